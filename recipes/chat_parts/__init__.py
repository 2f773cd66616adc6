"""Parts of `hf-rlhf chat` and `hf-rlhf generate`: options, models on shared bases, answers and the terminal."""

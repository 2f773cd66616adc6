"""Parts of `hf-rlhf plan`."""

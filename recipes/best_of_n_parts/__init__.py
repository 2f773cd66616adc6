"""Parts of `hf-rlhf best-of-n`: its options, the models that it loads, and its report."""

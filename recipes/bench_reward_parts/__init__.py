"""Parts of `hf-rlhf bench-reward`."""

"""Parts of `hf-rlhf init`: the user's files, the base that fits the machine, and the YAML."""

"""The subcommands of `hf-rlhf collect`, one module each."""

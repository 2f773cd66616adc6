"""Parts of `hf-rlhf compare`: options, systems, training, evaluation, judging and report."""

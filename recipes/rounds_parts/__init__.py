"""Parts of `hf-rlhf rounds`: options, data of a round, judging, learners, evaluation and report."""

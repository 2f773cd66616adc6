"""Parts of the pipeline: its options, the user's data, the training of each stage, and the report."""

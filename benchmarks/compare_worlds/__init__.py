"""Worlds of the study of `hf-rlhf compare`: a base model, data, and judges, written as files with a `compare.yaml`."""

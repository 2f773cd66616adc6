"""One script a stage: read the options, put the parts together, call the trainer. Shipped as `hf_rlhf_ext.recipes`."""

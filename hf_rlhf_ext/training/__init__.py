"""What the trainers share around training: values of options, optimizers, the best model."""

"""Loading of base models, scalar heads, adapters and log-probabilities."""

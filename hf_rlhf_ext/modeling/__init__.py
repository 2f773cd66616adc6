"""Loading base models, scalar heads and adapters."""

"""The memory that a training run needs, computed from a model's configuration before anything is loaded."""

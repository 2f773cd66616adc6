"""What a trained model is worth: figures and probes that need only a callable."""

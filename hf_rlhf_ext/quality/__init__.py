"""What data and reward models are worth: reports, agreement, duplicates, refinement, checks before PPO."""

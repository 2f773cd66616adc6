"""Quality of preference data and reward models: reports, agreement, duplicates, filters, and checks before PPO."""

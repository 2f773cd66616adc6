"""PPO with a KL penalty. `losses`, `advantages` and `kl` are pure functions; only `trainer` changes state."""

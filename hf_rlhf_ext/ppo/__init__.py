"""PPO with a KL penalty: pure mathematics in `losses`, `advantages` and `kl`; `trainer` alone changes state."""

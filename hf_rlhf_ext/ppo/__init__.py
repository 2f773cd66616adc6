"""PPO with a KL leash: pure mathematics in `losses`, `advantages` and `kl`; `trainer` only wires."""

"""What is said of a warm-up of the critic: the first rollouts of a run, which train the critic only."""

from .config import PPOConfig


def warm_up_line(args: PPOConfig) -> str:
    """What happens in the warm-up, in one line."""
    rollouts = args.critic_warmup_rollouts
    steps = rollouts * args.steps_per_rollout
    return (
        f"critic_warmup_steps={args.critic_warmup_steps}: the first {steps} optimizer steps (rollouts: {rollouts}) "
        "train the critic only, and the policy stays as it is"
    )

"""The settings of `learning_study.py`: one factor at a time around today's defaults, and those of TRL's trainers.

Options are named as in PPOConfig, GRPOConfig and RLOOConfig, with one exception: `critic_warmup_rollouts` is the number
of rollouts of `critic_warmup_steps`, so that it means the same for any number of passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BASE = "base"
"""Name of today's defaults, in both worlds."""
WINNER = "winner"
"""Name of SmolLM2's run with what the stories chose."""
FINAL = "final-"
"""Start of the names of the runs that the verdict is about, on seeds by which nothing was chosen."""
CHOICE_ROLLOUTS = 24
"""Rollouts of the runs that settings are chosen by: by then, most of the gold reward is won."""
START_ROLLOUTS = 11
"""Rollouts of the runs that compare the first values of critics."""
NO_CRITIC = {"critic": "none", "num_generations": 4}
OF_CRITIC = (
    "value_learning_rate",
    "critic_warmup_rollouts",
    "value_gae_lambda",
    "length_adaptive_lambda",
    "gae_lambda",
    "critic_start",
)
"""Options of the grid that PPO refuses or does not use without a critic."""


@dataclass(frozen=True)
class Setting:
    """A trainer with its options.

    Attributes:
        name: name of the run, and of its file.
        kind: "ppo", "grpo" or "rloo".
        options: what differs from the options of the world.
        factor: the option that is varied; None for a setting that competes with no other.
        rollouts: rollouts of a run; None for those of the world.
        uses_model: whether the reward is a reward model on the base of the policy, from which a critic can start.
    """

    name: str
    kind: str = "ppo"
    options: dict[str, Any] = field(default_factory=dict)
    factor: str | None = None
    rollouts: int | None = None
    uses_model: bool = False


def varied(factor: str, values: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """A short run for each value of a factor: name of the value -> options."""
    found = []
    for value, options in values.items():
        found.append(Setting(f"{factor}-{value}", options=dict(options), factor=factor, rollouts=CHOICE_ROLLOUTS))
    return found


def one_option(factor: str, option: str, *values: Any) -> list[Setting]:
    """A short run for each value of an option."""
    return varied(factor, {f"{value:g}": {option: value} for value in values})


TODAY = {
    "critic": "adapter",
    "num_generations": 1,
    "num_mini_batches": 1,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "whiten_advantages": True,
}
"""PPOConfig's defaults before the study, so that `base` stays the same when it changes them."""


# --- stories260K -----------------------------------------------------------------------------------------------------

STORIES_PPO = TODAY | {
    # As in ppo_study.py, with a fixed coefficient: an adaptive one would bring all runs to one KL.
    "num_ppo_epochs": 2,
    "learning_rate": 1e-3,
    "value_learning_rate": 1e-2,
    "vf_coef": 0.5,
    "value_clip_range": None,
    "kl_coef": 0.2,
    "logprobs_chunk_size": 4096,
}
STORIES_TRL = {"num_iterations": 2}
"""Two passes over each rollout, as in PPO."""
TRL_RATES = (5e-4, 1e-3, 3e-3)
TRL_BETAS = (0.05, 0.2)
TRL_GENERATIONS = (4, 8)


def stories_factors() -> list[Setting]:
    """Stage 1, PPO: today's defaults, and each factor alone."""
    return [
        Setting(BASE, rollouts=CHOICE_ROLLOUTS),
        *one_option("learning_rate", "learning_rate", 3e-4, 5e-4, 2e-3, 4e-3),
        *one_option("value_learning_rate", "value_learning_rate", 3e-3, 3e-2),
        *one_option("epochs", "num_ppo_epochs", 1, 4),
        *one_option("mini_batches", "num_mini_batches", 2),
        *one_option("generations", "num_generations", 4, 8),
        *varied("critic", {"head": {"critic": "head"}, "none": NO_CRITIC}),
        *one_option("warmup_rollouts", "critic_warmup_rollouts", 5, 10),
        *one_option("value_gae_lambda", "value_gae_lambda", 1.0),
        *one_option("length_adaptive_lambda", "length_adaptive_lambda", 0.05),
        *one_option("gae_lambda", "gae_lambda", 1.0),
        *one_option("clip_range_high", "clip_range_high", 0.28),
        *one_option("kl_coef", "kl_coef", 0.05, 0.1, 0.4),
        *varied("whitening", {"off": {"whiten_advantages": False}}),
    ]


def stories_starts() -> list[Setting]:
    """The start of the critic, with a reward model in place of the function, for the first rollouts only."""
    found = []
    for start in ("policy", "reward_features", "reward"):
        for warmup in (0, 5):
            options = {"critic": "adapter", "critic_start": start, "critic_warmup_rollouts": warmup}
            found.append(Setting(f"start-{start}-{warmup}", options=options, rollouts=START_ROLLOUTS, uses_model=True))
    return found


def trl_grid(rates: Sequence[float], betas: Sequence[float], generations: Sequence[int]) -> list[Setting]:
    """GRPO and RLOO with each combination."""
    found = []
    for kind in ("grpo", "rloo"):
        for k in generations:
            for beta in betas:
                for rate in rates:
                    options = {"learning_rate": rate, "beta": beta, "num_generations": k}
                    name = f"{kind}-k{k}-beta{beta:g}-rate{rate:g}"
                    found.append(Setting(name, kind, options, factor=kind, rollouts=CHOICE_ROLLOUTS))
    return found


def stories_trl() -> list[Setting]:
    """Stage 1, TRL: the options from which the best ones of GRPO and of RLOO are chosen."""
    return trl_grid(TRL_RATES, TRL_BETAS, TRL_GENERATIONS)


def stories_finals(winner: Mapping[str, Any], trl: Sequence[Setting]) -> list[Setting]:
    """Stage 3: today's defaults, the winner with each kind of critic and K = 1 and 4, and the best of TRL's trainers.

    Args:
        winner: options that stages 1 and 2 chose.
        trl: the best settings of GRPO and of RLOO.
    """
    options: dict[str, dict[str, Any]] = {BASE: {}, WINNER: dict(winner)}
    for critic in ("adapter", "head"):
        for k in (1, 4):
            options[f"{critic}-k{k}"] = of_a_critic(winner) | {"critic": critic, "num_generations": k}
    without = {name: value for name, value in of_a_critic(winner).items() if name not in OF_CRITIC}
    options["none-k4"] = without | NO_CRITIC
    found: list[Setting] = []
    seen: list[dict[str, Any]] = []
    for name, of_run in options.items():
        explicit = {"critic": "adapter", "num_generations": 1} | of_run  # as the default is spelled out
        if explicit not in seen:
            seen.append(explicit)
            found.append(Setting(FINAL + name, options=of_run))
    for best in trl:
        found.append(Setting(FINAL + best.kind, best.kind, dict(best.options)))
    return found


def of_a_critic(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the kind of critic and the number of completions per prompt."""
    return {name: value for name, value in options.items() if name not in NO_CRITIC}


# --- SmolLM2-135M ----------------------------------------------------------------------------------------------------

SMOLLM2_RATES = (1e-4, 3e-4, 1e-3)
SMOLLM2_WARMUP = 2
"""Rollouts of 8 in which the critic is trained alone."""
ADAPTER = {"critic": "adapter", "value_learning_rate": None}
"""A critic as large as the policy, with its learning rate: the rate of the world is that of a single layer."""


def smollm2_ppo(winner: Mapping[str, Any]) -> list[Setting]:
    """PPO with today's defaults, without a critic, with three starts of a critic, and with the winner's changes.

    Args:
        winner: options that the stories chose.
    """
    options: dict[str, dict[str, Any]] = {
        BASE: {},
        "no-critic": dict(NO_CRITIC),
        "warmup": {"critic_warmup_rollouts": SMOLLM2_WARMUP},
        "adapter-policy": ADAPTER | {"critic_start": "policy"},
        "adapter-reward_features": ADAPTER | {"critic_start": "reward_features"},
        "adapter-reward": ADAPTER | {"critic_start": "reward"},
    }
    changes = carried_over(winner)
    if changes not in options.values():
        options[WINNER] = changes
    return [Setting(name, options=of_run, uses_model=True) for name, of_run in options.items()]


def carried_over(winner: Mapping[str, Any]) -> dict[str, Any]:
    """What the stories chose, for SmolLM2: without options that depend on the model, and with a shorter warm-up."""
    changes = {name: value for name, value in winner.items() if name not in OF_THE_MODEL}
    if "critic_warmup_rollouts" in changes:
        changes["critic_warmup_rollouts"] = SMOLLM2_WARMUP
    return changes


def smollm2_winner(winner: Mapping[str, Any]) -> str:
    """Name of the run of SmolLM2 that has what the stories chose."""
    changes = carried_over(winner)
    return next(setting.name for setting in smollm2_ppo(winner) if setting.options == changes)


def smollm2_trl() -> list[Setting]:
    """GRPO and RLOO at three learning rates, on the first seed."""
    found = []
    for kind in ("grpo", "rloo"):
        for rate in SMOLLM2_RATES:
            found.append(Setting(f"{kind}-rate{rate:g}", kind, {"learning_rate": rate}, factor=kind))
    return found


OF_THE_MODEL = ("learning_rate", "value_learning_rate", "kl_coef", "vf_coef")
"""Options whose best value depends on the size of the model and on the scale of the reward."""

"""Every metric that the trainers log: its unit and its meaning. Model cards and docs print from this table.

A name inherited from TRL keeps TRL's meaning. KL, entropy and log-probabilities are in nats.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..reward.preference_metrics import PERCENTILES


class Metric(NamedTuple):
    """The unit of a logged number, and its meaning."""

    unit: str
    meaning: str


_TRAINER = {
    "loss": Metric("nats or reward", "what the optimizer minimizes, mean since the last log"),
    "grad_norm": Metric("1", "norm of the gradient before clipping (PPO: the policy's)"),
    "value_grad_norm": Metric("1", "norm of the value head's gradient before clipping"),
    "learning_rate": Metric("1/step", "learning rate of the first parameter group (PPO: the policy)"),
    "lr_value": Metric("1/step", "learning rate of the value head or adapter"),
    "epoch": Metric("passes", "passes over the training data"),
    "num_tokens": Metric("tokens", "tokens seen in training so far, without padding"),
}

_REWARD_MODEL = {
    "pairs": Metric("comparisons", "judged pairs in the evaluation set"),
    "accuracy": Metric("fraction", "comparisons whose preferred side scores higher, without ties (see accuracy_ties)"),
    "accuracy_low": Metric("fraction", "lower end of the 95 % bootstrap interval of `accuracy`, over prompts"),
    "accuracy_high": Metric("fraction", "upper end of that interval"),
    "accuracy_ties": Metric("fraction", "comparisons given the right label out of three: first, second or tie"),
    "nll": Metric("nats/pair", "Bradley-Terry negative log-likelihood of the judgements, weighted; log 2 is chance"),
    "brier": Metric("1", "mean squared error of σ(Δ) against the judgements; 0.25 is chance"),
    "ece": Metric("fraction", "expected calibration error: mean gap between σ(|Δ|) and how often that side wins"),
    "margin": Metric("reward", "mean score of the preferred minus the other side"),
    "min_reward": Metric("reward", "lowest raw score"),
    "mean_reward": Metric("reward", "mean raw score, before normalization"),
    "max_reward": Metric("reward", "highest raw score"),
    **{
        f"{side}_p{q}": Metric("reward", f"{q}th percentile of the {side} completions' raw scores")
        for side in ("chosen", "rejected")
        for q in PERCENTILES
    },
    "gain": Metric("fraction", "accuracy minus longer_wins_baseline"),
    "gain_low": Metric("fraction", "lower end of the 95 % bootstrap interval of `gain`, over prompts"),
    "gain_high": Metric("fraction", "upper end of that interval"),
    "accuracy/<group>/<name>": Metric(
        "fraction", "accuracy in a category, or in a quartile of the length gap (tokens) or the margin"
    ),
    "longer_wins_baseline": Metric("fraction", 'accuracy of "the longer completion is better" on the same comparisons'),
}

_PPO = {
    "episode": Metric("completions", "completions sampled since the start"),
    "objective/kl": Metric("nats/completion", "KL(policy || reference): k1 summed over tokens, mean over completions"),
    "objective/kl_k3": Metric("nats/completion", "the same KL by the k3 estimator, which is never negative"),
    "objective/kl_exact": Metric(
        "nats/completion",
        "the same KL, exact over the vocabulary at each sampled token, on a few evaluation rows",
    ),
    "objective/kl_coef": Metric("reward/nat", "β, the coefficient of the KL penalty, during this rollout"),
    "objective/entropy": Metric(
        "nats/completion", "entropy of next-token distributions summed over tokens, mean over completions"
    ),
    "objective/non_score_reward": Metric("reward", "KL penalty of a completion, -β·KL, mean over completions"),
    "objective/scores": Metric(
        "reward", "score of a completion as the reward functions gave it, mean over completions"
    ),
    "objective/scores_std": Metric("reward", "standard deviation of those scores over completions"),
    "objective/rlhf_reward": Metric(
        "reward", "score after clipping and missing-stop penalty, plus KL penalty, mean over completions"
    ),
    "policy/approxkl_avg": Metric("nats/token", "k3 between the policy and the one that made the rollout, masked mean"),
    "policy/clipfrac_avg": Metric("fraction", "completion tokens whose surrogate was clipped"),
    "policy/kl_loss": Metric("nats/token", "KL(policy || reference) as a loss term, before β, masked mean"),
    "policy/stopped_early": Metric(
        "fraction", "optimizer steps after which `early_stop_kl` ended the update on this rollout"
    ),
    "policy/entropy_avg": Metric("nats/token", "entropy of the policy's next-token distribution, masked mean"),
    "loss/policy_avg": Metric("advantage", "clipped surrogate loss, masked mean"),
    "loss/ptx": Metric("nats/token", "language-model loss on the pretraining text (PPO-ptx), before its coefficient"),
    "loss/value_avg": Metric("reward^2", "masked mean of half the clipped squared error"),
    "val/clipfrac_avg": Metric("fraction", "completion tokens whose value loss was clipped"),
    "val/explained_variance": Metric(
        "fraction", "1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant"
    ),
    "val/ratio": Metric("1", "new over old probability of a token, masked mean; 1 in the first step of an update"),
    "val/num_eos_tokens": Metric("tokens", "stop tokens in the rollout: one per finished completion"),
    "guards/skipped_steps": Metric("fraction", "optimizer steps skipped because a gradient was not finite"),
    "completions/mean_length": Metric("tokens", "mean length of a completion, its stop token included"),
    "completions/stopped_frac": Metric("fraction", "completions that ended with a stop token"),
    "sampling/logprob_mismatch": Metric(
        "nats/token", "mean difference of log-probabilities: those of generation minus those of scoring"
    ),
    "rewards/clipped_frac": Metric("fraction", "completions whose score `reward_clip` changed"),
    "rewards/<name>/mean": Metric("reward", "score of one reward function before weighting, mean over completions"),
    "rewards/<name>/std": Metric("reward", "standard deviation of that score over completions"),
}

METRICS: dict[str, Metric] = _TRAINER | _REWARD_MODEL | _PPO
"""By logged name, without the `eval_` that Trainer puts in front; `<name>` stands for a reward function's name."""


def find_metric(key: str) -> Metric | None:
    """The metric behind a logged key: `eval_accuracy` is `accuracy`, `rewards/gold/mean` is `rewards/<name>/mean`.

    Where `eval_dataset` is a dict, Trainer puts the name of the set between: `eval_hard_accuracy` is `accuracy` too.
    """
    without_prefix = re.sub(r"^(eval|train|test)[_/]", "", key)
    candidates = [key, without_prefix]
    if without_prefix != key:
        # The name of an evaluation set may hold underscores too: every shorter rest is tried.
        parts = without_prefix.split("_")
        for n_left_out in range(1, len(parts)):
            candidates.append("_".join(parts[n_left_out:]))
    for candidate in candidates:
        metric = _metric_named(candidate)
        if metric is not None:
            return metric
    return None


def _metric_named(name: str) -> Metric | None:
    if name in METRICS:
        return METRICS[name]
    # Names that hold a group or a reward function of the user's stand in the table as patterns.
    if re.fullmatch(r"accuracy/(category|length_gap|margin)/.+", name):
        return METRICS["accuracy/<group>/<name>"]
    of_reward = re.fullmatch(r"rewards/.+/(mean|std)", name)
    if of_reward:
        return METRICS[f"rewards/<name>/{of_reward[1]}"]
    return None


def describe(keys: Iterable[str] | None = None) -> str:
    """A markdown table (metric, unit, meaning) of the keys given, in their order; of all metrics when `keys` is None.

    Raises:
        KeyError: a key that is not in the table: a trainer logs only what it can explain.
    """
    if keys is None:
        keys = METRICS
    lines = ["| metric | unit | meaning |", "|---|---|---|"]
    unknown = []
    for key in keys:
        metric = find_metric(key)
        if metric is None:
            unknown.append(key)
            continue
        meaning = metric.meaning.replace("|", "&#124;")  # a bar would end the cell
        lines.append(f"| `{key}` | {metric.unit} | {meaning} |")
    if unknown:
        raise KeyError(f"no entry in METRICS for: {', '.join(unknown)}")
    return "\n".join(lines)

"""Unit and meaning of every metric that the trainers log. The documentation prints this table.

Metrics with a name from TRL have the same meaning as in TRL. KL, entropy and log-probabilities are in nats.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..reward.preference_metrics import PERCENTILES


class Metric(NamedTuple):
    """Unit and meaning of a logged metric."""

    unit: str
    meaning: str


_TRAINER = {
    "loss": Metric("nats or reward", "training loss, mean since the last log"),
    "grad_norm": Metric("1", "gradient norm before clipping (PPO: of the policy)"),
    "value_grad_norm": Metric("1", "gradient norm of the value head before clipping; none without a critic"),
    "learning_rate": Metric("1/step", "learning rate of the first parameter group (PPO: of the policy)"),
    "lr_value": Metric("1/step", "learning rate of the value head or value adapter"),
    "epoch": Metric("epochs", "number of passes over the training data so far"),
    "num_tokens": Metric("tokens", "number of tokens used in training so far, without padding"),
}

_REWARD_MODEL = {
    "pairs": Metric("pairs", "number of judged pairs in the evaluation set"),
    "accuracy": Metric("fraction", "fraction of pairs in which the preferred completion scores higher, without ties"),
    "accuracy_low": Metric("fraction", "lower bound of the 95 % bootstrap interval of `accuracy`, over prompts"),
    "accuracy_high": Metric("fraction", "upper bound of the 95 % bootstrap interval of `accuracy`, over prompts"),
    "accuracy_ties": Metric("fraction", "fraction of pairs predicted correctly as first, second or tie"),
    "nll": Metric(
        "nats/pair", "weighted Bradley-Terry negative log-likelihood of the judgments; log 2 = 0.693 is chance"
    ),
    "brier": Metric("1", "mean squared error of the predicted probability σ(r_i - r_j) of a judgment; 0.25 is chance"),
    "ece": Metric(
        "fraction",
        "expected calibration error: mean absolute difference between confidence σ(abs(r_i - r_j)) and accuracy",
    ),
    "margin": Metric("reward", "mean score of the preferred completion minus that of the other completion"),
    "min_reward": Metric("reward", "lowest raw score of a completion, before normalization"),
    "mean_reward": Metric("reward", "mean raw score of the completions, before normalization"),
    "max_reward": Metric("reward", "highest raw score of a completion, before normalization"),
    **{
        f"{side}_p{q}": Metric("reward", f"{q}th percentile of the raw scores of {side} completions")
        for side in ("chosen", "rejected")
        for q in PERCENTILES
    },
    "gain": Metric("fraction", "`accuracy` minus `longer_wins_baseline`"),
    "gain_low": Metric("fraction", "lower bound of the 95 % bootstrap interval of `gain`, over prompts"),
    "gain_high": Metric("fraction", "upper bound of the 95 % bootstrap interval of `gain`, over prompts"),
    "accuracy/<group>/<name>": Metric(
        "fraction", "accuracy in one category, or in one quartile of the length difference (in tokens) or of the margin"
    ),
    "longer_wins_baseline": Metric(
        "fraction", "accuracy of always preferring the longer completion, on the same pairs"
    ),
}

_PPO = {
    "episode": Metric("completions", "number of completions sampled so far"),
    "objective/kl": Metric(
        "nats/completion", "KL(policy || reference), k1 estimator summed over tokens, mean over completions"
    ),
    "objective/kl_k3": Metric(
        "nats/completion",
        "KL(policy || reference), k3 estimator (never negative) summed over tokens, mean over completions",
    ),
    "objective/kl_exact": Metric(
        "nats/completion",
        "KL(policy || reference), exact over the vocabulary at each sampled token, on a few evaluation rows",
    ),
    "objective/kl_coef": Metric("reward/nat", "coefficient β of the KL penalty in this rollout"),
    "objective/entropy": Metric(
        "nats/completion", "entropy of the next-token distributions, summed over tokens, mean over completions"
    ),
    "objective/non_score_reward": Metric("reward", "KL penalty -β·KL, mean over completions"),
    "objective/scores": Metric("reward", "score from the reward functions before clipping, mean over completions"),
    "objective/scores_std": Metric(
        "reward", "standard deviation over completions of the score from the reward functions"
    ),
    "objective/rlhf_reward": Metric(
        "reward", "score after shaping, clipping and penalties, plus the KL penalty, mean over completions"
    ),
    "objective/par": Metric(
        "probability",
        "score as PAR shapes it: the probability of being preferred to a reference answer, mean over completions (only "
        "with `reward_shaping`)",
    ),
    "objective/reference_scores": Metric(
        "reward", "score of the reference answers, mean over the completions of a rollout (only with `reward_shaping`)"
    ),
    "objective/overlong_penalty": Metric(
        "reward", "soft overlong penalty, 0 or less, mean over completions (only with `soft_overlong_tokens`)"
    ),
    "policy/approxkl_avg": Metric(
        "nats/token", "KL between the current policy and the policy that made the rollout, k3 estimator, masked mean"
    ),
    "policy/clipfrac_avg": Metric("fraction", "fraction of completion tokens whose policy loss was clipped"),
    "policy/kl_loss": Metric(
        "nats/token", "KL(policy || reference) as a loss term, before multiplication by β, masked mean"
    ),
    "policy/stopped_early": Metric(
        "fraction", "fraction of optimizer steps after which `early_stop_kl` ended the updates on this rollout"
    ),
    "policy/entropy_avg": Metric("nats/token", "entropy of the policy's next-token distribution, masked mean"),
    "loss/policy_avg": Metric("advantage", "clipped policy loss (PPO surrogate), masked mean"),
    "loss/ptx": Metric(
        "nats/token", "language-modeling loss on pretraining text (PPO-ptx), before multiplication by its coefficient"
    ),
    "loss/value_avg": Metric("reward^2", "value loss: half the clipped squared error, masked mean"),
    "val/clipfrac_avg": Metric("fraction", "fraction of completion tokens whose value loss was clipped"),
    "val/explained_variance": Metric(
        "fraction",
        "1 - Var(returns - values) / Var(returns); 1 is perfect, 0 is no better than a constant; NaN if all "
        "returns are equal",
    ),
    "val/ratio": Metric(
        "1", "probability ratio of a token, new to old policy, masked mean; 1 in the first step of an update"
    ),
    "val/num_eos_tokens": Metric("tokens", "number of stop tokens in the rollout, one per finished completion"),
    "guards/skipped_steps": Metric("fraction", "fraction of optimizer steps skipped because of a non-finite gradient"),
    "completions/mean_length": Metric("tokens", "mean length of a completion, including its stop token"),
    "completions/stopped_frac": Metric("fraction", "fraction of completions that ended with a stop token"),
    "completions/masked_frac": Metric(
        "fraction",
        "fraction of completions that do not count in the losses, as they have no stop token (only with "
        "`mask_truncated_completions`)",
    ),
    "sampling/logprob_mismatch": Metric(
        "nats/token", "mean of the log-probability in generation minus the log-probability in scoring"
    ),
    "rewards/clipped_frac": Metric("fraction", "fraction of completions whose score was changed by `reward_clip`"),
    "frac_reward_zero_std": Metric(
        "fraction",
        "fraction of prompts whose completions all have the same score, so that they teach nothing (only with "
        "`num_generations` of 2 or more)",
    ),
    "rewards/<name>/mean": Metric("reward", "score of one reward function before weighting, mean over completions"),
    "rewards/<name>/std": Metric(
        "reward", "standard deviation over completions of the score of one reward function before weighting"
    ),
}

METRICS: dict[str, Metric] = _TRAINER | _REWARD_MODEL | _PPO
"""Logged name -> unit and meaning. Names are without the prefix `eval_`. `<name>` is the name of a reward function."""


def find_metric(key: str) -> Metric | None:
    """Returns unit and meaning of a logged key, or None if it is unknown.

    For example, `eval_accuracy` is `accuracy`, and `rewards/gold/mean` is `rewards/<name>/mean`. If `eval_dataset` is a
    dict, Trainer adds the name of the dataset, so `eval_hard_accuracy` is `accuracy` too.
    """
    without_prefix = re.sub(r"^(eval|train|test)[_/]", "", key)
    candidates = [key, without_prefix]
    if without_prefix != key:
        # The name of an evaluation dataset may contain underscores, so every shorter suffix is tried.
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
    # Names that contain a group or the name of a reward function are in the table as patterns.
    if re.fullmatch(r"accuracy/(category|length_gap|margin)/.+", name):
        return METRICS["accuracy/<group>/<name>"]
    of_reward = re.fullmatch(r"rewards/.+/(mean|std)", name)
    if of_reward:
        return METRICS[f"rewards/<name>/{of_reward[1]}"]
    return None


def describe(keys: Iterable[str] | None = None) -> str:
    """Returns a Markdown table of metrics with the columns metric, unit and meaning.

    Args:
        keys: Logged names, in the order of the table. `None` lists all metrics.

    Raises:
        KeyError: A key is not in `METRICS`. Every metric that a trainer logs must have an entry.
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
        meaning = metric.meaning.replace("|", "&#124;")  # a "|" would end the cell
        lines.append(f"| `{key}` | {metric.unit} | {meaning} |")
    if unknown:
        raise KeyError(f"no entry in METRICS for: {', '.join(unknown)}")
    return "\n".join(lines)

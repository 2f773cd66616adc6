"""Health warnings from the metrics of a PPO run: one line each, with the cause and the option to change."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

RECENT, SHORT = 5, 3  # number of rollouts to average over; SHORT for problems that need a quick reaction
WARM_UP = 10  # number of rollouts before the critic is checked

ENTROPY_FLOOR = 0.2  # as a fraction of the entropy per token in the first rollouts
LENGTH_RANGE = (0.5, 2.0)  # as a multiple of the length in the first rollouts
CLIP_FRACTION_CEILING = 0.4
SPREAD_FLOOR = 0.1  # as a fraction of the standard deviation of scores in the first rollouts
CLIPPED_SCORES_CEILING = 0.9
EQUAL_GROUPS_CEILING = 0.9  # fraction of prompts whose completions all have the same score
KL_TOLERANCE = 0.1  # nats per completion by which a k1 estimate may be negative

History = Sequence[Mapping[str, float]]


def diagnose(
    history: History,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eval_completions: int | None = None,
) -> dict[str, str]:
    """Finds the problems that the metrics show after the last rollout.

    Metrics that are missing or not finite are ignored, and a check without its metrics gives no warning.

    Args:
        history: metrics of each rollout, oldest first; `metrics.names` has their units. The metrics of an evaluation
            (`eval_…`, or `eval_<set>_…` with several sets) belong to the rollout before it; those of an evaluation
            before the first rollout are an entry by themselves. Only the first five entries, the last five and those
            with an evaluation are read.
        temperature: sampling temperature of the run, used to explain a negative KL.
        top_k: `top_k` of the run, for the same purpose.
        top_p: `top_p` of the run, for the same purpose.
        eval_completions: number of completions per evaluation. With it and `eval_rewards/<name>/std`, a drop of an
            evaluation reward counts only if it exceeds two standard errors.

    Returns:
        The warnings by a short name. Each is one line with cause and remedy.
    """
    warnings = {
        "entropy_collapse": _entropy_collapse(history),
        "length_drift": _length_drift(history),
        "value": _blind_critic(history),
        "clip_fraction": _clipped_updates(history),
        "reward_saturation": _flat_scores(history),
        "reward_clip": _clipped_scores(history),
        "equal_groups": _equal_groups(history),
        "all_truncated": _all_truncated(history),
        "overoptimization": _overoptimization(history, eval_completions),
        "negative_kl": _negative_kl(history, temperature, top_k, top_p),
    }
    return {name: line for name, line in warnings.items() if line is not None}


def due(warnings: Mapping[str, str], last_said: dict[str, int], rollout: int, every: int) -> list[str]:
    """The warnings that were not logged within the last `every` rollouts.

    Args:
        warnings: warnings by name.
        last_said: for each warning, number of the rollout in which it was last logged. It is updated in place.
        rollout: number of the current rollout.
        every: minimum number of rollouts between two warnings of the same name.

    Returns:
        The lines to log.
    """
    lines = []
    for name, line in warnings.items():
        if name not in last_said or rollout - last_said[name] >= every:
            last_said[name] = rollout
            lines.append(line)
    return lines


def _finite(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]


def _values(history: History, name: str) -> list[float]:
    """The finite values of a metric, in the rollouts that have it."""
    return _finite(metrics.get(name, math.nan) for metrics in history)


def _mean(history: History, name: str, least: int) -> float | None:
    """Mean of a metric over `history`; `None` if fewer than `least` rollouts have it."""
    values = _values(history, name)
    if len(values) < least:
        return None
    return fmean(values)


def _then_and_now(history: History, name: str, window: int) -> tuple[float, float] | None:
    """Means over the first and over the last `window` rollouts; `None` while they overlap."""
    if len(history) < 2 * window:
        return None
    then = _mean(history[:window], name, window - 1)
    now = _mean(history[-window:], name, window - 1)
    if then is None or now is None:
        return None
    return then, now


def _entropy_collapse(history: History) -> str | None:
    # Per token, so that shorter completions do not count as a collapse.
    per_token = []
    for metrics in history:
        length = metrics.get("completions/mean_length")
        if length and "objective/entropy" in metrics:
            per_token.append({"entropy": metrics["objective/entropy"] / length})
    means = _then_and_now(per_token, "entropy", SHORT)
    if means is None:
        return None
    then, now = means
    if not now < ENTROPY_FLOOR * then:
        return None
    return (
        f"entropy fell from {then:.3g} to {now:.3g} nats per token: the policy is nearly deterministic and no longer "
        "explores. Raise kl_coef or entropy_coef, or lower learning_rate or num_ppo_epochs"
    )


def _length_drift(history: History) -> str | None:
    means = _then_and_now(history, "completions/mean_length", RECENT)
    if means is None:
        return None
    then, now = means
    if not then or LENGTH_RANGE[0] <= now / then <= LENGTH_RANGE[1]:
        return None
    change = f"completions went from {then:.3g} to {now:.3g} tokens"
    stopped = _mean(history[-RECENT:], "completions/stopped_frac", 1)
    if stopped is not None:
        change += f" ({stopped:.0%} of them ended with a stop token)"
    if now > then:
        return (
            f"{change}: the reward seems to favor long completions. Set length_penalty and length_target, or "
            "missing_eos_penalty"
        )
    return (
        f"{change}: the reward seems to favor short completions. Raise kl_coef, or lower length_penalty or "
        "missing_eos_penalty"
    )


def _blind_critic(history: History) -> str | None:
    if len(history) < WARM_UP:
        return None
    mean = _mean(history[-RECENT:], "val/explained_variance", SHORT)
    if mean is None or mean > 0:
        return None
    return (
        f"value explained variance is {mean:.2f} over the last {RECENT} rollouts: the critic predicts no better than a "
        "constant, so advantages are noise. Raise value_learning_rate or vf_coef, or set normalize_rewards if returns "
        "are large"
    )


def _clipped_updates(history: History) -> str | None:
    # One more rollout than needed: the last one may not have been trained on yet, and then lacks the metric.
    values = _values(history[-SHORT - 1 :], "policy/clipfrac_avg")[-SHORT:]
    if len(values) < SHORT or fmean(values) <= CLIP_FRACTION_CEILING:
        return None
    return (
        f"{fmean(values):.0%} of tokens were clipped (clip_range) in the last {SHORT} rollouts: updates are too large. "
        "Lower learning_rate or num_ppo_epochs, or set early_stop_kl"
    )


def _flat_scores(history: History) -> str | None:
    means = _then_and_now(history, "objective/scores_std", RECENT)
    if means is None:
        return None
    then, now = means
    if not now < SPREAD_FLOOR * then:
        return None
    return (
        f"scores are now almost equal (standard deviation {now:.2g}, {then:.2g} at the start): the reward is saturated "
        "and gives no training signal. Stop, raise kl_coef if completions look alike, or add a reward or prompts"
    )


def _clipped_scores(history: History) -> str | None:
    mean = _mean(history[-SHORT:], "rewards/clipped_frac", SHORT)
    if mean is None or mean < CLIPPED_SCORES_CEILING:
        return None
    return (
        f"{mean:.0%} of scores were clipped by reward_clip in the last {SHORT} rollouts, which makes most scores "
        "equal. Raise reward_clip, or set normalize_rewards"
    )


def _equal_groups(history: History) -> str | None:
    """Prompts whose completions all have the same score, where a rollout has several completions per prompt."""
    mean = _mean(history[-RECENT:], "frac_reward_zero_std", SHORT)
    if mean is None or mean < EQUAL_GROUPS_CEILING:
        return None
    if not any(_values(history[-RECENT:], "objective/scores_std")):
        return None  # a constant reward, of which `RewardSpread` tells more
    return (
        f"all completions of a prompt had the same score for {mean:.0%} of the prompts in the last rollouts "
        "(frac_reward_zero_std), which teaches nothing. Check that the reward reads the completion, take prompts that "
        "are neither too hard nor too easy or a finer reward, or raise num_generations or temperature"
    )


def _all_truncated(history: History) -> str | None:
    """No completion of the last rollout counts (`mask_truncated_completions`)."""
    masked = _values(history[-1:], "completions/masked_frac")
    if not masked or masked[0] < 1:
        return None
    return (
        "no completion of this rollout has a stop token, so that with mask_truncated_completions none counts, and this "
        "rollout teaches nothing. Raise max_completion_length, check stop_token_ids, or leave "
        "mask_truncated_completions out"
    )


def _overoptimization(history: History, eval_completions: int | None) -> str | None:
    """Over-optimization of the training reward (Gao et al. 2022, arXiv:2210.10760, fig. 1).

    The sign: a reward that only evaluation uses is below its best in both of the last two evaluations, while the
    training reward is higher than it was at that best. A change counts if it exceeds two standard errors of the
    difference of two means, 2·√(2/n)·std; if n or std is unknown, every change counts.
    """
    for prefix, reward in _eval_only_rewards(history):
        proxy = f"{prefix}objective/scores"
        gold = f"{prefix}rewards/{reward}/mean"
        evaluations = [row for row in history if _has(row, proxy) and _has(row, gold)]
        if len(evaluations) < 3:
            continue
        best = max(evaluations, key=lambda row: row[gold])
        last = evaluations[-1]
        fall = min(best[gold] - row[gold] for row in evaluations[-2:])
        rise = last[proxy] - best[proxy]
        gold_noise = _noise(best, f"{prefix}rewards/{reward}/std", eval_completions)
        proxy_noise = _noise(best, f"{proxy}_std", eval_completions)
        if fall > gold_noise and rise > proxy_noise:
            where = "evaluation"
            if prefix != "eval_":
                where += f" on {prefix.removeprefix('eval_').removesuffix('_')}"
            return (
                f"{reward} fell from its best {best[gold]:.3g} to {last[gold]:.3g} in {where} while the training "
                f"reward rose from {best[proxy]:.3g} to {last[proxy]:.3g}: the policy over-optimizes the training "
                "reward. Keep the best checkpoint, and raise kl_coef, or lower kl_target or max_kl"
            )
    return None


def _has(metrics: Mapping[str, float], name: str) -> bool:
    return math.isfinite(metrics.get(name, math.nan))


def _eval_only_rewards(history: History) -> list[tuple[str, str]]:
    """Rewards that only evaluation logs: pairs of the prefix of an evaluation set's metrics and the reward's name."""
    names = sorted({name for metrics in history for name in metrics})
    rewards = []
    for name in names:
        match = re.fullmatch(r"(eval_(?:[^/]+_)?)rewards/(.+)/mean", name)
        if match and f"rewards/{match[2]}/mean" not in names:
            rewards.append((match[1], match[2]))
    return rewards


def _noise(metrics: Mapping[str, float], std_name: str, n: int | None) -> float:
    """Two standard errors of the difference of two means of `n` values; 0 if `n` or the deviation is unknown."""
    if not n or not _has(metrics, std_name):
        return 0.0
    return 2 * math.sqrt(2 / n) * metrics[std_name]


def _negative_kl(history: History, temperature: float, top_k: int, top_p: float) -> str | None:
    kl = _values(history[-RECENT:], "objective/kl")
    if len(kl) < SHORT:
        return None
    tolerance = max(KL_TOLERANCE, 2 * stdev(kl) / math.sqrt(len(kl)))  # an estimate may be negative by chance
    if fmean(kl) + tolerance >= 0:
        return None
    line = (
        f"objective/kl is {fmean(kl):.2f} nats per completion, but a KL is never negative: tokens are not sampled from "
        f"the distribution that is scored (temperature={temperature:g}, top_k={top_k}, top_p={top_p:g}"
    )
    mismatch = _mean(history[-RECENT:], "sampling/logprob_mismatch", 1)
    if mismatch is not None:
        line += f"; log-probabilities differ by {mismatch:.2g} nats per token"
    line += ")"
    if top_k or top_p < 1:
        return f"{line}. Set top_k=0 and top_p=1.0, or importance_sampling_correction"
    return (
        f"{line} because of rounding or generation_kwargs. Set importance_sampling_correction to true, or bf16 to false"
    )

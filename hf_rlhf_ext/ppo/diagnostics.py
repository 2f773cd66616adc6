"""What a PPO run's own figures say about its health: one line each, with the cause and the option to change."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

RECENT, SHORT = 5, 3  # rollouts that "now" is the mean of; fewer for what harms at once
WARM_UP = 10  # rollouts that a critic gets before it is judged

ENTROPY_FLOOR = 0.2  # of the first rollouts' entropy a token
LENGTH_RANGE = (0.5, 2.0)  # times the first rollouts' length
CLIP_FRACTION_CEILING = 0.4
SPREAD_FLOOR = 0.1  # of the first rollouts' deviation of scores
CLIPPED_SCORES_CEILING = 0.9
KL_TOLERANCE = 0.1  # nats a completion that a k1 estimate may lie below zero

History = Sequence[Mapping[str, float]]


def diagnose(
    history: History,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eval_completions: int | None = None,
) -> dict[str, str]:
    """The warnings that hold after the last rollout, by short name: one line each, with cause and remedy.

    Figures that are missing or not finite are left out, and a check that lacks its figures says nothing.

    Args:
        history: logged figures of each rollout, oldest first (`metrics.names` has their units), `eval_…` figures in
            the rollout that an evaluation followed (`eval_<set>_…` where there are several sets), those before the
            first one in a row of their own. Only the first five, the last five and the evaluations are read.
        temperature, top_k, top_p: those of the run, to explain a negative KL.
        eval_completions: completions of one evaluation. With it and `eval_rewards/<name>/std`, a fall of an eval
            reward counts only above two standard errors.
    """
    found = {
        "entropy_collapse": _entropy_collapse(history),
        "length_drift": _length_drift(history),
        "value": _blind_critic(history),
        "clip_fraction": _clipped_updates(history),
        "reward_saturation": _flat_scores(history),
        "reward_clip": _clipped_scores(history),
        "overoptimization": _overoptimization(history, eval_completions),
        "negative_kl": _negative_kl(history, temperature, top_k, top_p),
    }
    return {name: line for name, line in found.items() if line is not None}


def due(warnings: Mapping[str, str], last_said: dict[str, int], rollout: int, every: int) -> list[str]:
    """The lines not said within the last `every` rollouts; `last_said` (name → rollout) is brought up to date."""
    names = [name for name in warnings if name not in last_said or rollout - last_said[name] >= every]
    last_said.update(dict.fromkeys(names, rollout))
    return [warnings[name] for name in names]


def _finite(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]


def _figures(history: History, name: str) -> list[float]:
    return _finite(figures.get(name, math.nan) for figures in history)


def _mean(history: History, name: str, least: int) -> float | None:
    """Mean of a figure over `history`, None where fewer than `least` of its rollouts have it."""
    values = _figures(history, name)
    return fmean(values) if len(values) >= least else None


def _then_and_now(history: History, name: str, window: int) -> tuple[float, float] | None:
    """Means over the first and the last `window` rollouts; None while they overlap."""
    means = _mean(history[:window], name, window - 1), _mean(history[-window:], name, window - 1)
    return None if len(history) < 2 * window or None in means else means


def _entropy_collapse(history: History) -> str | None:
    """Per token, so that shorter completions are no collapse."""
    entropy, length = "objective/entropy", "completions/mean_length"
    tokens = [h | {"entropy": h[entropy] / h[length]} for h in map(dict, history) if h.get(length) and entropy in h]
    means = _then_and_now(tokens, "entropy", SHORT)
    if means is None or not means[1] < ENTROPY_FLOOR * means[0]:
        return None
    return (
        f"entropy fell from {means[0]:.3g} to {means[1]:.3g} nats a token: the policy says one thing for every prompt "
        "and no longer explores. Raise kl_coef or entropy_coef, or lower learning_rate or num_ppo_epochs"
    )


def _length_drift(history: History) -> str | None:
    means = _then_and_now(history, "completions/mean_length", RECENT)
    if means is None or not means[0] or LENGTH_RANGE[0] <= means[1] / means[0] <= LENGTH_RANGE[1]:
        return None
    stopped = _mean(history[-RECENT:], "completions/stopped_frac", 1)
    share = "" if stopped is None else f" ({stopped:.0%} of them stopped by themselves)"
    change = f"completions went from {means[0]:.3g} to {means[1]:.3g} tokens{share}"
    if means[1] > means[0]:
        return f"{change}: the reward pays for length. Set length_penalty and length_target, or missing_eos_penalty"
    return f"{change}: the reward pays for brevity. Raise kl_coef, or lower length_penalty or missing_eos_penalty"


def _blind_critic(history: History) -> str | None:
    mean = _mean(history[-RECENT:], "val/explained_variance", SHORT)
    if len(history) < WARM_UP or mean is None or mean > 0:
        return None
    return (
        f"value explained variance is {mean:.2f} over the last {RECENT} rollouts, no better than a constant's: "
        "advantages are noise. Raise value_learning_rate or vf_coef, or set normalize_rewards where returns are large"
    )


def _clipped_updates(history: History) -> str | None:
    values = _figures(history[-SHORT - 1 :], "policy/clipfrac_avg")[-SHORT:]  # the last rollout may be unused yet
    if len(values) < SHORT or fmean(values) <= CLIP_FRACTION_CEILING:
        return None
    return (
        f"{fmean(values):.0%} of tokens were clipped (clip_range) in the last {SHORT} rollouts: updates are too large. "
        "Lower learning_rate or num_ppo_epochs, or set target_kl to end them early"
    )


def _flat_scores(history: History) -> str | None:
    means = _then_and_now(history, "objective/scores_std", RECENT)
    if means is None or not means[1] < SPREAD_FLOOR * means[0]:
        return None
    return (
        f"scores hardly differ any more (deviation {means[1]:.2g}, {means[0]:.2g} at the start): the reward is "
        "saturated and teaches nothing. Stop, raise kl_coef if completions look alike, or add a reward or prompts"
    )


def _clipped_scores(history: History) -> str | None:
    mean = _mean(history[-SHORT:], "rewards/clipped_frac", SHORT)
    if mean is None or mean < CLIPPED_SCORES_CEILING:
        return None
    return (
        f"{mean:.0%} of scores were clipped by reward_clip in the last {SHORT} rollouts, which makes them all alike. "
        "Raise reward_clip, or set normalize_rewards"
    )


def _overoptimization(history: History, eval_completions: int | None) -> str | None:
    """An eval-only reward below its best in both of the last two evaluations, with the training reward above then.

    The first sign of over-optimisation (Gao et al. 2022, arXiv:2210.10760, fig. 1). A change counts where it exceeds
    two standard errors of a difference of two means, 2·√(2/n)·std; every change does where n or std is unknown.
    """
    for prefix, reward in _eval_only_rewards(history):
        proxy, gold = f"{prefix}objective/scores", f"{prefix}rewards/{reward}/mean"
        evaluations = [h for h in history if len(_finite((h.get(proxy, math.nan), h.get(gold, math.nan)))) == 2]
        if len(evaluations) < 3:
            continue
        best, last = max(evaluations, key=lambda h: h[gold]), evaluations[-1]
        fall = min(best[gold] - h[gold] for h in evaluations[-2:])
        rise = last[proxy] - best[proxy]
        gold_noise = _noise(best, f"{prefix}rewards/{reward}/std", eval_completions)
        if fall > gold_noise and rise > _noise(best, f"{proxy}_std", eval_completions):
            where = "evaluation" if prefix == "eval_" else f"evaluation on {prefix[len('eval_') : -1]}"
            return (
                f"{reward} fell from its best {best[gold]:.3g} to {last[gold]:.3g} in {where} while the training "
                f"reward rose from {best[proxy]:.3g} to {last[proxy]:.3g}: the policy games the reward. Keep the best "
                "checkpoint, and raise kl_coef, or lower kl_target or max_kl"
            )
    return None


def _eval_only_rewards(history: History) -> list[tuple[str, str]]:
    """Rewards that evaluation logs and training does not: the prefix of each set's figures, and the reward's name."""
    names = sorted({key for figures in history for key in figures})
    means = [match for key in names if (match := re.fullmatch(r"(eval_(?:[^/]+_)?)rewards/(.+)/mean", key))]
    return [(prefix, reward) for prefix, reward in map(re.Match.groups, means) if f"rewards/{reward}/mean" not in names]


def _noise(figures: Mapping[str, float], std: str, n: int | None) -> float:
    deviations = _finite([figures.get(std, math.nan)])
    return 2 * math.sqrt(2 / n) * deviations[0] if n and deviations else 0.0


def _negative_kl(history: History, temperature: float, top_k: int, top_p: float) -> str | None:
    kl = _figures(history[-RECENT:], "objective/kl")
    if len(kl) < SHORT or fmean(kl) + max(KL_TOLERANCE, 2 * stdev(kl) / math.sqrt(len(kl))) >= 0:
        return None
    line = (
        f"objective/kl is {fmean(kl):.2f} nats a completion, and no KL is negative: tokens are not sampled from the "
        f"distribution that is scored (temperature={temperature:g}, top_k={top_k}, top_p={top_p:g}"
    )
    mismatch = _mean(history[-RECENT:], "sampling/logprob_mismatch", 1)
    line += ")" if mismatch is None else f"; log-probabilities differ by {mismatch:.2g} nats a token)"
    if top_k or top_p < 1:
        return f"{line}. Set top_k=0 and top_p=1.0, or importance_sampling_correction"
    return f"{line} by rounding or generation_kwargs. Set importance_sampling_correction, or bf16=False"

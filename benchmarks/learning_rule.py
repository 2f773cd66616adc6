"""The rule by which `learning_study.py` chooses settings. It is applied in code, and nobody chooses by hand.

**The score of a run** is the mean gold reward, over a given time, of the policy that a user would keep: of all policies
evaluated so far whose KL is at most 6 nats, the one with the highest gold reward. Between two evaluations within the
limit, gold and KL are interpolated; where the KL passes the limit, so is gold at the limit. The score is the area under
that curve, divided by the time. The time is that of the base run of the same seed, so that a setting with slow rollouts
has fewer of them. A run that ends earlier keeps its last value.

**A factor** takes the value with the highest mean score. If the interval of its gain over today's default, paired by
seed, contains zero, it is a tie, and the default stays.

**The winner** joins the factors that are no ties. They may not add up: candidates are the factor with the largest gain,
the two largest, and so on. A candidate takes the place of the one before it only if the interval of its gain over that
one, paired by seed, is above zero; the first is the factor with the largest gain alone, or the base without any.

**GRPO and RLOO** take the options with the highest mean score, without an interval: for them, chance may help.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from learning_grid import BASE, CHOICE_ROLLOUTS, OF_CRITIC, Setting

from hf_rlhf_ext.study.statistics import Interval, mean_interval, paired_gain

KL_LIMIT = 6.0
"""Nats per completion."""
MAX_CANDIDATES = 3
"""Number of joint settings that are tried beyond single factors."""

Run = Mapping[str, Any]
Runs = Mapping[int, Run]
"""The runs of a setting by seed."""


# --- score of a run --------------------------------------------------------------------------------------------------


def kept_curve(evaluations: Sequence[Mapping[str, Any]], kl_limit: float = KL_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """The gold reward of the policy that is kept, by time.

    Args:
        evaluations: dicts of `cpu_seconds`, `kl` and `gold`, in the order of time; the start has no KL.
        kl_limit: nats per completion.

    Returns:
        Minutes and gold (N,): gold never falls. Between two points it is linear.
    """
    minutes = [evaluations[0]["cpu_seconds"] / 60]
    gold = [evaluations[0]["gold"]]
    for before, after in pairwise(evaluations):
        for share in crossings(before["kl"], after["kl"], kl_limit):
            at = before["cpu_seconds"] + share * (after["cpu_seconds"] - before["cpu_seconds"])
            minutes.append(at / 60)
            gold.append(max(gold[-1], before["gold"] + share * (after["gold"] - before["gold"])))
        minutes.append(after["cpu_seconds"] / 60)
        gold.append(max(gold[-1], after["gold"]) if after["kl"] <= kl_limit else gold[-1])
    return np.array(minutes), np.array(gold)


def crossings(before: float, after: float, limit: float) -> list[float]:
    """The share of the way at which a KL passes the limit, from 0 to 1; nothing if it does not."""
    if (before <= limit) == (after <= limit):
        return []
    return [(limit - before) / (after - before)]


def score(run: Run, minutes: float, kl_limit: float = KL_LIMIT) -> float:
    """Mean gold reward of the kept policy from the start until `minutes`."""
    times, gold = kept_curve(run["evaluations"], kl_limit)
    inside = times < minutes
    times = np.append(times[inside], minutes)
    gold = np.append(gold[inside], np.interp(minutes, *kept_curve(run["evaluations"], kl_limit)))
    return float(np.trapezoid(gold, times) / minutes)


def gold_at_minutes(run: Run, minutes: float, kl_limit: float = KL_LIMIT) -> float:
    """Gold reward of the kept policy at a time; of the last one if the run ended before."""
    return float(np.interp(minutes, *kept_curve(run["evaluations"], kl_limit)))


def minutes_of(run: Run) -> float:
    """CPU minutes of training."""
    return run["evaluations"][-1]["cpu_seconds"] / 60


def scores(runs: Runs, base: Runs) -> dict[int, float]:
    """Score by seed, for the seeds that the base has too."""
    return {seed: score(run, minutes_of(base[seed])) for seed, run in runs.items() if seed in base}


# --- choices ---------------------------------------------------------------------------------------------------------


def gain(runs: Runs, other: Runs, base: Runs) -> Interval:
    """Gain in score over other runs, paired by seed."""
    mine = scores(runs, base)
    others = scores(other, base)
    seeds = [seed for seed in mine if seed in others]
    return paired_gain([others[seed] for seed in seeds], [mine[seed] for seed in seeds], seeds)


def mean_score(runs: Runs, base: Runs) -> Interval:
    """Mean score over seeds, with its interval."""
    found = scores(runs, base)
    return mean_interval(list(found.values()), list(found))


def chosen_values(settings: Sequence[Setting], runs: Mapping[str, Runs]) -> list[dict[str, Any]]:
    """The best value of each factor, and whether it replaces today's default.

    Args:
        settings: the settings of stage 1. Those without runs are left out.
        runs: runs by name of the setting; the base is among them.

    Returns:
        A dict per factor with `factor`, `setting` (name of the best one), `options`, `gain` (over the base) and
        `replaces`, with the largest gain first.
    """
    base = runs[BASE]
    best: dict[str, dict[str, Any]] = {}
    for setting in settings:
        if setting.factor is None or setting.kind != "ppo" or setting.name not in runs:
            continue
        entry = {
            "factor": setting.factor,
            "setting": setting.name,
            "options": dict(setting.options),
            "gain": gain(runs[setting.name], base, base),
        }
        known = best.get(setting.factor)
        if known is None or entry["gain"].mean > known["gain"].mean:
            best[setting.factor] = entry
    found = sorted(best.values(), key=lambda entry: -entry["gain"].mean)
    return [entry | {"replaces": bool(entry["gain"].low > 0)} for entry in found]


def candidates(chosen: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """The joint settings to run: the factor with the largest gain with the next one, with the next two, and so on."""
    joined: dict[str, Any] = {}
    found = []
    for entry in (entry for entry in chosen if entry["replaces"]):
        if conflict(joined, entry["options"]):
            continue
        joined = joined | entry["options"]
        found.append(Setting(f"joint-{len(found) + 1}", options=dict(joined), rollouts=CHOICE_ROLLOUTS))
    return found[1 : 1 + MAX_CANDIDATES]  # the first is a run of stage 1


def conflict(joined: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether options contradict those before: other values, or options of a critic where there is none."""
    if any(joined.get(name, value) != value for name, value in options.items()):
        return True
    both = dict(joined) | dict(options)
    return both.get("critic") == "none" and any(name in both for name in OF_CRITIC)


def winner(chosen: Sequence[Mapping[str, Any]], runs: Mapping[str, Runs]) -> Setting:
    """The setting that stage 1 chose; the base if every factor is a tie.

    Raises:
        LookupError: a candidate has not been run yet.
    """
    replacing = [entry for entry in chosen if entry["replaces"]]
    if not replacing:
        return Setting(BASE, rollouts=CHOICE_ROLLOUTS)
    best = Setting(replacing[0]["setting"], options=replacing[0]["options"], rollouts=CHOICE_ROLLOUTS)
    for candidate in candidates(chosen):
        if candidate.name not in runs:
            raise LookupError(f"{candidate.name} has not been run yet")
        if gain(runs[candidate.name], runs[best.name], runs[BASE]).low > 0:
            best = candidate
    return best


def best_of_kind(settings: Sequence[Setting], runs: Mapping[str, Runs], kind: str, base: Runs) -> Setting | None:
    """The setting of a trainer of TRL with the highest mean score; None if not all have been run."""
    of_kind = [setting for setting in settings if setting.kind == kind]
    if not of_kind or any(setting.name not in runs for setting in of_kind):
        return None
    return max(of_kind, key=lambda setting: mean_score(runs[setting.name], base).mean)

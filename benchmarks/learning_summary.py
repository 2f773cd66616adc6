"""What `learning_study.py --collect` computes from the runs: curves, gold at equal time and KL, choices, and a verdict.

All intervals are 95 % intervals over seeds, and differences are paired by seed (`study.statistics`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import learning_grid as grid
import learning_rule as rule
import learning_study as study
import numpy as np
from learning_grid import BASE, FINAL, WINNER, Setting
from learning_rule import Run, Runs

from hf_rlhf_ext.study.curves import KLTarget, Point, gold_at_kl, rising_points
from hf_rlhf_ext.study.statistics import Interval, mean_interval, paired_gain

KL_TARGETS = (2.0, 4.0, 6.0)
"""Nats at which gold is compared."""
SHARES = (1 / 3, 2 / 3, 1.0)
"""Parts of the time that the fastest of the compared trainers takes, at which gold is compared."""
TRL_KINDS = ("grpo", "rloo")
NAMES = {"grpo": "TRL's GRPO", "rloo": "TRL's RLOO"}


# --- numbers of a run ------------------------------------------------------------------------------------------------


def gold_of_run_at_kl(run: Run, kl: float) -> float | None:
    """Gold reward where the run first reaches a KL, by linear interpolation; None if it stays below."""
    points = []
    for entry in run["evaluations"]:
        points.append(Point(np.array([entry["gold"]]), np.array([entry["kl"]]), entry["cpu_seconds"]))
    gold = gold_at_kl(rising_points(points), KLTarget(np.array([kl])))
    return None if gold is None else float(gold[0])


def minutes_until(run: Run, gold: float) -> float | None:
    """CPU minutes until the kept policy has this gold reward; None if it never has."""
    minutes, kept = rule.kept_curve(run["evaluations"])
    if kept[-1] < gold:
        return None
    above = int(np.argmax(kept >= gold))
    if above == 0:
        return float(minutes[0])
    share = (gold - kept[above - 1]) / (kept[above] - kept[above - 1])
    return float(minutes[above - 1] + share * (minutes[above] - minutes[above - 1]))


def interval(values: Mapping[int, float | None]) -> Interval:
    """Mean over seeds of the values that there are, with its interval."""
    known = {seed: value for seed, value in values.items() if value is not None}
    return mean_interval(list(known.values()), list(known))


def difference(mine: Mapping[int, float | None], others: Mapping[int, float | None]) -> Interval:
    """Mean over seeds of mine minus others, with its interval, for the seeds that have both."""
    seeds = [seed for seed in mine if mine[seed] is not None and others.get(seed) is not None]
    return paired_gain([others[seed] for seed in seeds], [mine[seed] for seed in seeds], seeds)


# --- a setting -------------------------------------------------------------------------------------------------------


def entry_of(setting: Setting, runs: Runs, base: Runs | None) -> dict[str, Any]:
    """The numbers of a setting: its curve, and its score where there is a base run of the same length."""
    entry: dict[str, Any] = {
        **asdict(setting),
        "seeds": sorted(runs),
        "minutes": interval({seed: rule.minutes_of(run) for seed, run in runs.items()}).as_dict(),
        "stopped": {str(seed): run["stopped"] for seed, run in runs.items() if run["stopped"]},
        "points": points_of(list(runs.values())),
        "explained_variance": explained(runs),
    }
    if base:
        entry["score"] = rule.mean_score(runs, base).as_dict()
        entry["gain"] = rule.gain(runs, base, base).as_dict()
    return entry


def points_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Means over seeds at each evaluation that all seeds have: a run that a guard stopped has fewer."""
    found = []
    for entries in zip(*(run["evaluations"] for run in runs), strict=False):
        seeds = dict(enumerate(entries))
        found.append(
            {
                "rollouts": entries[0]["rollouts"],
                "completions": entries[0]["completions"],
                "minutes": float(np.mean([entry["cpu_seconds"] for entry in entries])) / 60,
                "kl": float(np.mean([entry["kl"] for entry in entries])),
                "gold": interval({seed: entry["gold"] for seed, entry in seeds.items()}).as_dict(),
                "second_gold": float(np.mean([entry["second_gold"] for entry in entries])),
                "tokens": float(np.mean([entry["tokens"] for entry in entries])),
            }
        )
    return found


def explained(runs: Runs) -> dict[str, Any]:
    """Explained variance of the critic at rollouts 1 and 10 (or the last one), by number of the rollout."""
    logged = {seed: run["explained_variance"] for seed, run in runs.items() if run["explained_variance"]}
    if not logged:
        return {}
    last = min(10, *(len(values) for values in logged.values()))
    return {str(n): interval({seed: values[n - 1] for seed, values in logged.items()}).as_dict() for n in (1, last)}


def entries_of(tasks: Sequence[Any], found: study.Parts) -> dict[str, dict[str, Any]]:
    """The numbers of all settings that have runs, by name."""
    entries: dict[str, dict[str, Any]] = {}
    for task in tasks:
        setting = task.setting
        if setting.name in entries or setting.name not in found:
            continue
        base = found.get(BASE, {})
        is_as_long = all(run["setting"]["rollouts"] == setting.rollouts for run in base.values())
        entries[setting.name] = entry_of(setting, found[setting.name], base if is_as_long else None)
    return entries


# --- comparisons -----------------------------------------------------------------------------------------------------


def comparison(runs: Mapping[str, Runs]) -> dict[str, Any]:
    """Gold of several settings at equal time and at equal KL.

    The time is a share of that of the run that ended first on the same seed, so that nothing is extrapolated. At equal
    time, the gold is that of the best policy so far within the limit of KL.

    Args:
        runs: runs by name; the settings share their seeds.
    """
    seeds = sorted(set.intersection(*(set(of_setting) for of_setting in runs.values())))
    shortest = {seed: min(rule.minutes_of(of_setting[seed]) for of_setting in runs.values()) for seed in seeds}
    found: dict[str, Any] = {"seeds": seeds, "minutes": [], "settings": {}}
    found["minutes"] = [float(np.mean(list(shortest.values()))) * share for share in SHARES] if seeds else []
    for name, of_setting in runs.items():
        at_time = []
        for share in SHARES:
            at_time.append({s: rule.gold_at_minutes(of_setting[s], share * shortest[s]) for s in seeds})
        at_kl = [{s: gold_of_run_at_kl(of_setting[s], kl) for s in seeds} for kl in KL_TARGETS]
        found["settings"][name] = {"at_time": at_time, "at_kl": at_kl}
    return found


def as_intervals(compared: Mapping[str, Any], ours: str) -> dict[str, Any]:
    """The comparison with intervals in place of the values of seeds, and with the differences of ours to all others."""
    settings = {}
    for name, values in compared["settings"].items():
        entry: dict[str, Any] = {}
        for axis in ("at_time", "at_kl"):
            mine = compared["settings"][ours][axis]
            entry[axis] = [interval(at).as_dict() for at in values[axis]]
            if name != ours:
                pairs = zip(mine, values[axis], strict=True)
                entry[f"ours_minus_this_{axis}"] = [difference(first, second).as_dict() for first, second in pairs]
        settings[name] = entry
    return {"ours": ours, "seeds": compared["seeds"], "minutes": compared["minutes"], "kl": list(KL_TARGETS)} | {
        "settings": settings
    }


def time_ratio(ours: Runs, theirs: Runs) -> float | None:
    """How many times as long ours needs for the gold that theirs has at its end; None where ours never has it."""
    ratios = []
    for seed in sorted(set(ours) & set(theirs)):
        gold = float(rule.kept_curve(theirs[seed]["evaluations"])[1][-1])
        mine, other = minutes_until(ours[seed], gold), minutes_until(theirs[seed], gold)
        if mine is None or not other:
            return None
        ratios.append(mine / other)
    return float(np.mean(ratios)) if ratios else None


# --- the verdict -----------------------------------------------------------------------------------------------------


def verdict(compared: Mapping[str, Any], runs: Mapping[str, Runs], kinds: Mapping[str, str]) -> list[str]:
    """Sentences on ours against each trainer of TRL, as the intervals say.

    Args:
        compared: what `as_intervals` returned.
        runs: runs by name.
        kinds: name of a setting of TRL's trainers -> its kind.
    """
    found = []
    for name, kind in kinds.items():
        entry = compared["settings"][name]
        by_time = entry["ours_minus_this_at_time"]
        lines = []
        for minutes, value in zip(compared["minutes"], by_time, strict=True):
            lines.append(f"after {minutes:.2f} CPU minutes {told(value)}")
        found.append(f"Against {NAMES[kind]} at equal time, PPO is {'; '.join(lines)}.")
        lines = []
        for kl, value in zip(compared["kl"], entry["ours_minus_this_at_kl"], strict=True):
            if value["mean"] is not None:
                lines.append(f"at {kl:g} nats {told(value)}")
        reached = "; ".join(lines) or "not compared, as not both reached the same KL on any seed"
        found.append(f"Against {NAMES[kind]} at equal KL, PPO is {reached}.")
        if by_time[-1]["mean"] is not None and by_time[-1]["mean"] < 0:
            found.append(needed(time_ratio(runs[compared["ours"]], runs[name]), NAMES[kind]))
    return found


def told(value: Mapping[str, Any]) -> str:
    """A difference in words, with its interval."""
    mean = value["mean"]
    low, high = value["ci95"]
    if mean is None:
        return "not compared"
    if low is None:
        return f"{'ahead' if mean > 0 else 'behind'} by {abs(mean):.2f} on {value['seeds']} seed, without an interval"
    if low > 0:
        return f"ahead by {mean:.2f} ({low:.2f} to {high:.2f})"
    if high < 0:
        return f"behind by {-mean:.2f} ({-high:.2f} to {-low:.2f})"
    return f"not told apart ({mean:+.2f}, {low:+.2f} to {high:+.2f})".replace("-", "−")


def needed(ratio: float | None, name: str) -> str:
    """What PPO would need to be level at equal time."""
    if ratio is None:
        return f"PPO does not reach the gold reward that {name} has at its end within its own run, on every seed."
    return f"PPO takes {ratio:.1f} times as long as {name} to the gold reward that this one has at its end."


# --- worlds ----------------------------------------------------------------------------------------------------------


def summary_of_stories(parts: dict[str, study.Parts], tasks: Sequence[Any]) -> dict[str, Any]:
    found = parts["stories"]
    summary = common(found, tasks)
    if BASE in found:
        summary["chosen"] = chosen_as_dict(rule.chosen_values(grid.stories_factors(), found))
        best = {kind: rule.best_of_kind(grid.stories_trl(), found, kind, found[BASE]) for kind in TRL_KINDS}
        summary["best_trl"] = {kind: setting and setting.name for kind, setting in best.items()}
    if study.plan_stories(found)[1] is not None:
        return summary
    winner = study.winner_of(found)
    summary["winner"] = {"name": winner.name, "options": winner.options}
    finals = {name: runs for name, runs in found.items() if name.startswith(FINAL)}
    ours = FINAL + (WINNER if FINAL + WINNER in finals else BASE)
    return summary | against_trl(finals, ours, {FINAL + kind: kind for kind in TRL_KINDS})


def summary_of_smollm2(parts: dict[str, study.Parts], tasks: Sequence[Any]) -> dict[str, Any]:
    found = parts["smollm2"]
    summary = common(found, tasks)
    kinds = {}
    for kind in TRL_KINDS:
        best = rule.best_of_kind(grid.smollm2_trl(), found, kind, found[BASE]) if BASE in found else None
        # On the first seed alone, as the choice was made by it.
        if best is not None:
            kinds[study.smollm2_best(found, kind).name] = kind
    summary["best_trl"] = {kind: name for name, kind in kinds.items()}
    stories = parts["stories"]
    is_chosen = study.plan_stories(stories)[1] is None
    ours = grid.smollm2_winner(study.winner_of(stories).options) if is_chosen else BASE
    compared = {name: runs for name, runs in found.items() if name in kinds or runs and not name.startswith(TRL_KINDS)}
    return summary | against_trl(compared, ours, kinds)


def common(found: study.Parts, tasks: Sequence[Any]) -> dict[str, Any]:
    """Settings of the world, the numbers of all its settings, and what they cost."""
    runs = [run for of_setting in found.values() for run in of_setting.values()]
    return {
        "world_settings": runs[0]["world_settings"],
        "versions": runs[0]["versions"],
        "cpu_minutes": sum(run["cpu_seconds"] for run in runs) / 60,
        "settings": entries_of(tasks, found),
    }


def chosen_as_dict(chosen: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**entry, "gain": entry["gain"].as_dict()} for entry in chosen]


def against_trl(runs: Mapping[str, Runs], ours: str, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The comparison of ours with all others, and the verdict; empty while runs are missing."""
    if ours not in runs or not kinds or any(name not in runs for name in kinds):
        return {}
    shared = set.intersection(set(runs[ours]), *(set(runs[name]) for name in kinds))
    complete = {name: of_setting for name, of_setting in runs.items() if shared <= set(of_setting)}
    if not shared:
        return {}
    compared = as_intervals(comparison({name: only(complete[name], shared) for name in complete}), ours)
    return {"compared": compared, "verdict": verdict(compared, complete, kinds)}


def only(runs: Runs, seeds: set[int]) -> dict[int, Run]:
    return {seed: run for seed, run in runs.items() if seed in seeds}

"""Merges the results of the seeds into one report: means, intervals, win rates, ratings and comparisons."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from hf_rlhf_ext.recipes.compare_parts.stacking import (
    Result,
    Stack,
    Values,
    any_value,
    as_dict,
    difference,
    mean_of_numbers,
    mean_or_none,
)
from hf_rlhf_ext.study.comparisons import compare_systems, reached_within_seed
from hf_rlhf_ext.study.curves import Reached
from hf_rlhf_ext.study.length_control import length_controlled_win_rate
from hf_rlhf_ext.study.ratings import bradley_terry
from hf_rlhf_ext.study.statistics import WinRate, mean_interval, paired_gain, wilson_interval, win_rate

NOT_TRAINED_FURTHER = ("base", "sft", "best_of_n")
"""Kinds of systems that are there before reinforcement learning begins: they do not set the equal training time."""
CALIBRATION_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FROM_TRAINING = ("kind", "labels", "settings", "rule", "needs", "completions")
"""What a system's entry has from its training, the same for all seeds but for small numbers."""


def merge(
    results: Sequence[Result],
    *,
    equal_seconds: float | None = None,
    command: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of all seeds: what `docs/study/compare.json` has, and all that tables and plots need.

    Args:
        results: contents of `results.json` of each seed.
        equal_seconds: training time of the table at equal time; None means that of the trained system with the least.
        command: the command of the run.
        settings: all options of the run.
    """
    stack = Stack(results)
    judge = stack.judges[0] if stack.judges else None
    report: dict[str, Any] = {
        "command": command,
        "seeds": [result["seed"] for result in results],
        "clock": results[0]["clock"],
        "n": results[0]["prompts"],
        "reference": stack.reference,
        "judge": judge,
        "judges": merged_coverage(results),
        "leaks": dict(results[0]["leaks"]),
        "reward_model": [dict(result["reward_model"]) for result in results],
        "systems": {name: merged_system(stack, name, judge) for name in stack.names},
    }
    add_ratings(report, stack)
    report["comparisons"] = []
    if judge is not None:
        report["comparisons"] = compare_systems(results, judge, stack.clock, equal_seconds=equal_seconds)
    report["win_rates"] = {name: win_rates(stack, name) for name in stack.judges}
    report["categories"] = by_category(stack, judge)
    report["equal_time"] = at_equal_time(stack, judge, equal_seconds)
    report["calibration"] = calibration(stack, judge)
    report["settings"] = dict(settings or {})
    return report


def merged_coverage(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """How much each judge judged in all seeds."""
    merged: dict[str, dict[str, Any]] = {}
    for result in results:
        for judge, counts in result["coverage"].items():
            total = merged.setdefault(judge, {"judged": 0, "failed": 0, "not_asked": 0, "first_error": None})
            total["judged"] += counts["judged"]
            total["failed"] += counts["failed"]
            total["not_asked"] += counts.get("not_asked", 0)
            total["unit"] = counts.get("unit", "cases")
            total["first_error"] = total["first_error"] or counts.get("first_error")
    return merged


# --- a system --------------------------------------------------------------------------------------------------------


def merged_system(stack: Stack, name: str, judge: str | None) -> dict[str, Any]:
    """All that is known of a system over the seeds."""
    errors = {}
    for result in stack.results:
        entry = result["systems"].get(name)
        if entry is not None and entry["status"] != "ok":
            errors[str(result["seed"])] = entry["error"]  # keys of JSON are text
    entries = [entry for _, entry in stack.entries(name)]
    if not entries:
        kind = next((result["systems"][name]["kind"] for result in stack.results if name in result["systems"]), None)
        error = next(iter(errors.values()), None)
        return {"status": "failed", "error": error, "errors": errors, "kind": kind, "seeds": []}
    kl = stack.mean(stack.values(name, "kl"))
    merged = {
        "status": "ok",
        "error": next(iter(errors.values()), None),
        "errors": errors,
        "seeds": [result["seed"] for result, _ in stack.entries(name)],
        "best_of": entries[0]["n"],
        "n": sum(len(entry["kl"]) for entry in entries),
        "kl": kl["mean"],
        "kl_ci95": kl["ci95"],
        "seconds": stack.seconds(name, "total"),
        "own_seconds": stack.seconds(name, "own"),
        "length": stack.mean(stack.values(name, "length")),
        "proxy": stack.mean(stack.values(name, "proxy")),
        "gold_of_judges": {of: stack.mean(stack.values(name, "gold", of)) for of in stack.judges},
        "texts": mean_of_numbers([entry["texts"] for entry in entries]),
        "alignment_tax": merged_tax(entries),
        "curves": [curve(result, entry, judge, stack.clock) for result, entry in stack.entries(name)],
    }
    merged |= {field: entries[0][field] for field in FROM_TRAINING}
    merged["completions"] = round(fmean(entry["completions"] for entry in entries))
    merged["gold"] = merged["gold_of_judges"].get(judge)
    merged |= against_reference(stack, name, judge)
    return merged


def against_reference(stack: Stack, name: str, judge: str | None) -> dict[str, Any]:
    """Paired gain, win rate and length-controlled win rate of a system against the reference."""
    reference = stack.reference
    numbers: dict[str, Any] = {"gold_gain": None, f"win_rate_vs_{reference}": None, "length_controlled": None}
    if judge is None or name == reference:
        return numbers
    before, after = stack.values(reference, "gold", judge), stack.values(name, "gold", judge)
    if any_value(before) and any_value(after):
        numbers["gold_gain"] = as_dict(paired_gain(before, after, stack.seeds, stack.prompts))
    outcomes = stack.outcomes(judge, name, reference)
    if any_value(outcomes):
        numbers[f"win_rate_vs_{reference}"] = rate_as_dict(win_rate(outcomes, stack.seeds, stack.prompts))
        lengths = difference(stack.values(name, "length"), stack.values(reference, "length"))
        numbers["length_controlled"] = length_controlled(stack, outcomes, lengths)
    return numbers


def length_controlled(stack: Stack, outcomes: Values, lengths: Values) -> dict[str, Any] | None:
    """Length-controlled win rate on the prompts that have an outcome and both lengths."""
    kept = [k for k, pair in enumerate(zip(outcomes, lengths, strict=True)) if None not in pair]
    if len(kept) < 2:
        return None
    of_kept = [[column[k] for k in kept] for column in (outcomes, lengths, stack.seeds, stack.prompts)]
    return as_dict(length_controlled_win_rate(*of_kept))


def rate_as_dict(rate: WinRate) -> dict[str, Any]:
    """A win rate with its interval, and the counts of wins, ties and losses, in one mapping."""
    values = rate.as_dict()
    return values.pop("rate") | values


def add_ratings(report: dict[str, Any], stack: Stack) -> None:
    """Adds the Bradley-Terry rating of each system by the judge of the main table, the reference being 0."""
    judge = report["judge"]
    working = [name for name in stack.names if stack.works(name)]
    outcomes = {}
    for position, first in enumerate(working):
        for second in working[position + 1 :]:
            values = stack.outcomes(judge, first, second) if judge else []
            if any_value(values):
                outcomes[first, second] = values
    ratings = {}
    if any(stack.reference in pair for pair in outcomes):  # the judge may have failed on all answers of the reference
        ratings = bradley_terry(outcomes, stack.seeds, stack.prompts, reference=stack.reference)
    for name, entry in report["systems"].items():
        entry["rating"] = as_dict(ratings[name]) if name in ratings else None


def merged_tax(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Perplexity and exact match: means over the seeds. For exact match also counts, and an interval over questions."""
    taxes = [entry["alignment_tax"] for entry in entries if entry.get("alignment_tax")]
    if not taxes:
        return None
    merged: dict[str, Any] = {}
    perplexities = [tax["perplexity"] for tax in taxes if "perplexity" in tax]
    if perplexities:
        merged["perplexity"] = mean_of_numbers(perplexities)
    matches = [tax["exact_match"] for tax in taxes if "exact_match" in tax]
    if matches:
        right, n = sum(match["right"] for match in matches), sum(match["n"] for match in matches)
        # All seeds have the same questions: more seeds make them no more.
        n_questions = matches[0]["n"]
        merged["exact_match"] = {
            "accuracy": right / n if n else None,
            "right": right,
            "n": n,
            "wilson95": list(wilson_interval(round(n_questions * right / n), n_questions)) if n else [None, None],
        }
    return merged


def curve(result: Result, entry: Mapping[str, Any], judge: str | None, clock: str) -> dict[str, Any]:
    """The points of a system in a seed: its snapshots and its end. Times are of everything that it builds on, too."""
    before = entry["total"][clock] - entry["own"][clock]
    points = []
    for snapshot in entry.get("snapshots", ()):
        points.append(
            point_of(snapshot, judge) | {"step": snapshot["step"], "seconds": before + snapshot["own"][clock]}
        )
    points.append(point_of(entry, judge) | {"step": None, "seconds": entry["total"][clock]})
    return {"seed": result["seed"], "points": points}


def point_of(measured: Mapping[str, Any], judge: str | None) -> dict[str, float | None]:
    """Means of what was measured of a policy."""
    gold = measured["gold"].get(judge) if judge else None
    return {"kl": mean_or_none(measured["kl"]), "gold": mean_or_none(gold), "proxy": mean_or_none(measured["proxy"])}


# --- between systems -------------------------------------------------------------------------------------------------


def win_rates(stack: Stack, judge: str) -> dict[str, Any]:
    """Win rate of each pair "a|b" that a judge compared, both ways round."""
    rates = {}
    for first, second in combinations(stack.names, 2):
        outcomes = stack.outcomes(judge, first, second)
        if any_value(outcomes):
            rate = win_rate(outcomes, stack.seeds, stack.prompts)
            rates[f"{first}|{second}"] = rate_as_dict(rate)
            rates[f"{second}|{first}"] = rate_as_dict(rate.reversed())
    return rates


def by_category(stack: Stack, judge: str | None) -> dict[str, Any]:
    """By use case: number of prompts, and of each system the gold and the win rate against the reference."""
    categories = sorted({name for name in stack.categories if name})
    if judge is None or not categories:
        return {}
    found = {}
    for category in categories:
        rows = [k for k, name in enumerate(stack.categories) if name == category]
        seeds, prompts = [stack.seeds[k] for k in rows], [stack.prompts[k] for k in rows]
        systems = {}
        for name in stack.names:
            gold = stack.values(name, "gold", judge)
            outcomes = stack.outcomes(judge, name, stack.reference)
            entry = {}
            if any_value([gold[k] for k in rows]):
                entry["gold"] = as_dict(mean_interval([gold[k] for k in rows], seeds, prompts))
            if any_value([outcomes[k] for k in rows]):
                entry["win_rate"] = rate_as_dict(win_rate([outcomes[k] for k in rows], seeds, prompts))
            if entry:
                systems[name] = entry
        found[category] = {"n": len(set(prompts)), "systems": systems}
    return found


def at_equal_time(stack: Stack, judge: str | None, equal_seconds: float | None) -> dict[str, Any] | None:
    """What each system had reached within the same training time, including all that it builds on.

    Of a system that took longer, the last snapshot within this time counts, in each seed: see `reached_within`. A
    system without one in some seed has no value.
    """
    if judge is None:
        return None
    budgets = budget_of_seeds(stack, equal_seconds)
    reference = stack.values(stack.reference, "gold", judge)
    systems = {}
    for name in stack.names:
        if not stack.works(name):
            continue
        gold, kl, reached = values_within(stack, name, judge, budgets)
        reasons = [of_seed.reason for of_seed in reached if of_seed.reason]
        if reasons:
            systems[name] = {"gold": None, "why": reasons[0]}
            continue
        gain = None
        if any_value(gold) and name != stack.reference:
            gain = as_dict(paired_gain(reference, gold, stack.seeds, stack.prompts))
        systems[name] = {
            "gold": stack.mean(gold),
            "gain": gain,
            "kl": mean_or_none(kl),
            "seconds": fmean(of_seed.seconds for of_seed in reached),
            "steps": [of_seed.step for of_seed in reached],
            "why": None,
        }
    return {"seconds": fmean(budgets.values()), "systems": systems}


def budget_of_seeds(stack: Stack, equal_seconds: float | None) -> dict[int, float]:
    """The training time of the comparison at equal time, by seed: that of the quickest system trained further than SFT.

    Without such a system, it is the longest time, in which every system was finished.
    """
    budgets = {}
    for result in stack.results:
        working = [entry for entry in result["systems"].values() if entry["status"] == "ok"]
        totals = [entry["total"][stack.clock] for entry in working]
        further = [entry["total"][stack.clock] for entry in working if entry["kind"] not in NOT_TRAINED_FURTHER]
        quickest = min(further) if further else max(totals, default=0.0)
        budgets[result["seed"]] = quickest if equal_seconds is None else equal_seconds
    return budgets


def values_within(
    stack: Stack, name: str, judge: str, budgets: Mapping[int, float]
) -> tuple[Values, Values, list[Reached]]:
    """Gold and KL of each prompt, and what was reached in each seed in which a system worked, within a time."""
    gold: Values = []
    kl: Values = []
    reached_of_seeds: list[Reached] = []
    for result in stack.results:
        missing = [None] * result["prompts"]
        if result["systems"].get(name, {"status": "missing"})["status"] != "ok":
            gold += missing
            kl += missing
            continue
        reached = reached_within_seed(result, name, stack.clock, budgets[result["seed"]])
        measured = reached.measured or {"gold": {}, "kl": missing}
        scores = measured["gold"].get(judge)
        gold += scores if scores is not None else missing
        kl += measured["kl"]
        reached_of_seeds.append(reached)
    return gold, kl, reached_of_seeds


def calibration(stack: Stack, judge: str | None) -> list[dict[str, Any]]:
    """How often the judge agrees with the reward model, by the confidence of the reward model.

    Each pair of a system's answer and the reference's is one case: the side with the higher reward wins with
    probability σ(difference), where rewards are in log-odds, as in training. Ties of the judge count one half.
    """
    scales = [result["reward_model"].get("scale") for result in stack.results]
    if judge is None or None in scales:
        return []
    scale_of_seed = {result["seed"]: scale for result, scale in zip(stack.results, scales, strict=True)}
    cases: list[tuple[float, float, int, str]] = []
    reference = answer_rewards(stack, stack.reference)
    for name in stack.names:
        if name == stack.reference:
            continue
        outcomes = stack.outcomes(judge, name, stack.reference)
        rewards = answer_rewards(stack, name)
        for k, outcome in enumerate(outcomes):
            if outcome is None or rewards[k] is None or reference[k] is None:
                continue
            log_odds = (rewards[k] - reference[k]) * scale_of_seed[stack.seeds[k]]
            if log_odds == 0:  # mostly the same text
                continue
            agrees = outcome if log_odds > 0 else 1 - outcome
            cases.append((sigmoid(abs(log_odds)), agrees, stack.seeds[k], stack.prompts[k]))
    return calibration_bins(cases)


def answer_rewards(stack: Stack, name: str) -> Values:
    """The reward of each answer that was given; for best-of-n not the mean over subsets."""
    given = stack.values(name, "answer_proxy")
    return given if any_value(given) else stack.values(name, "proxy")


def calibration_bins(cases: Sequence[tuple[float, float, int, str]]) -> list[dict[str, Any]]:
    """Cases of (confidence, agreement, seed, prompt) in bins of equal width."""
    bins = []
    for low, high in zip(CALIBRATION_EDGES[:-1], CALIBRATION_EDGES[1:], strict=True):
        inside = [case for case in cases if low <= case[0] < high or (high == 1.0 and case[0] == 1.0)]
        if inside:
            predicted, agrees, seeds, prompts = zip(*inside, strict=True)
            observed = mean_interval(agrees, seeds, prompts, null=0.5, bounds=(0.0, 1.0))
            bins.append({"predicted": fmean(predicted), "observed": as_dict(observed), "n": len(inside)})
    return bins


def sigmoid(log_odds: float) -> float:
    """Probability of log-odds, which must not be negative."""
    return 1 / (1 + math.exp(-log_odds))

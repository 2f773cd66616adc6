"""Comparisons of systems at the end of training, at equal KL and at equal time, from the results of all seeds."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from .curves import KLTarget, Point, Reached, gold_at_kl, reached_within, rising_points
from .statistics import Interval, as_numbers, detectable_effect, holm, mean_interval

END = "end"
EQUAL_KL = "equal_kl"
EQUAL_TIME = "equal_time"

PPO = "ppo"
"""The kind of system that the verdict is about."""
STARTS_AT_REFERENCE = {"ppo", "dpo", "grpo", "rloo"}
"""Kinds whose training starts at the reference policy, so that their curves start there, at a KL of 0."""
BEST_OF_N = "best_of_n"


@dataclass(frozen=True)
class Comparison:
    """Gold score of one system minus that of another one, on the same prompts.

    Attributes:
        first: name of the first system.
        second: name of the other one.
        judge: name of the judge whose scores are compared.
        at: "end" (of training), "equal_kl" or "equal_time".
        gain: gold(first) - gold(second), in units of the gold score; None if they cannot be compared.
        kl: KL at which they are compared, mean over seeds, nats; None at the end and at equal time.
        seconds: time at which they are compared, mean over seeds; None at the end and at equal KL.
        reason: why there is no gain, in a clause.
        measure: "gold" for scores; "win rate" for a judge without scores, where the gain is P(first better) - 1/2.
        p_holm: p-value, adjusted for the other comparisons of a PPO system `first`; of another system, for those of all
            other systems with the reference.
    """

    first: str
    second: str
    judge: str
    at: str
    gain: Interval | None
    kl: float | None = None
    seconds: float | None = None
    reason: str | None = None
    measure: str = "gold"
    p_holm: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields and `detectable` (effect that these data would have found, 80 %) for JSON."""
        detectable = None
        if self.gain is not None and math.isfinite(self.gain.half_width):
            detectable = detectable_effect(self.gain)
        return {
            "first": self.first,
            "second": self.second,
            "judge": self.judge,
            "at": self.at,
            "measure": self.measure,
            "gain": None if self.gain is None else self.gain.as_dict(),
            "kl": self.kl,
            "seconds": self.seconds,
            "detectable": detectable,
            "p_holm": None if math.isnan(self.p_holm) else self.p_holm,
            "reason": self.reason,
        }


def compare_systems(
    results: Sequence[Mapping[str, Any]],
    judge: str | None = None,
    clock: str = "cpu_seconds",
    *,
    equal_seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Compares each PPO system with each other system, and each system with the reference.

    - At the end: all systems, as their training left them.
    - At equal KL, in each seed: the largest KL that both reach. Between saved policies, gold is interpolated in KL. The
      systems best-of-2, -4, … are one curve. A system without saved policies counts only with its own KL.
    - At equal time, in each seed: when the faster one was finished, with the time of all stages that a system needs
      (its reward model, say), or at `equal_seconds`. A system that was not finished then counts with its last
      snapshot; without one, there is no claim. Not with the reference, on which all build.

    Only seeds in which both systems worked count, and prompts that the judge scored for both.

    Args:
        results: the results of each seed, `results.json` of `hf-rlhf compare`. Prompts are the same in all seeds: by
            `prompt_ids` if it is there, else by row.
        judge: name of the judge. None: the first one with scores.
        clock: "cpu_seconds" or "seconds".
        equal_seconds: time at which systems are compared, instead of that of the faster one.

    Returns:
        `Comparison.as_dict` of each. Those without a value have a `reason`.

    Raises:
        UserError: There are no results, or no judge has this name.
    """
    if not results:
        raise UserError("compare: there are no results of any seed. Run the comparison before its report.")
    judge = judge or _first_judge(results)
    _check_judge(results, judge)
    seeds = [_Seed.of(result, judge, clock) for result in results]
    reference = results[0]["reference"]
    names = list(dict.fromkeys(name for result in results for name in result["systems"]))
    # A system that failed may have no kind in one seed.
    kinds = {name: None for name in names}
    for result in results:
        for name, system in result["systems"].items():
            kinds[name] = system.get("kind") or kinds[name]

    comparisons = []
    families: dict[str | None, list[int]] = {}  # numbers of the comparisons that Holm's adjustment counts together
    for first in names:
        others = [name for name in names if kinds[name] != PPO] if kinds[first] == PPO else [reference]
        family = families.setdefault(first if kinds[first] == PPO else None, [])
        for second in others:
            if second != first:
                found = _compare(first, second, seeds, reference, judge, equal_seconds)
                family += range(len(comparisons), len(comparisons) + len(found))
                comparisons += found
    for family in families.values():
        adjusted = _adjusted([comparisons[number] for number in family])
        for number, comparison in zip(family, adjusted, strict=True):
            comparisons[number] = comparison
    return [comparison.as_dict() for comparison in comparisons]


def _compare(
    first: str, second: str, seeds: Sequence["_Seed"], reference: str, judge: str, equal_seconds: float | None
) -> list[Comparison]:
    both = [seed for seed in seeds if first in seed.worked and second in seed.worked]
    if not both:
        failed = first if not any(first in seed.worked for seed in seeds) else second
        reason = f"{failed} failed in every seed"
        if any(failed in seed.worked for seed in seeds):
            reason = "there is no seed in which both worked"
        return [Comparison(first, second, judge, END, None, reason=reason)]
    if not all(first in seed.curves and second in seed.curves for seed in both):
        return [_compare_outcomes(first, second, both, judge)]

    pairs: list[Callable[[_Seed], _Pair]] = [lambda seed: seed.at_end(first, second)]
    ways = [END]
    if reference not in (first, second):
        pairs.append(lambda seed: seed.at_equal_kl(first, second))
        pairs.append(lambda seed: seed.at_equal_time(first, second, equal_seconds))
        ways += [EQUAL_KL, EQUAL_TIME]
    return [
        _summary(first, second, judge, way, [(seed, pair_of(seed)) for seed in both])
        for way, pair_of in zip(ways, pairs, strict=True)
    ]


def _summary(first: str, second: str, judge: str, way: str, pairs: Sequence[tuple["_Seed", "_Pair"]]) -> Comparison:
    """One comparison from the gains of all seeds. A seed in which it has no value makes it incomplete: it has none."""
    reasons = [pair.reason for _, pair in pairs if pair.reason]
    if reasons:
        return Comparison(first, second, judge, way, None, reason=reasons[0])
    gains = np.concatenate([pair.gains for _, pair in pairs])
    if np.isnan(gains).all():
        reason = f"{judge} scored both on no prompt"
        return Comparison(first, second, judge, way, None, reason=reason)
    groups = [seed.seed for seed, pair in pairs for _ in pair.gains]
    prompts = [prompt for seed, _ in pairs for prompt in seed.prompts]
    kls = [pair.kl for _, pair in pairs if pair.kl is not None]
    seconds = [pair.seconds for _, pair in pairs if pair.seconds is not None]
    return Comparison(
        first, second, judge, way,
        gain=mean_interval(gains, groups, prompts),
        kl=float(np.mean(kls)) if kls else None,
        seconds=float(np.mean(seconds)) if seconds else None,
    )  # fmt: skip


def _compare_outcomes(first: str, second: str, seeds: Sequence["_Seed"], judge: str) -> Comparison:
    """The comparison by a judge without scores: P(first better) - 1/2, at the end only."""
    gains: list[float] = []
    groups: list[Hashable] = []
    prompts: list[Hashable] = []
    for seed in seeds:
        outcomes = seed.outcomes_of(first, second)
        if outcomes is not None:
            gains += (outcomes - 0.5).tolist()
            groups += [seed.seed] * len(outcomes)
            prompts += seed.prompts
    if not gains:
        reason = f"{judge} has neither scored nor compared them"
        return Comparison(first, second, judge, END, None, reason=reason)
    return Comparison(first, second, judge, END, mean_interval(gains, groups, prompts), measure="win rate")


def _adjusted(family: Sequence[Comparison]) -> list[Comparison]:
    raw = [math.nan if comparison.gain is None else comparison.gain.p_value for comparison in family]
    adjusted = []
    for comparison, p_holm in zip(family, holm(raw), strict=True):
        adjusted.append(Comparison(**{**comparison.__dict__, "p_holm": p_holm}))
    return adjusted


@dataclass(frozen=True)
class _Pair:
    """Gains of a seed, (P,), or the reason why there are none."""

    gains: np.ndarray = field(default_factory=lambda: np.empty(0))
    kl: float | None = None
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Seed:
    """Results of a seed. `curves` has the saved policies of each system with scores, the last one last."""

    seed: Hashable
    prompts: list[Hashable]
    worked: set[str]
    curves: dict[str, list[Point]]
    outcomes: Mapping[str, Sequence[float | None]]
    result: Mapping[str, Any]
    judge: str
    clock: str

    @classmethod
    def of(cls, result: Mapping[str, Any], judge: str, clock: str) -> "_Seed":
        systems = result["systems"]
        worked = {name for name, system in systems.items() if system["status"] == "ok"}
        scored = [name for name in systems if name in worked and (systems[name].get("gold") or {}).get(judge)]
        ends = {name: _end_point(systems[name], judge, clock) for name in scored}
        reference = ends.get(result["reference"])
        curves = {}
        for name in scored:
            start = []
            if reference is not None and systems[name]["kind"] in STARTS_AT_REFERENCE:
                start = [_start_point(reference, systems[name], clock)]
            snapshots = _snapshot_points(systems[name], judge, clock)
            curves[name] = [*start, *snapshots, ends[name]]
        for name in scored:
            if systems[name]["kind"] == BEST_OF_N and reference is not None:
                curves[name] = _best_of_n_curve(name, systems, ends, reference)
        prompts = list(result.get("prompt_ids") or range(result["prompts"]))
        outcomes = (result.get("outcomes") or {}).get(judge) or {}
        return cls(result["seed"], prompts, worked, curves, outcomes, result, judge, clock)

    def at_end(self, first: str, second: str) -> _Pair:
        return _Pair(self.curves[first][-1].gold - self.curves[second][-1].gold)

    def at_equal_kl(self, first: str, second: str) -> _Pair:
        rising = {name: rising_points(self.curves[name]) for name in (first, second)}
        # The one that stays closer to the reference sets the KL.
        setter = min(rising, key=lambda name: rising[name][-1].mean_kl)
        target = KLTarget(rising[setter][-1].kl)
        if not target.kl.any():  # both would be the reference itself
            return _Pair(reason=f"the KL of {setter} is not clearly more than 0")
        golds = {name: gold_at_kl(rising[name], target) for name in rising}
        if golds[first] is None or golds[second] is None:
            return _Pair(reason="there are no saved policies on both sides of the smaller KL")
        return _Pair(golds[first] - golds[second], kl=target.mean)

    def at_equal_time(self, first: str, second: str, equal_seconds: float | None) -> _Pair:
        ends = [self.curves[name][-1].seconds for name in (first, second)]
        seconds = min(ends) if equal_seconds is None else equal_seconds
        golds = []
        for name in (first, second):
            reached = reached_within_seed(self.result, name, self.clock, seconds)
            if reached.measured is None:
                return _Pair(reason=reached.reason)
            gold = reached.measured["gold"].get(self.judge)
            # Nothing is said of a system that the judge scored nowhere, not even while it is still the reference.
            if gold is None or np.isnan(self.curves[name][-1].gold).all():
                return _Pair(reason=f"{self.judge} scored both on no prompt")
            golds.append(as_numbers(gold))
        return _Pair(golds[0] - golds[1], seconds=seconds)

    def outcomes_of(self, first: str, second: str) -> np.ndarray | None:
        if f"{first}|{second}" in self.outcomes:
            return as_numbers(self.outcomes[f"{first}|{second}"])
        if f"{second}|{first}" in self.outcomes:
            return 1 - as_numbers(self.outcomes[f"{second}|{first}"])
        return None


def reached_within_seed(result: Mapping[str, Any], name: str, clock: str, seconds: float) -> Reached:
    """What a system that worked had reached within a time in a seed: see `reached_within`."""
    system = result["systems"][name]
    reference = None
    if system["kind"] in STARTS_AT_REFERENCE:
        reference = result["systems"].get(result["reference"])
        if reference is not None and reference["status"] != "ok":
            reference = None
    return reached_within(name, system, reference, clock, seconds)


def _end_point(system: Mapping[str, Any], judge: str, clock: str) -> Point:
    gold = as_numbers(system["gold"][judge])
    return Point(gold, _per_prompt(system["kl"], len(gold)), float(system["total"][clock]))


def _start_point(reference: Point, system: Mapping[str, Any], clock: str) -> Point:
    """The reference policy, at the time when training of the system started."""
    started = float(system["total"][clock]) - float(system["own"][clock])
    return Point(reference.gold, np.zeros(len(reference.gold)), started)


def _snapshot_points(system: Mapping[str, Any], judge: str, clock: str) -> list[Point]:
    started = float(system["total"][clock]) - float(system["own"][clock])
    points = []
    for snapshot in system.get("snapshots") or []:
        gold = (snapshot.get("gold") or {}).get(judge)
        # The last policy may have been saved as a snapshot too. It is the end of the curve already.
        if gold and float(snapshot["own"][clock]) < float(system["own"][clock]):
            numbers = as_numbers(gold)
            kl = _per_prompt(snapshot["kl"], len(numbers))
            points.append(Point(numbers, kl, started + float(snapshot["own"][clock])))
    return points


def _best_of_n_curve(
    name: str, systems: Mapping[str, Mapping[str, Any]], ends: Mapping[str, Point], reference: Point
) -> list[Point]:
    """The reference, and best-of-m for each m up to the system's n."""
    n_of = {other: systems[other]["n"] for other in ends if systems[other]["kind"] == BEST_OF_N}
    smaller = sorted((other for other in n_of if n_of[other] < n_of[name]), key=n_of.__getitem__)
    # At the time of the reference, but best-of-n is not trained: it has no curve over time.
    start = Point(reference.gold, np.zeros(len(reference.gold)), math.inf)
    return [start, *(ends[other] for other in smaller), ends[name]]


def _per_prompt(kl: Any, n_prompts: int) -> np.ndarray:
    """KL of each prompt. Best-of-n may have one number for all."""
    if isinstance(kl, int | float):
        return np.full(n_prompts, float(kl))
    return as_numbers(kl)


def _first_judge(results: Sequence[Mapping[str, Any]]) -> str:
    for result in results:
        for system in result["systems"].values():
            for judge in system.get("gold") or {}:
                return judge
    for result in results:
        for judge in result.get("outcomes") or {}:
            return judge
    raise UserError(
        "compare: no system has a score or an outcome of any judge. Check `judges` and the systems' errors."
    )


def _check_judge(results: Sequence[Mapping[str, Any]], judge: str) -> None:
    known: list[str] = []
    for result in results:
        known += result.get("outcomes") or {}
        for system in result["systems"].values():
            known += system.get("gold") or {}
    if judge not in known:
        raise UserError(f"judge: no results of a judge named {judge!r}. Judges: {', '.join(dict.fromkeys(known))}.")

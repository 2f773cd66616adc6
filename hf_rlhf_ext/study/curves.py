"""A system's gold score along its training: against KL, and against time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_CLEARLY_LARGER = 2.0
"""Standard errors by which KL must grow from one kept point to the next: below it, a slope would be noise."""
AT_ONCE = 1.001
"""Ratio of two times that are equal but for rounding."""


@dataclass(frozen=True)
class Point:
    """A policy on the held-out prompts of a seed.

    Attributes:
        gold: (P,) gold score per prompt; NaN where the judge failed.
        kl: (P,) KL(policy ‖ reference policy) per completion, nats.
        seconds: time that was needed to get there.
    """

    gold: np.ndarray
    kl: np.ndarray
    seconds: float

    @property
    def mean_kl(self) -> float:
        """Mean KL over prompts, nats."""
        return float(np.nanmean(self.kl))


@dataclass(frozen=True)
class KLTarget:
    """A KL at which systems are compared: that of a policy, per prompt (P,), nats."""

    kl: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over prompts, nats."""
        return float(np.nanmean(self.kl))


def rising_points(curve: Sequence[Point]) -> list[Point]:
    """Points at which KL is clearly larger than at all kept points before (by two standard errors, paired by prompt).

    A KL can fall again during training. The first policy that reaches a KL is then the one that counts.
    """
    kept = [curve[0]]
    for point in curve[1:]:
        steps = point.kl - kept[-1].kl
        steps = steps[~np.isnan(steps)]
        if len(steps) == 0:
            continue
        error = steps.std(ddof=1) / np.sqrt(len(steps)) if len(steps) > 1 else 0.0
        if steps.mean() > _CLEARLY_LARGER * error:
            kept.append(point)
    return kept


def gold_at_kl(rising: Sequence[Point], target: KLTarget) -> np.ndarray | None:
    """Gold score at a KL by linear interpolation of the means, as one contribution per prompt (P,).

    The mean of the contributions is the interpolated gold score. They contain the effect that other prompts would have
    on the measured KL of both neighbors and of the target: an interval of the mean covers it (delta method).

    Args:
        rising: points with growing KL; see `rising_points`.
        target: the KL.

    Returns:
        The contributions, or None if no two points have the KL between them.
    """
    kls = [point.mean_kl for point in rising]
    for number, kl in enumerate(kls):
        if np.isclose(kl, target.mean, rtol=1e-9, atol=1e-12) and rising[number].kl is target.kl:
            return rising[number].gold
    for before, after in zip(rising, rising[1:], strict=False):
        width = after.mean_kl - before.mean_kl
        share = (target.mean - before.mean_kl) / width
        if 0 <= share <= 1:
            gold = (1 - share) * before.gold + share * after.gold
            kl = (1 - share) * before.kl + share * after.kl
            steps = after.gold - before.gold
            slope = float(np.nanmean(steps)) / width if not np.isnan(steps).all() else math.nan
            return gold - slope * (kl - target.kl)
    return None


@dataclass(frozen=True)
class Reached:
    """The last policy of a system that was kept within a time.

    Attributes:
        measured: what was measured of it, with `gold` and `kl`; None if no policy is known.
        seconds: time that was needed to get there.
        step: its optimizer step; 0 at the start of training, None at the end.
        reason: why no policy is known, in a clause.
    """

    measured: Mapping[str, Any] | None
    seconds: float = math.nan
    step: int | None = None
    reason: str | None = None


def reached_within(
    name: str, system: Mapping[str, Any], reference: Mapping[str, Any] | None, clock: str, seconds: float
) -> Reached:
    """What a system had reached within a time, by the policies that were kept: nothing is interpolated over time.

    A system that was finished counts at its end; at the moment when its training started, as the policy it started
    from; between both, with its last snapshot. Gold may rise and fall in between, so that a system without a snapshot
    by then has no value.

    Args:
        name: name of the system.
        system: its entry in the results of a seed.
        reference: the entry of the policy that its training started from; None if it started elsewhere.
        clock: "cpu_seconds" or "seconds".
        seconds: the time, with everything that the system builds on.
    """
    total, own = float(system["total"][clock]), float(system["own"][clock])
    if total <= seconds:
        return Reached(system, total)
    started = total - own
    within = [snapshot for snapshot in system.get("snapshots") or () if started + snapshot["own"][clock] <= seconds]
    if within:
        last = max(within, key=lambda snapshot: snapshot["own"][clock])
        return Reached(last, started + last["own"][clock], last.get("step"))
    if seconds * AT_ONCE < started:
        return Reached(None, reason=f"what {name} builds on was not ready by then")
    if reference is not None and seconds <= started * AT_ONCE:
        return Reached({"gold": reference["gold"], "kl": [0.0] * len(system["kl"])}, started, 0)
    return Reached(
        None, reason=f"no policy of {name} was kept in time before its end: set snapshot_seconds, or a smaller one"
    )

"""Over-optimization of a reward model: how gold reward rises and falls with the distance from the reference policy.

Gao, Schulman and Hilton (2022, arXiv:2210.10760) found that the gold reward follows, in d = √KL(policy ‖ reference),

    best-of-n:  d (α − β d)          reinforcement learning:  d (α − β log d)

above that of the reference policy. `fit_curve` fits these forms to one curve, and `fit_curves` to the curves of several
seeds, with intervals. `fall_after_peak` asks without a form whether gold falls.

**Intervals** cover other seeds and other prompts. The variance of a parameter is that over seeds (a jackknife) plus
that over prompts (a bootstrap that resamples the prompts of all seeds alike). Student's quantile has the degrees of
freedom of both, weighted by their parts (Cochran and Cox 1957), as in `statistics.mean_interval`: a percentile interval
of a bootstrap over three seeds would be too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..errors import UserError
from .statistics import LEVEL, Interval, mean_interval

Form = Literal["best_of_n", "rl"]
FORMS: tuple[Form, ...] = ("best_of_n", "rl")
N_PARAMETERS = 3
FARTHEST = 10.0
"""A peak beyond this multiple of the largest d counts as infinitely far: the points say nothing about it."""
NEAREST = 0.01
"""A peak below this fraction of the largest d counts as being at the reference policy."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What one run reached: gold reward at several distances from the reference policy.

    Args:
        kl: (N, P) or (N,) KL(policy ‖ reference) of each of N points, nats per completion; of each prompt, or one
            value per point, such as the exact KL of best-of-n.
        gold: (N, P) mean gold reward of each point on each of P prompts.

    Raises:
        UserError: if the shapes do not fit, there are too few points for a fit, or a number is not finite.
    """

    kl: Floats
    gold: Floats

    def __post_init__(self):
        gold = np.asarray(self.gold, dtype=np.float64)
        kl = np.asarray(self.kl, dtype=np.float64)
        if kl.ndim == 1 and gold.ndim == 2:
            kl = np.repeat(kl[:, None], gold.shape[1], axis=1)
        if gold.ndim != 2 or kl.shape != gold.shape:
            raise UserError(f"Curve: kl {kl.shape} and gold {gold.shape}: give both as (points, prompts).")
        if len(gold) < N_PARAMETERS:
            raise UserError(f"Curve: {len(gold)} points: a fit needs {N_PARAMETERS} or more.")
        if not (np.isfinite(kl).all() and np.isfinite(gold).all()):
            raise UserError("Curve: some kl or gold is not finite: leave these points out.")
        object.__setattr__(self, "kl", kl)
        object.__setattr__(self, "gold", gold)


@dataclass(frozen=True)
class Fit:
    """A fitted curve: gold reward = start + d (α − β d) for best-of-n, start + d (α − β log d) for RL, with d = √KL.

    Attributes:
        form: `"best_of_n"` or `"rl"`.
        start: gold reward of the reference policy.
        alpha: α, gold reward per √nat.
        beta: β, gold reward per nat (best-of-n) or per √nat (RL). Gold never falls if it is 0 or negative.
        rmse: root of the mean squared distance of the points from the curve, in gold reward.
    """

    form: Form
    start: float
    alpha: float
    beta: float
    rmse: float = math.nan

    def gold_at(self, kl: ArrayLike) -> Floats:
        """Gold reward of the curve at each KL (nats)."""
        return _features(np.asarray(kl, dtype=np.float64), self.form) @ [self.start, self.alpha, -self.beta]

    @property
    def peak_kl(self) -> float:
        """KL in nats at which the curve is highest: 0 if it only falls, infinite if it only rises."""
        log_d = float(_log_peak(np.array([self.alpha]), np.array([self.beta]), self.form)[0])
        return math.exp(2 * log_d) if log_d < 300.0 else math.inf


@dataclass(frozen=True)
class FittedCurves:
    """The fit to the curves of several seeds, with 95 % intervals.

    Attributes:
        fit: fit to the points of all seeds.
        alpha: interval of α.
        beta: interval of β.
        peak_kl: interval of the KL of the peak, in nats. An end beyond `FARTHEST` is infinite, below `NEAREST` it is 0.
        last_kl: KL of the last point, mean over seeds.
        largest_kl: largest KL of a point of a seed.
        seeds: number of seeds.
        n: number of prompts.
    """

    fit: Fit
    alpha: tuple[float, float]
    beta: tuple[float, float]
    peak_kl: tuple[float, float]
    last_kl: float
    largest_kl: float
    seeds: int
    n: int

    @property
    def peaks_before_last(self) -> bool:
        """Whether the interval of the peak's KL ends below the KL of the last point."""
        return self.peak_kl[1] < self.last_kl

    def as_dict(self) -> dict[str, Any]:
        """For JSON: infinite numbers, and a peak beyond `FARTHEST`, are None."""
        peak = self.fit.peak_kl if self.fit.peak_kl < FARTHEST**2 * self.largest_kl else math.inf
        return {
            "form": self.fit.form,
            "start": self.fit.start,
            "alpha": {"mean": self.fit.alpha, "ci95": list(self.alpha)},
            "beta": {"mean": self.fit.beta, "ci95": list(self.beta)},
            "rmse": self.fit.rmse,
            "peak_kl": {"mean": _or_none(peak), "ci95": [_or_none(end) for end in self.peak_kl]},
            "last_kl": self.last_kl,
            "largest_kl": self.largest_kl,
            "peaks_before_last": self.peaks_before_last,
            "seeds": self.seeds,
            "n": self.n,
        }


def fit_curve(kl: ArrayLike, gold: ArrayLike, form: Form) -> Fit:
    """Fits one curve by least squares.

    Args:
        kl: (N,) KL of each point, nats per completion. Negative estimates count as 0.
        gold: (N,) gold reward of each point.
        form: `"best_of_n"` or `"rl"`.

    Raises:
        UserError: for an unknown form, or fewer than three different KL.
    """
    _check_form(form)
    kl = np.asarray(kl, dtype=np.float64)
    gold = np.asarray(gold, dtype=np.float64)
    if len(np.unique(kl)) < N_PARAMETERS:
        raise UserError(f"fit_curve: {len(np.unique(kl))} different KL: a fit needs {N_PARAMETERS} or more.")
    start, alpha, beta = _solve(kl[None], gold[None], np.ones((1, len(kl))), form)[0]
    rmse = float(np.sqrt(np.mean((Fit(form, start, alpha, beta).gold_at(kl) - gold) ** 2)))
    return Fit(form, float(start), float(alpha), float(beta), rmse)


def fit_curves(curves: Sequence[Curve], form: Form, *, n_resamples: int = 1000, seed: int = 0) -> FittedCurves:
    """Fits one curve to the points of several seeds, with 95 % intervals over seeds and prompts.

    Args:
        curves: one curve per seed, on the same prompts. With a single one, the intervals cover prompts only.
        form: `"best_of_n"` or `"rl"`.
        n_resamples: number of resamples of the prompts.
        seed: seed of the resampling.

    Raises:
        UserError: for no curves, curves with different numbers of prompts, or an unknown form.
    """
    _check_curves(curves)
    kl = np.concatenate([curve.kl for curve in curves])  # (points of all seeds, P)
    gold = np.concatenate([curve.gold for curve in curves])
    fit = fit_curve(kl.mean(1), gold.mean(1), form)

    # Prompts are shared by all seeds, so a resample draws the same ones for each.
    n_prompts = kl.shape[1]
    shares = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), n_resamples)
    shares = shares / n_prompts  # (R, P)
    over_prompts = _parameters(shares @ kl.T, shares @ gold.T, np.ones((n_resamples, len(kl))), form, kl)

    # Each row leaves out the points of one seed.
    seed_of_point = np.repeat(np.arange(len(curves)), [len(curve.kl) for curve in curves])
    left_in = (seed_of_point[None] != np.arange(len(curves))[:, None]).astype(np.float64)
    n_seeds = len(curves)
    without_seed = None
    if n_seeds > 1:
        means = [np.repeat(values.mean(1)[None], n_seeds, axis=0) for values in (kl, gold)]
        without_seed = _parameters(*means, left_in, form, kl)

    estimate = _parameters(kl.mean(1)[None], gold.mean(1)[None], np.ones((1, len(kl))), form, kl)[0]
    low, high = _interval(estimate, over_prompts, without_seed, n_prompts)
    return FittedCurves(
        fit=fit,
        alpha=(float(low[0]), float(high[0])),
        beta=(float(low[1]), float(high[1])),
        peak_kl=_peak_ends(low[2], high[2], kl),
        last_kl=float(np.mean([curve.kl[-1].mean() for curve in curves])),
        largest_kl=float(kl.mean(1).max()),
        seeds=n_seeds,
        n=n_prompts,
    )


def fall_after_peak(curves: Sequence[Curve], *, last: int = 1) -> Interval:
    """How far gold falls from its highest point to the end of a run, without any form of the curve.

    The highest of many noisy points is too high by chance. So the point is chosen on one half of the prompts and the
    fall is measured on the other half, and the other way around. Runs whose gold never falls have a mean near 0.

    Args:
        curves: one curve per seed, on the same prompts.
        last: number of points whose mean is the end of the run.

    Returns:
        The fall in gold reward, with its interval over seeds and prompts.

    Raises:
        UserError: for no curves, or curves with different numbers of prompts.
    """
    _check_curves(curves)
    falls = []
    seeds = []
    prompts = []
    for number, curve in enumerate(curves):
        n_prompts = curve.gold.shape[1]
        for half in (np.arange(n_prompts) % 2 == 0, np.arange(n_prompts) % 2 == 1):
            highest = int(curve.gold[:, ~half].mean(1).argmax())
            end = curve.gold[-last:, half].mean(0)
            falls += (curve.gold[highest, half] - end).tolist()
            prompts += np.flatnonzero(half).tolist()
            seeds += [number] * int(half.sum())
    return mean_interval(falls, seeds, prompts)


def highest_point(curves: Sequence[Curve]) -> tuple[float, float, float]:
    """KL of the point with the highest gold of each seed, in nats: geometric mean, and its interval over seeds.

    Returns:
        Mean, low and high. Both ends are NaN for one seed.

    Raises:
        UserError: for no curves, or curves with different numbers of prompts.
    """
    _check_curves(curves)
    logs = []
    for curve in curves:
        kl = curve.kl.mean(1)
        smallest = max(NEAREST**2 * kl.max(), 1e-12)  # the start of a run has a KL of 0
        logs.append(math.log(max(kl[curve.gold.mean(1).argmax()], smallest)))
    mean = float(np.mean(logs))
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(logs) - 1) * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def _features(kl: Floats, form: Form) -> Floats:
    """(…, 3) factors of start, α and −β at each KL (…)."""
    d = np.sqrt(np.maximum(kl, 0.0))
    if form == "best_of_n":
        curved = d**2
    else:
        curved = d * np.log(np.maximum(d, 1e-12))  # 0 at d = 0
    return np.stack([np.ones_like(d), d, curved], axis=-1)


def _solve(kl: Floats, gold: Floats, weights: Floats, form: Form) -> Floats:
    """(R, 3) least-squares start, α and β of R resamples of N points, all given as (R, N)."""
    roots = np.sqrt(weights)
    features = _features(kl, form) * roots[..., None]  # (R, N, 3)
    solution = np.linalg.pinv(features) @ (gold * roots)[..., None]
    return solution[..., 0] * [1.0, 1.0, -1.0]


def _parameters(kl: Floats, gold: Floats, weights: Floats, form: Form, all_kl: Floats) -> Floats:
    """(R, 3) α, β and the logarithm of the peak's d, which is limited to what the points can say anything about."""
    _, alpha, beta = _solve(kl, gold, weights, form).T
    return np.stack([alpha, beta, np.clip(_log_peak(alpha, beta, form), *_log_limits(all_kl))], axis=1)


def _log_limits(kl: Floats) -> tuple[float, float]:
    """Logarithms of the smallest and the largest d of a peak that the points (N, P) can say anything about."""
    largest = math.log(math.sqrt(max(float(kl.mean(1).max()), 1e-12)))
    return largest + math.log(NEAREST), largest + math.log(FARTHEST)


def _log_peak(alpha: Floats, beta: Floats, form: Form) -> Floats:
    """Logarithm of the d at which the curve is highest; −∞ if it only falls and ∞ if it only rises."""
    rises = beta <= 0
    beta = np.where(rises, 1.0, beta)
    with np.errstate(divide="ignore", over="ignore"):
        if form == "best_of_n":
            found = np.log(np.maximum(alpha, 0.0) / (2 * beta))
        else:
            found = alpha / beta - 1.0
    return np.where(rises, np.inf, found)


def _interval(
    estimate: Floats, over_prompts: Floats, without_seed: Floats | None, n_prompts: int
) -> tuple[Floats, Floats]:
    """Both ends of the intervals of the parameters, from resamples of prompts and from leaving out each seed."""
    of_prompts = over_prompts.var(0, ddof=1)
    quantiles = np.full(len(estimate), stats.t.ppf(0.5 + LEVEL / 2, n_prompts - 1))
    variances = of_prompts
    if without_seed is not None:
        n_seeds = len(without_seed)
        of_seeds = (n_seeds - 1) * without_seed.var(0)  # the jackknife
        variances = of_seeds + of_prompts
        share = np.divide(of_seeds, variances, out=np.ones_like(of_seeds), where=variances > 0)
        quantiles = share * stats.t.ppf(0.5 + LEVEL / 2, n_seeds - 1) + (1 - share) * quantiles
    reach = quantiles * np.sqrt(variances)
    return estimate - reach, estimate + reach


def _peak_ends(low: float, high: float, kl: Floats) -> tuple[float, float]:
    """KL of both ends of the interval of the peak; 0 or infinite beyond what the points can say anything about."""
    nearest, farthest = _log_limits(kl)
    first = 0.0 if low <= nearest else math.exp(2 * min(low, farthest))
    second = math.inf if high >= farthest else math.exp(2 * max(high, nearest))
    return first, second


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise UserError(f"form={form!r}: choose one of {', '.join(FORMS)}.")


def _check_curves(curves: Sequence[Curve]) -> None:
    if not curves:
        raise UserError("curves: the list is empty: give one curve per seed.")
    sizes = sorted({curve.gold.shape[1] for curve in curves})
    if len(sizes) > 1:
        raise UserError(f"curves: they have {sizes} prompts: evaluate all seeds on the same prompts.")

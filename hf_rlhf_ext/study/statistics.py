"""Means, paired gains and win rates with 95 % confidence intervals, over held-out prompts and over seeds.

**Which variation an interval covers.** Values of one seed are independent draws over prompts, so that the interval says
what other prompts would have given with *these* trained models. It is a bootstrap over prompts (BCa). Values of several
seeds also vary because training a system again gives another system. That part needs seeds, not prompts: its interval
says what other seeds *and* other prompts would have given, and `Interval.over` is then "seeds and prompts".

**Why not a bootstrap over seeds.** Three seeds have 10 different resamples, and a resample has two thirds of the spread
of three independent draws. An interval from a bootstrap over 3 seeds and then over 100 prompts contained the truth in
77 % of simulated comparisons where seeds dominate, in 89 % where they have a third of the spread of prompts. Instead,
the variance of the mean is the sum of a part of seeds and a part of prompts, each with its own degrees of freedom (see
`mean_interval`): 94 to 98 % (tests/study/test_study_coverage.py).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from ..errors import UserError
from ..reward.preference_metrics import bootstrap_mean_ci

LEVEL = 0.95
"""Confidence level of all intervals."""
POWER = 0.8
"""Chance of finding an effect that `detectable_effect` and `needed_n` plan for."""

OVER_PROMPTS = "prompts"
OVER_SEEDS = "seeds and prompts"

LEAST_SHARE = 0.5
"""Least width of an interval over seeds, as a share of the width over prompts alone.

Measured: with 1, intervals that should contain the truth in 95 % of the cases contain it in 97 to 99 %.
"""

_FEW_VALUES = 2  # no interval from fewer
_FEW_EQUAL = 6  # no interval from fewer equal values: a sign test needs 6 for p < 0.05
_ROUNDING = 1e-12
_SMALLEST_P = 1e-12  # below it, 1 - p loses its digits


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: the estimate; NaN without values.
        low: lower end; NaN if there are too few values for an interval.
        high: upper end; NaN if there are too few values for an interval.
        n: number of values.
        seeds: number of seeds that the values come from.
        over: what the interval covers: "prompts" (other prompts, the same trained models) or "seeds and prompts".
        p_value: two-sided p-value of Student's t-test that the mean is `null`; NaN without an interval.
        null: mean under the null hypothesis: 0 for gains, 0.5 for win rates.
    """

    mean: float
    low: float
    high: float
    n: int
    seeds: int = 1
    over: str = OVER_PROMPTS
    p_value: float = math.nan
    null: float = 0.0

    @property
    def half_width(self) -> float:
        """Half of the width of the interval, in the unit of the values."""
        return (self.high - self.low) / 2

    @property
    def excludes_null(self) -> bool:
        """Whether the whole interval lies on one side of `null`."""
        return self.low > self.null or self.high < self.null

    def as_dict(self) -> dict[str, Any]:
        """Returns `mean`, `ci95`, `n`, `seeds`, `over` and `p_value` for JSON; an undefined number is None."""
        return {
            "mean": _number_or_none(self.mean),
            "ci95": [_number_or_none(self.low), _number_or_none(self.high)],
            "n": self.n,
            "seeds": self.seeds,
            "over": self.over,
            "p_value": _number_or_none(self.p_value),
        }


def mean_interval(
    values: Sequence[float | None],
    groups: Sequence[Hashable] | None = None,
    prompts: Sequence[Hashable] | None = None,
    *,
    null: float = 0.0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    seed: int = 0,
    n_resamples: int = 9999,
) -> Interval:
    """Mean of values with its 95 % confidence interval, over prompts or over seeds and prompts.

    With values of one seed: bootstrap over prompts (BCa), widened for small samples (Hesterberg 2015), by 2 % for 100
    prompts. With values of S ≥ 2 seeds, the model is value = μ + seed + prompt + rest, and the mean is that of the
    seeds' means. Its variance has these parts:

    - V_seed = Var(means of seeds) / S, with S - 1 degrees of freedom. It contains the rest.
    - V_prompt = Var(means of prompts) / P - Var(rest) / (S P), if the seeds share P prompts, with P - 1 degrees of
      freedom. If each seed has its own prompts, V_seed contains this too.

    Student's quantile of the sum is the mean of the parts' quantiles, weighted by the parts (Cochran and Cox
    1957). Few seeds thus give wide intervals: 2 seeds have a quantile of 12.7, 3 seeds of 4.3, where seeds dominate.
    With shared prompts, the interval is at least half (`LEAST_SHARE`) as wide as the one over prompts alone.

    Args:
        values: (N,) one value per seed and prompt. None or NaN (a judge failed) are left out.
        groups: (N,) seed of each value. None: one seed.
        prompts: (N,) prompt of each value. Needed if seeds share prompts: without it, the prompts of different seeds
            are taken to be different ones.
        null: mean under the null hypothesis of `p_value`.
        bounds: smallest and largest possible mean; ends of the interval are clipped to them.
        seed: seed of the bootstrap.
        n_resamples: resamples of the bootstrap.

    Returns:
        The interval. Its ends are NaN for fewer than two values, and where nothing can be said of other prompts: of
        one prompt in several seeds, and of fewer than 6 prompts with equal values. From 6 on, equal values have an
        interval without width, and the p-value of a sign test.

    Raises:
        UserError: `groups` or `prompts` have not one entry per value.
    """
    sample = _Sample.of(values, groups, prompts)
    if sample.are_equal():
        return _interval_of_equal_values(sample, null)
    if sample.n_seeds < 2:
        return _one_seed_interval(sample, null, bounds, seed, n_resamples)

    mean, parts, over_prompts = sample.mean_and_variance()
    if sample.n_prompts == 1:
        return Interval(mean, math.nan, math.nan, len(sample.values), sample.n_seeds, OVER_SEEDS, null=null)
    # Two or three seeds may agree by chance: their spread alone would then claim what one seed cannot show.
    least_reach = LEAST_SHARE * over_prompts.quantile(LEVEL) * over_prompts.error
    reach = max(parts.quantile(LEVEL) * parts.error, least_reach)
    low, high = np.clip([mean - reach, mean + reach], *bounds)
    p_value = max(parts.p_value(mean - null), over_prompts.p_value((mean - null) / LEAST_SHARE))
    return Interval(mean, float(low), float(high), len(sample.values), sample.n_seeds, OVER_SEEDS, p_value, null)


def paired_gain(
    before: Sequence[float | None],
    after: Sequence[float | None],
    groups: Sequence[Hashable] | None = None,
    prompts: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean of `after - before` on the same prompts, with the interval of `mean_interval`.

    Both are (N,), in the same order. A prompt that the judge failed on (None) in one of them is left out.
    """
    if len(before) != len(after):
        raise UserError(f"A paired gain needs as many values before as after, got {len(before)} and {len(after)}.")
    gains = as_numbers(after) - as_numbers(before)  # NaN if one is missing
    return mean_interval(gains, groups, prompts)


@dataclass(frozen=True)
class WinRate:
    """How often the first of two systems is better.

    Attributes:
        wins: number of pairs that the first system wins: its probability of being better is over 0.5.
        ties: number of pairs with a probability of exactly 0.5.
        losses: number of pairs that the second system wins.
        failed: number of pairs without a judgment.
        rate: mean probability that the first is better; a tie counts one half.
        wilson: Wilson's 95 % interval of wins / (wins + losses), which has no ties and takes pairs as independent: it
            covers prompts, not seeds. NaN without decided pairs.
    """

    wins: int
    ties: int
    losses: int
    failed: int
    rate: Interval
    wilson: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts, `rate` as in `Interval.as_dict`, and `wilson95` for JSON."""
        return {
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "failed": self.failed,
            "rate": self.rate.as_dict(),
            "wilson95": [_number_or_none(end) for end in self.wilson],
        }

    def reversed(self) -> "WinRate":
        """Returns the win rate of the second system against the first."""
        rate = Interval(
            1 - self.rate.mean, 1 - self.rate.high, 1 - self.rate.low, self.rate.n, self.rate.seeds, self.rate.over,
            self.rate.p_value, self.rate.null,
        )  # fmt: skip
        low, high = self.wilson
        return WinRate(self.losses, self.ties, self.wins, self.failed, rate, (1 - high, 1 - low))


def win_rate(
    outcomes: Sequence[float | None],
    groups: Sequence[Hashable] | None = None,
    prompts: Sequence[Hashable] | None = None,
) -> WinRate:
    """Win rate of the first of two systems. Ties count one half.

    Args:
        outcomes: (N,) probability that the first is better, from 0 to 1; 0.5 is a tie, None a failed judgment.
        groups: (N,) seed of each outcome.
        prompts: (N,) prompt of each outcome; see `mean_interval`.

    Raises:
        UserError: An outcome is not between 0 and 1.
    """
    numbers = checked_outcomes(outcomes)
    judged = numbers[~np.isnan(numbers)]
    wins = int((judged > 0.5).sum())
    losses = int((judged < 0.5).sum())
    return WinRate(
        wins=wins,
        ties=len(judged) - wins - losses,
        losses=losses,
        failed=len(numbers) - len(judged),
        rate=_rate_interval(numbers, groups, prompts),
        wilson=wilson_interval(wins, wins + losses),
    )


def _rate_interval(
    outcomes: np.ndarray, groups: Sequence[Hashable] | None, prompts: Sequence[Hashable] | None
) -> Interval:
    rate = mean_interval(outcomes, groups, prompts, null=0.5, bounds=(0.0, 1.0))
    if rate.mean not in (0.0, 1.0):
        return rate
    # One side won all pairs: without any spread, the interval would be a point. Seeds that share prompts are not
    # independent, so only the distinct prompts count.
    judged = ~np.isnan(outcomes)
    n_pairs = int(judged.sum())
    if prompts is not None:
        n_pairs = len({prompt for prompt, is_judged in zip(prompts, judged, strict=True) if is_judged})
    low, high = wilson_interval(round(rate.mean * n_pairs), n_pairs)
    p_value = min(1.0, 2 * 0.5**n_pairs)  # sign test
    return replace(rate, low=low, high=high, p_value=p_value)


def win_rate_matrix(
    outcomes: Mapping[tuple[str, str] | str, Sequence[float | None]],
    groups: Sequence[Hashable] | None = None,
    prompts: Sequence[Hashable] | None = None,
) -> dict[str, dict[str, WinRate]]:
    """Win rates of each system against each other one: `matrix[a][b]` is that of `a` against `b`.

    Args:
        outcomes: for each pair, `("a", "b")` or `"a|b"`, the probabilities that `a` is better; see `win_rate`.
        groups: (N,) seed of each outcome, the same for all pairs.
        prompts: (N,) prompt of each outcome, the same for all pairs.
    """
    matrix: dict[str, dict[str, WinRate]] = {}
    for pair, values in outcomes.items():
        first, second = names_of_pair(pair)
        result = win_rate(values, groups, prompts)
        matrix.setdefault(first, {})[second] = result
        matrix.setdefault(second, {})[first] = result.reversed()
    return matrix


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number (Holm 1979): each one below 0.05 is then right together with all others, 95 %.

    NaN stays NaN and does not count as a comparison.
    """
    raw = np.asarray(p_values, float)
    adjusted = np.full(len(raw), math.nan)
    defined = np.flatnonzero(~np.isnan(raw))
    ascending = defined[np.argsort(raw[defined], kind="stable")]
    largest = 0.0
    for rank, number in enumerate(ascending):
        # The smallest of m counts m times, the next one m - 1 times, and none is smaller than one before it.
        largest = max(largest, min(1.0, (len(ascending) - rank) * raw[number]))
        adjusted[number] = largest
    return adjusted.tolist()


def detectable_effect(interval: Interval) -> float:
    """Smallest true distance from the null that data like these would have found with a chance of 80 %.

    An effect is found if the interval excludes the null. In a normal approximation, the effect must be
    1 + z(0.80) / z(0.975) = 1.43 half widths. NaN without an interval.
    """
    return interval.half_width * (1 + stats.norm.ppf(POWER) / stats.norm.ppf((1 + LEVEL) / 2))


def needed_n(effect: float, sd: float) -> int:
    """Number of prompts of one seed that finds a mean of `effect` with a chance of 80 %; `sd` is that of one value.

    Raises:
        ValueError: `effect` is 0, which no number of prompts can find.
    """
    if effect == 0:
        raise ValueError("No number of prompts finds an effect of 0: pass the smallest effect that matters.")
    z_sum = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)
    return max(_FEW_VALUES, math.ceil((z_sum * sd / effect) ** 2))


def names_of_pair(pair: tuple[str, str] | str) -> tuple[str, str]:
    """Returns the two systems of the key `("a", "b")` or `"a|b"`."""
    if isinstance(pair, str):
        first, bar, second = pair.partition("|")
        if not bar:
            raise UserError(f"The outcomes of two systems are stored under 'first|second', got {pair!r}.")
        return first, second
    first, second = pair
    return first, second


def as_numbers(values: Sequence[float | None]) -> np.ndarray:
    """Returns values as (N,) floats, with NaN for None."""
    return np.array([math.nan if value is None else value for value in values], float)


def checked_outcomes(outcomes: Sequence[float | None]) -> np.ndarray:
    """Returns outcomes as (N,) floats, with NaN for None. Raises `UserError` for one that is no probability."""
    numbers = as_numbers(outcomes)
    outside = np.flatnonzero((numbers < 0) | (numbers > 1))
    if len(outside):
        row = int(outside[0])
        raise UserError(
            f"Outcome {row} is {numbers[row]:g}, but it must be the probability that the first is better, from 0 to 1."
        )
    return numbers


@dataclass(frozen=True)
class _Sample:
    """The values that are there, (N,), with the numbers of their seeds and prompts, from 0."""

    values: np.ndarray
    seeds: np.ndarray
    prompts: np.ndarray | None

    @classmethod
    def of(
        cls,
        values: Sequence[float | None],
        groups: Sequence[Hashable] | None,
        prompts: Sequence[Hashable] | None,
    ) -> "_Sample":
        numbers = as_numbers(values)
        for name, labels in (("groups", groups), ("prompts", prompts)):
            if labels is not None and len(labels) != len(numbers):
                raise UserError(f"`{name}` needs one entry per value: {len(labels)} for {len(numbers)} values.")
        there = ~np.isnan(numbers)
        seeds = _numbered(groups if groups is not None else [0] * len(numbers), there)
        prompt_numbers = None if prompts is None else _numbered(prompts, there)
        return cls(numbers[there], seeds, prompt_numbers)

    @property
    def n_seeds(self) -> int:
        return len(np.unique(self.seeds))

    @property
    def n_prompts(self) -> int:
        """Number of different prompts; of values, if their prompts are not known."""
        return len(self.values) if self.prompts is None else len(np.unique(self.prompts))

    def are_equal(self) -> bool:
        """Whether all values are the same but for rounding, and there is at least one."""
        if len(self.values) == 0:
            return False
        return bool(np.ptp(self.values) <= _ROUNDING * max(1.0, np.abs(self.values).max()))

    def mean_and_variance(self) -> tuple[float, "_VarianceParts", "_VarianceParts"]:
        """Mean of the seeds' means, the parts of its variance, and its variance over prompts alone."""
        seed_means = _means_of(self.values, self.seeds)
        n_seeds = len(seed_means)
        of_seeds = _VarianceParts(np.array([seed_means.var(ddof=1) / n_seeds]), np.array([n_seeds - 1]))
        mean = float(seed_means.mean())
        if self.prompts is None or not self._shares_prompts():
            return mean, of_seeds, of_seeds
        prompt_variance, rest_variance, n_prompts = self._prompt_variance(seed_means)
        # An estimate below 0 means that prompts make no difference.
        of_prompts = max(0.0, prompt_variance - rest_variance)
        both = _VarianceParts(np.append(of_seeds.variances, of_prompts), np.append(of_seeds.freedoms, n_prompts - 1))
        return mean, both, _VarianceParts(np.array([prompt_variance]), np.array([n_prompts - 1]))

    def _shares_prompts(self) -> bool:
        n_prompts = int(self.prompts.max()) + 1
        n_cells = len(np.unique(self.seeds * n_prompts + self.prompts))
        return 2 <= n_prompts < n_cells

    def _prompt_variance(self, seed_means: np.ndarray) -> tuple[float, float, int]:
        """Variance of the mean over prompts, the part of it that is not the prompts' own, and the number of prompts."""
        centered = self.values - seed_means[self.seeds]
        prompt_effects = _means_of(centered, self.prompts)
        n_prompts = len(prompt_effects)
        rest = centered - prompt_effects[self.prompts]
        rest_freedom = max(1, len(rest) - len(seed_means) - n_prompts + 1)
        rest_variance = float((rest**2).sum()) / rest_freedom / len(rest)  # that of a mean of all values
        return float(prompt_effects.var(ddof=1)) / n_prompts, rest_variance, n_prompts


@dataclass(frozen=True)
class _VarianceParts:
    """Parts of the variance of a mean, (K,), and the degrees of freedom of each estimate, (K,)."""

    variances: np.ndarray
    freedoms: np.ndarray

    @property
    def error(self) -> float:
        return math.sqrt(self.variances.sum())

    def quantile(self, level: float) -> float:
        """Two-sided quantile of mean / error: the mean of Student's quantiles, weighted by the parts."""
        if self.error == 0:
            return 0.0
        quantiles = special.stdtrit(self.freedoms, (1 + level) / 2)
        return float(quantiles @ self.variances / self.variances.sum())

    def p_value(self, distance: float) -> float:
        """Two-sided p-value of a mean at this distance from the null: 1 - level of the interval that ends at it."""
        if self.error == 0:
            return float(distance == 0)
        statistic = abs(distance) / self.error
        # Each part alone bounds the p-value of their weighted mean.
        bounds = 2 * special.stdtr(self.freedoms, -statistic)
        smallest, largest = float(bounds.min()), float(bounds.max())
        if smallest == largest or smallest < _SMALLEST_P:
            return largest
        return float(optimize.brentq(lambda p: self.quantile(1 - p) - statistic, smallest / 2, min(1, largest * 2)))


def _interval_of_equal_values(sample: _Sample, null: float) -> Interval:
    """Without any spread, a bootstrap has no width, for two values too: only their number says how sure they are."""
    mean = float(sample.values[0])
    low = p_value = math.nan
    if sample.n_prompts >= _FEW_EQUAL:
        low = mean
        is_null = abs(mean - null) <= _ROUNDING * max(1.0, abs(mean))
        p_value = 1.0 if is_null else 2 * 0.5**sample.n_prompts  # sign test
    over = OVER_PROMPTS if sample.n_seeds < 2 else OVER_SEEDS
    return Interval(mean, low, low, len(sample.values), sample.n_seeds, over, p_value, null)


def _one_seed_interval(
    sample: _Sample, null: float, bounds: tuple[float, float], seed: int, n_resamples: int
) -> Interval:
    """Bootstrap over prompts. Values of a prompt that occurs several times are averaged first."""
    values = sample.values
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, 0, null=null)
    if sample.prompts is not None:
        values = _means_of(values, sample.prompts)
    mean = float(values.mean())
    if len(values) < _FEW_VALUES:
        return Interval(mean, math.nan, math.nan, n, null=null)
    ends = np.array(bootstrap_mean_ci(values, seed=seed, n_resamples=n_resamples))
    low, high = np.clip(mean + (ends - mean) * _small_sample_factor(len(values)), *bounds)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    p_value = _t_test(mean - null, error, len(values) - 1)
    return Interval(mean, float(low), float(high), n, p_value=p_value, null=null)


def _small_sample_factor(n: int) -> float:
    """By how much a bootstrap interval of n values is too narrow (Hesterberg 2015, arXiv:1411.5279, sec. 4.1).

    A resample varies by (n - 1) / n of the estimated variance, and its quantiles are normal ones, not Student's.
    """
    tail = (1 + LEVEL) / 2
    return math.sqrt(n / (n - 1)) * float(special.stdtrit(n - 1, tail) / special.ndtri(tail))


def _t_test(distance: float, error: float, freedom: float) -> float:
    """Two-sided p-value of Student's t-test; without any spread, 1 at the null and 0 elsewhere."""
    if error == 0:
        return float(distance == 0)
    return float(2 * special.stdtr(freedom, -abs(distance) / error))


def _means_of(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of the values of each label, (K,), for labels from 0 to K - 1."""
    return np.bincount(labels, weights=values) / np.bincount(labels)


def _numbered(labels: Sequence[Hashable], there: np.ndarray) -> np.ndarray:
    """Numbers of the labels of the values that are there, from 0 without gaps, in the order of appearance."""
    numbers: dict[Hashable, int] = {}
    kept = [label for label, is_there in zip(labels, there, strict=True) if is_there]
    return np.array([numbers.setdefault(label, len(numbers)) for label in kept], int)


def _number_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

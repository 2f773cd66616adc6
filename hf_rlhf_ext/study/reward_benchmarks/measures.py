"""Numbers of a benchmark with 95 % intervals: weighted sums of means over its rows, and a bootstrap over rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

N_RESAMPLES = 2000
_DRAWS_AT_A_TIME = 5 * 10**6


class Term(NamedTuple):
    """A summand of a formula: `weight` · Σₖ `columns[k]` · (mean of column k of the part named `part`)."""

    part: str
    weight: float
    columns: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Measure:
    """A number of a benchmark.

    Attributes:
        value: The number.
        ci95: Its 95 % interval (low, high): percentiles of a bootstrap over rows, within each part. None for one row.
        n: Number of rows that it is computed from.
    """

    value: float
    ci95: tuple[float, float] | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The measure as in `report.json`."""
        return {"value": self.value, "ci95": list(self.ci95) if self.ci95 else None, "n": self.n}


@dataclass(frozen=True)
class Outcome:
    """What a benchmark says of a reward model.

    Attributes:
        measures: Numbers by name. The first one is the score of the benchmark.
        details: Numbers that are only in `report.json`, such as the style matrix of RM-Bench.
        notes: Sentences on how to read the numbers, such as which sections are missing.
    """

    measures: dict[str, Measure]
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> Measure:
        """The score of the benchmark."""
        return next(iter(self.measures.values()))


def score_of_all(missing: Sequence[str], what: str) -> tuple[str, tuple[str, ...]]:
    """The name of the score of a benchmark, and a note, where parts of it have no rows.

    Args:
        missing: Names of the parts without rows.
        what: What a part is called, such as "section".
    """
    if not missing:
        return "score", ()
    plural = "s" if len(missing) > 1 else ""
    note = f"no rows of the {what}{plural} {', '.join(missing)}: the score cannot be compared with published ones"
    return "score (incomplete)", (note,)


def measured(
    parts: Mapping[str, np.ndarray], formulas: Mapping[str, Sequence[Term]], *, seed: int = 0
) -> dict[str, Measure]:
    """Computes formulas of means, with bootstrap intervals that resample the rows of each part.

    Args:
        parts: For each part, such as a subset, an array (N, C): C numbers of each of N rows. NaN is a number that a row
            does not have; the mean of a column is over the others.
        formulas: Terms of each measure.
        seed: Seed of the resampling.

    Returns:
        The measures by name, in the order of `formulas`.
    """
    rng = np.random.default_rng(seed)
    values = {name: _as_table(part) for name, part in parts.items()}
    means = {name: _column_means(part, axis=0) for name, part in values.items()}  # (C,)
    resampled = {name: _resampled_means(part, rng) for name, part in values.items()}  # (R, C)
    measures = {}
    for name, terms in formulas.items():
        value = float(sum(term.weight * (means[term.part] @ np.array(term.columns)) for term in terms))
        draws = sum(term.weight * (resampled[term.part] @ np.array(term.columns)) for term in terms)  # (R,)
        n = sum(len(values[part]) for part in {term.part for term in terms})
        low, high = np.percentile(draws, [2.5, 97.5])
        measures[name] = Measure(value, (float(low), float(high)) if n > 1 else None, n)
    return measures


def _as_table(part: np.ndarray) -> np.ndarray:
    """A part as (N, C) float64; a part with one number a row may be (N,)."""
    part = np.asarray(part, float)
    return part[:, None] if part.ndim == 1 else part


def _resampled_means(part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means (R, C) of the columns of a part (N, C) in R resamples of its rows."""
    n, n_columns = part.shape
    size = max(1, _DRAWS_AT_A_TIME // max(1, n * n_columns))
    means = []
    for start in range(0, N_RESAMPLES, size):
        drawn = rng.integers(0, n, size=(min(size, N_RESAMPLES - start), n))
        means.append(_column_means(part[drawn], axis=1))
    return np.concatenate(means)


def _column_means(values: np.ndarray, axis: int) -> np.ndarray:
    """Means over the numbers that are not NaN; 0 where there are none."""
    is_known = ~np.isnan(values)
    sums = np.where(is_known, values, 0.0).sum(axis)
    return sums / np.maximum(is_known.sum(axis), 1)

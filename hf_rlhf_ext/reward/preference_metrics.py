"""Metrics of how well scores agree with judgments: pure functions of numpy arrays over a whole evaluation set.

Shapes: `deltas` (P,) are score differences r_i - r_j of P pairs, in units of reward. `targets` (P,) are P(i ≻ j), from
    0
to 1, where 0.5 is a tie. A mean over no pairs is NaN.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import special, stats

PERCENTILES = (5, 50, 95)
"""Percentiles of the scores of chosen and rejected completions that an evaluation logs."""

METRIC_NAMES = (
    *("loss", "nll", "accuracy", "accuracy_low", "accuracy_high", "accuracy_ties", "brier", "ece", "margin", "pairs"),
    *("gain", "gain_low", "gain_high", "longer_wins_baseline", "min_reward", "mean_reward", "max_reward"),
    *(f"{side}_p{percentile}" for side in ("chosen", "rejected") for percentile in PERCENTILES),
    *("runtime", "samples_per_second", "steps_per_second", "num_tokens"),
)
"""Names of the metrics of an evaluation. Those of groups depend on the data: `accuracy/<title>/<name>`."""

TIE_THRESHOLD = math.log(3)
"""|Δ| below which σ(Δ) is closer to 0.5 than to 0 or 1, in units of reward: the model then predicts a tie."""


def pairwise_accuracy(deltas: np.ndarray, targets: np.ndarray) -> float:
    """Fraction of pairs whose preferred completion has the strictly higher score. Ties (target 0.5) are left out."""
    deltas = np.asarray(deltas, float)
    targets = np.asarray(targets, float)
    decided = targets != 0.5
    if not decided.any():
        return math.nan
    return float(np.mean(deltas[decided] * (targets[decided] - 0.5) > 0))


def accuracy_with_ties(deltas: np.ndarray, targets: np.ndarray, threshold: float = TIE_THRESHOLD) -> float:
    """Fraction of all pairs for which the prediction (i, j or tie) is right; |Δ| < `threshold` predicts a tie."""
    deltas = np.asarray(deltas, float)
    targets = np.asarray(targets, float)
    if len(deltas) == 0:
        return math.nan
    called = np.where(np.abs(deltas) < threshold, 0.0, np.sign(deltas))  # 1: i, -1: j, 0: a tie
    return float(np.mean(called == np.sign(targets - 0.5)))


def preference_nll(deltas: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Weighted mean of -[t log σ(Δ) + (1 - t) log σ(-Δ)], in nats per pair; log 2 for equal scores (chance)."""
    deltas = np.asarray(deltas, float)
    targets = np.asarray(targets, float)
    losses = targets * np.logaddexp(0.0, -deltas) + (1 - targets) * np.logaddexp(0.0, deltas)
    if weights is None:
        weights = np.ones_like(losses)
    else:
        weights = np.asarray(weights, float)
    total = np.sum(weights)
    if not total > 0:
        return math.nan
    return float(np.sum(weights * losses) / total)


def brier_score(deltas: np.ndarray, targets: np.ndarray) -> float:
    """Mean of (σ(Δ) - t)² (Brier 1950). Without ties, equal scores (chance) give 0.25."""
    deltas = np.asarray(deltas, float)
    targets = np.asarray(targets, float)
    if len(deltas) == 0:
        return math.nan
    return float(np.mean((special.expit(deltas) - targets) ** 2))


def reliability_bins(deltas: np.ndarray, targets: np.ndarray, n_bins: int = 10) -> list[dict[str, float]]:
    """Bins for a reliability diagram. In a calibrated model, confidence and accuracy of each bin are equal.

    Args:
        deltas: (P,) score differences.
        targets: (P,) P(i ≻ j).
        n_bins: number of bins of equal width in the probability σ(|Δ|), from 0.5 to 1.

    Returns:
        For each bin that is not empty: `n`, the number of pairs; `confidence`, the mean of σ(|Δ|); and `accuracy`, the
        mean target of the completion with the higher score, 0.5 if both scores are equal.
    """
    deltas = np.asarray(deltas, float)
    targets = np.asarray(targets, float)
    confidence = special.expit(np.abs(deltas))
    right = 0.5 + np.sign(deltas) * (targets - 0.5)
    # Maps [0.5, 1] to bin numbers. A probability of exactly 1 belongs to the last bin.
    bin_numbers = np.clip(((confidence - 0.5) * 2 * n_bins).astype(int), 0, n_bins - 1)
    bins = []
    for number in range(n_bins):
        in_bin = bin_numbers == number
        if in_bin.any():
            bins.append(
                {
                    "n": int(in_bin.sum()),
                    "confidence": float(confidence[in_bin].mean()),
                    "accuracy": float(right[in_bin].mean()),
                }
            )
    return bins


def calibration_error(deltas: np.ndarray, targets: np.ndarray, n_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): mean gap of confidence and accuracy of the bins, weighted by n."""
    n_pairs = 0
    weighted_gaps = 0
    for entry in reliability_bins(deltas, targets, n_bins):
        n_pairs += entry["n"]
        weighted_gaps += entry["n"] * abs(entry["confidence"] - entry["accuracy"])
    if n_pairs == 0:
        return math.nan
    return weighted_gaps / n_pairs


def longer_wins_baseline(length_deltas: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy of the rule "the longer completion is better", without ties. A useful reward model must exceed it.

    Args:
        length_deltas: (P,) length of i minus length of j, in any unit. Equal lengths count as half right.
        targets: (P,) P(i ≻ j).
    """
    length_deltas = np.asarray(length_deltas, float)
    targets = np.asarray(targets, float)
    decided = targets != 0.5
    if not decided.any():
        return math.nan
    agreement = np.sign(length_deltas[decided]) * np.sign(targets[decided] - 0.5)
    return float(np.mean((agreement + 1) / 2))


def preference_report(
    deltas: np.ndarray, targets: np.ndarray, weights: np.ndarray, length_deltas: np.ndarray
) -> dict[str, float]:
    """Computes all of these metrics. Undefined ones are left out, such as the accuracy if all pairs are ties.

    Args:
        deltas: (P,) score differences.
        targets: (P,) P(i ≻ j).
        weights: (P,) weights of the pairs. Only `nll` uses them.
        length_deltas: (P,) length of i minus length of j, in any unit.

    Returns:
        Metrics by name: `pairs`, `nll`, `brier`, `ece`, `accuracy`, `margin` (mean score difference, preferred minus
        other), `longer_wins_baseline` and `accuracy_ties`.
    """
    deltas = np.asarray(deltas, float)
    targets = np.asarray(targets, float)
    decided = targets != 0.5
    report: dict[str, float] = {"pairs": len(deltas), "nll": preference_nll(deltas, targets, weights)}
    if len(deltas):
        report["brier"] = brier_score(deltas, targets)
        report["ece"] = calibration_error(deltas, targets)
    if decided.any():
        report["accuracy"] = pairwise_accuracy(deltas, targets)
        report["margin"] = float(np.mean(deltas[decided] * np.sign(targets[decided] - 0.5)))
        report["longer_wins_baseline"] = longer_wins_baseline(length_deltas, targets)
    if not decided.all():
        report["accuracy_ties"] = accuracy_with_ties(deltas, targets)
    return report


def bootstrap_mean_ci(
    values: np.ndarray, *, level: float = 0.95, seed: int = 0, n_resamples: int = 9999
) -> tuple[float, float]:
    """Bootstrap confidence interval (BCa) of the mean of independent values.

    Args:
        values: (N,) values.
        level: confidence level.
        seed: seed of the resampling.
        n_resamples: number of resamples.

    Returns:
        The lower and the upper end; both are the mean if all values are equal.
    """
    values = np.asarray(values, float)
    if len(values) == 0:
        return math.nan, math.nan
    if len(values) < 2 or np.ptp(values) == 0:  # BCa is undefined without spread
        mean = float(np.mean(values))
        return mean, mean
    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=n_resamples,
        rng=np.random.default_rng(seed),
        batch=999,  # resamples at one time, to limit memory
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def bootstrap_accuracy_ci(
    deltas: np.ndarray, targets: np.ndarray, prompts: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap confidence interval (percentile) of `pairwise_accuracy`, which resamples whole prompts.

    The pairs of a prompt share completions and are not independent, so resampling pairs would give a too narrow
    interval.

    Args:
        deltas: (P,) score differences.
        targets: (P,) P(i ≻ j).
        prompts: (P,) number of the prompt of each pair.
        level: confidence level.
        seed: seed of the resampling.

    Returns:
        The lower and the upper end; NaN for fewer than two prompts.
    """
    right, decided = _right(deltas, targets)
    return clustered_mean_ci(right, np.asarray(prompts)[decided], level=level, seed=seed)


def bootstrap_gain_ci(
    deltas: np.ndarray,
    length_deltas: np.ndarray,
    targets: np.ndarray,
    prompts: np.ndarray,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap confidence interval of accuracy minus `longer_wins_baseline`; see `bootstrap_accuracy_ci`."""
    right, decided = _right(deltas, targets)
    longer, _ = _right(length_deltas, targets, equal=0.5)
    return clustered_mean_ci(right - longer, np.asarray(prompts)[decided], level=level, seed=seed)


def clustered_mean_ci(
    values: np.ndarray, groups: np.ndarray, *, level: float = 0.95, seed: int = 0, n_resamples: int = 9999
) -> tuple[float, float]:
    """Bootstrap confidence interval (percentile) of a mean, which resamples whole groups.

    Args:
        values: (N,) values.
        groups: (N,) group of each value.
        level: confidence level.
        seed: seed of the resampling.
        n_resamples: number of resamples.

    Returns:
        The lower and the upper end; NaN for fewer than two groups.
    """
    _, group_numbers = np.unique(groups, return_inverse=True)  # (N,), from 0
    # A resample draws groups. The mean needs only the sum and the number of the values of each group.
    sums = np.bincount(group_numbers, weights=values)
    counts = np.bincount(group_numbers)
    n_groups = len(counts)
    if n_groups < 2:  # every resample would be the same
        return math.nan, math.nan

    rng = np.random.default_rng(seed)
    means = []
    for size in _part_sizes(n_resamples, n_groups):
        drawn = rng.integers(0, n_groups, size=(size, n_groups))
        drawn_sums = sums[drawn].sum(1)
        drawn_counts = counts[drawn].sum(1)
        means.append(drawn_sums / drawn_counts)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(np.concatenate(means), tails)
    return float(low), float(high)


def _part_sizes(n_resamples: int, n_groups: int) -> np.ndarray:
    """Numbers of resamples to draw at one time, at most about 10 million groups each, to limit memory."""
    n_parts = max(1, n_resamples * n_groups // 10**7 + 1)
    edges = np.linspace(0, n_resamples, n_parts + 1).astype(int)
    return np.diff(edges)


def _right(deltas: np.ndarray, targets: np.ndarray, equal: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """For each pair that is not a tie (D,): 1 if the preferred side is larger, `equal` if both are equal, else 0.

    Also returns which pairs are not ties, (P,) bool.
    """
    deltas = np.asarray(deltas, float)
    targets = np.asarray(targets, float)
    decided = targets != 0.5
    preferred_is_larger = np.sign(deltas) == np.sign(targets - 0.5)
    right = np.where(deltas == 0, equal, preferred_is_larger)
    return right[decided], decided


@dataclass(frozen=True)
class JudgedPairs:
    """The judged pairs of an evaluation set. All arrays are (P,).

    Attributes:
        scores_i: scores of the first completion of each pair, in units of reward.
        scores_j: scores of the second completion.
        targets: P(i ≻ j), from 0 to 1.
        weights: weights of the pairs.
        margins: margins of the data, in units of reward.
        length_deltas: length of i minus length of j, in any unit.
        prompts: number of the prompt of each pair.
        categories: name of the category of each pair, "" without one.
    """

    scores_i: np.ndarray
    scores_j: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    margins: np.ndarray
    length_deltas: np.ndarray
    prompts: np.ndarray
    categories: np.ndarray

    @property
    def deltas(self) -> np.ndarray:
        """(P,) score differences r_i - r_j."""
        return self.scores_i - self.scores_j

    @property
    def sides(self) -> dict[str, np.ndarray]:
        """Scores of the chosen and of the rejected completions, (D,) each, of the D pairs that are not ties."""
        decided = self.targets != 0.5
        i_won = self.targets > 0.5
        chosen = np.where(i_won, self.scores_i, self.scores_j)
        rejected = np.where(i_won, self.scores_j, self.scores_i)
        return {"chosen": chosen[decided], "rejected": rejected[decided]}

    def report(self) -> dict[str, float]:
        """Computes all metrics of the pairs. Undefined ones are left out.

        Returns:
            Metrics by name: those of `preference_report`; confidence intervals (`accuracy_low`, `accuracy_high`); the
            `gain` over `longer_wins_baseline` with its interval; the accuracy of each group
            (`accuracy/<title>/<name>`); and percentiles of the scores (`chosen_p5`, …).
        """
        report = preference_report(self.deltas, self.targets, self.weights, self.length_deltas)
        low, high = bootstrap_accuracy_ci(self.deltas, self.targets, self.prompts)
        report["accuracy_low"] = low
        report["accuracy_high"] = high
        if "accuracy" in report:
            report["gain"] = report["accuracy"] - report["longer_wins_baseline"]
            low, high = bootstrap_gain_ci(self.deltas, self.length_deltas, self.targets, self.prompts)
            report["gain_low"] = low
            report["gain_high"] = high
        for title, groups in self.groups().items():
            for name, group in groups.items():
                report[f"accuracy/{title}/{name}"] = group["accuracy"]
        for side, scores in self.sides.items():
            if len(scores):
                for percentile in PERCENTILES:
                    report[f"{side}_p{percentile}"] = float(np.percentile(scores, percentile))
        return {name: value for name, value in report.items() if not math.isnan(value)}

    def groups(self) -> dict[str, dict[str, dict[str, float]]]:
        """`n` and `accuracy` without ties, by category and by quartiles of |length difference| and of |margin|."""
        groups = {}
        names = sorted(set(self.categories.tolist()) - {""})
        if names:
            groups["category"] = self._accuracy_by(self.categories, names)
        if self.length_deltas.any():
            groups["length_gap"] = self._accuracy_by_quartile(np.abs(self.length_deltas))
        if self.margins.any():
            groups["margin"] = self._accuracy_by_quartile(np.abs(self.margins))
        return groups

    def _accuracy_by_quartile(self, values: np.ndarray) -> dict[str, dict[str, float]]:
        """`n` and `accuracy` in up to four ranges of `values` (P,), such as "2 to 6", with about equally many pairs."""
        decided = values[self.targets != 0.5]
        if len(decided) == 0:
            return {}
        edges = np.unique(np.quantile(decided, [0, 0.25, 0.5, 0.75, 1]))  # fewer than five where values repeat
        if len(edges) == 1:  # all values are equal: one range, from the value to itself
            edges = np.repeat(edges, 2)
        names = []
        for lower, upper in pairwise(edges):
            names.append(f"{lower:.4g} to {upper:.4g}")
        range_numbers = np.searchsorted(edges, values, side="right") - 1
        # The largest value belongs to the last range. Values of ties may be outside of all ranges.
        range_numbers = np.clip(range_numbers, 0, len(names) - 1)
        return self._accuracy_by(np.array(names)[range_numbers], names)

    def _accuracy_by(self, group_of_pair: np.ndarray, names: list[str]) -> dict[str, dict[str, float]]:
        """`n` and `accuracy` of each group without ties, in the order of `names`. Empty groups are left out."""
        right, decided = _right(self.deltas, self.targets)
        group_of_decided = group_of_pair[decided]
        groups = {}
        for name in names:
            hits = right[group_of_decided == name]
            if len(hits):
                groups[name] = {"n": len(hits), "accuracy": float(hits.mean())}
        return groups

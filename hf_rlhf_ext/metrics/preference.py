"""How well scores agree with judgements: pure functions on numpy arrays, computed over a whole evaluation set at once.

Shared shapes: `deltas` (P,) are r_i - r_j of P pairs in units of reward; `targets` (P,) are P(i ≻ j) in [0, 1], where
0.5 is a tie. A mean over no pairs is NaN.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from .names import PERCENTILES

TIE_THRESHOLD = math.log(3)
"""|Δ| in reward below which σ(Δ) is nearer to 0.5 than to 0 or 1: the model says "tie"."""


def pairwise_accuracy(deltas: np.ndarray, targets: np.ndarray) -> float:
    """Fraction of pairs whose preferred side scores strictly higher; ties (target 0.5) are left out."""
    deltas, targets = np.asarray(deltas, float), np.asarray(targets, float)
    decided = targets != 0.5
    if not decided.any():
        return math.nan
    return float(np.mean(deltas[decided] * (targets[decided] - 0.5) > 0))


def accuracy_with_ties(deltas: np.ndarray, targets: np.ndarray, threshold: float = TIE_THRESHOLD) -> float:
    """Fraction of all pairs given the right one of three labels; |Δ| < `threshold` counts as calling a tie."""
    deltas, targets = np.asarray(deltas, float), np.asarray(targets, float)
    called = np.where(np.abs(deltas) < threshold, 0.0, np.sign(deltas))
    return float(np.mean(called == np.sign(targets - 0.5))) if len(deltas) else math.nan


def preference_nll(deltas: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Weighted mean of -[t log σ(Δ) + (1 - t) log σ(-Δ)] in nats a pair; log 2 is a coin's."""
    deltas, targets = np.asarray(deltas, float), np.asarray(targets, float)
    losses = targets * np.logaddexp(0.0, -deltas) + (1 - targets) * np.logaddexp(0.0, deltas)
    weights = np.ones_like(losses) if weights is None else np.asarray(weights, float)
    return float(np.sum(weights * losses) / np.sum(weights)) if np.sum(weights) > 0 else math.nan


def brier_score(deltas: np.ndarray, targets: np.ndarray) -> float:
    """Mean of (σ(Δ) - t)² (Brier 1950); 0.25 is a coin's on decided pairs."""
    deltas, targets = np.asarray(deltas, float), np.asarray(targets, float)
    return float(np.mean((special.expit(deltas) - targets) ** 2)) if len(deltas) else math.nan


def reliability_bins(deltas: np.ndarray, targets: np.ndarray, n_bins: int = 10) -> list[dict[str, float]]:
    """Bins of equal width in the probability σ(|Δ|) of the side that scores higher, from 0.5 to 1; empty ones left out.

    Each has `n`, `confidence` (mean probability) and `accuracy` (mean share of wins of that side, soft targets as they
    are, one half where both score alike): a calibrated model has the two equal.
    """
    deltas, targets = np.asarray(deltas, float), np.asarray(targets, float)
    confidence = special.expit(np.abs(deltas))
    right = 0.5 + np.sign(deltas) * (targets - 0.5)
    index = np.clip(((confidence - 0.5) * 2 * n_bins).astype(int), 0, n_bins - 1)
    found = []
    for here in (index == b for b in range(n_bins)):
        if here.any():
            means = {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean())}
            found.append({"n": int(here.sum())} | means)
    return found


def calibration_error(deltas: np.ndarray, targets: np.ndarray, n_bins: int = 10) -> float:
    """ECE: the mean gap of confidence and accuracy over `reliability_bins`, weighted by n (Guo et al. 2017)."""
    bins = reliability_bins(deltas, targets, n_bins)
    total = sum(entry["n"] for entry in bins)
    gaps = sum(entry["n"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins)
    return gaps / total if total else math.nan


def longer_wins_baseline(length_deltas: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy of "the longer one is better" on decided pairs; equal lengths count one half.

    `length_deltas` (P,) are lengths of i minus lengths of j, in any unit. A reward model must beat this.
    """
    length_deltas, targets = np.asarray(length_deltas, float), np.asarray(targets, float)
    decided = targets != 0.5
    if not decided.any():
        return math.nan
    agreement = np.sign(length_deltas[decided]) * np.sign(targets[decided] - 0.5)
    return float(np.mean((agreement + 1) / 2))


def preference_report(
    deltas: np.ndarray, targets: np.ndarray, weights: np.ndarray, length_deltas: np.ndarray
) -> dict[str, float]:
    """All of the above by name; those that the data leave undefined are left out (accuracy where all are ties).

    `accuracy`, `accuracy_ties`, `margin` (mean of preferred minus other) and `longer_wins_baseline` count pairs; `nll`
    weighs them.
    """
    deltas, targets = np.asarray(deltas, float), np.asarray(targets, float)
    decided = targets != 0.5
    report: dict[str, float] = {"pairs": len(deltas), "nll": preference_nll(deltas, targets, weights)}
    if len(deltas):
        report |= {"brier": brier_score(deltas, targets), "ece": calibration_error(deltas, targets)}
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
    """(low, high) of the bootstrap interval (BCa) of the mean of independent `values` (N,); a point if all equal."""
    values = np.asarray(values, float)
    if len(values) < 2 or np.ptp(values) == 0:  # BCa is undefined without spread
        mean = float(np.mean(values)) if len(values) else math.nan
        return mean, mean
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=n_resamples, rng=np.random.default_rng(seed), batch=999
    ).confidence_interval
    return float(interval.low), float(interval.high)


def bootstrap_accuracy_ci(
    deltas: np.ndarray, targets: np.ndarray, prompts: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the percentile bootstrap interval of `pairwise_accuracy`, resampling whole prompts.

    Pairs of one prompt share completions, so they are not independent: an interval over pairs would be too narrow.
    `prompts` (P,) numbers the prompt of each pair.
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
    """(low, high) of accuracy minus `longer_wins_baseline` on the same pairs, resampling prompts as above."""
    right, decided = _right(deltas, targets)
    longer, _ = _right(length_deltas, targets, equal=0.5)
    return clustered_mean_ci(right - longer, np.asarray(prompts)[decided], level=level, seed=seed)


def clustered_mean_ci(
    values: np.ndarray, groups: np.ndarray, *, level: float = 0.95, seed: int = 0, n_resamples: int = 9999
) -> tuple[float, float]:
    """(low, high) of the percentile bootstrap interval of the mean of `values` (N,), resampling whole `groups` (N,)."""
    _, group = np.unique(groups, return_inverse=True)
    if group.size == 0 or group.max() == 0:
        return math.nan, math.nan
    sums, n = np.bincount(group, weights=values), np.bincount(group)
    rng, means = np.random.default_rng(seed), []
    for size in np.diff(np.linspace(0, n_resamples, max(2, n_resamples * len(n) // 10**7 + 2)).astype(int)):
        draws = rng.integers(0, len(n), size=(size, len(n)))  # in parts: a large set would fill the memory
        means.append(sums[draws].sum(1) / n[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _right(deltas: np.ndarray, targets: np.ndarray, equal: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """1 where the preferred side is larger, `equal` where both are alike (D,), and which pairs are decided (P,)."""
    deltas, targets = np.asarray(deltas, float), np.asarray(targets, float)
    decided = targets != 0.5
    return np.where(deltas == 0, equal, np.sign(deltas) == np.sign(targets - 0.5))[decided], decided


@dataclass(frozen=True)
class JudgedPairs:
    """Everything about P judged pairs of an evaluation set; arrays (P,), beside the shared ones of this module:

    `scores_i`, `scores_j` in reward, `weights`, `margins`, `length_deltas` in any unit, `prompts` the number of each
    pair's prompt, `categories` their names, "" where a prompt has none.
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
        return self.scores_i - self.scores_j

    @property
    def sides(self) -> dict[str, np.ndarray]:
        """Scores of the chosen and the rejected completions of decided pairs, (D,) each."""
        won, decided = self.targets > 0.5, self.targets != 0.5
        chosen, rejected = np.where(won, self.scores_i, self.scores_j), np.where(won, self.scores_j, self.scores_i)
        return {"chosen": chosen[decided], "rejected": rejected[decided]}

    def report(self) -> dict[str, float]:
        """`preference_report`, with intervals, the gain over `longer_wins_baseline`, and accuracy by group.

        Further percentiles of both sides' scores: `chosen_p5`, …. What the data leave undefined (an interval over one
        prompt) is left out.
        """
        report = preference_report(self.deltas, self.targets, self.weights, self.length_deltas)
        given = self.targets, self.prompts
        report |= zip(("accuracy_low", "accuracy_high"), bootstrap_accuracy_ci(self.deltas, *given), strict=True)
        if "accuracy" in report:
            report["gain"] = report["accuracy"] - report["longer_wins_baseline"]
            gain = bootstrap_gain_ci(self.deltas, self.length_deltas, *given)
            report |= zip(("gain_low", "gain_high"), gain, strict=True)
        for title, groups in self.groups().items():
            report |= {f"accuracy/{title}/{name}": found["accuracy"] for name, found in groups.items()}
        for side, scores in self.sides.items():
            if len(scores):
                report |= {f"{side}_p{q}": float(np.percentile(scores, q)) for q in PERCENTILES}
        return {name: value for name, value in report.items() if not math.isnan(value)}

    def groups(self) -> dict[str, dict[str, dict[str, float]]]:
        """`n` and `accuracy` of decided pairs by category, and by quartile of |length gap| and of |margin|."""
        found = {}
        if (self.categories != "").any():
            found["category"] = self._by(self.categories, sorted(set(self.categories.tolist()) - {""}))
        for title, values in (("length_gap", self.length_deltas), ("margin", self.margins)):
            if values.any():
                found[title] = self._by(*self._quartile(np.abs(values)))
        return found

    def _quartile(self, values: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(P,) names such as "2 to 6", and these in order: up to four ranges, about as many decided pairs in each."""
        decided = values[self.targets != 0.5]
        edges = np.unique(np.quantile(decided, [0, 0.25, 0.5, 0.75, 1])) if len(decided) else np.zeros(1)
        last = max(0, len(edges) - 2)
        names = [f"{edges[k]:.4g} to {edges[min(k + 1, len(edges) - 1)]:.4g}" for k in range(last + 1)]
        return np.array(names)[np.clip(np.searchsorted(edges, values, side="right") - 1, 0, last)], names

    def _by(self, names: np.ndarray, order: list[str]) -> dict[str, dict[str, float]]:
        right, decided = _right(self.deltas, self.targets)
        of = {name: right[names[decided] == name] for name in order}
        return {name: {"n": len(hits), "accuracy": float(hits.mean())} for name, hits in of.items() if len(hits)}

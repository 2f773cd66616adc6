"""Agreement between annotators, from a table of labels: items x annotators, NaN where somebody did not judge."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray


def percent_agreement(labels: NDArray[np.floating]) -> float:
    """Share of pairs of judgements of one item that are equal, all such pairs pooled; NaN without any."""
    counts = _counts(labels)
    judged = counts.sum(1)
    pairs = (judged * (judged - 1)).sum()
    return float((counts * (counts - 1)).sum() / pairs) if pairs else float("nan")


def mean_cohen_kappa(labels: NDArray[np.floating]) -> float:
    """Cohen's kappa (1960) of each pair of annotators with items in common, weighted by how many those are."""
    from sklearn.metrics import cohen_kappa_score

    values, weights = [], []
    for i, j in combinations(range(labels.shape[1]), 2):
        both = ~np.isnan(labels[:, [i, j]]).any(1)
        if len(np.unique(labels[both][:, [i, j]])) > 1:  # undefined where both know one label only
            values.append(cohen_kappa_score(*(2 * labels[both][:, [i, j]]).astype(int).T))
            weights.append(both.sum())
    return float(np.average(values, weights=weights)) if values else float("nan")


def fleiss_kappa(labels: NDArray[np.floating]) -> float:
    """Fleiss' kappa (1971) over the items that have the most frequent number of judgements; NaN where undefined."""
    counts = _counts(labels)
    judged = counts.sum(1)
    usual = np.bincount(judged.astype(int))[2:].argmax() + 2 if (judged > 1).any() else 0
    counts = counts[judged == usual]
    if not usual or not len(counts):
        return float("nan")
    observed = ((counts**2).sum(1) - usual).mean() / (usual * (usual - 1))
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def krippendorff_alpha(labels: NDArray[np.floating]) -> float:
    """Krippendorff's alpha (2011), nominal: any number of judgements an item; NaN where undefined."""
    import krippendorff

    usable = labels[(~np.isnan(labels)).sum(1) > 1]
    if len(np.unique(usable[~np.isnan(usable)])) < 2:
        return float("nan")
    return float(krippendorff.alpha(reliability_data=usable.T, level_of_measurement="nominal"))


def agreement_with_rest(labels: NDArray[np.floating]) -> NDArray[np.floating]:
    """For each annotator, the share of items judged as most others did; items without a majority are left out."""
    values = np.unique(labels[~np.isnan(labels)])
    shares = np.full(labels.shape[1], np.nan)
    for k in range(labels.shape[1]):
        rest = _counts(np.delete(labels, k, 1), values)
        top = rest.max(1, keepdims=True) if len(values) else rest
        decided = (~np.isnan(labels[:, k])) & ((rest == top).sum(1) == 1)
        if decided.any():
            shares[k] = (values[rest[decided].argmax(1)] == labels[decided, k]).mean()
    return shares


def flip_rate(agreement: float) -> float:
    """How often one annotator errs, if two of them agree this often and each errs alike and alone on a two-way choice.

    From P(agree) = (1 - e)^2 + e^2: e = (1 - sqrt(2 P - 1)) / 2; 0.5 where they agree no more than by chance.
    """
    return float((1 - np.sqrt(max(0.0, 2 * agreement - 1))) / 2)


def _counts(labels: NDArray[np.floating], values: NDArray | None = None) -> NDArray[np.floating]:
    values = np.unique(labels[~np.isnan(labels)]) if values is None else values
    return np.stack([(labels == value).sum(1) for value in values], 1) if len(values) else np.zeros((len(labels), 1))

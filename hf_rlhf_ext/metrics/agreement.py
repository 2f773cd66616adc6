"""Agreement between annotators, from single votes: memory grows with the votes, not with annotators times items."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MOST_PAIRS = 5_000_000  # pairs of votes that one Cohen figure looks at: about 0.5 GB


class Votes(NamedTuple):
    """V votes; an annotator has at most one on an item. Items and annotators are numbered from 0."""

    items: NDArray[np.integer]
    annotators: NDArray[np.integer]
    labels: NDArray[np.floating]


def votes_of(items: ArrayLike, annotators: ArrayLike, labels: ArrayLike) -> Votes:
    """Votes on items that at least two annotators judged, renumbered; who judged one twice has the mean of the two."""
    _, items = np.unique(items, return_inverse=True)
    _, annotators = np.unique(annotators, return_inverse=True)
    labels = np.asarray(labels, float)
    n = annotators.max(initial=0) + 1
    keys, place = np.unique(items * n + annotators, return_inverse=True)
    labels = np.bincount(place, labels, len(keys)) / np.bincount(place, minlength=len(keys))
    items, annotators = keys // n, keys % n
    shared = np.bincount(items, minlength=1)[items] > 1
    _, items = np.unique(items[shared], return_inverse=True)
    return Votes(items, annotators[shared], labels[shared])


def votes_of_table(table: NDArray[np.floating]) -> Votes:
    """Votes of a table of labels, items x annotators, NaN where somebody did not judge."""
    items, annotators = np.nonzero(~np.isnan(table))
    return votes_of(items, annotators, table[items, annotators])


def three_way(labels: ArrayLike) -> NDArray[np.floating]:
    """Graded labels P(first is better) as first (1), tie (0.5) or second (0); rounding apart, 0.75 and 1 agree."""
    labels = np.asarray(labels, float)
    return np.where(np.isclose(labels, 0.5), 0.5, (labels > 0.5).astype(float))


def percent_agreement(votes: Votes) -> float:
    """Share of pairs of judgements of one item that are equal, all such pairs pooled; NaN without any."""
    equal, pairs = agreeing(_counts(votes))
    return equal / pairs if pairs else float("nan")


def agreeing_pairs(votes: Votes) -> tuple[int, int]:
    """(equal, all) pairs of votes on one item."""
    return agreeing(_counts(votes))


def agreeing(counts: NDArray[np.integer]) -> tuple[int, int]:
    """(equal, all) pairs of judgements from `counts`, items x labels: Σ n_l (n_l - 1) / 2 and Σ n (n - 1) / 2."""
    judged = counts.sum(1)
    return int((counts * (counts - 1)).sum()) // 2, int((judged * (judged - 1)).sum()) // 2


def mean_cohen_kappa(votes: Votes, *, least: int = 5, seed: int = 0) -> float:
    """Cohen's kappa (1960) of each pair of annotators with `least` items in common, weighted by how many those are.

    Two who gave one label only are left out (kappa is undefined there), which with few common items would leave those
    who differ: hence `least`. Where there are more than five million pairs of votes, random annotators are left out.
    """
    codes = np.unique(votes.labels, return_inverse=True)[1]
    items, annotators = votes.items, votes.annotators
    busy = np.bincount(annotators, minlength=1)[annotators] >= least
    rng = np.random.default_rng(seed)
    while _pair_count(items[busy]) > _MOST_PAIRS:
        lucky = rng.permutation(np.unique(annotators[busy]))
        busy &= np.isin(annotators, lucky[: len(lucky) // 2])
    first, second = _pairs(items[busy], annotators[busy])
    people, codes = annotators[busy], codes[busy]
    _, pair, common = np.unique(
        people[first] * (people.max(initial=0) + 1) + people[second], return_inverse=True, return_counts=True
    )
    enough = common[pair] >= least
    if not enough.any():
        return float("nan")
    _, pair = np.unique(pair[enough], return_inverse=True)
    n = codes.max() + 1
    cells = (pair * n + codes[first[enough]]) * n + codes[second[enough]]
    return _pooled_kappa(np.bincount(cells, minlength=(pair.max() + 1) * n * n).reshape(-1, n, n))


def _pooled_kappa(tables: NDArray[np.integer]) -> float:
    """Mean kappa of confusion tables (pairs, n, n), weighted by their sums."""
    total = tables.sum((1, 2))
    equal = tables.diagonal(axis1=1, axis2=2).sum(1)
    chance = (tables.sum(1) * tables.sum(2)).sum(1)  # times total²
    defined = chance < total**2
    if not defined.any():
        return float("nan")
    total, equal, chance = total[defined], equal[defined], chance[defined]
    return float(np.average((equal * total - chance) / (total**2 - chance), weights=total))


def _pair_count(items: NDArray[np.integer]) -> int:
    judged = np.bincount(items)
    return int((judged * (judged - 1)).sum()) // 2


def _pairs(items: NDArray[np.integer], annotators: NDArray[np.integer]) -> tuple[NDArray, NDArray]:
    """Indices of the two votes of every pair of votes on one item, the annotator with the lower number first."""
    order = np.lexsort((annotators, items))
    judged = np.bincount(items, minlength=1)[items[order]]  # of each vote's item
    firsts, seconds = [np.zeros(0, int)], [np.zeros(0, int)]
    for n in np.unique(judged[judged > 1]):
        votes = order[judged == n].reshape(-1, n)  # items with n votes x votes
        one, other = np.triu_indices(n, 1)
        firsts.append(votes[:, one].ravel())
        seconds.append(votes[:, other].ravel())
    return np.concatenate(firsts), np.concatenate(seconds)


def fleiss_kappa(votes: Votes) -> float:
    """Fleiss' kappa (1971) over the items that have the most frequent number of judgements; NaN where undefined."""
    counts = _counts(votes)
    judged = counts.sum(1)
    if not len(counts):
        return float("nan")
    usual = np.bincount(judged).argmax()
    counts = counts[judged == usual]
    observed = ((counts**2).sum(1) - usual).mean() / (usual * (usual - 1))
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def krippendorff_alpha(votes: Votes) -> float:
    """Krippendorff's alpha (2011), nominal: any number of judgements an item; NaN where undefined."""
    import krippendorff

    counts = _counts(votes)
    if counts.shape[1] < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def agreement_with_rest(votes: Votes) -> dict[int, tuple[float, int]]:
    """Annotator -> (share of items judged as most others did, number of items); items without a majority are left out.

    A majority is the one most frequent label of the others, whose votes are the item's counts less one's own.
    """
    codes = np.unique(votes.labels, return_inverse=True)[1]
    rest = _counts(votes)[votes.items]  # votes x labels
    rest[np.arange(len(codes)), codes] -= 1
    decided = (rest == rest.max(1, keepdims=True, initial=0)).sum(1) == 1
    agreed = decided & (rest.argmax(1) == codes) if len(codes) else decided
    items = np.bincount(votes.annotators[decided], minlength=1)
    hits = np.bincount(votes.annotators[agreed], minlength=len(items))
    return {int(k): (float(hits[k] / items[k]), int(items[k])) for k in np.flatnonzero(items)}


def flip_rate(agreement: float) -> float:
    """How often one annotator errs, if two of them agree this often and each errs alike and alone on a two-way choice.

    From P(agree) = (1 - e)^2 + e^2: e = (1 - sqrt(2 P - 1)) / 2; 0.5 where they agree no more than by chance.
    """
    return float((1 - np.sqrt(max(0.0, 2 * agreement - 1))) / 2)


def _counts(votes: Votes) -> NDArray[np.integer]:
    """Votes by item and label: (items, distinct labels)."""
    values, codes = np.unique(votes.labels, return_inverse=True)
    n_items = votes.items.max(initial=-1) + 1
    return np.bincount(votes.items * len(values) + codes, minlength=n_items * len(values)).reshape(n_items, len(values))

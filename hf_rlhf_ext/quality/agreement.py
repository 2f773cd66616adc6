"""Agreement between annotators, computed from single votes.

Memory use grows with the number of votes, not with annotators times items.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .packages import data_package

_MOST_PAIRS = 5_000_000  # pairs of votes used for Cohen's kappa: about 0.5 GB


class Votes(NamedTuple):
    """V votes, with at most one vote per annotator and item. Items and annotators are numbered from 0."""

    items: NDArray[np.integer]
    annotators: NDArray[np.integer]
    labels: NDArray[np.floating]


def votes_of(items: ArrayLike, annotators: ArrayLike, labels: ArrayLike) -> Votes:
    """Returns the votes on items that at least two annotators judged, renumbered.

    If an annotator has several votes on one item, they are replaced by their mean.
    """
    items = _renumbered(items)
    annotators = _renumbered(annotators)
    labels = np.asarray(labels, float)

    # One number for each (item, annotator), so that repeated votes can be averaged.
    n_annotators = annotators.max(initial=0) + 1
    keys, place = np.unique(items * n_annotators + annotators, return_inverse=True)
    sums = np.bincount(place, labels, len(keys))
    n_repeats = np.bincount(place, minlength=len(keys))
    labels = sums / n_repeats
    items = keys // n_annotators
    annotators = keys % n_annotators

    votes_on_item = np.bincount(items, minlength=1)
    shared = votes_on_item[items] > 1
    return Votes(_renumbered(items[shared]), annotators[shared], labels[shared])


def _renumbered(values: ArrayLike) -> NDArray[np.integer]:
    """Replaces values by numbers from 0, in sorted order."""
    _, numbers = np.unique(values, return_inverse=True)
    return numbers


def lower_first(i: int, j: int, label: float) -> tuple[tuple[int, int], float]:
    """Rewrites a judgment P(i is better than j) so that the lower index of the pair comes first.

    A pair may be judged in either order. Two judgments are only comparable in the same order.
    """
    if i < j:
        return (i, j), label
    return (j, i), 1 - label


def three_way(labels: ArrayLike) -> NDArray[np.floating]:
    """Rounds graded labels P(first is better) to first (1), tie (0.5) or second (0).

    Annotators with labels 0.75 and 1 agree on the winner. A label that differs from 0.5 only by rounding is a tie.
    """
    labels = np.asarray(labels, float)
    winners = (labels > 0.5).astype(float)
    return np.where(np.isclose(labels, 0.5), 0.5, winners)


def percent_agreement(votes: Votes) -> float:
    """Returns the share of pairs of judgments on one item that are equal, over all such pairs. NaN without any."""
    n_equal, n_all = agreeing_pairs(votes)
    if not n_all:
        return float("nan")
    return n_equal / n_all


def agreeing_pairs(votes: Votes) -> tuple[int, int]:
    """Returns the number of equal and of all pairs of votes on one item."""
    return agreeing(_counts(votes))


def agreeing(counts: NDArray[np.integer]) -> tuple[int, int]:
    """Returns the number of equal and of all pairs of judgments.

    These are Σ n_l (n_l - 1) / 2 and Σ n (n - 1) / 2, where `counts` is (items, labels).
    """
    judged = counts.sum(1)
    n_equal = int((counts * (counts - 1)).sum()) // 2
    n_all = int((judged * (judged - 1)).sum()) // 2
    return n_equal, n_all


def mean_cohen_kappa(votes: Votes, *, least: int = 5, seed: int = 0) -> float:
    """Returns the mean of Cohen's kappa (1960) over pairs of annotators, weighted by their number of common items.

    Only pairs of annotators with at least `least` common items count. A pair that used a single label is excluded,
    since kappa is undefined for it. With few common items this would exclude mainly annotators who agree, which is why
    `least` is needed. With more than five million pairs of votes, a random subset of the annotators is used.
    """
    _, codes = np.unique(votes.labels, return_inverse=True)
    used = _sampled_votes(votes, least, seed)
    annotators = votes.annotators[used]
    codes = codes[used]

    # Every pair of votes on one item belongs to a pair of annotators.
    first, second = _vote_pairs(votes.items[used], annotators)
    n_annotators = annotators.max(initial=0) + 1
    pair_keys = annotators[first] * n_annotators + annotators[second]
    _, pair, items_in_common = np.unique(pair_keys, return_inverse=True, return_counts=True)
    enough = items_in_common[pair] >= least
    if not enough.any():
        return float("nan")
    tables = _confusion_tables(
        pair=_renumbered(pair[enough]),
        first_codes=codes[first[enough]],
        second_codes=codes[second[enough]],
        n_labels=codes.max() + 1,
    )
    return _pooled_kappa(tables)


def _sampled_votes(votes: Votes, least: int, seed: int) -> NDArray[np.bool_]:
    """Returns a mask (V,) of the votes that `mean_cohen_kappa` uses: annotators with `least` votes, if not too many."""
    # An annotator with fewer than `least` votes cannot have that many items in common with another.
    n_votes = np.bincount(votes.annotators, minlength=1)
    used = n_votes[votes.annotators] >= least
    rng = np.random.default_rng(seed)
    while _pair_count(votes.items[used]) > _MOST_PAIRS:
        shuffled = rng.permutation(np.unique(votes.annotators[used]))
        kept_half = shuffled[: len(shuffled) // 2]
        used &= np.isin(votes.annotators, kept_half)
    return used


def _confusion_tables(
    pair: NDArray[np.integer],
    first_codes: NDArray[np.integer],
    second_codes: NDArray[np.integer],
    n_labels: int,
) -> NDArray[np.integer]:
    """Counts, for each pair of annotators, the labels of both: (pairs of annotators, n_labels, n_labels)."""
    cells = (pair * n_labels + first_codes) * n_labels + second_codes
    n_pairs = pair.max() + 1
    counts = np.bincount(cells, minlength=n_pairs * n_labels * n_labels)
    return counts.reshape(n_pairs, n_labels, n_labels)


def _pooled_kappa(tables: NDArray[np.integer]) -> float:
    """Returns the mean kappa of the confusion tables (pairs, n, n), weighted by their sums."""
    total = tables.sum((1, 2))
    equal = tables.diagonal(axis1=1, axis2=2).sum(1)
    # Agreement by chance, times total². As integers, this is exact.
    chance = (tables.sum(1) * tables.sum(2)).sum(1)
    defined = chance < total**2
    if not defined.any():
        return float("nan")
    total = total[defined]
    equal = equal[defined]
    chance = chance[defined]
    kappas = (equal * total - chance) / (total**2 - chance)
    return float(np.average(kappas, weights=total))


def _pair_count(items: NDArray[np.integer]) -> int:
    """Counts the pairs of votes on one item."""
    judged = np.bincount(items)
    return int((judged * (judged - 1)).sum()) // 2


def _vote_pairs(items: NDArray[np.integer], annotators: NDArray[np.integer]) -> tuple[NDArray, NDArray]:
    """Returns the indices of both votes for every pair of votes on one item, with the lower annotator first."""
    order = np.lexsort((annotators, items))
    votes_on_item = np.bincount(items, minlength=1)[items[order]]  # for each vote, in that order
    firsts = [np.zeros(0, int)]
    seconds = [np.zeros(0, int)]
    # Process all items with the same number of votes together, to avoid a loop over items.
    for n in np.unique(votes_on_item[votes_on_item > 1]):
        votes = order[votes_on_item == n].reshape(-1, n)  # (items, n)
        one, other = np.triu_indices(n, 1)
        firsts.append(votes[:, one].ravel())
        seconds.append(votes[:, other].ravel())
    return np.concatenate(firsts), np.concatenate(seconds)


def fleiss_kappa(votes: Votes) -> float:
    """Returns Fleiss' kappa (1971) over items with the most frequent number of judgments. NaN if undefined."""
    counts = _counts(votes)
    if not len(counts):
        return float("nan")
    judged = counts.sum(1)
    most_frequent = np.bincount(judged).argmax()
    counts = counts[judged == most_frequent]
    pairs_per_item = most_frequent * (most_frequent - 1)
    observed = ((counts**2).sum(1) - most_frequent).mean() / pairs_per_item
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    if expected >= 1:
        return float("nan")
    return float((observed - expected) / (1 - expected))


def krippendorff_alpha(votes: Votes) -> float:
    """Returns Krippendorff's nominal alpha (2011), for any number of judgments per item. NaN if undefined."""
    krippendorff = data_package("krippendorff")
    counts = _counts(votes)
    if counts.shape[1] < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def agreement_with_rest(votes: Votes) -> dict[int, tuple[float, int]]:
    """Returns how often each annotator agrees with the majority of the other annotators.

    The majority is the most frequent label of the other annotators. Items without a unique majority are skipped.

    Returns:
        Annotator -> (share of items with the majority's label, number of items).
    """
    if not len(votes.labels):
        return {}
    _, codes = np.unique(votes.labels, return_inverse=True)
    rest = _counts(votes)[votes.items]  # votes x labels
    rest[np.arange(len(codes)), codes] -= 1
    is_most_frequent = rest == rest.max(1, keepdims=True)
    has_majority = is_most_frequent.sum(1) == 1
    agrees = has_majority & (rest.argmax(1) == codes)

    n_items = np.bincount(votes.annotators[has_majority], minlength=1)
    n_agreed = np.bincount(votes.annotators[agrees], minlength=len(n_items))
    shares = {}
    for annotator in np.flatnonzero(n_items):
        share = float(n_agreed[annotator] / n_items[annotator])
        shares[int(annotator)] = (share, int(n_items[annotator]))
    return shares


def flip_rate(agreement: float) -> float:
    """Estimates the error rate of one annotator from the agreement of two.

    Assumes two possible labels, and independent errors with the same rate e for all annotators. Then the agreement is
    P = (1 - e)^2 + e^2, so that e = (1 - sqrt(2 P - 1)) / 2. The result is 0.5 if the agreement is at most chance.
    """
    beyond_chance = max(0.0, 2 * agreement - 1)
    return float((1 - np.sqrt(beyond_chance)) / 2)


def _counts(votes: Votes) -> NDArray[np.integer]:
    """Counts votes by item and label: (items, distinct labels)."""
    labels, codes = np.unique(votes.labels, return_inverse=True)
    n_items = votes.items.max(initial=-1) + 1
    cells = votes.items * len(labels) + codes
    return np.bincount(cells, minlength=n_items * len(labels)).reshape(n_items, len(labels))

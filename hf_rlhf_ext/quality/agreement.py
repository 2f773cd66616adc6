"""Agreement between annotators, from single votes: memory grows with the votes, not with annotators times items."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MOST_PAIRS = 5_000_000  # pairs of votes that Cohen's kappa looks at: about 0.5 GB


class Votes(NamedTuple):
    """V votes; an annotator has at most one on an item. Items and annotators are numbered from 0."""

    items: NDArray[np.integer]
    annotators: NDArray[np.integer]
    labels: NDArray[np.floating]


def votes_of(items: ArrayLike, annotators: ArrayLike, labels: ArrayLike) -> Votes:
    """Votes on items that at least two annotators judged, renumbered.

    Several votes of one annotator on one item become their mean.
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
    """Values as numbers from 0, in their sorted order."""
    _, numbers = np.unique(values, return_inverse=True)
    return numbers


def lower_first(i: int, j: int, label: float) -> tuple[tuple[int, int], float]:
    """A judgement P(i is better than j) as one of the pair whose lower number comes first.

    A pair may be judged either way round: only so are two judgements of it comparable.
    """
    if i < j:
        return (i, j), label
    return (j, i), 1 - label


def three_way(labels: ArrayLike) -> NDArray[np.floating]:
    """Graded labels P(first is better) as first (1), tie (0.5) or second (0).

    Two annotators who say 0.75 and 1 agree on the winner. What differs from 0.5 by rounding only is a tie.
    """
    labels = np.asarray(labels, float)
    winners = (labels > 0.5).astype(float)
    return np.where(np.isclose(labels, 0.5), 0.5, winners)


def percent_agreement(votes: Votes) -> float:
    """Share of pairs of judgements of one item that are equal, all such pairs pooled; NaN without any."""
    n_equal, n_all = agreeing_pairs(votes)
    if not n_all:
        return float("nan")
    return n_equal / n_all


def agreeing_pairs(votes: Votes) -> tuple[int, int]:
    """(equal, all) pairs of votes on one item."""
    return agreeing(_counts(votes))


def agreeing(counts: NDArray[np.integer]) -> tuple[int, int]:
    """(equal, all) pairs of judgements from `counts`, items x labels: Σ n_l (n_l - 1) / 2 and Σ n (n - 1) / 2."""
    judged = counts.sum(1)
    n_equal = int((counts * (counts - 1)).sum()) // 2
    n_all = int((judged * (judged - 1)).sum()) // 2
    return n_equal, n_all


def mean_cohen_kappa(votes: Votes, *, least: int = 5, seed: int = 0) -> float:
    """Cohen's kappa (1960) of each pair of annotators with `least` items in common, weighted by how many those are.

    Two who gave one label only are left out (kappa is undefined there), which with few common items would leave those
    who differ: hence `least`. Where there are more than five million pairs of votes, random annotators are left out.
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
    """(V,) which votes `mean_cohen_kappa` looks at: of everybody with `least` votes, if those are not too many."""
    # Who cast fewer votes than `least` cannot share that many items with anybody.
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
    """(pairs of annotators, n_labels, n_labels): how often the first gave one label and the second another."""
    cells = (pair * n_labels + first_codes) * n_labels + second_codes
    n_pairs = pair.max() + 1
    counts = np.bincount(cells, minlength=n_pairs * n_labels * n_labels)
    return counts.reshape(n_pairs, n_labels, n_labels)


def _pooled_kappa(tables: NDArray[np.integer]) -> float:
    """Mean kappa of confusion tables (pairs, n, n), weighted by their sums."""
    total = tables.sum((1, 2))
    equal = tables.diagonal(axis1=1, axis2=2).sum(1)
    # Agreement by chance, times total²: whole numbers keep this exact.
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
    """Pairs of votes on one item."""
    judged = np.bincount(items)
    return int((judged * (judged - 1)).sum()) // 2


def _vote_pairs(items: NDArray[np.integer], annotators: NDArray[np.integer]) -> tuple[NDArray, NDArray]:
    """Indices of the two votes of every pair of votes on one item, the annotator with the lower number first."""
    order = np.lexsort((annotators, items))
    votes_on_item = np.bincount(items, minlength=1)[items[order]]  # for each vote, in that order
    firsts = [np.zeros(0, int)]
    seconds = [np.zeros(0, int)]
    # All items with the same number of votes at once: no loop over items.
    for n in np.unique(votes_on_item[votes_on_item > 1]):
        votes = order[votes_on_item == n].reshape(-1, n)  # (items, n)
        one, other = np.triu_indices(n, 1)
        firsts.append(votes[:, one].ravel())
        seconds.append(votes[:, other].ravel())
    return np.concatenate(firsts), np.concatenate(seconds)


def fleiss_kappa(votes: Votes) -> float:
    """Fleiss' kappa (1971) over the items that have the most frequent number of judgements; NaN where undefined."""
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
    """Krippendorff's alpha (2011), nominal: any number of judgements per item; NaN where undefined."""
    import krippendorff

    counts = _counts(votes)
    if counts.shape[1] < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def agreement_with_rest(votes: Votes) -> dict[int, tuple[float, int]]:
    """Annotator -> (share of items judged as most others did, number of items); items without a majority are left out.

    A majority is the one most frequent label of the others, whose votes are the item's counts less one's own.
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
    """How often one annotator errs, if two of them agree this often and each errs alike and alone on a two-way choice.

    From P(agree) = (1 - e)^2 + e^2: e = (1 - sqrt(2 P - 1)) / 2; 0.5 where they agree no more than by chance.
    """
    beyond_chance = max(0.0, 2 * agreement - 1)
    return float((1 - np.sqrt(beyond_chance)) / 2)


def _counts(votes: Votes) -> NDArray[np.integer]:
    """Votes by item and label: (items, distinct labels)."""
    labels, codes = np.unique(votes.labels, return_inverse=True)
    n_items = votes.items.max(initial=-1) + 1
    cells = votes.items * len(labels) + codes
    return np.bincount(cells, minlength=n_items * len(labels)).reshape(n_items, len(labels))

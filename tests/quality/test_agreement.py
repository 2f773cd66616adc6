"""Agreement metrics against other libraries, a published example, and simulation."""

import tracemalloc
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats import inter_rater

from hf_rlhf_ext.quality import agreement
from hf_rlhf_ext.quality.agreement import flip_rate, three_way, votes_of

X = np.nan


def votes_of_table(table):
    """Converts a table of labels (items, annotators) to votes. NaN means that there is no vote."""
    items, annotators = np.nonzero(~np.isnan(table))
    return votes_of(items, annotators, table[items, annotators])


def of_table(metric, table, **options):
    return getattr(agreement, metric)(votes_of_table(np.asarray(table)), **options)


percent_agreement, mean_cohen_kappa, fleiss_kappa, krippendorff_alpha, agreement_with_rest = (
    partial(of_table, name)
    for name in ("percent_agreement", "mean_cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "agreement_with_rest")
)
# The textbook example of Fleiss (1971): 10 subjects, 14 raters, 5 categories; kappa = 0.210.
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def random_labels(n=60, raters=3, missing=0.0, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 0.5, 1], n, p=[0.45, 0.1, 0.45])
    labels = np.stack([np.where(rng.random(n) < 0.7, truth, rng.choice([0, 0.5, 1], n)) for _ in range(raters)], 1)
    labels[rng.random(labels.shape) < missing] = np.nan
    return labels


def test_fleiss_of_the_textbook_and_of_statsmodels():
    labels = np.array([[k for k, count in enumerate(row) for _ in range(count)] for row in FLEISS], float)
    assert fleiss_kappa(labels) == pytest.approx(0.210, abs=5e-4)
    for seed in range(3):
        labels = random_labels(seed=seed)
        table, _ = inter_rater.aggregate_raters((2 * labels).astype(int))
        assert fleiss_kappa(labels) == pytest.approx(inter_rater.fleiss_kappa(table), abs=1e-12)


def test_fleiss_takes_the_items_that_most_annotators_share():
    labels = np.array([[1, 1, 0], [0, 0, 1], [1, 1, X], [X, 0, X]], float)
    assert fleiss_kappa(labels) == pytest.approx(fleiss_kappa(labels[:2]))


def test_cohen_of_two_is_that_of_statsmodels_and_pools_by_items():
    labels = random_labels(raters=2)
    table = np.array([[np.sum((labels[:, 0] == a) & (labels[:, 1] == b)) for b in (0, 0.5, 1)] for a in (0, 0.5, 1)])
    assert mean_cohen_kappa(labels) == pytest.approx(inter_rater.cohens_kappa(table).kappa, abs=1e-12)
    three = np.concatenate([labels, np.full((len(labels), 1), X)], 1)
    three[:10, 2] = labels[:10, 0]  # agrees with the first on ten items
    parts = [labels, three[:10][:, [0, 2]], three[:10][:, [1, 2]]]
    expected = np.average([mean_cohen_kappa(part) for part in parts], weights=[len(part) for part in parts])
    assert mean_cohen_kappa(three) == pytest.approx(expected)


def test_krippendorff_of_the_published_example():
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section C: nominal data with gaps, 0.743.
    example = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
        [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X],
    ]
    assert krippendorff_alpha(np.array(example, float).T) == pytest.approx(0.743, abs=5e-4)


def test_percent_agreement_and_the_rest_by_brute_force():
    labels = random_labels(raters=4, missing=0.3, seed=5)
    same = [
        row[i] == row[j] for row in labels for i in range(4) for j in range(i) if not np.isnan(row[[i, j]]).any()
    ]  # fmt: skip
    assert percent_agreement(labels) == pytest.approx(np.mean(same))
    found = agreement_with_rest(labels)
    assert sorted(found) == [0, 1, 2, 3]
    for k, (share, items) in found.items():
        hits = []
        for row in labels:
            rest = [v for j, v in enumerate(row) if j != k and not np.isnan(v)]
            counts = sorted(((rest.count(v), v) for v in set(rest)), reverse=True)
            if not np.isnan(row[k]) and counts and (len(counts) == 1 or counts[0][0] > counts[1][0]):
                hits.append(counts[0][1] == row[k])
        assert share == pytest.approx(np.mean(hits)) and items == len(hits)


@pytest.mark.parametrize("error", [0.0, 0.1, 0.25, 0.4])
def test_flip_rate_recovers_the_rate_that_labels_were_flipped_with(error):
    rng = np.random.default_rng(1)
    labels = (rng.random((200_000, 2)) < error).astype(float)  # the truth is 0
    assert flip_rate(percent_agreement(labels)) == pytest.approx(error, abs=0.01)
    assert flip_rate(0.4) == 0.5  # below chance


def test_nothing_to_compare_is_nan_not_an_error():
    for nothing in (np.array([[1.0, X], [X, 0.0]]), np.full((2, 2), X)):
        for metric in (percent_agreement, mean_cohen_kappa, fleiss_kappa, krippendorff_alpha):
            assert np.isnan(metric(nothing))
        assert agreement_with_rest(nothing) == {}
    same = np.ones((6, 2))
    assert np.isnan(fleiss_kappa(same)) and np.isnan(krippendorff_alpha(same)) and np.isnan(mean_cohen_kappa(same))
    assert percent_agreement(same) == 1 and agreement_with_rest(same) == {0: (1.0, 6), 1: (1.0, 6)}


@pytest.mark.parametrize("least", [2, 5, 12])
def test_cohen_of_a_sparse_crowd_is_that_of_sklearn_pair_by_pair(least):
    labels = random_labels(n=80, raters=9, missing=0.6, seed=4)
    labels = labels[np.random.default_rng(0).permutation(80)]
    kappas, weights = [], []
    for i, j in combinations(range(9), 2):
        both = ~np.isnan(labels[:, [i, j]]).any(1)
        if both.sum() >= least and len(np.unique(labels[both][:, [i, j]])) > 1:
            kappas.append(cohen_kappa_score(*(2 * labels[both][:, [i, j]]).astype(int).T))
            weights.append(both.sum())
    assert 3 < len(kappas) and (least < 12 or len(kappas) < 36)
    expected = np.average(kappas, weights=weights)
    assert mean_cohen_kappa(labels, least=least) == pytest.approx(expected, abs=1e-12)


def test_votes_on_shared_items_only_and_one_vote_a_person():
    votes = votes_of([7, 7, 7, 3, 9, 9], [0, 1, 1, 2, 2, 0], [1, 0, 1, 1, 0, 0])
    assert votes.items.tolist() == [0, 0, 1, 1]  # nobody else judged item 3
    assert votes.annotators.tolist() == [0, 1, 0, 2] and votes.labels.tolist() == [1, 0.5, 0, 0]
    assert three_way([0, 0.25, 0.49, 0.5, 1 / 2 + 1e-12, 0.75, 1]).tolist() == [0, 0, 0, 0.5, 0.5, 1, 1]


def test_a_large_crowd_takes_no_table_of_everybody_and_everything():
    rng = np.random.default_rng(0)
    items, annotators = np.repeat(np.arange(20_000), 3), rng.integers(0, 5_000, 60_000)
    truth = rng.integers(0, 2, 20_000)[items]
    tracemalloc.start()
    votes = votes_of(items, annotators, np.where(rng.random(60_000) < 0.9, truth, 1 - truth))
    names = ("percent_agreement", "fleiss_kappa", "krippendorff_alpha")
    metrics = [getattr(agreement, name)(votes) for name in names]
    shares = [share for share, n in agreement.agreement_with_rest(votes).values() if n > 5]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # the table would be 800 MB
    assert metrics == pytest.approx([0.82, 0.64, 0.64], abs=0.01)  # 0.9² + 0.1², and twice that less one
    # The two others are decided where they agree: 0.81 right, 0.01 wrong, so 0.9 * 0.81 / 0.82 + 0.1 * 0.01 / 0.82.
    assert np.mean(shares) == pytest.approx(0.8902, abs=0.01)


def test_many_judges_of_few_items_are_sampled_for_cohen(monkeypatch):
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 20)[:, None]
    votes = votes_of_table(np.where(rng.random((20, 800)) < 0.9, truth, 1 - truth).astype(float))
    sampled = agreement.mean_cohen_kappa(votes)  # 6.4 million pairs of votes are too many
    monkeypatch.setattr(agreement, "_MOST_PAIRS", 10_000_000)
    exact = agreement.mean_cohen_kappa(votes)
    assert sampled != exact and sampled == pytest.approx(exact, abs=0.03)

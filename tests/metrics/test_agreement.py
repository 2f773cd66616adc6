"""Agreement figures against other libraries, a published example, and simulation."""

import numpy as np
import pytest
from statsmodels.stats import inter_rater

from hf_rlhf_ext.metrics.agreement import (
    agreement_with_rest,
    fleiss_kappa,
    flip_rate,
    krippendorff_alpha,
    mean_cohen_kappa,
    percent_agreement,
)

X = np.nan
# Fleiss (1971) as every textbook shows it: 10 subjects, 14 raters, 5 categories; kappa = 0.210.
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
    for k, share in enumerate(agreement_with_rest(labels)):
        hits = []
        for row in labels:
            rest = [v for j, v in enumerate(row) if j != k and not np.isnan(v)]
            counts = sorted(((rest.count(v), v) for v in set(rest)), reverse=True)
            if not np.isnan(row[k]) and counts and (len(counts) == 1 or counts[0][0] > counts[1][0]):
                hits.append(counts[0][1] == row[k])
        assert share == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("error", [0.0, 0.1, 0.25, 0.4])
def test_flip_rate_recovers_the_rate_that_labels_were_flipped_with(error):
    rng = np.random.default_rng(1)
    labels = (rng.random((200_000, 2)) < error).astype(float)  # the truth is 0
    assert flip_rate(percent_agreement(labels)) == pytest.approx(error, abs=0.01)
    assert flip_rate(0.4) == 0.5  # less than chance


def test_nothing_to_compare_is_nan_not_an_error():
    alone = np.array([[1.0, X], [X, 0.0]])
    for figure in (percent_agreement, mean_cohen_kappa, fleiss_kappa, krippendorff_alpha):
        assert np.isnan(figure(alone))
    assert np.isnan(agreement_with_rest(alone)).all()
    assert np.isnan(fleiss_kappa(np.ones((3, 2)))) and np.isnan(krippendorff_alpha(np.ones((3, 2))))

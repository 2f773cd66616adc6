"""Preference metrics compared with counts by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_rlhf_ext.metrics.names import find_metric
from hf_rlhf_ext.reward.preference_metrics import (
    JudgedPairs,
    accuracy_with_ties,
    bootstrap_accuracy_ci,
    bootstrap_mean_ci,
    brier_score,
    calibration_error,
    clustered_mean_ci,
    longer_wins_baseline,
    pairwise_accuracy,
    preference_nll,
    preference_report,
    reliability_bins,
)


def test_accuracy_leaves_ties_out_and_wants_a_strictly_higher_score():
    deltas = [2.0, -1.0, 0.0, -3.0, 5.0]
    targets = [1.0, 0.9, 1.0, 0.0, 0.5]  # right, wrong, wrong (equal scores), right, a tie
    assert pairwise_accuracy(deltas, targets) == 0.5
    assert math.isnan(pairwise_accuracy([1.0], [0.5]))


def test_accuracy_with_ties_calls_small_differences_ties():
    deltas = [2.0, 0.5, -0.5, 0.5, -2.0, -2.0]
    targets = [1.0, 0.5, 0.5, 1.0, 0.5, 0.0]  # right, right, right, wrong, wrong, right
    assert accuracy_with_ties(deltas, targets) == pytest.approx(4 / 6)
    assert accuracy_with_ties(deltas, targets, threshold=0.1) == pytest.approx(3 / 6)


def test_nll_worked_by_hand():
    log3 = math.log(3)
    assert preference_nll([log3, log3], [1.0, 0.0]) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    weighted = (3 * math.log(4 / 3) + math.log(4)) / 4
    assert preference_nll([log3, log3], [1.0, 0.0], [3.0, 1.0]) == pytest.approx(weighted)
    assert preference_nll([0.0], [0.5]) == pytest.approx(math.log(2))
    assert preference_nll([-1e4], [1.0]) == pytest.approx(1e4)


def test_longer_wins_counts_equal_lengths_as_one_half():
    assert longer_wins_baseline([5, -2, 0, 3, 9], [1.0, 1.0, 0.0, 0.0, 0.5]) == pytest.approx((1 + 0 + 0.5 + 0) / 4)


def test_report_leaves_out_what_the_data_leave_undefined():
    report = preference_report([2.0, -1.0, 0.1], [1.0, 1.0, 0.5], [1.0, 1.0, 1.0], [3, -1, 0])
    assert report["pairs"] == 3 and report["accuracy"] == 0.5 and report["margin"] == 0.5
    assert report["longer_wins_baseline"] == 0.5 and report["accuracy_ties"] == pytest.approx(2 / 3)
    assert "accuracy_ties" not in preference_report([1.0], [1.0], [1.0], [1])
    assert set(preference_report([1.0], [0.5], [1.0], [1])) == {"pairs", "nll", "brier", "ece", "accuracy_ties"}


def test_brier_and_calibration_worked_by_hand():
    three = math.log(3)  # σ = 3/4
    assert brier_score([three, -three], [1.0, 1.0]) == pytest.approx((1 / 16 + 9 / 16) / 2)
    # Two bins of [0.5, 1]: 3/4 falls into the upper one, right once in two; σ(0.1) into the lower one, always right.
    bins = reliability_bins([three, -three, 0.1, -0.1], [1.0, 1.0, 1.0, 0.0], n_bins=2)
    assert [(b["n"], b["accuracy"]) for b in bins] == [(2, 1.0), (2, 0.5)]
    assert bins[1]["confidence"] == pytest.approx(0.75) and bins[0]["confidence"] == pytest.approx(0.52498, abs=1e-5)
    gaps = abs(1 - bins[0]["confidence"]) + 0.25
    assert calibration_error([three, -three, 0.1, -0.1], [1.0, 1.0, 1.0, 0.0], n_bins=2) == pytest.approx(gaps / 2)


def test_percentiles_are_those_of_the_side_that_won():
    n = 101
    first_wins, ones = np.arange(n) % 2 == 0, np.ones(n)
    high, low = np.arange(n) + 1000.0, np.arange(n, dtype=float)
    scores = np.where(first_wins, high, low), np.where(first_wins, low, high)
    names = np.full(n + 1, "")
    columns = [
        np.append(values, extra) for values, extra in zip((*scores, first_wins * 1.0), (-9, 9, 0.5), strict=True)
    ]
    judged = JudgedPairs(*columns, np.append(ones, 1), *np.zeros((2, n + 1)), np.arange(n + 1), names)
    report = judged.report()  # the tie is on no side
    assert [report[f"{side}_p{q}"] for side in ("chosen", "rejected") for q in (5, 50, 95)] == [
        1005, 1050, 1095, 5, 50, 95
    ]  # fmt: skip


def test_a_model_without_an_opinion_is_calibrated_whatever_the_order_of_the_sides():
    assert reliability_bins([0.0, 0.0], [1.0, 1.0]) == [{"n": 2, "confidence": 0.5, "accuracy": 0.5}]
    assert calibration_error(np.zeros(9), np.ones(9)) == 0.0


def test_a_model_that_knows_its_chances_is_calibrated():
    rng = np.random.default_rng(0)
    deltas = rng.normal(0, 2, 200_000)
    targets = (rng.random(200_000) < 1 / (1 + np.exp(-deltas))).astype(float)
    assert calibration_error(deltas, targets) < 0.01 < calibration_error(3 * deltas, targets)
    assert brier_score(deltas, targets) < brier_score(3 * deltas, targets)


def test_accuracy_interval_resamples_prompts_not_pairs():
    # Each prompt's six pairs are all right or all wrong: 40 independent facts, not 240.
    right = np.arange(40) < 26
    deltas = np.repeat(np.where(right, 1.0, -1.0), 6)
    low, high = bootstrap_accuracy_ci(deltas, np.ones(240), np.repeat(np.arange(40), 6))
    half_width = 1.96 * np.sqrt(0.65 * 0.35 / 40)  # the normal approximation over prompts
    assert low == pytest.approx(0.65 - half_width, abs=0.02) and high == pytest.approx(0.65 + half_width, abs=0.02)
    with_ties = bootstrap_accuracy_ci(
        np.append(deltas, 5.0), np.append(np.ones(240), 0.5), np.append(np.repeat(np.arange(40), 6), 40)
    )
    assert with_ties == (low, high)  # a row labeled a tie does not count
    assert all(np.isnan(bootstrap_accuracy_ci(np.ones(3), np.ones(3), np.zeros(3))))  # one prompt says nothing


def test_bootstrap_interval_covers_and_is_repeatable():
    rng = np.random.default_rng(1)
    samples = rng.normal(2.0, 1.0, size=(200, 40))
    intervals = [bootstrap_mean_ci(sample, n_resamples=499) for sample in samples]
    covered = np.mean([low <= 2.0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99
    assert bootstrap_mean_ci(samples[0], seed=3) == bootstrap_mean_ci(samples[0], seed=3)
    low, high = bootstrap_mean_ci(samples[0], level=0.5)
    assert high - low < np.subtract(*bootstrap_mean_ci(samples[0])[::-1])


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap_mean_ci([0.25] * 8) == (0.25, 0.25)


def test_the_bootstrap_in_parts_is_scipys_to_sampling_error():
    rng = np.random.default_rng(0)
    values = rng.normal(size=3000) + 1  # more than one part
    low, high = clustered_mean_ci(values, np.arange(3000))
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=rng, batch=100)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.005)
    assert clustered_mean_ci(values, np.zeros(3000)) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_judged_pairs_report_by_group_as_counted_one_by_one():
    rng = np.random.default_rng(1)
    n = 400
    judged = JudgedPairs(
        scores_i=rng.normal(size=n), scores_j=rng.normal(size=n), targets=rng.choice([0.0, 0.5, 1.0], n),
        weights=rng.uniform(size=n), margins=np.zeros(n), length_deltas=rng.integers(-40, 41, n),
        prompts=np.arange(n) // 2, categories=np.repeat(["chat", "", "open qa", "chat"], n // 4),
    )  # fmt: skip
    report, groups = judged.report(), judged.groups()
    decided = [k for k in range(n) if judged.targets[k] != 0.5]

    def accuracy(numbers):
        return np.mean([(judged.deltas[k] > 0) == (judged.targets[k] == 1) for k in numbers])

    assert set(groups) == {"category", "length_gap"} and set(groups["category"]) == {"chat", "open qa"}
    chat = [k for k in decided if judged.categories[k] == "chat"]
    assert groups["category"]["chat"] == {"n": len(chat), "accuracy": pytest.approx(accuracy(chat))}
    assert report["accuracy/category/chat"] == groups["category"]["chat"]["accuracy"]
    assert sum(found["n"] for found in groups["length_gap"].values()) == len(decided)
    for name, found in groups["length_gap"].items():
        low, high = map(float, name.split(" to "))
        last = high == max(float(other.split(" to ")[1]) for other in groups["length_gap"])
        gaps = np.abs(judged.length_deltas)
        here = [k for k in decided if low <= gaps[k] < high or (last and gaps[k] == high)]
        assert found == {"n": len(here), "accuracy": pytest.approx(accuracy(here))}
    starts = [float(name.split(" to ")[0]) for name in groups["length_gap"]]
    assert starts == sorted(starts) and len(starts) == 4
    assert report["gain"] == pytest.approx(report["accuracy"] - report["longer_wins_baseline"])
    assert report["gain_low"] < report["gain"] < report["gain_high"]
    assert all(find_metric(f"eval_{name}") for name in report)

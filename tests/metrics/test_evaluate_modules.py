"""The `evaluate.Metric` modules, offline, against counts by hand and scikit-learn."""

import math
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from hf_rlhf_ext import metrics

RNG = np.random.default_rng(3)
DELTAS, TARGETS = RNG.normal(size=60), RNG.choice([0.0, 1.0], 60)
PROMPTS, LENGTHS = np.arange(60) // 3, RNG.integers(-9, 10, 60)


@pytest.mark.parametrize("name", metrics.PREFERENCE_NAMES)
def test_each_loads_by_its_path_without_the_hub(name):
    found = evaluate.load(str(Path(metrics.__file__).parent / name))
    assert found.description and "P(i over j)" in found.inputs_description


def test_a_name_that_no_metric_has_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'bleu'.*longer_wins_gain"):
        metrics.load_metric("bleu")


def test_names_and_units_are_read_without_importing_evaluate():
    code = "import sys, hf_rlhf_ext.metrics, hf_rlhf_ext.metrics.names; assert 'evaluate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_accuracy_is_a_count():
    found = metrics.load_metric("pairwise_accuracy").compute(
        predictions=[*DELTAS, 0.1], references=[*TARGETS, 0.5], prompts=[*PROMPTS, 99]
    )
    right = np.mean((DELTAS > 0) == (TARGETS == 1))
    assert found["accuracy"] == pytest.approx(right)
    assert found["accuracy_low"] < right < found["accuracy_high"]
    called = [0 if abs(d) < math.log(3) else math.copysign(1, d) for d in [*DELTAS, 0.1]]
    truth = [1 if t == 1 else -1 if t == 0 else 0 for t in [*TARGETS, 0.5]]
    assert found["accuracy_ties"] == pytest.approx(np.mean(np.array(called) == truth))
    assert "accuracy_low" not in metrics.load_metric("pairwise_accuracy").compute(
        predictions=DELTAS, references=TARGETS
    )


def test_likelihood_and_brier_are_those_of_scikit_learn():
    chances, weights = 1 / (1 + np.exp(-DELTAS)), RNG.uniform(size=60)
    given = {"predictions": DELTAS, "references": TARGETS}
    assert metrics.load_metric("preference_nll").compute(**given)["nll"] == pytest.approx(log_loss(TARGETS, chances))
    weighted = metrics.load_metric("preference_nll").compute(**given, weights=weights)["nll"]
    assert weighted == pytest.approx(log_loss(TARGETS, chances, sample_weight=weights))
    calibration = metrics.load_metric("preference_calibration").compute(**given)
    assert calibration["brier"] == pytest.approx(brier_score_loss(TARGETS, chances))
    one_bin = metrics.load_metric("preference_calibration").compute(**given, n_bins=1)["ece"]
    right = np.mean((DELTAS > 0) == (TARGETS == 1))
    assert one_bin == pytest.approx(abs(np.mean(np.maximum(chances, 1 - chances)) - right))


def test_a_reliability_diagram_comes_with_its_calibration_error():
    found = metrics.load_metric("preference_calibration").compute(predictions=DELTAS, references=TARGETS, n_bins=5)
    bins = found["reliability"]
    assert sum(b["n"] for b in bins) == 60
    assert found["ece"] == pytest.approx(sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 60)


def test_groups_are_counts_by_category_length_and_margin():
    names, margins = np.array(["chat", "open qa", ""])[np.arange(60) % 3], RNG.uniform(size=60)
    found = metrics.load_metric("preference_groups").compute(
        predictions=[*DELTAS, 0.1], references=[*TARGETS, 0.5], categories=[*names, "chat"],
        length_deltas=[*LENGTHS, 1], margins=[*margins, 0.0],
    )  # fmt: skip
    right = (DELTAS > 0) == (TARGETS == 1)
    for name in ("chat", "open qa"):  # the tie is in no count
        assert found[f"n/category/{name}"] == 20
        assert found[f"accuracy/category/{name}"] == pytest.approx(right[names == name].mean())
    for title in ("length_gap", "margin"):
        named = [key.removeprefix("n/") for key in found if key.startswith(f"n/{title}/")]
        assert sum(found[f"n/{key}"] for key in named) == 60
        assert sum(found[f"n/{key}"] * found[f"accuracy/{key}"] for key in named) == pytest.approx(right.sum())
    none = metrics.load_metric("preference_groups").compute(predictions=DELTAS, references=TARGETS)
    assert none == {}


def test_gain_is_what_the_scores_know_beyond_length():
    by_length = metrics.load_metric("longer_wins_gain").compute(
        predictions=LENGTHS * 0.1, references=TARGETS, length_deltas=LENGTHS, prompts=PROMPTS
    )
    equal = (LENGTHS == 0).mean()  # which count half for the baseline and nothing for the scores
    assert by_length["gain"] == pytest.approx(-equal / 2)
    perfect = metrics.load_metric("longer_wins_gain").compute(
        predictions=TARGETS - 0.5, references=TARGETS, length_deltas=LENGTHS, prompts=PROMPTS
    )
    assert perfect["gain"] == pytest.approx(1 - perfect["longer_wins_baseline"])
    assert perfect["gain_low"] < perfect["gain"] < perfect["gain_high"]

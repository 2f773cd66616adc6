"""Length-controlled win rates on judges of which the answer is known."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import special, stats

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.length_control import length_controlled_win_rate
from hf_rlhf_ext.study.statistics import win_rate


def longer_answers(n=2000, seed=0):
    return np.random.default_rng(seed).normal(15.0, 20.0, n).round()


def test_a_judge_that_only_likes_length_gives_one_half():
    deltas = longer_answers()
    outcomes = np.where(deltas == 0, 0.5, deltas > 0)
    assert win_rate(outcomes).rate.mean > 0.7
    result = length_controlled_win_rate(outcomes, deltas)
    assert result.mean == pytest.approx(0.5, abs=0.03)
    assert result.low <= 0.5 <= result.high


def test_a_noisy_judge_that_only_likes_length_gives_one_half():
    deltas = longer_answers()
    outcomes = np.random.default_rng(1).random(len(deltas)) < special.expit(deltas / 20)
    result = length_controlled_win_rate(outcomes.astype(float), deltas)
    assert result.mean == pytest.approx(0.5, abs=0.04)
    assert result.low <= 0.5 <= result.high


def test_a_judge_that_ignores_length_gives_the_win_rate():
    deltas = longer_answers(200)
    # For each difference in length, the same share of wins: ignoring length exactly.
    outcomes = np.tile([1.0, 1.0, 0.5, 0.0], len(deltas))
    result = length_controlled_win_rate(outcomes, np.repeat(deltas, 4))
    assert result.mean == pytest.approx(0.625, abs=1e-4)
    assert length_controlled_win_rate(outcomes, np.zeros(len(outcomes))).mean == pytest.approx(0.625, abs=1e-6)


def test_the_fit_is_that_of_a_binomial_glm_with_robust_errors():
    rng = np.random.default_rng(2)
    deltas = rng.normal(5, 20, 400)
    features = np.tanh(deltas / deltas.std(ddof=1))
    outcomes = rng.choice([0.0, 0.5, 1.0], 400, p=[0.2, 0.2, 0.6])
    glm = sm.GLM(outcomes, sm.add_constant(features), family=sm.families.Binomial()).fit(cov_type="HC0")
    result = length_controlled_win_rate(outcomes, deltas)
    assert result.mean == pytest.approx(special.expit(glm.params[0]), abs=1e-4)
    assert (result.low, result.high) == pytest.approx(tuple(special.expit(glm.conf_int()[0])), abs=0.006)


def test_length_that_cannot_be_told_apart_has_no_value():
    assert math.isnan(length_controlled_win_rate([1.0, 0.0, 1.0], [5, 5, 5]).mean)
    assert math.isnan(length_controlled_win_rate([], []).mean)
    with pytest.raises(UserError, match="length_deltas"):
        length_controlled_win_rate([1.0, 0.0], [5])


def test_a_side_that_wins_everything_keeps_the_interval_of_the_win_rate():
    rate = length_controlled_win_rate([1.0] * 16, [1, 2, 3, 4] * 4)
    assert rate.mean == pytest.approx(16.5 / 17)
    assert rate.low == pytest.approx(stats.binomtest(16, 16).proportion_ci(method="wilson").low)
    assert rate.high == 1.0

"""Bradley-Terry ratings on known strengths, against evalica and against a logistic regression."""

from itertools import combinations

import evalica
import numpy as np
import pytest
from scipy import special
from sklearn.linear_model import LogisticRegression

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.ratings import ELO_PER_LOGIT, bradley_terry

STRENGTHS = {"base": -1.0, "sft": 0.0, "ppo": 0.7, "dpo": 0.4}


def judged(n=400, seed=0, tie=0.2):
    rng = np.random.default_rng(seed)
    outcomes = {}
    for one, two in combinations(STRENGTHS, 2):
        wins = (rng.random(n) < special.expit(STRENGTHS[one] - STRENGTHS[two])).astype(float)
        outcomes[one, two] = np.where(rng.random(n) < tie, 0.5, wins).tolist()
    return outcomes


def test_known_strengths_are_found():
    ratings = bradley_terry(judged(4000, tie=0), reference="sft")
    assert list(ratings) == ["ppo", "dpo", "sft", "base"]
    for name, strength in STRENGTHS.items():
        assert ratings[name].mean == pytest.approx(strength * ELO_PER_LOGIT, abs=15)
        assert ratings[name].low <= strength * ELO_PER_LOGIT <= ratings[name].high
    assert (ratings["sft"].low, ratings["sft"].high) == (0.0, 0.0)


def test_ratings_are_evalicas_and_those_of_a_logistic_regression():
    outcomes = judged()
    ratings = bradley_terry(outcomes, reference="sft", n_resamples=99)
    firsts, seconds, winners, design, labels, weights = [], [], [], [], [], []
    for (one, two), values in outcomes.items():
        for value in values:
            firsts.append(one)
            seconds.append(two)
            winners.append({1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}[value])
            row = [float(name == one) - float(name == two) for name in STRENGTHS]
            design += [row, row]
            labels += [1, 0]
            weights += [value, 1 - value]
    scores = np.log(evalica.bradley_terry(firsts, seconds, winners, tolerance=1e-10, limit=10_000).scores)
    fit = LogisticRegression(C=1e8, fit_intercept=False, tol=1e-10).fit(design, labels, sample_weight=weights)
    strengths = dict(zip(STRENGTHS, fit.coef_[0], strict=True))
    for name, rating in ratings.items():
        assert rating.mean == pytest.approx(ELO_PER_LOGIT * (scores[name] - scores["sft"]), abs=1e-3)
        assert rating.mean == pytest.approx(ELO_PER_LOGIT * (strengths[name] - strengths["sft"]), abs=0.05)


@pytest.mark.slow
def test_intervals_are_close_to_a_refit_on_resampled_prompts():
    outcomes = {pair: np.array(values) for pair, values in judged(200).items()}
    interval = bradley_terry(outcomes, reference="sft")["ppo"]
    rng = np.random.default_rng(3)
    refitted = []
    for _ in range(200):
        rows = rng.integers(0, 200, 200)
        resampled = {pair: values[rows] for pair, values in outcomes.items()}
        refitted.append(bradley_terry(resampled, reference="sft", n_resamples=49)["ppo"].mean)
    low, high = np.quantile(refitted, [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.2 * (high - low))


def test_a_system_that_wins_everything_has_a_finite_rating():
    ratings = bradley_terry({"a|b": [1.0] * 20, "b|c": [1.0, 0.0] * 10})
    # 20.5 of 21 with the additional tie.
    assert ratings["a"].mean - ratings["b"].mean == pytest.approx(ELO_PER_LOGIT * np.log(20.5 / 0.5), abs=0.1)


def test_what_cannot_be_rated_is_refused():
    with pytest.raises(UserError, match="judge a pair of both sides"):
        bradley_terry({"a|b": [1.0, 0.0], "c|d": [1.0, 0.0]})
    with pytest.raises(UserError, match="judge a pair of both sides"):
        bradley_terry({"a|b": [1.0, 0.0], "b|c": [None, None]})
    with pytest.raises(UserError, match="Pass None"):
        bradley_terry({"a|b": [1.0, 0.0], "b|c": [1.0]})
    with pytest.raises(UserError, match="reference"):
        bradley_terry({"a|b": [1.0, 0.0]}, reference="x")


def test_the_error_of_an_infinite_rating_is_not_known():
    ratings = bradley_terry({"a|b": [1.0] * 20}, reference="b")
    assert ratings["a"].mean > 0 and np.isnan(ratings["a"].low)
    assert (ratings["b"].low, ratings["b"].high) == (0, 0)

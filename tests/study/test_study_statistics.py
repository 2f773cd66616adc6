"""Means, gains, win rates and adjustments against closed forms and other libraries."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.preference_metrics import bootstrap_mean_ci
from hf_rlhf_ext.study.statistics import (
    detectable_effect,
    holm,
    mean_interval,
    needed_n,
    paired_gain,
    win_rate,
    win_rate_matrix,
)


def test_a_gain_of_one_seed_is_a_paired_bootstrap_over_prompts():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 50)
    after = before + rng.normal(0.5, 1, 50)
    interval = paired_gain(before, after)
    low, high = bootstrap_mean_ci(after - before)
    widened = math.sqrt(50 / 49) * stats.t.ppf(0.975, 49) / stats.norm.ppf(0.975)
    expected = (interval.mean + (low - interval.mean) * widened, interval.mean + (high - interval.mean) * widened)
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-9)
    assert (interval.n, interval.seeds, interval.over) == (50, 1, "prompts")
    assert interval.p_value == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=1e-9)


def test_seeds_with_their_own_prompts_give_the_t_interval_of_their_means():
    values = [1.0, 3.0, 2.0, 6.0, 5.0, 7.0]
    interval = mean_interval(values, [0, 0, 1, 1, 2, 2])
    expected = stats.ttest_1samp([2.0, 4.0, 6.0], 0)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-12)
    assert interval.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert (interval.mean, interval.seeds, interval.over) == (4.0, 3, "seeds and prompts")


def test_shared_prompts_add_their_own_part_of_the_variance():
    # Seeds' means 1.5 and 2.5, prompts' effects -1 and 1, no rest. V_seed = 0.5 / 2 with 1 degree of freedom,
    # V_prompt = 2 / 2 with 1 degree of freedom: both have the quantile 12.706.
    interval = mean_interval([0.5, 2.5, 1.5, 3.5], [0, 0, 1, 1], ["a", "b", "a", "b"])
    reach = stats.t.ppf(0.975, 1) * math.sqrt(0.25 + 1.0)
    assert (interval.low, interval.high) == pytest.approx((2.0 - reach, 2.0 + reach), rel=1e-9)
    # Without `prompts`, the same values are taken as four prompts, and the interval is too narrow.
    assert mean_interval([0.5, 2.5, 1.5, 3.5], [0, 0, 1, 1]).half_width < interval.half_width / 2


def test_the_p_value_belongs_to_the_interval():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(0, 0.2, 3), 40) + np.tile(rng.normal(0, 1, 40), 3) + rng.normal(0, 1, 120)
    seeds, prompts = np.repeat(range(3), 40), np.tile(range(40), 3)
    interval = mean_interval(values, seeds, prompts)
    at_its_end = mean_interval(values, seeds, prompts, null=interval.low)
    assert at_its_end.p_value == pytest.approx(0.05, abs=1e-6)


def test_failed_judgments_and_too_few_values():
    assert mean_interval([1.0, None, 3.0, math.nan]).n == 2
    assert math.isnan(mean_interval([]).mean)
    assert mean_interval([2.0]).as_dict() == {
        "mean": 2.0, "ci95": [None, None], "n": 1, "seeds": 1, "over": "prompts", "p_value": None,
    }  # fmt: skip
    with pytest.raises(UserError, match="groups"):
        mean_interval([1.0, 2.0], [0])


def test_win_rate_counts_ties_as_half_and_wilson_without_them():
    result = win_rate([1.0, 1.0, 0.8, 0.5, 0.0, None])
    assert (result.wins, result.ties, result.losses, result.failed) == (3, 1, 1, 1)
    assert result.rate.mean == pytest.approx(3.3 / 5)
    # Wilson's closed form for 3 of 4.
    z = stats.norm.ppf(0.975)
    center = (0.75 + z * z / 8) / (1 + z * z / 4)
    reach = z / (1 + z * z / 4) * math.sqrt(0.75 * 0.25 / 4 + z * z / 64)
    assert result.wilson == pytest.approx((center - reach, center + reach), rel=1e-9)
    with pytest.raises(UserError, match="from 0 to 1"):
        win_rate([2.0])


def test_a_win_rate_of_one_is_no_point():
    result = win_rate([1.0] * 5 + [1.0] * 5, [0] * 5 + [1] * 5, [*range(5), *range(5)])
    assert result.rate.low == pytest.approx(stats.binomtest(5, 5).proportion_ci(method="wilson").low)
    assert result.rate.high == 1.0
    assert result.rate.p_value == pytest.approx(stats.binomtest(5, 5).pvalue)


def test_the_matrix_has_both_directions():
    matrix = win_rate_matrix({"a|b": [1.0, 1.0, 0.5, 0.0], ("a", "c"): [1.0, 0.0, 1.0, 0.0]})
    assert matrix["a"]["b"].rate.mean == 0.625
    assert matrix["b"]["a"].rate.mean == 0.375
    assert matrix["b"]["a"].wins == 1
    assert matrix["b"]["a"].rate.low == pytest.approx(1 - matrix["a"]["b"].rate.high)
    assert "b" not in matrix["c"]


def test_holm_is_that_of_statsmodels():
    raw = [0.01, 0.04, 0.03, 0.005, 0.2, 0.04]
    assert holm(raw) == pytest.approx(multipletests(raw, method="holm")[1])
    assert holm([0.02, math.nan])[0] == 0.02


def test_needed_n_and_detectable_effect_find_it_in_four_of_five():
    rng = np.random.default_rng(2)
    n = needed_n(effect=0.3, sd=1.0)
    values = rng.normal(0.3, 1.0, (20_000, n))
    errors = values.std(1, ddof=1) / math.sqrt(n)
    assert np.mean(values.mean(1) > 1.96 * errors) == pytest.approx(0.8, abs=0.02)
    assert detectable_effect(mean_interval(values[0])) == pytest.approx(0.3, rel=0.25)


def test_seeds_that_agree_by_chance_keep_the_spread_over_prompts():
    # Both seeds have the mean 0, by values that differ much between prompts.
    first = [-1.0, 1.0, -2.0, 2.0, -1.5, 1.5, 0.5, -0.5]
    seeds, prompts = [0] * 8 + [1] * 8, [*range(8), *range(8)]
    over_both = mean_interval(first + first[::-1], seeds, prompts)
    averaged = mean_interval([(one + two) / 2 for one, two in zip(first, first[::-1], strict=True)])
    assert over_both.high > 0.4 * averaged.high > 0
    assert over_both.p_value == pytest.approx(1.0)


def test_equal_values_have_an_interval_only_if_there_are_enough():
    # Rounding is no spread: a bootstrap of it has no ends.
    gains = [value + 1 - value for value in (0.1, 0.7, 1.3, 0.2, 0.9, 0.4, 0.6)]
    interval = mean_interval(gains)
    assert (interval.low, interval.high) == pytest.approx((1, 1))
    assert interval.p_value == pytest.approx(stats.binomtest(7, 7).pvalue)
    assert math.isnan(mean_interval(gains[:5]).low)
    two_seeds = mean_interval(gains[:5] * 2, [0] * 5 + [1] * 5, [*range(5), *range(5)])
    assert math.isnan(two_seeds.low) and two_seeds.seeds == 2
    assert mean_interval([0.0] * 8).p_value == 1.0


def test_one_prompt_says_nothing_of_others_in_many_seeds_too():
    interval = mean_interval([1.0, 1.2, 1.1], [0, 1, 2], ["p", "p", "p"])
    assert interval.mean == pytest.approx(1.1)
    assert math.isnan(interval.low) and math.isnan(interval.p_value)

"""Fits of over-optimization against known curves with noise, and what each guard would have chosen on made-up runs."""

import math

import numpy as np
import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.early_stops import RunEvaluations, all_stops, at_max_kl, at_warning, by_patience
from hf_rlhf_ext.study.overoptimization import Curve, fall_after_peak, fit_curve, fit_curves, highest_point

DISTANCES = np.linspace(0, 8, 21)
N_PROMPTS = 24


def known_gold(d, form, alpha, beta, start=0.5):
    curved = d if form == "best_of_n" else np.log(np.maximum(d, 1e-12))
    return start + d * (alpha - beta * curved)


# Peaks worked by hand: d = α / 2β = 2.5, KL 6.25; and d = exp(α/β - 1) = exp(1.5), KL exp(3).
@pytest.mark.parametrize(
    "form, alpha, beta, peak", [("best_of_n", 1.0, 0.2, 6.25), ("rl", 1.0, 0.4, math.exp(3.0))], ids=["bon", "rl"]
)
def test_a_curve_without_noise_gives_back_its_parameters(form, alpha, beta, peak):
    fit = fit_curve(DISTANCES**2, known_gold(DISTANCES, form, alpha, beta), form)
    assert (fit.start, fit.alpha, fit.beta, fit.rmse) == pytest.approx((0.5, alpha, beta, 0.0), abs=1e-9)
    assert fit.peak_kl == pytest.approx(peak, rel=1e-9)
    grid = np.linspace(0.0, 64, 200_001)
    assert grid[fit.gold_at(grid).argmax()] == pytest.approx(peak, abs=1e-3)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_a_curve_that_only_rises_has_its_peak_at_infinity(form):
    assert fit_curve(DISTANCES**2, known_gold(DISTANCES, form, 1.0, -0.1), form).peak_kl == math.inf
    curves = noisy_curves(np.random.default_rng(0), form, [(1.0, -0.1)] * 3)
    fitted = fit_curves(curves, form)
    assert fitted.peak_kl[1] == math.inf and not fitted.peaks_before_last
    assert fitted.as_dict()["peak_kl"]["ci95"][1] is None


def noisy_curves(rng, form, parameters, noise=0.6):
    """One curve per seed with its own α and β; prompts have levels that all seeds share."""
    of_prompt = rng.normal(0, 1.0, N_PROMPTS)
    curves = []
    for alpha, beta in parameters:
        gold = known_gold(DISTANCES, form, alpha, beta)[:, None] + of_prompt
        gold = gold + rng.normal(0, noise, gold.shape)
        curves.append(Curve(DISTANCES**2, gold))
    return curves


@pytest.mark.parametrize("form, alpha, beta", [("best_of_n", 1.0, 0.1), ("rl", 1.0, 0.4)], ids=["bon", "rl"])
def test_the_intervals_cover_the_truth(form, alpha, beta):
    """250 studies of three seeds whose own α and β vary. The bounds are 95 % ± 3.5 standard errors."""
    rng = np.random.default_rng(5)
    peak = fit_curve(DISTANCES**2, known_gold(DISTANCES, form, alpha, beta), form).peak_kl
    covered = {"alpha": 0, "beta": 0, "peak": 0}
    n = 250
    for _ in range(n):
        parameters = [(alpha + rng.normal(0, 0.05), beta * (1 + rng.normal(0, 0.05))) for _ in range(3)]
        fitted = fit_curves(noisy_curves(rng, form, parameters), form, n_resamples=40)
        covered["alpha"] += fitted.alpha[0] <= alpha <= fitted.alpha[1]
        covered["beta"] += fitted.beta[0] <= beta <= fitted.beta[1]
        covered["peak"] += fitted.peak_kl[0] <= peak <= fitted.peak_kl[1]
    shares = {name: count / n for name, count in covered.items()}
    assert all(0.90 <= share <= 0.998 for share in shares.values()), shares


@pytest.mark.parametrize("of_seeds, of_prompts", [(0.1, 0.0), (0.0, 0.3), (0.1, 0.3)], ids=["seeds", "prompts", "both"])
def test_the_interval_of_alpha_is_that_of_its_mean_where_alpha_varies_by_seed_and_prompt(of_seeds, of_prompts):
    # α is linear in gold, so its estimate is the mean of α over seeds and prompts, with the variances of two means.
    rng = np.random.default_rng(4)
    seeds = rng.normal(0, 1, 3) * of_seeds
    prompts = rng.normal(0, 1, N_PROMPTS) * of_prompts
    curves = []
    for shift in seeds:
        alpha = 1.0 + shift + prompts  # (P,)
        curves.append(Curve(DISTANCES**2, known_gold(DISTANCES[:, None], "rl", alpha, 0.4)))
    fitted = fit_curves(curves, "rl", n_resamples=4000)
    variances = np.array([seeds.var(ddof=1) / 3, prompts.var() / N_PROMPTS])
    student = [4.3027, 2.0687]  # 97.5 %, 2 and 23 degrees of freedom
    reach = variances @ student / math.sqrt(variances.sum())
    mean = 1.0 + seeds.mean() + prompts.mean()
    assert fitted.alpha == pytest.approx((mean - reach, mean + reach), abs=0.04 * reach)


def test_the_peak_is_told_from_the_last_point_where_it_is_and_not_where_it_is_not():
    rng = np.random.default_rng(1)
    falling = fit_curves(noisy_curves(rng, "rl", [(1.0, 0.5)] * 3), "rl")  # peak at KL exp(2) = 7.4
    assert falling.peaks_before_last and falling.peak_kl[0] < math.exp(2) < falling.peak_kl[1] < falling.last_kl == 64
    late = fit_curves(noisy_curves(rng, "rl", [(1.0, 0.325)] * 3), "rl")  # peak at d = 8, the last point
    assert not late.peaks_before_last


def test_kl_may_differ_by_prompt_and_seeds_may_have_different_numbers_of_points():
    rng = np.random.default_rng(2)
    full, short = noisy_curves(rng, "rl", [(1.0, 0.5)] * 2, noise=0.0)
    kl = full.kl * rng.uniform(0.5, 1.5, N_PROMPTS)
    kl *= full.kl.mean(1, keepdims=True) / np.maximum(kl.mean(1, keepdims=True), 1e-9)  # the means are those of before
    fitted = fit_curves([Curve(kl, full.gold), Curve(short.kl[:15], short.gold[:15])], "rl")
    assert (fitted.fit.alpha, fitted.fit.beta) == pytest.approx((1.0, 0.5), abs=1e-6)
    assert fitted.last_kl == pytest.approx((64 + DISTANCES[14] ** 2) / 2)


def test_the_fall_is_not_found_where_there_is_only_noise_and_is_measured_where_there_is_one():
    rng = np.random.default_rng(3)
    flat = [Curve(DISTANCES**2, rng.normal(0, 1, (21, N_PROMPTS))) for _ in range(60)]
    naive = np.mean([curve.gold.mean(1).max() - curve.gold[-1].mean() for curve in flat])
    found = fall_after_peak(flat)
    assert naive > 0.3  # the highest of 21 noisy means
    assert found.low < 0 < found.high
    # rl with α 1, β 0.5: at the peak, d = e, it is e (1 - 0.5) = 1.359; at the end, 8 (1 - 0.5 log 8) = -0.318.
    falling = fall_after_peak(noisy_curves(rng, "rl", [(1.0, 0.5)] * 3, noise=0.2))
    assert falling.mean == pytest.approx(math.e * 0.5 + 0.318, abs=0.15)
    assert falling.low > 0


def test_highest_point_is_the_geometric_mean_over_seeds():
    curves = [Curve([0.0, kl, 50.0], [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]) for kl in (4.0, 9.0, 16.0)]
    mean, low, high = highest_point(curves)
    assert mean == pytest.approx((4 * 9 * 16) ** (1 / 3))
    # Student's t with 2 degrees of freedom: 4.303 times the standard error of the logarithms.
    logs = np.log([4, 9, 16])
    assert math.log(high / mean) == pytest.approx(4.3027 * logs.std(ddof=1) / math.sqrt(3), rel=1e-4)
    assert low * high == pytest.approx(mean**2)


def test_what_cannot_be_fitted_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="best_of_n, rl"):
        fit_curve(DISTANCES, DISTANCES, "dpo")
    with pytest.raises(UserError, match="a fit needs 3"):
        fit_curve([1.0, 1.0, 1.0], [0.0, 1.0, 2.0], "rl")
    with pytest.raises(UserError, match="leave these points out"):
        Curve([0, 1, 2], [[0.0], [math.nan], [1.0]])
    with pytest.raises(UserError, match="same prompts"):
        fit_curves([Curve([0, 1, 2], np.zeros((3, 2))), Curve([0, 1, 2], np.zeros((3, 4)))], "rl")
    with pytest.raises(UserError, match="one curve per seed"):
        fit_curves([], "rl")


# --- guards ----------------------------------------------------------------------------------------------------------

# Evaluations after 0, 2, 4 … rollouts. The proxy rises to the end but one; the held-out model falls from the third on.
RUN = RunEvaluations(
    rollouts=[0, 2, 4, 6, 8, 10],
    kl=[0.0, 8.0, 15.0, 22.0, 45.0, 60.0],
    proxy=[0.0, 0.5, 1.0, 1.4, 1.6, 1.5],
    heldout_proxy=[0.0, 0.4, 0.8, 0.5, 0.2, 0.1],
    disagreement=[0.5, 0.55, 0.7, 0.8, 1.2, 1.3],
    rollout_kl=[0.0, 4.0, 9.0, 12.0, 18.0, 21.0, 30.0, 44.0, 50.0, 55.0],
    completions=64,
)


def test_each_guard_chooses_from_what_it_sees():
    chosen = {name: (stop.index, stop.stopped_after, stop.stopped) for name, stop in all_stops(RUN, patience=2).items()}
    assert chosen == {
        "end": (5, 10, False),
        "max_kl=10": (1, 3, True),  # rollout 3 has 12 nats; before it, evaluation 1 was below the limit
        "max_kl=20": (2, 5, True),
        "max_kl=40": (3, 7, True),
        "best_proxy": (4, 10, False),
        "early_stopping": (4, 10, False),  # one evaluation without a new best is within its patience
        "early_stopping_heldout_model": (2, 8, True),
        "warning": (2, 8, True),
        "disagreement": (2, 6, True),  # 0.8 is above 1.5 times 0.5; the evaluation before is kept
    }


def test_a_limit_that_is_never_exceeded_stops_nothing_and_one_that_is_exceeded_at_once_keeps_the_start():
    assert (at_max_kl(RUN, 100.0).index, at_max_kl(RUN, 100.0).stopped) == (5, False)
    assert (at_max_kl(RUN, 1.0).index, at_max_kl(RUN, 1.0).stopped_after) == (0, 1)


def test_max_kl_goes_back_to_an_evaluation_before_the_rollout_and_below_the_limit():
    # Rollout 4 (of 0, 1 …) exceeds 10 nats. The evaluation after 4 rollouts was of the same policy, and the one after
    # 6 had not been made yet.
    rollout_kl = [0.0, 3.0, 6.0, 8.0, 11.0, 9.0]
    run = RunEvaluations([0, 2, 4, 5, 6], [0.0, 7.0, 9.5, 9.0, 8.0], [0.0] * 5, rollout_kl, 64)
    assert at_max_kl(run, 10.0).index == 2
    too_far = RunEvaluations([0, 2, 4, 5, 6], [0.0, 7.0, 10.5, 9.0, 8.0], [0.0] * 5, rollout_kl, 64)
    assert at_max_kl(too_far, 10.0).index == 1


def test_patience_counts_evaluations_without_a_new_best():
    values = [0.0, 3.0, 1.0, 2.0, 2.5, 9.0]
    assert by_patience(RUN, values, 4).index == 5
    assert (by_patience(RUN, values, 3).index, by_patience(RUN, values, 3).stopped_after) == (1, 8)


def test_the_warning_does_not_take_noise_for_a_fall():
    noisy = RunEvaluations(
        rollouts=RUN.rollouts,
        kl=RUN.kl,
        proxy=RUN.proxy,
        heldout_proxy=[0.0, 0.4, 0.8, 0.75, 0.74, 0.76],
        heldout_proxy_std=[1.0] * 6,  # two standard errors of a difference of means of 64: 0.35
        rollout_kl=RUN.rollout_kl,
        completions=64,
    )
    assert (at_warning(noisy).index, at_warning(noisy).stopped) == (5, False)


def test_guards_without_their_metrics_are_left_out():
    bare = RunEvaluations(RUN.rollouts, RUN.kl, RUN.proxy, RUN.rollout_kl, 64)
    left_out = set(all_stops(RUN)) - set(all_stops(bare))
    assert left_out == {"early_stopping_heldout_model", "warning", "disagreement"}

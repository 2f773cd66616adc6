"""Guards return a verdict and change nothing."""

import math
from pathlib import Path

import pytest
import torch

from hf_rlhf_ext.ppo.guards import MAX_ROLLBACKS, GradientGuard, KLGuard, are_finite

GOOD = Path("runs/ppo/checkpoint-8")


def judge(action, kl=9.0, *, ceiling=5.0, rollbacks=0, checkpoint=GOOD):
    guard = KLGuard(ceiling, action)
    return guard.judge({"objective/kl": kl}, kl_coef=0.1, rollbacks=rollbacks, checkpoint=checkpoint)


@pytest.mark.parametrize("kl, ceiling", [(5.0, 5.0), (-1.0, 5.0), (1e9, None)])
def test_a_rollout_at_or_below_the_ceiling_is_trained_on(kl, ceiling):
    verdict = judge("stop", kl, ceiling=ceiling)
    assert (verdict.action, verdict.kl_coef, verdict.restore, verdict.message) == ("train", 0.1, None, "")
    assert verdict.is_good


def test_a_rollout_without_a_reference_has_no_kl_to_judge():
    assert KLGuard(5.0, "stop").judge({}, kl_coef=0.1, rollbacks=0, checkpoint=GOOD).action == "train"


@pytest.mark.parametrize("kl", [9.0, math.inf, math.nan])
def test_above_the_ceiling_the_run_stops_with_the_weights_of_the_last_good_checkpoint(kl):
    verdict = judge("stop", kl)
    assert (verdict.action, verdict.kl_coef, verdict.restore) == ("stop", 0.1, GOOD)
    assert "max_kl = 5" in verdict.message and "checkpoint-8" in verdict.message and "kl_coef" in verdict.message


def test_raising_the_coefficient_trains_on_and_goes_back_to_nothing():
    verdict = judge("raise_kl_coef", checkpoint=None)
    assert (verdict.action, verdict.kl_coef, verdict.restore) == ("train", 0.2, None)
    assert "kl_coef is now 0.2" in verdict.message and not verdict.is_good


def test_a_rollback_samples_again_with_twice_the_coefficient_a_few_times_at_most():
    for rollbacks in range(MAX_ROLLBACKS):
        verdict = judge("rollback", rollbacks=rollbacks)
        assert (verdict.action, verdict.kl_coef, verdict.restore) == ("resample", 0.2, GOOD)
        assert f"rollback {rollbacks + 1} of {MAX_ROLLBACKS}" in verdict.message
    assert judge("rollback", rollbacks=MAX_ROLLBACKS).action == "stop"


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_without_a_checkpoint_there_is_only_the_stop(action):
    verdict = judge(action, checkpoint=None)
    assert (verdict.action, verdict.restore) == ("stop", None) and "no checkpoint below it" in verdict.message


@pytest.mark.parametrize("ceiling, exceeded", [(5.0, [False, True, True]), (None, [False, False, True])])
def test_whether_an_evaluation_is_above_the_ceiling(ceiling, exceeded):
    guard = KLGuard(ceiling, "stop")
    assert [guard.is_exceeded(kl) for kl in (5.0, 5.1, math.nan)] == exceeded


def test_finite_gradients_end_the_count():
    verdict = GradientGuard(3).judge(True, in_a_row=2, loss_scale=None)
    assert (verdict.skip, verdict.in_a_row, verdict.warning, verdict.stop_reason) == (False, 0, "", None)


def test_gradients_that_are_not_finite_are_skipped_until_there_are_too_many():
    guard = GradientGuard(2)
    first = guard.judge(False, in_a_row=0, loss_scale=None)
    assert (first.skip, first.in_a_row, first.stop_reason) == (True, 1, None) and "skipped" in first.warning
    second = guard.judge(False, in_a_row=1, loss_scale=1.0)
    assert (second.skip, second.in_a_row, second.warning) == (True, 2, "")
    assert "2 optimizer steps in a row" in second.stop_reason and "learning_rate" in second.stop_reason


def test_an_overflow_at_a_large_loss_scale_is_skipped_and_does_not_count():
    verdict = GradientGuard(1).judge(False, in_a_row=0, loss_scale=65536.0)
    assert (verdict.skip, verdict.in_a_row, verdict.stop_reason) == (True, 0, None)
    assert "loss scale of 65536" in verdict.warning


def test_are_finite():
    assert are_finite([]) and are_finite([torch.zeros(2), torch.ones(1)])
    assert not are_finite([torch.zeros(2), torch.tensor([1.0, math.inf])])
    assert not are_finite([torch.tensor(math.nan)])

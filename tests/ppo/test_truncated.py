"""`mask_truncated_completions`: completions without a stop token do not count in losses, whitening and baselines."""

import math

import pytest
import torch

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.advantages import leave_one_out_advantages, whiten
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.losses import masked_mean
from hf_rlhf_ext.ppo.rollout import Rollout

MASKED = {"mask_truncated_completions": True}
ONE = {"max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}
WITHOUT_CRITIC = {"critic": "none", "num_generations": 4, "per_device_train_batch_size": 8}


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def first_rollout(trainer):
    """Trains, and returns the rollout on which the run began."""
    found = []
    make = trainer.experience.make

    def kept(*args, **kwargs):
        found.append(make(*args, **kwargs))
        return found[-1]

    trainer.experience.make = kept
    trainer.train()
    return found[0]


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log and "objective/scores" in log]


# Pure functions


def test_leave_one_out_among_those_that_count_by_hand():
    # Returns 1, 5, 3, 100 of the first prompt, of which the last does not count: 1 - 4, 5 - 2, 3 - 3.
    # One completion of the second prompt counts: there is nothing to compare it with. None of the third.
    returns = [1.0, 5.0, 3.0, 100.0, 7.0, 8.0, 9.0, 10.0, 1.0, 2.0, 3.0, 4.0]
    rewards = torch.tensor([[value, math.nan] for value in returns], dtype=torch.float64)
    mask = torch.tensor([[True, False]] * 12)
    counted = torch.tensor([True, True, True, False, False, True, False, False, False, False, False, False])
    found = leave_one_out_advantages(rewards, mask, per_prompt=4, counted=counted)
    expected = torch.zeros(12, 2, dtype=torch.float64)
    expected[:3, 0] = torch.tensor([-3.0, 3.0, 0.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_leave_one_out_where_all_count_is_that_without_a_selection():
    rewards = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 5, 2, 1])[:, None]
    every = leave_one_out_advantages(rewards, mask, per_prompt=4, counted=torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(every, leave_one_out_advantages(rewards, mask, per_prompt=4), rtol=0, atol=1e-12)


def test_equal_returns_of_those_that_count_are_exactly_nothing():
    rewards = torch.tensor([[0.1], [0.3], [0.3], [0.3]])
    counted = torch.tensor([False, True, True, True])
    found = leave_one_out_advantages(rewards, torch.ones(4, 1, dtype=torch.bool), per_prompt=4, counted=counted)
    assert found.tolist() == [[0.0]] * 4


def rollout_of(counted):
    rows = torch.arange(12).view(3, 4)
    numbers = torch.zeros(3, 3)
    lengths = torch.tensor([3, 1, 2])
    return Rollout(rows, torch.ones(3).long(), lengths, numbers, numbers, numbers, rows[:1, :3], counted=counted)


def test_the_tokens_that_losses_count_are_those_of_counted_rows():
    rows = torch.tensor([0, 2])
    assert rollout_of(None).counted_tokens(rows) == 5
    rollout = rollout_of(torch.tensor([True, False, False]))
    assert rollout.counted_tokens(rows) == 3
    assert rollout.counted_tokens(torch.tensor([1, 2])) == 1  # none: to divide by
    part = rollout.select(rows, minibatch_tokens=torch.tensor(3), share=1.0)
    assert part.mask.tolist() == [[True] * 3, [True, True, False]]
    assert part.loss_mask.tolist() == [[True] * 3, [False] * 3]


# Runs


@pytest.mark.parametrize("options", [{"critic": "head"}, {"critic": "adapter"}, {"critic": "model"}, WITHOUT_CRITIC])
def test_a_masked_completion_changes_nothing_but_its_metrics(make_trainer, options):
    """Rewards of cut completions may be anything: whitening, losses and the weights are the same to the bit."""

    def reward(scale):
        def of(completions, completion_ids, **columns):
            values = [text.count("e") - 0.2 * len(text) for text in completions]
            cut = [len(ids) == 6 and ids[-1] % 5 != 0 for ids in completion_ids]
            assert any(cut) and not all(cut)
            return [scale * 1e3 if is_cut else value for is_cut, value in zip(cut, values, strict=True)]

        return of

    options = options | MASKED | {"max_tokens_per_batch": 40, "max_steps": 2, "num_ppo_epochs": 1, "entropy_coef": 0.1}
    if options["critic"] == "model":
        options["peft_config"] = None
    found = []
    for scale in (0.0, 1.0):
        trainer = make_trainer(folder=str(scale), reward_funcs=reward(scale), **options)
        before = trained(trainer)
        trainer.train()
        found.append(trained(trainer))
        assert any(not torch.equal(weight, before[name]) for name, weight in found[-1].items())
        (log,) = logs_of(trainer)[:1]
        assert 0 < log["completions/masked_frac"] == pytest.approx(1 - log["completions/stopped_frac"])
    assert log["objective/scores"] > 100  # they still count in what describes the samples
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name


def test_advantages_are_white_over_those_that_count(make_trainer):
    rollout = first_rollout(make_trainer(**MASKED, **ONE))
    assert 0 < rollout.counted.sum() < len(rollout.counted)
    mask = rollout.sequences.mask & rollout.counted[:, None]
    assert not rollout.advantages.masked_fill(mask, 0.0).any()
    assert masked_mean(rollout.advantages, mask) == pytest.approx(0, abs=1e-6)
    assert masked_mean(rollout.advantages.square(), mask) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(whiten(rollout.advantages, mask), rollout.advantages, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"critic": "adapter"}, WITHOUT_CRITIC])
def test_a_rollout_without_a_stop_token_is_said_and_gives_no_nan(make_trainer, caplog, options):
    never = {
        "stop_token_ids": [],
        "max_completion_length": 3,
        "kl_placement": "loss",
        "optim": "sgd",
        "entropy_coef": 0.1,
    }
    trainer = make_trainer(**options, **MASKED, **ONE, **never)
    before = trained(trainer)
    trainer.train()
    (line,) = [line for line in caplog.messages if "mask_truncated_completions" in line]
    assert "rollout 0" in line and "max_completion_length" in line
    (log,) = logs_of(trainer)
    assert log["completions/masked_frac"] == 1
    assert {name for name, value in log.items() if value != value} <= {"val/explained_variance"}
    assert log["loss"] == log["grad_norm"] == 0
    for name, weight in trained(trainer).items():
        assert torch.equal(weight, before[name]), name  # SGD without momentum


def test_without_the_option_nothing_is_selected(make_trainer):
    trainer = make_trainer(**ONE)
    assert first_rollout(trainer).counted is None
    assert "completions/masked_frac" not in logs_of(trainer)[0]


def test_resuming_in_the_middle_of_a_rollout_keeps_the_selection(make_trainer):
    options = MASKED | {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(resumed)[name]), name


def test_the_penalty_of_cut_completions_is_refused_beside_the_mask():
    with pytest.raises(UserError, match="missing_eos_penalty.*leave one of them out"):
        PPOConfig("x", use_cpu=True, bf16=False, missing_eos_penalty=1.0, **MASKED)


def test_the_overlong_penalty_of_a_run(make_trainer):
    trainer = make_trainer(
        soft_overlong_tokens=3, soft_overlong_weight=2.0, max_tokens_per_batch=40, kl_coef=0.0, **ONE
    )
    rollout = first_rollout(trainer)
    (log,) = logs_of(trainer)
    # Of 6 tokens at most: 0 up to 3 tokens, then -1/3, -2/3 and -1, times 2.
    penalty = -2 * (rollout.completion_lengths - 3).clamp(min=0) / 3
    assert penalty.unique().numel() > 2
    assert log["objective/overlong_penalty"] == pytest.approx(float(penalty.mean()), abs=1e-6)
    assert log["objective/rlhf_reward"] == pytest.approx(log["objective/scores"] + float(penalty.mean()), abs=1e-5)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"soft_overlong_weight": 2.0}, "soft_overlong_weight.*set soft_overlong_tokens"),
        ({"soft_overlong_tokens": 9, "max_completion_length": 8}, "soft_overlong_tokens=9.*max_completion_length=8"),
        ({"soft_overlong_tokens": 0}, "soft_overlong_tokens"),
        ({"soft_overlong_tokens": 2, "soft_overlong_weight": -1.0}, "soft_overlong_weight"),
        ({"clip_range_high": 0.0}, "clip_range_high"),
    ],
)
def test_wrong_values_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        PPOConfig("x", use_cpu=True, bf16=False, **options)


def test_the_upper_clip_of_a_run_lets_more_tokens_move(make_trainer):
    fractions = []
    for high in (None, 5.0):
        trainer = make_trainer(folder=str(high), clip_range=0.05, clip_range_high=high, learning_rate=5e-2)
        trainer.train()
        fractions.append(sum(log.get("policy/clipfrac_avg", 0.0) for log in trainer.state.log_history))
    assert fractions[1] < fractions[0]

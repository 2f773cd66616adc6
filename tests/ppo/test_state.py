"""The state of a run: the next rows, the content of a checkpoint, and the shares of processes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.kl import KLController, adapted_kl_coef
from hf_rlhf_ext.ppo.meter import Meter
from hf_rlhf_ext.ppo.ranks import Ranks
from hf_rlhf_ext.ppo.rollout import Rollout
from hf_rlhf_ext.ppo.shaping import RunningMoments
from hf_rlhf_ext.ppo.state import PPOState, geometry, steps_in_all


def ranks_of(count, index):
    """Stands for one of several processes when rows are shared."""
    fake = SimpleNamespace(num_processes=count, process_index=index, device=torch.device("cpu"))
    return Ranks(fake)


@pytest.fixture
def args(tmp_path):
    return PPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_mini_batches=2,
        num_ppo_epochs=2,
    )


@pytest.mark.parametrize("count", [1, 2])
def test_every_epoch_uses_each_completion_once_over_all_processes(args, count):
    size = args.rollout_size * count
    order = torch.stack([torch.randperm(size) for _ in range(args.num_ppo_epochs)])
    lengths = torch.arange(1, size + 1)
    numbers = torch.zeros(size, 1)
    rollout = Rollout(order, lengths, lengths, numbers, numbers, numbers, order)
    states = [PPOState(kl_coef=0.1, rollout=rollout) for _ in range(count)]
    assert steps_in_all(args) == 12
    for epoch in range(args.num_ppo_epochs):
        used = []
        for micro_step in range(6):
            shares = [state.next_micro_batch(args, ranks_of(count, i)) for i, state in enumerate(states)]
            used += [row for share in shares for row in share.rows.tolist()]
            # All micro-batches of an optimizer step are divided by the tokens of their whole mini-batch.
            first = micro_step // 3 * 6 * count
            mini_batch = order[epoch][first : first + 6 * count]
            assert all(share.minibatch_tokens == lengths[mini_batch].sum() for share in shares)
        assert sorted(used) == list(range(size))
    assert all(state.step_in_rollout == 12 for state in states)


def test_a_rollout_that_is_left_is_used_up(args):
    state = PPOState(kl_coef=0.1, step_in_rollout=3)
    assert state.updates == 1
    state.leave_rollout(args)
    assert state.step_in_rollout == steps_in_all(args)


def test_what_is_saved_comes_back(args, tmp_path):
    state = PPOState(
        kl_coef=0.3,
        moments=RunningMoments(5, 0.5, 2.0),
        rollout_index=7,
        step_in_rollout=12,
        clip_fraction=torch.tensor(0.25),
        clip_weight=2.0,
        skipped_in_a_row=1,
        rollbacks=2,
        good_checkpoint="checkpoint-4",
        new_checkpoint="checkpoint-8",
    )
    state.save(tmp_path, args, ranks_of(1, 0), critic="head")
    loaded = PPOState.load(tmp_path, args, ranks_of(1, 0), critic="head")
    assert loaded == PPOState(**vars(state) | {"clip_fraction": 0.25})
    assert geometry(args, ranks_of(2, 0))["num_processes"] == 2


@pytest.mark.parametrize("n, count", [(7, 2), (8, 2), (1, 3), (0, 2), (10, 4)])
def test_blocks_of_all_processes_are_all_rows_in_order(n, count):
    blocks = [list(ranks_of(count, index).block(n)) for index in range(count)]
    assert [row for block in blocks for row in block] == list(range(n))
    assert max(map(len, blocks)) <= -(-n // count)


def test_one_process_gathers_and_sums_nothing():
    ranks = Ranks(Accelerator(cpu=True))
    rows = {"input_ids": torch.tensor([[1, 2]])}
    tensor = torch.tensor([1.0, 2.0])
    ranks.sum_([tensor])
    assert ranks.alone and ranks.gather("a") == ["a"] and ranks.gather_rows(rows, 0) is rows
    assert tensor.tolist() == [1.0, 2.0] and ranks.sum_of(1.5, torch.tensor(2.0)) == [1.5, 2.0]
    assert ranks.concatenate([1, 2]) == [1, 2] and ranks.share([1, 2, 3]) == [1, 2, 3]


def test_a_meter_weighs_shares_and_starts_anew():
    meter = Meter(Ranks(Accelerator(cpu=True)))
    meter.add("loss", torch.tensor(1.0, requires_grad=True), 0.5)
    meter.add("loss", 2.0, 0.5)
    meter.observe("kl", 4.0)
    meter.observe("kl", 6.0)
    assert meter.means() == {"loss": 3.0, "kl": 5.0}
    assert meter.means() == {}


def test_a_controller_without_a_target_leaves_the_coefficient():
    assert KLController().next(0.1, 50.0, 64) == 0.1
    expected = adapted_kl_coef(0.1, 50.0, kl_target=5.0, kl_horizon=640, n_sequences=64)
    assert KLController(5.0).next(0.1, 50.0, 64) == expected > 0.1
    assert KLController(5.0, 100).next(0.1, 0.0, 64) < 0.1

"""Every row counts once an epoch, and passes that keep processes together add nothing."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.training_args import OptimizerNames

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.partitions import loaded_whole
from hf_rlhf_ext.reward import sharded_runs
from hf_rlhf_ext.reward.even_batches import filled_up, is_counted, own_rows, uncounted, weight_repeated_rows_zero
from hf_rlhf_ext.reward.meter import TrainMeter
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.scores import score_batch
from hf_rlhf_ext.reward.sharded_runs import check_sharded_run
from hf_rlhf_ext.training.engines import Engine
from tests.reward.examples import comparisons


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 2), (2, 2), (3, 2), (2, 3)])
def test_rows_that_accelerate_repeats_do_not_count(batch_size, processes):
    for n in range(1, 20):
        counted = []
        for process in range(processes):
            sampler = BatchSamplerShard(BatchSampler(range(n), batch_size, drop_last=False), processes, process)
            *batches, last = sampler
            counted += [row for batch in batches for row in batch]
            counted += last[: own_rows(n, batch_size, processes, process)]
        assert sorted(counted) == list(range(n))


def fake_accelerator(n_rows, process):
    loader = SimpleNamespace(dataset=range(n_rows))
    state = SimpleNamespace(end_of_dataloader=True, active_dataloader=loader)
    return SimpleNamespace(num_processes=2, process_index=process, gradient_state=state, gather=lambda values: values)


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
@pytest.mark.parametrize("budget", [None, 60])
def test_a_filled_batch_has_loss_and_metrics_of_its_own_rows(make_trainer, layout, budget):
    """The last of 7 rows on the second of two processes with batches of 4: one of its rows is repeated."""
    trainer = make_trainer(comparisons(4, seed=2), peft=None, layout=layout, max_tokens_per_batch=budget)
    rows = list(trainer.train_dataset)

    def measured(inputs):
        meter, losses = TrainMeter(), []
        for batch in inputs.get("micro_batches", [inputs]):
            scores = score_batch(trainer.model, batch).detach()
            losses.append(trainer._pair_losses(scores, batch).sum())
            meter.add(scores, batch)
        return sum(losses), meter.reduce(fake_accelerator(7, 1))

    filled = trainer.data_collator(rows)
    weight_repeated_rows_zero([filled], fake_accelerator(7, 1))
    loss, totals = measured(filled)
    expected_loss, expected = measured(trainer.data_collator(rows[:3]))
    torch.testing.assert_close(loss, expected_loss)
    assert vars(totals) == pytest.approx(vars(expected), abs=1e-5)

    unchanged = trainer.data_collator(rows)
    weight_repeated_rows_zero([unchanged], fake_accelerator(8, 1))
    assert measured(unchanged)[1].tokens > totals.tokens


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
def test_passes_that_fill_up_add_no_gradient_and_no_metrics(make_trainer, layout):
    trainer = make_trainer(
        comparisons(5), peft=None, layout=layout, max_tokens_per_batch=60, ranking_loss="plackett_luce"
    )
    batches = trainer.data_collator(list(trainer.train_dataset))["micro_batches"]
    filled = filled_up(batches, len(batches) + 2)
    assert filled[2:] == batches and not any(map(is_counted, filled[:2])) and all(map(is_counted, batches))
    smallest = min(batch["input_ids"].numel() for batch in batches)
    assert filled[0]["input_ids"].numel() == filled[1]["input_ids"].numel() == smallest
    trainer.model.train()
    trainer.compute_loss(trainer.model, filled[0], num_items_in_batch=torch.tensor(3.0)).backward()
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)
    trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=torch.tensor(3.0))
    totals = trainer._meter.reduce(fake_accelerator(8, 0))
    assert (
        totals.tokens == batches[0]["token_counts"].sum() and totals.n_scores == batches[0]["completion_counts"].sum()
    )
    assert filled_up(batches, len(batches)) == batches
    assert batches[0]["weights"].all(), "the copy must not change the batch"
    assert not uncounted(batches[0])["weights"].any()


def test_a_scorer_runs_as_many_passes_as_it_is_told(seqcls, chat_tokenizer):
    scorer = RewardScorer(seqcls, chat_tokenizer, batch_size=2)
    sequences = [[5, 6, 7], [8, 9], [10]]
    expected = scorer.score_ids(sequences)
    passes = []
    hook = seqcls.register_forward_hook(lambda *args: passes.append(args))
    assert scorer.n_passes(sequences) == 2
    assert scorer.score_ids(sequences, at_least=5) == expected and len(passes) == 5
    assert scorer.score_ids([], at_least=1) == [] and len(passes) == 6
    hook.remove()


def test_a_model_is_loaded_whole_although_zero3_is_configured():
    class Config:
        def is_zero3(self):
            return True

    config = Config()  # Transformers keeps a weak reference only
    set_hf_deepspeed_config(config)
    try:
        assert is_deepspeed_zero3_enabled()
        with loaded_whole():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()


@pytest.mark.parametrize(
    ("engine", "changed", "message"),
    [
        ("fsdp2", {"optim": "adafactor"}, "optim='adafactor': with fsdp2"),
        ("zero2", {"optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit': with zero2"),
        ("zero2", {"fp16": True}, "fp16: not supported with zero2"),
        ("fsdp2", {"save_only_model": True, "load_best_model_at_end": True}, "save_only_model: with fsdp2"),
        ("fsdp2", {"optimizers": (torch.optim.SGD, None)}, "optimizers: fsdp2 shards the model"),
        ("zero3", {"saves_whole": False}, "zero3_save_16bit_model: without it"),
        ("ddp", {"even_batches": False}, "accelerator_config: even_batches=False"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_in_one_line(monkeypatch, engine, changed, message):
    monkeypatch.setattr(sharded_runs, "asked_engine", lambda args: Engine(engine))
    changed = dict(changed)
    optimizers = changed.pop("optimizers", (None, None))
    with pytest.raises(UserError, match=message):
        check_sharded_run(two_processes(**changed), optimizers)


def test_options_that_engines_support_are_not_refused(monkeypatch):
    for engine in (Engine.DDP, Engine.FSDP2, Engine.ZERO2, Engine.ZERO3):
        monkeypatch.setattr(sharded_runs, "asked_engine", lambda args, engine=engine: engine)
        check_sharded_run(two_processes(), (None, None))


def two_processes(*, even_batches=True, saves_whole=True, optim="adamw_torch", **options):
    """Options as `check_sharded_run` reads them on one of two processes."""
    zero = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": saves_whole}}
    known = {"fp16": False, "save_only_model": False, "load_best_model_at_end": False}
    return SimpleNamespace(
        accelerator_config=SimpleNamespace(even_batches=even_batches),
        world_size=2,
        deepspeed_plugin=SimpleNamespace(deepspeed_config=zero),
        optim=OptimizerNames(optim),
        **(known | options),
    )

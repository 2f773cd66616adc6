"""`auto_batch` of the reward trainer: after a lack of memory, the same weights as with the smaller number set by hand.

The weights are compared bit for bit, in fp32.
"""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.memory.planner import plan_of
from hf_rlhf_ext.reward.model_setup import longest_row
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from hf_rlhf_ext.training import memory_line
from hf_rlhf_ext.training.auto_batch import REWARD_TOKENS, AutoBatch
from tests.reward.examples import comparisons, trainable
from tests.support.small_memory import SmallMemory, said

OPTIONS = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
OPTIONS |= {"normalize_rewards": False, "save_strategy": "no", "layout": "plain", "lr_scheduler_type": "constant"}


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same(trainer, other):
    weights, wanted = trainable(trainer.model), trainable(other.model)
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(weights[name], weight), name


CASES = {
    "forward pass": {},
    "backward pass": {"backward": True},
    "second micro-step": {"after": 1},
    "shared prefix": {"layout": "shared_prefix", "backward": True},
    "dropout": {"dropout": 0.2, "disable_dropout": False, "after": 1},
    "twice in one step": {"after": 1, "then": 60, "dropout": 0.2, "disable_dropout": False},
}


COUNTED = {"num_tokens", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm"}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_the_smaller_number_set_by_hand(make_trainer, caplog, case):
    options = OPTIONS | CASES[case]
    memory = {name: options.pop(name) for name in ("backward", "after", "then") if name in options}
    dropout = options.pop("dropout", 0.0)
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = make_trainer(comparisons(24), peft=lora, auto_batch=True, **options)
    small = SmallMemory(trainer.model, 120, **memory)
    trainer.train()
    budget = trainer.args.max_tokens_per_batch
    lines = said(caplog)
    assert len(lines) == small.failures >= (2 if "then" in memory else 1)
    assert f"max_tokens_per_batch is now {budget} tokens" in lines[-1] and "out of memory in training" in lines[0]

    by_hand = make_trainer(comparisons(24), peft=lora, max_tokens_per_batch=budget, **options)
    by_hand.train()
    assert_same(trainer, by_hand)
    assert losses(trainer) == pytest.approx(losses(by_hand), rel=1e-6)
    for log, wanted in zip(trainer.state.log_history, by_hand.state.log_history, strict=True):
        for name in COUNTED & wanted.keys():  # no pass is counted twice
            assert log[name] == wanted[name], name


def test_it_begins_with_what_the_plan_says_fits(make_trainer, seqcls, monkeypatch, caplog):
    base = copy.deepcopy(seqcls)
    by_hand = make_trainer(comparisons(24), **OPTIONS)
    longest = longest_row(by_hand.train_dataset)
    monkeypatch.setattr(memory_line, "card_memory", lambda device: 10**12)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    memory = memory_line.log_memory(base, "reward", by_hand.args, peft_config=lora)
    assert memory.sizes(layout="plain", **longest) == {}  # four rows fit
    setup = replace(memory.request.setup, layout="plain", **longest)
    budget = 3 * setup.per_prompt * setup.length
    card = plan_of(replace(memory.request, setup=replace(setup, max_tokens_per_batch=budget))).n_bytes

    monkeypatch.setattr(memory_line, "card_memory", lambda device: card)
    trainer = make_trainer(comparisons(24), auto_batch=True, **OPTIONS)
    assert trainer.args.max_tokens_per_batch == budget and trainer.args.per_device_train_batch_size == 4
    assert f"max_tokens_per_batch begins with {budget} tokens (was: no limit)" in caplog.text
    trainer.train()
    by_hand = make_trainer(comparisons(24), max_tokens_per_batch=budget, **OPTIONS)
    by_hand.train()
    assert_same(trainer, by_hand)


def test_a_later_lack_of_memory_is_as_if_the_run_were_resumed_with_a_smaller_number(make_trainer):
    class Shrink(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.memory.tokens = 120

    options = OPTIONS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    shrink = Shrink()
    trainer = make_trainer(comparisons(24), auto_batch=True, callbacks=[shrink], folder="auto", **options)
    shrink.memory = SmallMemory(trainer.model, backward=True)
    trainer.train()
    assert shrink.memory.failures

    make_trainer(comparisons(24), folder="hand", **(options | {"max_steps": 2})).train()
    budget = trainer.args.max_tokens_per_batch
    by_hand = make_trainer(comparisons(24), folder="hand", max_tokens_per_batch=budget, **options)
    by_hand.train(resume_from_checkpoint=True)
    assert_same(trainer, by_hand)


def test_a_resumed_run_keeps_the_smaller_number(make_trainer, caplog):
    options = OPTIONS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "auto_batch": True}
    whole = make_trainer(comparisons(24), folder="whole", **options)
    SmallMemory(whole.model, 120)
    whole.train()
    n_lines = len(said(caplog))

    first = make_trainer(comparisons(24), folder="parts", **options)
    SmallMemory(first.model, 120)
    first.args.max_steps = 2
    first.train()
    second = make_trainer(comparisons(24), folder="parts", **options)
    memory = SmallMemory(second.model, 120)
    second.train(resume_from_checkpoint=True)
    assert memory.failures == 0 and second.args.max_tokens_per_batch == whole.args.max_tokens_per_batch
    assert len(said(caplog)) == 2 * n_lines
    assert_same(second, whole)


def test_an_evaluation_has_smaller_passes_too(make_trainer, caplog):
    rows = comparisons(16)
    options = {"eval_dataset": rows, "per_device_eval_batch_size": 8, "normalize_rewards": False, "layout": "plain"}
    trainer = make_trainer(rows, auto_batch=True, **options)
    memory = SmallMemory(trainer.model, 100)
    metrics = trainer.evaluate()
    assert memory.failures and "out of memory in evaluation" in said(caplog)[0]
    by_hand = make_trainer(rows, max_tokens_per_batch=trainer.args.max_tokens_per_batch, **options)
    assert metrics["eval_loss"] == pytest.approx(by_hand.evaluate()["eval_loss"], rel=1e-6)


def test_the_normalization_is_measured_in_smaller_passes(make_trainer):
    options = OPTIONS | {"normalize_rewards": True, "max_steps": 1}
    wanted = make_trainer(comparisons(8), **options)
    wanted.train()
    trainer = make_trainer(comparisons(8), auto_batch=True, **options)

    class Shrink(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            SmallMemory(trainer.model, 100)

    trainer.add_callback(Shrink())
    trainer.train()
    assert trainer.sizes.sizes[REWARD_TOKENS] is not None and trainer.args.max_tokens_per_batch is None
    assert trainer.normalization.is_measured
    assert trainer.normalization.mean == pytest.approx(wanted.normalization.mean, abs=1e-6)


def test_a_scorer_scores_the_same_in_smaller_passes(seqcls, chat_tokenizer, make_trainer):
    scorer = RewardScorer(seqcls, chat_tokenizer)
    prompts = ["Tell me:", "Tell me more about it:"] * 4
    completions = [" yes" * (1 + n) for n in range(8)]
    wanted = scorer.raw(prompts, completions)
    trainer = make_trainer(comparisons(4), model=seqcls, peft=None, auto_batch=True, normalize_rewards=False)
    memory = SmallMemory(seqcls, 60)
    scorer.sizes = trainer.sizes
    assert scorer.raw(prompts, completions) == pytest.approx(wanted, abs=1e-5)
    budget = trainer.sizes.sizes[REWARD_TOKENS]
    assert memory.failures and budget is not None and trainer.args.max_tokens_per_batch is None
    by_hand = RewardScorer(seqcls, chat_tokenizer, max_tokens=budget)
    assert scorer.raw(prompts, completions) == by_hand.raw(prompts, completions)


def test_a_prompt_that_does_not_fit_alone_is_refused_in_one_line(make_trainer):
    trainer = make_trainer(comparisons(8), auto_batch=True, **OPTIONS)
    SmallMemory(trainer.model, 5)
    with pytest.raises(UserError, match="auto_batch: out of memory in training.*activation_checkpointing") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_without_the_option_and_for_other_errors_nothing_is_repeated(make_trainer):
    trainer = make_trainer(comparisons(8), **OPTIONS)
    SmallMemory(trainer.model, 60)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()

    trainer = make_trainer(comparisons(8), auto_batch=True, **OPTIONS)
    memory = SmallMemory(trainer.model, 60)
    memory.fail_if = lambda is_too_large: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.train()
    assert isinstance(trainer.sizes, AutoBatch) and trainer.args.max_tokens_per_batch is None


def test_a_collator_of_the_user_is_refused(chat_tokenizer, make_trainer):
    earlier = make_trainer(comparisons(4))
    args = make_trainer(comparisons(4), auto_batch=True).args
    options = {"processing_class": chat_tokenizer, "data_collator": earlier.data_collator}
    with pytest.raises(UserError, match="auto_batch splits.*leave data_collator"):
        BradleyTerryTrainer(earlier.model, args, comparisons(4), **options)

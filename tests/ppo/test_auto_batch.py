"""`auto_batch` of PPO: after a lack of memory, the same rollouts and weights as with the smaller number set by hand.

They are compared bit for bit, in fp32.
"""

import json
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.callbacks import PPOCallback
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.training import memory_line
from hf_rlhf_ext.training.auto_batch import AUTO_BATCH_FILE, REWARD_TOKENS
from tests.support.small_memory import SmallMemory, said

OPTIONS = {"gradient_accumulation_steps": 2, "num_mini_batches": 1, "critic": "adapter", "max_steps": 3}


class SetByHand(PPOCallback):
    """Sets the token budget after the first rollout was scored, as a lack of memory in training does."""

    def __init__(self, budget):
        self.budget = budget

    def on_rollout(self, args, state, control, **kwargs):
        args.max_tokens_per_batch = self.budget


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(trainer, other):
    weights, wanted = trained(trainer), trained(other)
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(weights[name], weight), name
    for log, wanted_log in zip(trainer.state.log_history, other.state.log_history, strict=True):
        for name in wanted_log.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            assert log[name] == pytest.approx(wanted_log[name], rel=1e-5, abs=1e-7, nan_ok=True), name


TEXTS = Dataset.from_dict({"text": ["A fox is quick and brown.", "Many words!", "The garden, on a sunny day"]})
SCORED = {
    "adapter": (30, {}),
    "head": (30, {"critic": "head"}),
    "together": (40, {"joint_scoring": True, "per_device_train_batch_size": 8}),  # three copies of a sequence
    "completions of a prompt": (20, {"num_generations": 2}),  # in one row behind their prompt
    "texts": (30, {"critic": "head", "ptx_coef": 0.3, "ptx_batch_size": 3, "ptx_dataset": TEXTS}),
}
"""Case -> the number of tokens that fit, and options."""


@pytest.mark.parametrize("case", SCORED)
def test_scoring_that_does_not_fit_gives_the_run_with_the_smaller_number(make_trainer, caplog, case):
    tokens, options = SCORED[case]
    options = OPTIONS | options
    trainer = make_trainer(auto_batch=True, **options)
    memory = SmallMemory(trainer.policy, tokens)
    trainer.train()
    lines = said(caplog)
    budget = trainer.args.max_tokens_per_batch
    assert len(lines) == memory.failures > 0
    assert "out of memory in scoring" in lines[0] and f"max_tokens_per_batch is now {budget} tokens" in lines[-1]
    by_hand = make_trainer(max_tokens_per_batch=budget, **options)
    by_hand.train()
    assert_same(trainer, by_hand)


def test_it_begins_with_what_the_plan_says_fits(make_trainer, monkeypatch, caplog):
    options = OPTIONS | {"num_generations": 2, "max_steps": 2}
    monkeypatch.setattr(memory_line, "card_memory", lambda device: 1)  # not even one prompt fits
    trainer = make_trainer(auto_batch=True, **options)
    longest = int(trainer.experience.prompts.lengths.max())
    found = {"max_tokens_per_batch": longest + 2 * 6, "generation_batch_size": 2}
    assert {name: getattr(trainer.args, name) for name in found} == found
    assert f"max_tokens_per_batch begins with {longest + 12} tokens (was: no limit)" in caplog.text
    assert "generation_batch_size begins with 2 completions (was: no limit)" in caplog.text
    trainer.train()
    by_hand = make_trainer(**found, **options)
    by_hand.train()
    assert_same(trainer, by_hand)


class WatchedMemory(SmallMemory):
    """Also notes whether what went into a pass that failed is still in memory at the next pass."""

    kept: tuple[bool, ...] = ()
    failed = None

    def _enter(self, layer, inputs, options):
        if self.failed is not None:
            self.kept += (self.failed() is not None,)
            self.failed = None
        self.entered = weakref.ref(inputs[0])
        super()._enter(layer, inputs, options)

    def fail_if(self, is_too_large):
        if is_too_large:
            self.failed = self.entered
        super().fail_if(is_too_large)


@pytest.mark.parametrize("limits", [{"tokens": 30}, {"tokens": 30, "backward": True}, {"sampled": 4, "after": 6}])
def test_nothing_of_a_pass_that_failed_is_in_memory_at_the_next_one(make_trainer, limits):
    trainer = make_trainer(auto_batch=True, **(OPTIONS | {"critic": "head", "max_steps": 1}))
    memory = WatchedMemory(trainer.policy, **limits)
    trainer.train()
    assert memory.kept and not any(memory.kept)


class ShrinkAtSubstep(TrainerCallback):
    """Lets the memory become smaller after the first micro-step of an optimizer step."""

    def on_substep_end(self, args, state, control, **kwargs):
        self.memory.tokens = 30


@pytest.mark.parametrize("case", ["head", "twice in one step", "in the second micro-step"])
def test_an_optimizer_step_that_does_not_fit_is_repeated_with_the_smaller_number(make_trainer, caplog, case):
    options = OPTIONS | {"critic": "head" if case == "head" else "adapter"}
    shrink = ShrinkAtSubstep()
    in_second = case == "in the second micro-step"
    trainer = make_trainer(auto_batch=True, callbacks=[shrink] if in_second else [], **options)
    twice = case == "twice in one step"
    memory = SmallMemory(trainer.policy, None if in_second else 30, backward=True, then=15 if twice else None)
    shrink.memory = memory
    trainer.train()
    lines = said(caplog)
    assert len(lines) == memory.failures >= (2 if twice else 1) and "out of memory in training" in lines[0]
    by_hand = make_trainer(callbacks=[SetByHand(trainer.args.max_tokens_per_batch)], **options)
    by_hand.train()
    assert_same(trainer, by_hand)


def test_a_step_that_is_repeated_twice_is_counted_once_in_metrics_of_several_steps(make_trainer):
    meter = make_trainer().meter
    meter.add("loss/value_avg", torch.tensor(2.0))  # of the step before
    restore = meter.snapshot()
    for _ in range(2):
        meter.add("loss/value_avg", torch.tensor(5.0))
        restore()
    meter.add("loss/value_avg", torch.tensor(4.0))
    assert meter.means() == {"loss/value_avg": 3.0}


@pytest.mark.parametrize("generations", [1, 2])
def test_sampling_that_does_not_fit_draws_what_smaller_batches_draw(make_trainer, caplog, generations):
    options = OPTIONS | {"num_generations": generations}
    trainer = make_trainer(auto_batch=True, **options)
    memory = SmallMemory(trainer.policy, sampled=4, after=6)  # some tokens are drawn before
    trainer.train()
    assert memory.failures == 1 and "generation_batch_size is now 4 completions (was: no limit)" in said(caplog)[0]
    assert trainer.args.generation_batch_size == 4 and trainer.args.max_tokens_per_batch is None
    by_hand = make_trainer(generation_batch_size=4, **options)
    by_hand.train()
    assert_same(trainer, by_hand)


def test_reward_models_references_and_evaluation_have_smaller_passes_too(
    make_trainer, tiny_config, chat_tokenizer, prompts, caplog
):
    torch.manual_seed(1)
    reward = LlamaForSequenceClassification(LlamaConfig(**(tiny_config.to_dict() | {"num_labels": 1})))
    options = OPTIONS | {"reward_funcs": RewardScorer(reward, chat_tokenizer), "max_steps": 2}
    options |= {"reward_shaping": "par", "num_reference_answers": 2, "eval_dataset": prompts}
    trainer = make_trainer(auto_batch=True, **options)
    of_reward, of_policy = SmallMemory(reward, 60), SmallMemory(trainer.policy, 30, sampled=3)
    trainer.train()
    assert of_reward.failures and of_policy.failures
    metrics = trainer.evaluate()
    lines = " ".join(said(caplog))
    assert "scoring with a reward model" in lines and "in sampling" in lines and "in scoring" in lines
    sizes = trainer.roles.sizes.sizes
    assert sizes[REWARD_TOKENS] and sizes["generation_batch_size"] <= 3 and metrics["eval_objective/kl"] is not None


def test_a_resumed_run_keeps_the_smaller_numbers(make_trainer):
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 2, "auto_batch": True}
    whole = make_trainer("whole", **options)
    SmallMemory(whole.policy, 30, sampled=4)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    saved = json.loads((checkpoint / AUTO_BATCH_FILE).read_text())
    assert saved["generation_batch_size"] == 4 and saved["max_tokens_per_batch"] <= 30
    resumed = make_trainer("whole", **options)
    memory = SmallMemory(resumed.policy, 30, sampled=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert memory.failures == 0
    weights, wanted = trained(resumed), trained(whole)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("limits", [{"tokens": 5}, {"sampled": 0}])
def test_a_sequence_that_does_not_fit_alone_is_refused_in_one_line(make_trainer, limits):
    trainer = make_trainer(auto_batch=True, **OPTIONS)
    SmallMemory(trainer.policy, **limits)
    with pytest.raises(UserError, match="auto_batch: out of memory in .* 1 row .*max_completion_length") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_without_the_option_a_lack_of_memory_ends_the_run(make_trainer):
    trainer = make_trainer(**OPTIONS)
    SmallMemory(trainer.policy, 30)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()

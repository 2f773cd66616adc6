"""Runs with several completions per prompt: layouts, rewards, engines, the order of the data, and resuming."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.modeling.packing import Layout
from hf_rlhf_ext.ppo import shared_prompts
from hf_rlhf_ext.ppo.callbacks import PPOCallback
from hf_rlhf_ext.ppo.engine import TransformersEngine
from hf_rlhf_ext.ppo.prompts import rows_from
from hf_rlhf_ext.reward.scorer import RewardNormalization, RewardScorer

LETTERS = "abcdefghijkl"
N_PROMPTS = len(LETTERS)
ONE = {"max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}


class Recorder:
    """A reward function that keeps what it is called with."""

    __name__ = "recorder"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, **columns})
        return [text.count("e") - 0.2 * len(text) for text in completions]

    @property
    def rollouts(self):
        return [call["prompts"] for call in self.calls]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def force(trainer, layout):
    for role in trainer.stack.roles.values():
        role.layout = layout


def groups_of(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# Layouts

SGD = {"optim": "sgd", "max_grad_norm": 1e3, "learning_rate": 0.1, "adam_epsilon": 1.0}


def test_every_layout_trains_the_weights_of_plain_rows(make_trainer):
    found = {}
    for layout in Layout:
        recorder = Recorder()
        options = {"critic": "adapter", "num_generations": 4, "per_device_train_batch_size": 8, "folder": layout}
        options |= {"max_steps": 3, "num_ppo_epochs": 3, "num_mini_batches": 1, "max_tokens_per_batch": 60}
        trainer = make_trainer(reward_funcs=recorder, **(SGD | options))
        before = trained(trainer)
        force(trainer, layout)
        trainer.train()
        found[layout] = trained(trainer), [call["ids"] for call in recorder.calls]
    expected, sampled = found[Layout.PLAIN]
    assert max((expected[name] - weight).abs().max() for name, weight in before.items()) > 1e-2
    for layout, (weights, ids) in found.items():
        assert ids == sampled and len(ids) == 1
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=f"{layout}: {name}")


def test_with_one_completion_nothing_is_tested_and_attention_stays(make_trainer, monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("a probe")

    monkeypatch.setattr(shared_prompts, "find_layout", fails)
    trainer = make_trainer(**ONE)
    assert trainer.model.config._attn_implementation == "sdpa"
    assert {role.layout for role in trainer.stack.roles.values()} == {Layout.PLAIN}
    trainer.train()


def lines_of(caplog):
    return [line for line in caplog.messages if line.startswith("num_generations=")]


def test_virtual_tokens_take_plain_rows_and_the_reason_is_logged(make_trainer, caplog):
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(peft_config=virtual, num_generations=4, **ONE)
    (line,) = lines_of(caplog)
    assert "the policy computes a prompt once for each of its completions" in line and "virtual tokens" in line
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "val/ratio" in log]
    assert log["val/ratio"] == pytest.approx(1, abs=1e-6) and abs(log["sampling/logprob_mismatch"]) < 1e-5


def test_a_model_without_position_ids_takes_plain_rows(make_trainer, tiny_config, caplog):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=tiny_config.vocab_size, hidden_size=32, n_layer=1, n_head=4, pad_token_id=0)
    trainer = make_trainer(model=BloomForCausalLM(config), num_generations=4, **ONE)
    (line,) = lines_of(caplog)
    assert "position ids" in line and trainer.stack.roles["policy"].layout is Layout.PLAIN
    trainer.train()


@pytest.mark.parametrize("length, layout", [(4, Layout.MASK), (400, Layout.PLAIN)])
def test_where_only_a_mask_works_it_is_taken_if_it_is_cheaper(make_trainer, tiny_config, caplog, length, layout):
    tiny_config._attn_implementation = "eager"
    data = Dataset.from_dict({"prompt": ["The quick brown fox jumps over the lazy dog and runs into the garden"]})
    model = LlamaForCausalLM(tiny_config)
    options = {"num_generations": 8, "per_device_train_batch_size": 8, "max_completion_length": length}
    trainer = make_trainer(model=model, train_dataset=data, **(ONE | options))
    assert {role.layout for role in trainer.stack.roles.values()} == {layout}
    lines = lines_of(caplog)
    if layout is Layout.MASK:
        assert not lines
        trainer.train()
    else:
        assert len(lines) == 1 and "times as long" in lines[0] and "eager" in lines[0]


def test_a_whole_policy_and_its_reference_share_prompts(make_trainer):
    trainer = make_trainer(peft_config=None, critic="model", num_generations=4, **ONE)
    assert {role.layout for role in trainer.stack.roles.values()} == {Layout.SEGMENTS}
    trainer.train()


# Rewards


def test_reward_functions_get_each_prompt_with_its_columns_once_per_completion(make_trainer):
    recorder, tables = Recorder(), []

    class Tables(PPOCallback):
        def on_rollout(self, args, state, control, *, completions, **kwargs):
            tables.append(completions)

    data = Dataset.from_dict({"prompt": list(LETTERS), "level": list(range(N_PROMPTS)), "per_prompt": ["mine"] * 12})
    options = {"num_generations": 4, "per_device_train_batch_size": 12, "callbacks": [Tables()]}
    trainer = make_trainer(train_dataset=data, reward_funcs=recorder, **(ONE | options))
    trainer.train()
    (call,) = recorder.calls
    rows = [row for row in rows_from(0, 3, N_PROMPTS, 3) for _ in range(4)]
    assert call["prompts"] == [LETTERS[row] for row in rows] and call["level"] == rows
    assert call["per_prompt"] == ["mine"] * 12
    assert len(set(map(tuple, call["ids"]))) > 6  # other completions of the same prompt
    (table,) = tables
    assert table.prompts == call["prompts"] and table.completions == call["completions"]
    assert len(table.rewards["recorder"]) == 12


def reward_model(kind, config, tokenizer, folder):
    """A reward model of its own, or the folder of an adapter that shares the base of the policy."""
    torch.manual_seed(2)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    if kind == "own":
        return RewardScorer(model, tokenizer), None
    policy = LlamaForCausalLM(config)
    policy.model.load_state_dict(model.model.state_dict())
    policy.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = load_base_model(str(folder / "base"), task="reward", dtype="float32")
    model = get_peft_model(base, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    RewardNormalization(base_dtype="float32").save(folder / "reward")
    return str(folder / "reward"), load_base_model(str(folder / "base"), dtype="float32")


@pytest.mark.parametrize("kind, generations", [("own", 1), ("own", 4), ("shared", 4)])
def test_reward_models_get_the_number_of_completions_in_training_only(
    make_trainer, tiny_config, chat_tokenizer, prompts, monkeypatch, tmp_path, kind, generations
):
    scorer, policy = reward_model(kind, tiny_config, chat_tokenizer, tmp_path)
    calls, call = [], RewardScorer.__call__

    def noted(self, prompts, completions, **columns):
        rewards = call(self, prompts, completions, **columns)
        calls.append((columns.get("per_prompt", 1), prompts, completions, rewards))
        return rewards

    monkeypatch.setattr(RewardScorer, "__call__", noted)
    data = prompts.add_column("per_prompt", ["mine"] * len(prompts))
    options = {"num_generations": generations, "train_dataset": data, "eval_dataset": prompts, "max_steps": 2}
    if policy is not None:
        options["model"] = policy
    trainer = make_trainer(reward_funcs=[scorer, lambda completions, **columns: [0.0] * len(completions)], **options)
    if kind == "shared":
        scorer = trainer.rewards.funcs[0]
        assert scorer.model is trainer.model
    trainer.train()
    assert {per_prompt for per_prompt, *_ in calls} == {generations}
    for _, texts, completions, rewards in calls:
        assert rewards == pytest.approx(call(scorer, texts, completions), abs=1e-5)
    calls.clear()
    trainer.evaluate()
    assert {per_prompt for per_prompt, *_ in calls} == {1}


def test_token_rewards_and_scores_of_several_functions(make_trainer):
    def per_token(completions, completion_ids, **columns):
        return [[0.1 * token for token in range(len(ids))] for ids in completion_ids]

    def some(completions, **columns):  # a completion may have no score of one function
        return [None if row % 3 else 1.0 for row in range(len(completions))]

    options = {"num_generations": 4, "per_device_train_batch_size": 8, "normalize_rewards": True}
    trainer = make_trainer(reward_funcs=[per_token, some], **options)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "objective/scores" in log]
    assert log["rewards/some/mean"] == 1.0 and log["rewards/per_token/std"] > 0
    # No function can drop a completion, so that every prompt keeps as many as it has.
    with pytest.raises(UserError, match="returned None for completion 1 of 8: at least one function must score every"):
        make_trainer(reward_funcs=some, **(ONE | options)).train()


# Engines and evaluation


class TwoArguments:
    """An engine of the user for one completion per prompt."""

    def __init__(self):
        self.inner, self.prompts = TransformersEngine(), []

    def sync(self, policy):
        self.inner.sync(policy)

    def generate(self, prompt_ids, sampling):
        self.prompts.append(prompt_ids)
        return self.inner.generate(prompt_ids, sampling)


class ThreeArguments(TwoArguments):
    def generate(self, prompt_ids, sampling, n=1):
        self.prompts.append(prompt_ids)
        return self.inner.generate(prompt_ids, sampling, n)


class Forgetful(TwoArguments):
    def generate(self, prompt_ids, sampling, **options):
        return super().generate(prompt_ids, sampling)


@pytest.mark.parametrize("engine, copies", [(TwoArguments, 4), (ThreeArguments, 1)])
def test_engines_of_the_user(make_trainer, engine, copies):
    engine = engine()
    trainer = make_trainer(engine=engine, num_generations=4, per_device_train_batch_size=8, **ONE)
    trainer.train()
    (prompts,) = engine.prompts
    assert len(prompts) == 2 * copies
    assert all(group == group[:1] * copies for group in groups_of(prompts, copies))
    with pytest.raises(UserError, match="Forgetful.generate returned 2 completions for 2 prompts with n=4"):
        make_trainer(engine=Forgetful(), num_generations=4, per_device_train_batch_size=8, **ONE).train()


def test_stop_strings_and_generation_batches(make_trainer):
    recorder = Recorder()
    options = {"generation_kwargs": {"stop_strings": ["e", "a"]}, "generation_batch_size": 3, "stop_token_ids": []}
    options |= {"max_completion_length": 12, "num_generations": 4, "per_device_train_batch_size": 12}
    make_trainer(reward_funcs=recorder, **(ONE | options)).train()
    (call,) = recorder.calls
    assert len({len(ids) for ids in call["ids"]}) > 2 and any("e" in text for text in call["completions"])
    assert all(len(groups) == 4 and len(set(groups)) == 1 for groups in groups_of(call["prompts"], 4))


def test_an_evaluation_is_that_of_one_completion_per_prompt(make_trainer, prompts):
    found = []
    for generations in (1, 4):
        trainer = make_trainer(num_generations=generations)
        rows = trainer.sample_and_score(prompts)
        assert [row.prompt for row in rows] == prompts["prompt"]
        found.append([(row.completion_ids, row.kl, row.score) for row in rows])
        assert trainer.evaluator.exact_kl(rows) == 0.0
    assert found[0] == found[1]


# The order of the data


def sampled(recorder, generations):
    """The prompts of all rollouts as rows, one for each group of completions."""
    rows = []
    for rollout in recorder.rollouts:
        for group in groups_of(rollout, generations):
            assert len(set(group)) == 1 and len(group) == generations
            rows.append(LETTERS.index(group[0]))
    return rows


EPOCHS = {"num_train_epochs": 2, "max_steps": -1, "num_ppo_epochs": 1, "per_device_train_batch_size": 4}
EPOCHS |= {"num_mini_batches": 2, "train_dataset": Dataset.from_dict({"prompt": list(LETTERS)}), "folder": "epochs"}


def test_every_prompt_is_used_as_often_as_asked_also_after_a_change_of_the_number(make_trainer):
    recorder = Recorder()
    options = EPOCHS | {"reward_funcs": recorder, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(num_generations=2, callbacks=[StopAt(4)], **options)  # 4 prompts in 2 steps
    assert first.args.max_steps == 12
    first.train()
    assert sampled(recorder, 2) == rows_from(0, 8, N_PROMPTS, 3)
    other = Recorder()
    second = make_trainer(num_generations=4, **(options | {"reward_funcs": other}))  # 2 prompts in 2 steps
    second.train(resume_from_checkpoint=True)
    assert sampled(recorder, 2) + sampled(other, 4) == rows_from(0, 24, N_PROMPTS, 3)
    assert second.state.global_step == 4 + 16
    episodes = [log["episode"] for log in second.state.log_history if "episode" in log]
    assert episodes == [8 * (number + 1) for number in range(10)]
    other.calls.clear()
    second.train()  # a new run with the same trainer goes on after the last prompt
    assert sampled(other, 4) == rows_from(24, 24, N_PROMPTS, 3)
    assert [log["episode"] for log in second.state.log_history if "episode" in log][0] == 88


def test_another_number_is_refused_in_the_middle_of_a_rollout(make_trainer):
    options = EPOCHS | {"save_strategy": "steps", "save_steps": 3}
    make_trainer(num_generations=2, callbacks=[StopAt(3)], **options).train()
    with pytest.raises(UserError, match="num_generations=2, but it is now 4: set num_generations=2") as error:
        make_trainer(num_generations=4, **options).train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)


# Resuming

# A rollout is 4 optimizer steps.
WHOLE = {"max_steps": 6, "save_strategy": "steps", "lr_scheduler_type": "linear", "num_generations": 4}
WHOLE |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "critic": "adapter"}


def test_resuming_is_exact(make_trainer):
    straight = make_trainer(folder="whole", save_steps=6, **WHOLE)
    straight.train()
    expected = trained(straight)
    for step in (4, 3):  # between two rollouts, and in the middle of one
        options = WHOLE | {"folder": f"parts-{step}", "save_steps": step}
        make_trainer(callbacks=[StopAt(step)], **options).train()
        resumed = make_trainer(**options)
        resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / f"checkpoint-{step}"))
        found = trained(resumed)
        assert resumed.state.global_step == 6 and found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items()), step
        logs = [[log for log in run.state.log_history if "loss" in log] for run in (straight, resumed)]
        assert logs[0] == logs[1]

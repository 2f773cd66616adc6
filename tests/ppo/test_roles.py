"""A reward adapter on the policy's base: the same scores as a separate model, and the start of the critic."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, RewardScorer
from hf_rlhf_ext.data.text import encode_completion, encode_prompt
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.modeling.logprobs import completion_hidden_states

PROMPTS = ["Tell me", "a sunny day", "The quick brown fox jumps over", "happy or sad?"]
ANSWERS = [" a happy fox", " words", "", " the lazy dog; numbers 0123456789"]


@pytest.fixture
def make_trainer(make_trainer):
    """A trainer with the default critic."""
    return lambda **options: make_trainer(**({"critic": None} | options))


@pytest.fixture
def base(tiny_config, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def reward(base, chat_tokenizer, tmp_path):
    """A reward model from `BradleyTerryTrainer` that prefers longer answers."""
    rows = [{"prompt": p, "chosen": a + " many words, many", "rejected": a} for p in PROMPTS for a in ANSWERS]
    args = BradleyTerryConfig(str(tmp_path / "reward"), use_cpu=True, bf16=False, max_steps=12, learning_rate=1e-2,
                              report_to="none", save_strategy="no", disable_tqdm=True)  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    trainer = BradleyTerryTrainer(
        model, args, Dataset.from_list(rows), processing_class=chat_tokenizer, peft_config=lora
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "reward"


def policy(base):
    return LlamaForCausalLM.from_pretrained(base)


def test_adapter_model_and_callable_give_the_same_scores(make_trainer, base, reward):
    scorer = RewardScorer.from_pretrained(reward)
    expected = scorer(PROMPTS, ANSWERS)
    assert max(expected) - min(expected) > 1e-2

    def as_function(prompts, completions, **kwargs):
        return scorer(prompts, completions)

    trainer = make_trainer(model=policy(base), reward_funcs=[str(reward), scorer.model, as_function])
    shared, separate, function = trainer.rewards.funcs
    assert shared.model is trainer.model and separate.model is scorer.model
    raw = scorer.raw(PROMPTS, ANSWERS)
    torch.testing.assert_close(shared(PROMPTS, ANSWERS), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(separate(PROMPTS, ANSWERS), raw, rtol=0, atol=1e-4)  # a bare model knows no scale
    torch.testing.assert_close(function(PROMPTS, ANSWERS), expected, rtol=0, atol=1e-4)
    assert trainer.model.active_adapter == "default"


def test_the_scores_stay_while_the_policy_trains(make_trainer, base, reward):
    trainer = make_trainer(model=policy(base), reward_funcs=str(reward))
    before = trainer.rewards.funcs[0](PROMPTS, ANSWERS)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".reward." in n}
    trainer.train()
    assert trainer.critic == "adapter" and weights
    for name, weight in weights.items():
        assert torch.equal(trainer.model.get_parameter(name), weight)
    torch.testing.assert_close(trainer.rewards.funcs[0](PROMPTS, ANSWERS), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"reward_weights": [2.0], "reward_scale": 0.5}, {"reward_weights": [3.0]}])
def test_the_critic_starts_as_the_reward_model(make_trainer, base, reward, chat_tokenizer, options):
    trainer = make_trainer(model=policy(base), reward_funcs=str(reward), **options)
    weight = options.get("reward_weights", [1.0])[0] * options.get("reward_scale", 1.0)
    rewards = trainer.rewards.funcs[0](PROMPTS, ANSWERS)
    trainer.model.eval()
    for prompt, answer, reward_value in zip(PROMPTS, ANSWERS, rewards, strict=True):
        ids = torch.tensor([encode_prompt(chat_tokenizer, prompt) + encode_completion(chat_tokenizer, prompt, answer)])
        with torch.no_grad(), trainer.stack.activate("value") as model:
            # The state of the last token: the one before a further token.
            more = torch.cat([ids, ids[:, :1]], 1)
            hidden = completion_hidden_states(model, model, more, torch.tensor([ids.shape[1]]), torch.ones(1, 1).bool())
        assert trainer.value_head(hidden).item() == pytest.approx(weight * reward_value, abs=1e-4)
    names = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    assert all(on for name, on in names.items() if ".value." in name or "value_head" in name)
    assert not any(on for name, on in names.items() if ".reward." in name or "reward_head" in name)


def test_a_reward_of_another_precision_or_base_is_loaded_beside(make_trainer, base, reward, tiny_config, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer = make_trainer(model=policy(base).bfloat16(), reward_funcs=str(reward))
    assert trainer.rewards.funcs[0].model is not trainer.model and "reward" not in trainer.stack.roles
    assert "was trained on float32 weights, but the policy has bfloat16: it is loaded on a separate base" in caplog.text
    other = make_trainer(reward_funcs=str(reward))  # a base without a name
    assert other.rewards.funcs[0].model is not other.model


def test_a_saved_run_has_policy_and_critic_and_not_the_reward(make_trainer, base, reward, tmp_path):
    trainer = make_trainer(model=policy(base), reward_funcs=str(reward))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    final = tmp_path / "final"
    assert {path.name for path in (final / "value").iterdir()} >= {
        "adapter_model.safetensors",
        "value_head.safetensors",
    }
    assert not list(final.rglob("*reward*")) and not list(final.rglob("*.bin"))
    keys = load_file(final / "adapter_model.safetensors").keys()
    assert keys and not any("value" in key or "reward" in key for key in keys)


def test_critics_of_their_own_learn(make_trainer, tiny_config):
    with pytest.raises(UserError, match="value_model has 2 labels instead of 1: load it with num_labels=1"):
        make_trainer(value_model=LlamaForSequenceClassification(tiny_config))
    tiny_config.num_labels = 1
    for options in ({"critic": "model", "peft_config": None}, {"critic": "model", "value_model": None}):
        if "value_model" in options:
            options["value_model"] = LlamaForSequenceClassification(copy.deepcopy(tiny_config))
        trainer = make_trainer(max_steps=8, **options)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "value" in name}
        trainer.train()
        changed = [name for name in start if not torch.equal(trainer.model.get_parameter(name), start[name])]
        assert {"value_head.weight", "value_head.bias"} < set(changed) and len(changed) > 10


def test_a_critic_by_its_path_starts_as_the_model_there(make_trainer, base, tiny_config, tmp_path):
    trainer = make_trainer(critic="model", value_model=str(base))
    saved = LlamaForCausalLM.from_pretrained(base).state_dict()
    own = trainer.stack.roles["value"].model.state_dict()
    assert all(torch.equal(own[name], saved[name]) for name in saved) and not trainer.value_head.weight.any()
    tiny_config.num_labels = 1
    torch.manual_seed(4)
    reward_model = LlamaForSequenceClassification(tiny_config)
    reward_model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "reward_normalization.json").write_text("{}")
    head = make_trainer(value_model=str(tmp_path / "whole")).value_head
    assert torch.equal(head.weight, reward_model.score.weight)


def test_a_value_model_for_another_critic_is_one_line(make_trainer, tiny_config):
    with pytest.raises(UserError, match="value_model was given, but critic='head': choose critic='model'"):
        make_trainer(critic="head", value_model=LlamaForCausalLM(tiny_config))


class Forwards:
    """Number of forward passes of the first layer of a model in training."""

    def __init__(self, model):
        self.calls = 0
        model.model.layers[0].mlp.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.calls += module.training


@pytest.mark.parametrize("peft", [True, False])
def test_gradient_checkpointing_is_on_in_a_critic_of_its_own(make_trainer, tiny_config, peft):
    calls, weights = [], []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        options = {
            "activation_checkpointing": checkpointing,
            "max_steps": 1,
            "num_mini_batches": 1,
            "num_ppo_epochs": 1,
        }
        trainer = make_trainer(
            critic="model",
            value_model=LlamaForCausalLM(copy.deepcopy(tiny_config)),
            **options,
            **({} if peft else {"peft_config": None}),
        )
        counted = Forwards(trainer.stack.roles["value"].model)
        trainer.train()
        calls.append(counted.calls)
        weights.append(trainer.stack.roles["value"].model.state_dict())
    assert calls == [1, 2]  # computed again in the backward pass
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)


def test_a_reward_model_without_a_pad_token_can_be_the_critic(make_trainer, tiny_config):
    config = copy.deepcopy(tiny_config)
    config.num_labels, config.pad_token_id = 1, None
    trainer = make_trainer(critic="model", value_model=LlamaForSequenceClassification(config), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_weights_that_are_trained_whole_are_fp32_or_it_is_said(make_trainer, base, tiny_config, caplog):
    model = load_base_model(str(base), dtype="bfloat16")
    model.save_pretrained(base)  # a checkpoint in bf16, as most are
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        loaded = make_trainer(model=str(base), peft_config=None, processing_class=None)
        assert {p.dtype for p in loaded.policy.parameters()} == {torch.float32} and not caplog.text
        make_trainer(model=copy.deepcopy(model))  # an adapter on it: fp32 itself
        assert not caplog.text
        make_trainer(model=model, peft_config=None)
        assert "model is trained without an adapter and its weights are bfloat16: small updates are lost" in caplog.text
        caplog.clear()
        make_trainer(critic="model", value_model=LlamaForCausalLM(tiny_config).bfloat16())
        assert "value_model is trained without an adapter and its weights are bfloat16" in caplog.text


def test_a_quantized_critic_is_one_line(make_trainer, base):
    with pytest.raises(UserError, match="value_model: .* is not supported: load it in fp32"):
        make_trainer(critic="model", value_model=load_base_model(str(base), load_in_4bit=True))


def test_a_gold_adapter_for_evaluation_shares_the_base_and_leaves_training_alone(make_trainer, base, reward, prompts):
    weights = []
    for options in ({}, {"eval_reward_funcs": str(reward), "eval_dataset": prompts}):
        trainer = make_trainer(model=policy(base), **options)
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert trainer.eval_rewards.funcs[0].model is trainer.model and trainer.critic == "adapter"
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
    rows = trainer.sample_and_score(prompts)
    expected = RewardScorer.from_pretrained(reward)([row.prompt for row in rows], [row.completion for row in rows])
    found = [row.rewards[trainer.eval_rewards.names[0]] for row in rows]
    assert found == pytest.approx(expected, abs=1e-4)

"""Gradient checkpointing, on by default, is off where an adapter or a model cannot do it."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 1, "seed": 3}
OPTIONS |= {
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "activation_checkpointing": True,
    "logging_steps": 1,
}
PAIRS = [{"prompt": "a fox", "chosen": " happy", "rejected": " sad"}, {"prompt": "x", "chosen": " a", "rejected": " b"}]
PREFIX = {"num_virtual_tokens": 3}
KINDS = [
    PrefixTuningConfig(**PREFIX),
    PrefixTuningConfig(**PREFIX, prefix_projection=True, encoder_hidden_size=8),
    CartridgeConfig(**PREFIX),
]


def said(caplog):
    return [record.message for record in caplog.records if "activation_checkpointing is off" in record.message]


def is_on(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def config_for(kind, task):
    config = copy.deepcopy(kind)
    config.task_type = task
    return config


@pytest.fixture
def ppo(chat_tokenizer, tmp_path):
    def make(model, **arguments):
        options = {"max_completion_length": 4, "num_mini_batches": 1, "num_ppo_epochs": 1, "critic": "head"}
        critic = arguments.pop("critic", "head")
        args = PPOConfig(str(tmp_path), **(OPTIONS | options | {"critic": critic}))
        return PPOTrainer(
            model,
            lambda completions, **_: [float(len(text)) for text in completions],
            args,
            Dataset.from_dict({"prompt": ["a fox", "happy"]}),
            processing_class=chat_tokenizer,
            **arguments,
        )

    return make


@pytest.fixture
def bradley_terry(chat_tokenizer, tmp_path):
    def make(model, peft_config=None):
        args = BradleyTerryConfig(str(tmp_path), **OPTIONS)
        return BradleyTerryTrainer(model, args, PAIRS, processing_class=chat_tokenizer, peft_config=peft_config)

    return make


def train(trainer, caplog, *fragments):
    asked = trainer.args.activation_checkpointing
    trainer.train()
    assert trainer.state.global_step == 1 and not asked and not is_on(trainer.model)
    (line,) = said(caplog)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize("kind", KINDS, ids=["prefix", "projection", "cartridge"])
def test_ppo_trains_virtual_tokens_in_the_cache(tiny_config, ppo, caplog, kind):
    train(ppo(LlamaForCausalLM(tiny_config), peft_config=config_for(kind, "CAUSAL_LM")), caplog, kind.peft_type.value)


def test_a_prefix_of_the_user_on_a_model_that_checkpoints(tiny_config, ppo, caplog):
    model = get_peft_model(LlamaForCausalLM(tiny_config), PrefixTuningConfig(**PREFIX, task_type="CAUSAL_LM"))
    model.get_base_model().activation_checkpointing_enable()
    train(ppo(model), caplog, "PREFIX_TUNING")


@pytest.mark.parametrize("kind", KINDS, ids=["prefix", "projection", "cartridge"])
def test_a_reward_model_with_virtual_tokens_in_the_cache(tiny_config, bradley_terry, caplog, kind):
    tiny_config.num_labels = 1
    model = LlamaForSequenceClassification(tiny_config)
    model.activation_checkpointing_enable()  # PEFT refuses such a model
    train(bradley_terry(model, config_for(kind, "SEQ_CLS")), caplog, kind.peft_type.value)


def test_models_that_do_not_support_it(ppo, bradley_terry, caplog, chat_tokenizer):
    tokens = {"vocab_size": len(chat_tokenizer), "pad_token_id": chat_tokenizer.pad_token_id}
    policy = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2, n_positions=64, **tokens))
    train(ppo(policy), caplog, "OpenAIGPTLMHeadModel does not support it")
    caplog.clear()
    small = {"embedding_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = AlbertForSequenceClassification(AlbertConfig(intermediate_size=16, num_labels=1, **small, **tokens))
    train(bradley_terry(encoder), caplog, "AlbertForSequenceClassification does not support it")


def test_a_value_model_that_does_not_support_it(tiny_config, ppo, caplog, chat_tokenizer):
    tokens = {"vocab_size": tiny_config.vocab_size, "pad_token_id": chat_tokenizer.pad_token_id}
    value_model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2, n_positions=64, **tokens))
    trainer = ppo(LlamaForCausalLM(tiny_config), value_model=value_model, critic="model")
    trainer.train()
    assert is_on(trainer.model) and len(said(caplog)) == 1


def test_other_adapters_keep_it(tiny_config, ppo, caplog):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = ppo(LlamaForCausalLM(tiny_config), peft_config=lora)
    trainer.train()
    assert trainer.args.activation_checkpointing and is_on(trainer.model) and not said(caplog)
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))

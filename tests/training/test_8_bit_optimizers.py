"""8-bit and paged optimizers of bitsandbytes on a CPU: what their states are, and that a run resumes to the bit.

Layers have 4096 weights or more, as bitsandbytes keeps the states of smaller ones in fp32.
"""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import SFTConfig

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer

COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "activation_checkpointing": False}
COMMON |= {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
COMMON |= {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "logging_steps": 1}
STATES = {
    "adamw_8bit": {"state1": torch.uint8, "state2": torch.uint8},
    "paged_adamw_8bit": {"state1": torch.uint8, "state2": torch.uint8},
    "paged_adamw_32bit": {"state1": torch.float32, "state2": torch.float32},
}
"""Names of optimizers, and the dtypes of the states of a large layer."""


@pytest.fixture
def config(chat_tokenizer) -> LlamaConfig:
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(chat_tokenizer), bos_token_id=None, num_labels=1, **size)
    config.pad_token_id, config.eos_token_id = chat_tokenizer.pad_token_id, chat_tokenizer.eos_token_id
    return config


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=64, target_modules=["q_proj", "v_proj"], task_type=task)


def ppo(config, tokenizer, folder, **options):
    options |= {"critic": "adapter", "max_completion_length": 4, "num_ppo_epochs": 2, "value_clip_range": None}
    return PPOTrainer(
        LlamaForCausalLM(config),
        lambda completions, **columns: [float(len(text)) for text in completions],
        PPOConfig(folder, num_mini_batches=1, value_learning_rate=5e-3, **options),
        Dataset.from_dict({"prompt": ["Tell me", "a sunny day"]}),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )


def reward(config, tokenizer, folder, **options):
    pairs = {"prompt": ["Tell me", "fox"], "chosen": [" a day", " happy"], "rejected": [" sad", " no"]}
    return BradleyTerryTrainer(
        LlamaForSequenceClassification(config),
        BradleyTerryConfig(folder, normalize_rewards=False, **options),
        Dataset.from_dict(pairs),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS"),
    )


def sft(config, tokenizer, folder, **options):
    return PublishingSFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(folder, **options),
        train_dataset=Dataset.from_dict({"text": ["a sunny day in the garden", "the quick brown fox"]}),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )


def states(trainer) -> dict[str, torch.Tensor]:
    """The states of all weights, by the names of weight and state."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found = {}
    for parameter, values in trainer.optimizer.state.items():
        for name, value in values.items():
            found[f"{names[parameter]}/{name}"] = torch.as_tensor(value)
    return found


@pytest.mark.parametrize("make", [ppo, reward, sft], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", STATES)
def test_a_run_with_its_states_resumes_to_the_bit(config, chat_tokenizer, tmp_path, make, name):
    def trained(checkpoint: Path | None):
        torch.manual_seed(0)
        trainer = make(config, chat_tokenizer, str(tmp_path / "run"), optim=name, **COMMON)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        return weights, states(trainer)

    straight, its_states = trained(None)
    resumed, states_of_resumed = trained(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    assert its_states.keys() == states_of_resumed.keys()
    assert all(torch.equal(states_of_resumed[key], value) for key, value in its_states.items())
    roles = (".default.", ".value.") if make is ppo else (".default.",)
    for role in roles:
        of_role = {key: value for key, value in its_states.items() if f"q_proj.lora_A{role}weight" in key}
        found = {key.rpartition("/")[2]: value.dtype for key, value in of_role.items() if "/state" in key}
        assert found == STATES[name]


@pytest.mark.parametrize("make", [ppo, reward], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name, remedy", [("paged_ademamix_8bit", "ademamix_8bit"), ("paged_ademamix_32bit", "ademamix")]
)
def test_pages_that_a_cpu_does_not_have_are_refused(config, chat_tokenizer, tmp_path, make, name, remedy):
    with pytest.raises(UserError, match=f"optim='{name}' needs a GPU for its pages: choose {remedy}.$") as error:
        make(config, chat_tokenizer, str(tmp_path / "run"), optim=name, **COMMON)
    assert "\n" not in str(error.value)

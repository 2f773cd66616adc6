"""A PPOTrainer on a tiny random Llama, as the tests of this folder use it."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]


def letter_reward(completions, **kwargs):
    return [text.count("e") - 0.2 * len(text) for text in completions]


@pytest.fixture
def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def prompts():
    return Dataset.from_dict({"prompt": PROMPTS})


@pytest.fixture
def make_trainer(tiny_config, chat_tokenizer, prompts, lora, tmp_path):
    """`make(**options)`: PPOConfig's options, and PPOTrainer's own arguments by name.

    Every trainer gets a model of its own with the same weights; half of the vocabulary stops a completion, so that
    lengths are ragged.
    """
    from transformers import LlamaForCausalLM

    from hf_rlhf_ext.ppo.config import PPOConfig
    from hf_rlhf_ext.ppo.trainer import PPOTrainer

    ours = ("model", "reward_funcs", "train_dataset", "eval_dataset", "processing_class", "peft_config", "callbacks")
    ours += ("eval_reward_funcs", "value_model", "ptx_dataset")

    def make(folder="out", **options):
        torch.manual_seed(0)
        arguments = {"reward_funcs": letter_reward, "train_dataset": prompts, "processing_class": chat_tokenizer}
        arguments |= {"peft_config": lora} | {name: options.pop(name) for name in ours if name in options}
        if "model" not in arguments:
            arguments["model"] = LlamaForCausalLM(tiny_config)
        defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
        defaults |= {"per_device_train_batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 4}
        defaults |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "seed": 3}
        defaults |= {"max_completion_length": 6, "disable_tqdm": True, "logging_steps": 1}
        defaults |= {"stop_token_ids": list(range(0, tiny_config.vocab_size, 5))}
        return PPOTrainer(args=PPOConfig(str(tmp_path / folder), **(defaults | options)), **arguments)

    return make

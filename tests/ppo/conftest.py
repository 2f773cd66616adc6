"""Fixtures: a `PPOTrainer` on a tiny random Llama."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]


def letter_reward(completions, **kwargs):
    return [text.count("e") - 0.2 * len(text) for text in completions]


def health_history(trainer):
    """Metrics by rollout, from the history of the health warnings."""
    from hf_rlhf_ext.ppo.callbacks import HealthWarnings

    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, HealthWarnings))
    return callback.history


@pytest.fixture
def history_of():
    return health_history


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
    ours += ("eval_reward_funcs", "value_model", "ptx_dataset", "engine", "optimizers", "optimizer_cls_and_kwargs")

    def make(folder="out", **options):
        torch.manual_seed(0)
        arguments = {"reward_funcs": letter_reward, "train_dataset": prompts, "processing_class": chat_tokenizer}
        arguments |= {"peft_config": lora} | {name: options.pop(name) for name in ours if name in options}
        if "model" not in arguments:
            arguments["model"] = LlamaForCausalLM(tiny_config)
        defaults = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
        defaults |= {"per_device_train_batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 4}
        defaults |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "seed": 3}
        defaults |= {"max_completion_length": 6, "disable_tqdm": True, "logging_steps": 1}
        defaults |= {"critic": "head"}  # the faster one
        defaults |= {"stop_token_ids": list(range(0, tiny_config.vocab_size, 5))}
        return PPOTrainer(args=PPOConfig(str(tmp_path / folder), **(defaults | options)), **arguments)

    return make


JOY = ("happy", "smile", "fun", "love", "laugh", "play")


def joy(completions, **kwargs):
    """Number of happy words in a story, at most four, so that repeating one does not help."""
    return [min(4.0, float(sum(text.lower().count(word) for word in JOY))) for text in completions]


@pytest.fixture
def make_storyteller(stories_path, tmp_path):
    """`make(model, **options)`: a `PPOTrainer` that makes the stories of a real small model happier in 44 steps."""
    from hf_rlhf_ext.modeling.loading import load_tokenizer
    from hf_rlhf_ext.ppo.config import PPOConfig
    from hf_rlhf_ext.ppo.trainer import PPOTrainer

    prompts = Dataset.from_dict(
        {"prompt": ["Once upon a time", "One day, a little girl", "Tom and Lily", "The big dog"] * 16}
    )

    def make(model, *, reward_funcs=joy, eval_reward_funcs=None, **options):
        defaults = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "seed": 0}
        defaults |= {"per_device_train_batch_size": 32, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 44}
        defaults |= {"learning_rate": 3e-3, "value_learning_rate": 2e-2, "value_clip_range": None, "vf_coef": 0.5}
        defaults |= {"lr_scheduler_type": "constant", "max_completion_length": 40, "kl_coef": 0.12, "critic": "head"}
        defaults |= {"per_device_eval_batch_size": 64, "logging_steps": 4, "save_strategy": "no", "disable_tqdm": True}
        return PPOTrainer(
            model,
            reward_funcs,
            args=PPOConfig(str(tmp_path / "stories"), **(defaults | options)),
            train_dataset=prompts,
            eval_dataset=prompts,
            processing_class=load_tokenizer(str(stories_path)),
            eval_reward_funcs=eval_reward_funcs,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )

    return make

"""Two processes, of which the second one runs out of memory: `auto_batch_run.py FOLDER`.

Trains a reward model and a policy with `auto_batch`, and again with the sizes that it has found, set by hand. Each
process writes `weights-RANK.pt`: the weights of all four runs and the sizes.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer
from tests.reward.examples import comparisons, trainable
from tests.support.small_memory import SmallMemory

COMMON = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "seed": 3}
COMMON |= {"disable_tqdm": True, "learning_rate": 1e-2, "max_steps": 3, "save_strategy": "no", "logging_steps": 1}
COMMON |= {"gradient_accumulation_steps": 2}
PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]


def letter_reward(completions, **columns):
    return [text.count("e") - 0.2 * len(text) for text in completions]


def lora(task):
    return LoraConfig(r=4, target_modules="all-linear", task_type=task)


def reward_run(folder, name, **options):
    torch.manual_seed(0)
    options = COMMON | {"per_device_train_batch_size": 4, "normalize_rewards": False, "layout": "plain"} | options
    trainer = BradleyTerryTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="float32"),
        BradleyTerryConfig(str(folder / name), **options),
        comparisons(21),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora("SEQ_CLS"),
    )
    if trainer.sizes.enabled and trainer.accelerator.process_index == 1:
        SmallMemory(trainer.model, 120, backward=True)
    trainer.train()
    return trainer


def ppo_run(folder, name, **options):
    torch.manual_seed(0)
    options = COMMON | {"per_device_train_batch_size": 4, "max_completion_length": 6, "num_ppo_epochs": 2} | options
    trainer = PPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        letter_reward,
        args=PPOConfig(str(folder / name), stop_token_ids=list(range(0, 384, 5)), **options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora("CAUSAL_LM"),
    )
    if options.get("auto_batch") and trainer.ranks.index == 1:
        SmallMemory(trainer.policy, 30, sampled=4)
    trainer.train()
    return trainer


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {}
    tokens, completions = "max_tokens_per_batch", "generation_batch_size"
    for run, names in ((reward_run, [tokens]), (ppo_run, [tokens, completions])):
        automatic = run(folder, "automatic", auto_batch=True)
        sizes = {name: getattr(automatic.args, name) for name in names}
        by_hand = run(folder, "by_hand", **sizes)
        found[run.__name__] = {
            "sizes": sizes,
            "automatic": trainable(automatic.model),
            "by_hand": trainable(by_hand.model),
        }
    torch.save(found, folder / f"weights-{automatic.accelerator.process_index}.pt")


if __name__ == "__main__":
    main()

"""The folder of a run with tiny models, as `hf-rlhf pipeline` and `quickstart` write it."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from hf_rlhf_ext import load_base_model
from hf_rlhf_ext.reward.scorer import RewardNormalization


def save_adapter(base: Path, folder: Path, tokenizer, *, seed: int, task: str = "causal_lm") -> Path:
    """A LoRA whose random weights change what the base computes."""
    model = load_base_model(str(base), task=task, dtype="float32")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if task == "reward":
        RewardNormalization(mean=0.5, std=2.0, base_dtype="float32").save(folder)
    return folder


def save_run(base: Path, folder: Path, tokenizer) -> Path:
    """A run with SFT policy, reward model and policy."""
    save_adapter(base, folder / "sft", tokenizer, seed=1)
    save_adapter(base, folder / "reward_model", tokenizer, seed=2, task="reward")
    save_adapter(base, folder / "policy", tokenizer, seed=3)
    (folder / "manifest.json").write_text(json.dumps({"settings": {"seed": 0}, "stages": {}}))
    return folder

"""A tiny random model and a few rows for comparisons of all systems."""

import importlib
from pathlib import Path
from typing import Any

import pytest

REWARDS = """
def gold(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in str(completion)) / 4 for completion in completions]

def length(prompts, completions, **columns):
    return [len(str(completion)) / 10 for completion in completions]
"""
DAYS = ("sunny", "rainy", "windy", "cold", "warm", "long", "short", "quiet")
PLACES = ("park", "house", "school", "shop", "beach", "farm", "forest", "garden")


@pytest.fixture(scope="session")
def compare_world(tmp_path_factory, chat_tokenizer_factory, save_base, write_jsonl) -> Path:
    """A folder with `base/`, demonstrations with ratings, comparisons, prompts, texts and reward functions."""
    folder = tmp_path_factory.mktemp("compare")
    save_base(folder / "base", chat_tokenizer_factory())
    prompts = [f"A {day} day at the {place}." for day in DAYS for place in PLACES]
    demonstrations = []
    for number, prompt in enumerate(prompts[:16]):
        demonstrations.append({"prompt": prompt, "completion": " It was good.", "stars": number % 4})
    pairs = [{"prompt": p, "chosen": " It was good.", "rejected": " No."} for p in prompts[16:32]]
    write_jsonl(folder / "demonstrations.jsonl", demonstrations)
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p, "category": "day"} for p in prompts[32:]])
    texts = [{"text": f"There was a {day} day in the {place}."} for day in DAYS[:3] for place in PLACES]
    write_jsonl(folder / "texts.jsonl", texts)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def options(compare_world, tmp_path, monkeypatch):
    """Options of a comparison that trains two steps of everything: options(systems={...}, **changes)."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", compare_world / "cache")
    kind = importlib.import_module("hf_rlhf_ext.recipes.compare_parts.options").CompareArguments

    def make(systems: dict[str, Any], **changes: Any) -> Any:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "demonstrations": str(compare_world / "demonstrations.jsonl"),
            "comparisons": str(compare_world / "pairs.jsonl"),
            "prompts": str(compare_world / "prompts.jsonl"),
            "eval_prompts": 4,
            "max_completion_length": 4,
            "judges": [{"gold": f"{compare_world / 'rewards.py'}:gold"}],
            "sft": {"max_steps": 2, "per_device_train_batch_size": 2},
            "reward": {"max_steps": 2, "per_device_train_batch_size": 2},
            "dpo": {"max_steps": 2, "per_device_train_batch_size": 2},
            "ppo": {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1},
        }
        online = {"max_steps": 4, "per_device_train_batch_size": 2, "num_generations": 2, "logging_steps": 1}
        values |= {"grpo": online, "rloo": online}
        used = {spec.partition("_")[0] for spec in systems}
        if "rejection" in used:
            used.add("sft")
        for section in ("dpo", "grpo", "rloo", "ppo"):
            if section not in used:
                values[section] = None
        return kind(systems=systems, **(values | changes))

    return make


@pytest.fixture
def model(compare_world):
    """Options of the tiny model."""
    from hf_rlhf_ext.cli.options import ModelArguments

    return ModelArguments(model_name_or_path=str(compare_world / "base"), dtype="float32", lora_r=4)

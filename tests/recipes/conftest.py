"""Recipes as a user runs them: a folder with a tiny model and a few rows, and commands in a process or in this one."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs" / "smollm2-135m"
PROGRESS = re.compile(r"^\s*$|\b(it|s|examples|tokens)/(s|it)\b|\d%\|")
PPO_SIZES = {"max_steps": 4, "per_device_train_batch_size": 2, "max_completion_length": 4, "eval_rows": 2}

REWARDS = """
import os
import time
from pathlib import Path

def length(prompts, completions, **columns):
    return [float(len(completion[-1]["content"])) for completion in completions]

def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in completion[-1]["content"])) for completion in completions]

def slow(prompts, completions, trainer_state, **columns):
    # two minutes in every rollout but the first
    if trainer_state.global_step:
        Path(os.environ["CALLS"], os.environ.get("RANK", "0")).touch()
        time.sleep(120)
    return length(prompts, completions)

def fails_in_one_process(prompts, completions, **columns):
    if os.environ.get("RANK") == "1":
        raise ValueError("no answer")
    return length(prompts, completions)

def too_few(prompts, completions, **columns):
    return [1.0]

def silent(prompts, completions, **columns):
    return [None] * len(completions)

def undefined(prompts, completions, **columns):
    return [float("nan")] * len(completions)
"""


@dataclass
class Finished:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines of stderr that are no progress bars."""
        return [line for line in re.split(r"[\r\n]", self.err) if not PROGRESS.search(line)]


def command(workspace: Path, recipe: str, changes: dict) -> list[str]:
    """The recipe's options on the files of `workspace`, with its YAML; a change to None leaves an option out."""
    data = {"sft": "demonstrations.jsonl", "ppo": "prompts"}.get(recipe, "pairs.jsonl")
    chosen = {"config": CONFIGS / f"{recipe}.yaml", "model_name_or_path": workspace / "base", "dataset_name": data}
    if recipe in ("sft", "reward", "ppo"):
        chosen["check_memory"] = "off"  # a plan takes a second; test_plan.py has those of the recipes
    chosen |= {"output_dir": f"runs/{recipe}"} | (PPO_SIZES if recipe == "ppo" else {}) | changes
    return [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]


def _write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def _save_base(folder: Path, tokenizer, hidden_size: int = 32) -> Path:
    """A random two-layer Llama with its tokenizer, as `from_pretrained` loads it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_jsonl():
    return _write_jsonl


@pytest.fixture(scope="session")
def save_base():
    return _save_base


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, chat_tokenizer_factory) -> Path:
    """The folder that recipes run in: `base/`, demonstrations, pairs, prompts and reward functions."""
    folder = tmp_path_factory.mktemp("workspace")
    _save_base(folder / "base", chat_tokenizer_factory())
    prompts = [_ask(f"Tell me about day {i}.") for i in range(12)]
    _write_jsonl(folder / "demonstrations.jsonl", [{"prompt": p, "completion": _reply("Sunny!")} for p in prompts])
    sides = ("A sunny day.", "No.", "A sad day, and a long one at that.")
    pairs = [
        {"prompt": p, "chosen": _reply(sides[0]), "rejected": _reply(sides[1 + i % 2])} for i, p in enumerate(prompts)
    ]
    _write_jsonl(folder / "pairs.jsonl", pairs)
    _write_jsonl(folder / "prompts" / "train.jsonl", [{"prompt": p} for p in prompts[:8]])
    _write_jsonl(folder / "prompts" / "validation.jsonl", [{"prompt": p} for p in prompts[8:]])
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="session")
def start(workspace, recipes_path):
    """Runs a recipe as a process in `workspace`: start("ppo", env={}, kl_coef=0.1)."""

    def run(recipe: str, env: dict[str, str] | None = None, **changes) -> Finished:
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        cache = {"HF_DATASETS_CACHE": str(workspace / "cache")}
        done = subprocess.run(
            [sys.executable, str(recipes_path / f"{recipe}.py"), *command(workspace, recipe, changes)],
            cwd=workspace,
            env=os.environ | offline | cache | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def call(workspace, recipes_path, monkeypatch, capfd):
    """Runs a recipe's file as `__main__` in this process, which saves the ten seconds of its imports."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workspace / "cache")
    monkeypatch.chdir(workspace)

    def run(recipe: str, **changes) -> Finished:
        script = str(recipes_path / f"{recipe}.py")
        monkeypatch.setattr(sys, "argv", [script, *command(workspace, recipe, changes)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        return Finished(code, *capfd.readouterr())

    return run

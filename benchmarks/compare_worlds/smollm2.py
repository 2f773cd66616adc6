"""The world of SmolLM2-135M: demonstrations and prompts of the quickstart over ten use cases, judged by sentiment.

Labels come from simulated annotators and raters who follow the gold reward (VADER) with noise, as in the quickstart.
The second judge is a reward model of HH-RLHF helpful: people's comparisons of other prompts, which no system sees.
Sizes and settings of SFT, reward model and PPO are those of the quickstart when it judged by sentiment. GRPO and RLOO
have the learning rate, passes and mini-batches of PPO, and TRL's or the stories' other options: nothing was tuned for
any of them here. `learning_study.py` compares the trainers at their best learning rates.
"""

import json
import os
from pathlib import Path
from typing import Any

from compare_worlds.world import JUDGE, JUDGE_ROWS, World, shuffled
from hf_rlhf_ext import load_comparisons, load_tokenizer
from hf_rlhf_ext.collect.simulated import GoldReward, SimulatedPerson
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.tokenization import longest, tokenize_row
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.recipes.quickstart import SYSTEM, Size, with_minimum
from hf_rlhf_ext.recipes.quickstart_parts.data import make_demonstrations, make_prompts

SHARED = Path(os.environ.get("RLHF_SHARED", "../shared"))
SIZE = Size(
    demonstrations=320,
    sft_steps=40,
    judged_prompts=160,
    judged_heldout=32,
    completions=4,
    reward_epochs=2,
    reward_batch=4,
    updates=8,
    rollout=32,
    dev_prompts=24,
    test_prompts=80,
    min_per_category=4,
)
"""As the quickstart had it when it judged by sentiment. Kept here, so that further seeds have the same settings."""
PROMPTS = SIZE.updates * SIZE.rollout
HELDOUT = 120
HELDOUT_SEED = 7
"""The held-out prompts are the same for all seeds."""
RATING_NOISE = 0.2
JUDGE_PAIRS, JUDGE_LENGTH = 960, 200
"""Comparisons of HH-RLHF for the second judge, and the most tokens of each."""
PLAIN_TEXTS = 240
MIN_WORDS = 40
MODEL = {"model_name_or_path": EMBEDDED_MODEL, "dtype": "bfloat16", "lora_r": 16, "lora_alpha": 32}
"""In bf16 on every machine; on a CPU without bf16 instructions, a seed takes many times as long."""
MAX_TOKENS_PER_BATCH = 2048
SFT = {
    "max_steps": SIZE.sft_steps,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "max_length": 256,
    "bf16": True,
}
REWARD = {
    "num_train_epochs": SIZE.reward_epochs,
    "learning_rate": 3e-4,
    "warmup_steps": 5,
    "per_device_train_batch_size": SIZE.reward_batch,
    "max_length": 256,
    "bf16": True,
}
DPO = {"num_train_epochs": 1, "learning_rate": 1e-4, "beta": 0.1, "per_device_train_batch_size": 16}
ON_POLICY = {
    # Two passes over each batch of completions, as in PPO, in two mini-batches.
    "max_steps": 4 * SIZE.updates,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "per_device_train_batch_size": SIZE.rollout // 2,
    "num_generations": 4,
    "learning_rate": 3e-4,
}
GRPO = ON_POLICY | {"beta": 0.04}
RLOO = ON_POLICY | {"beta": 0.1}
PPO = {
    "max_steps": 4 * SIZE.updates,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "per_device_train_batch_size": SIZE.rollout // 2,
    "learning_rate": 3e-4,
    "critic": "head",
    "value_learning_rate": 1e-3,
    "kl_coef": 0.1,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "base": {},
    "sft": {},
    # Few rows have a 7, and half as many steps pass over them as often as over all rows.
    "sft_top_rated": {"min_rating": 6, "max_steps": SIZE.sft_steps // 2},
    "best_of_4": {},
    "best_of_16": {},
    "rejection_sampling": {"n": 4},
    "dpo": {},
    "grpo": {},
    "rloo": {},
    "ppo": {},
    "ppo_ptx": {"ptx_coef": 1.0, "ptx_batch_size": 8},
}

WORLD = World(
    name="smollm2",
    model=MODEL,
    sft=SFT,
    reward=REWARD,
    temperature=0.8,
    max_completion_length=32,
    completions=SIZE.completions,
    noise=0.1,
    gold=GoldReward(),
)


def make_shared(folder: Path) -> None:
    """Held-out prompts, plain text, and the second judge."""
    drawn = make_prompts(2 * HELDOUT, HELDOUT_SEED, split="heldout", min_per_category=SIZE.min_per_category)
    write_rows(with_system(with_minimum(drawn, HELDOUT, SIZE.min_per_category)), folder / "heldout.jsonl")
    write_rows(plain_texts(), folder / "plain_text.jsonl")
    WORLD.train_judge(
        human_comparisons(),
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        max_tokens_per_batch=MAX_TOKENS_PER_BATCH,
    )


def with_system(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of prompts as messages, with the system message of the demonstrations."""
    return [row | {"prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}]} for row in rows]


def plain_texts() -> list[dict[str, str]]:
    """Longer texts that people wrote: answers of Databricks Dolly, the ones first that are first in the file."""
    texts = []
    with (SHARED / "data" / "dolly_3k.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["response"]
            if len(text.split()) >= MIN_WORDS:
                texts.append({"text": text})
    return texts[:PLAIN_TEXTS]


def human_comparisons() -> list[dict[str, Any]]:
    """Short comparisons of HH-RLHF helpful."""
    tokenizer = load_tokenizer()
    rows = load_comparisons(str(SHARED / "data" / "hh_helpful_train.jsonl"), group=False)[0].to_list()
    short = [row for row in rows if longest(tokenize_row(row, tokenizer)) <= JUDGE_LENGTH]
    kept = shuffled(short, 0)[:JUDGE_PAIRS]
    return [{name: row[name] for name in ("prompt", "completions", "pairs", "targets")} for row in kept]


def make_files(folder: Path, shared: Path, seed: int) -> None:
    """Demonstrations with ratings, and prompts to train on."""
    rater = SimulatedPerson("rater", noise=RATING_NOISE, seed=seed, gold=WORLD.gold)
    rows = []
    for row in make_demonstrations(SIZE.demonstrations, seed):
        (rating,) = rater.answer(row["prompt"], [row["completion"][0]["content"]])["ratings"]
        rows.append(row | {"prompt": [SYSTEM, *row["prompt"]], "rating": rating})
    write_rows(rows, folder / "demonstrations.jsonl")
    write_rows(with_system(make_prompts(PROMPTS, seed)), folder / "prompts.jsonl")


def make_comparisons(folder: Path, start: Path, shared: Path, seed: int) -> None:
    """Judged completions of the SFT policy in `start`: all pairs of four completions of a prompt."""
    prompts = with_system(make_prompts(PROMPTS, seed))[: SIZE.judged_prompts]
    completions = WORLD.sample(str(start), [row["prompt"] for row in prompts], WORLD.completions, seed, 16)
    write_rows(WORLD.judge(prompts, completions, seed), folder / "comparisons.jsonl")


def config(data: Path, shared: Path, output: Path, seed: int) -> dict[str, Any]:
    """The content of `compare.yaml`."""
    return {
        **MODEL,
        "output_dir": str(output),
        "seeds": [seed],
        "demonstrations": str(data / "demonstrations.jsonl"),
        "ratings_column": "rating",
        "comparisons": str(data / "comparisons.jsonl"),
        "prompts": str(data / "prompts.jsonl"),
        "heldout_prompts": str(shared / "heldout.jsonl"),
        "plain_text": str(shared / "plain_text.jsonl"),
        "judges": [
            {"gold": "vader", "name": "gold"},
            {"reward_model": str(shared / JUDGE), "trained_on": str(shared / JUDGE_ROWS), "name": "judge model"},
        ],
        "clock": "cpu",
        "snapshot_seconds": 150.0,
        "save_seconds": 600.0,
        "temperature": WORLD.temperature,
        "max_completion_length": WORLD.max_completion_length,
        "max_tokens_per_batch": MAX_TOKENS_PER_BATCH,
        "sft": SFT,
        "reward": REWARD,
        "dpo": DPO,
        "grpo": GRPO,
        "rloo": RLOO,
        "ppo": PPO,
        "systems": SYSTEMS,
    }

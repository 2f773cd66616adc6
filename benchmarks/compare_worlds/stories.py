"""The world of stories260K: 260,000 parameters that continue children's stories. A run takes minutes.

The base model is a copy of stories260K with a chat template that joins messages by line breaks, so that there are
conversations and system messages. Demonstrations come from `story_texts`, and every style has a source file of its own.
Settings were fixed on seed 99, which no result uses.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from story_world import STORIES

from compare_worlds import golds, story_texts
from compare_worlds.world import JUDGE, JUDGE_ROWS, World
from hf_rlhf_ext.collect.tasks import write_rows

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
)
DEMONSTRATIONS = 512
MACHINE_WRITTEN = 512
JUDGED = 384
"""Prompts of which two completions are judged."""
PROMPTS = 640
HELDOUT = 160
HELDOUT_SEED = 7
"""The held-out prompts are the same for all seeds."""
JUDGE_PAIRS = 768
ROLLOUT = 64
UPDATES = 40
MODEL = {"dtype": "float32", "lora_r": 8, "lora_alpha": 16}
SFT = {"max_steps": 32, "learning_rate": 1e-3, "per_device_train_batch_size": 32, "max_length": 256}
REWARD = {
    "num_train_epochs": 4,
    "learning_rate": 3e-3,
    "warmup_steps": 5,
    "per_device_train_batch_size": 32,
    "max_length": 256,
}
DPO = {"num_train_epochs": 4, "learning_rate": 1e-3, "beta": 0.1, "per_device_train_batch_size": 32}
ON_POLICY = {
    # Two passes over each batch of completions, as in PPO.
    "max_steps": 2 * UPDATES,
    "num_iterations": 2,
    "per_device_train_batch_size": ROLLOUT,
    "num_generations": 4,
    "learning_rate": 1e-3,
}
GRPO = ON_POLICY | {"beta": 0.04}
RLOO = ON_POLICY | {"beta": 0.1}
PPO = {
    "max_steps": 2 * UPDATES,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "per_device_train_batch_size": ROLLOUT,
    "learning_rate": 1e-3,
    "value_learning_rate": 1e-2,
    "vf_coef": 0.5,
    "value_clip_range": None,
    "kl_coef": 0.1,
    "logprobs_chunk_size": 4096,
}
STYLES = {
    "sft_alpaca_style": {"demonstrations": "machine_written.jsonl"},
    "sft_gpt4all_style": {"demonstrations": "mix.jsonl"},
    "sft_vicuna_style": {"demonstrations": "conversations.jsonl"},
    "sft_guanaco_style": {"demonstrations": "ranked.jsonl"},
    "sft_lima_style": {"demonstrations": "demonstrations.jsonl", "size": 32},
    "sft_orca_style": {"demonstrations": "explanations.jsonl"},
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "base": {},
    "sft": {},
    "sft_top_rated": {},
    **STYLES,
    "best_of_2": {},
    "best_of_4": {},
    "best_of_16": {},
    "best_of_64": {},
    "rejection_sampling": {"n": 4},
    "dpo": {},
    "grpo": {},
    "rloo": {},
    "ppo": {},
    "ppo_adaptive": {"kl_target": 6.0, "kl_horizon": 320},
    "ppo_ptx": {"ptx_coef": 1.0},
}

WORLD = World(
    name="stories",
    model=MODEL,
    sft=SFT,
    reward=REWARD,
    temperature=1.0,
    max_completion_length=48,
    completions=2,
    noise=0.5,
    gold=golds.stories,
)


def make_shared(folder: Path) -> None:
    """Base model with its template, plain text, held-out prompts, and the second judge."""
    write_base(folder / "base")
    prompts = story_texts.openings(JUDGE_PAIRS, 0, "judge")
    world = of_base(folder / "base")
    # Plain text is what the base model writes: its own training text is not here.
    texts = world.sample(str(folder / "base"), [row["prompt"] for row in prompts[:512]], 1, 11, 64)
    rows = []
    for row, (completion,) in zip(prompts, texts, strict=False):
        rows.append({"text": f"{row['prompt'][0]['content']} {completion[0]['content']}"})
    write_rows(rows, folder / "plain_text.jsonl")
    write_rows(story_texts.openings(HELDOUT, HELDOUT_SEED, "heldout"), folder / "heldout.jsonl")

    pairs = world.sample(str(folder / "base"), [row["prompt"] for row in prompts], 2, 12, 64)
    world.train_judge(world.judge(prompts, pairs, 13), folder)


def write_base(folder: Path) -> None:
    """A copy of stories260K with a chat template, and with the token that ends its stories as the end of an answer.

    The base ends stories with `<s>`. It has never seen `</s>`, the end of its tokenizer, so that SFT hardly learns it.
    """
    shutil.copytree(STORIES, folder)
    changes = {
        "tokenizer_config.json": {"chat_template": TEMPLATE, "eos_token": "<s>"},
        "config.json": {"eos_token_id": 1},
        "generation_config.json": {"eos_token_id": 1},
    }
    for name, values in changes.items():
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        path.chmod(0o644)
        path.write_text(json.dumps(content | values, indent=2) + "\n", encoding="utf-8")


def of_base(base: Path) -> World:
    """The world with the base model at its place."""
    return World(**{**vars(WORLD), "model": MODEL | {"model_name_or_path": str(base)}})


def make_files(folder: Path, shared: Path, seed: int) -> None:
    """Demonstrations, the source files of the styles, and prompts to train on."""
    demonstrations = story_texts.demonstrations(DEMONSTRATIONS, seed)
    machine_written = story_texts.demonstrations(MACHINE_WRITTEN, seed + 500)
    machine_written = [{name: row[name] for name in ("prompt", "completion", "category")} for row in machine_written]
    write_rows(demonstrations, folder / "demonstrations.jsonl")
    write_rows(machine_written, folder / "machine_written.jsonl")
    write_rows(story_texts.mix(demonstrations, machine_written, seed), folder / "mix.jsonl")
    write_rows(story_texts.conversations(256, seed), folder / "conversations.jsonl")
    write_rows(story_texts.ranked(256, 4, seed), folder / "ranked.jsonl")
    write_rows(story_texts.explanations(384, seed), folder / "explanations.jsonl")
    write_rows(story_texts.openings(PROMPTS, seed, "train"), folder / "prompts.jsonl")


def make_comparisons(folder: Path, start: Path, shared: Path, seed: int) -> None:
    """Judged pairs of completions of the SFT policy in `start`."""
    world = of_base(shared / "base")
    prompts = story_texts.openings(PROMPTS, seed, "train")[:JUDGED]
    completions = world.sample(str(start), [row["prompt"] for row in prompts], WORLD.completions, seed, 64)
    write_rows(world.judge(prompts, completions, seed), folder / "comparisons.jsonl")


def config(data: Path, shared: Path, output: Path, seed: int) -> dict[str, Any]:
    """The content of `compare.yaml`."""
    systems = {}
    for name, options in SYSTEMS.items():
        options = dict(options)
        if "demonstrations" in options:
            options["demonstrations"] = str(data / options["demonstrations"])
        systems[name] = options
    return {
        "model_name_or_path": str(shared / "base"),
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
            {"gold": f"{Path(golds.__file__)}:stories", "name": "gold"},
            {"reward_model": str(shared / JUDGE), "trained_on": str(shared / JUDGE_ROWS), "name": "judge model"},
        ],
        "clock": "cpu",
        "snapshot_seconds": 10.0,
        "temperature": WORLD.temperature,
        "max_completion_length": WORLD.max_completion_length,
        "sft": SFT,
        "reward": REWARD,
        "dpo": DPO,
        "grpo": GRPO,
        "rloo": RLOO,
        "ppo": PPO,
        "systems": systems,
    }

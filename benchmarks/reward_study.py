"""Study: held-out accuracy of this library's reward trainer and of TRL's, with the same model, data and options.

make study-reward       # writes docs/study/reward_model.json; continues where it was stopped, finished runs are kept

Both use SmolLM2-135M, LoRA r 16, learning rate 2e-4, batch size 16, one epoch, and rows of HH-RLHF helpful with at most
1,024 tokens: 500 are held out by prompt, and 1,000 are used for training with three seeds. One more run of this library
trains on all other rows. TRL trains with micro-batches of one pair, which have the fewest padded tokens and the same
mean loss, and with the end of the chat template. This library trains on the shared-prefix layout. Each model is scored
as it was trained. Both compute in the dtype in which the machine is fastest (`dtype` of each run in the file). The
paired difference is computed over the seeds for which both runs have the same dtype.
"""

import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from hf_rlhf_ext import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    RewardScorer,
    load_base_model,
    load_comparisons,
    load_tokenizer,
)
from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.data.tokenization import longest, tokenize_row
from hf_rlhf_ext.modeling.adapters import autocast_dtype, mixed_precision
from hf_rlhf_ext.modeling.loading import preferred_dtype
from hf_rlhf_ext.reward.preference_metrics import clustered_mean_ci, longer_wins_baseline

DATA = Path(os.environ.get("RLHF_SHARED", "../shared")) / "data" / "hh_helpful_train.jsonl"
OUT = Path("docs/study/reward_model.json")
SEEDS, HELD_OUT, PAIRS, MAX_LENGTH = (0, 1, 2), 500, 1000, 1024
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")


def rows() -> tuple[list[dict], list[dict]]:
    """Returns the rows for training and the held-out rows, in the order of the file. No prompt is in both."""
    tokenizer = load_tokenizer()
    found = load_comparisons(str(DATA), group=False)[0].to_list()
    short = [
        row for row in found if longest(tokenize_row(row, tokenizer)) <= MAX_LENGTH - 2
    ]  # TRL's endings are longer
    heldout = short[-HELD_OUT:]
    asked = {str(row["prompt"]) for row in heldout}
    return [row for row in short[:-HELD_OUT] if str(row["prompt"]) not in asked], heldout


def options(folder: str, seed: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        **machine_defaults(),
        "learning_rate": 2e-4,
        "warmup_steps": 5,
        "num_train_epochs": 1,
        "activation_checkpointing": False,
        "max_length": MAX_LENGTH,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "seed": seed,
    }


def train_ours(train: list[dict], heldout: list[dict], seed: int, folder: str) -> list[float]:
    """Trains, and returns the score differences of the held-out pairs, first minus second completion."""
    args = BradleyTerryConfig(
        per_device_train_batch_size=16, max_tokens_per_batch=1600, normalize_rewards=False, **options(folder, seed)
    )
    model, tokenizer = load_base_model(task="reward"), load_tokenizer()
    trainer = BradleyTerryTrainer(model, args, Dataset.from_list(train), processing_class=tokenizer, peft_config=LORA)
    trainer.train()
    scorer = RewardScorer(trainer.model, tokenizer, batch_size=8, autocast=autocast_dtype(args))
    sides = [scorer.raw([row["prompt"] for row in heldout], [row["completions"][k] for row in heldout]) for k in (0, 1)]
    return (np.array(sides[0]) - np.array(sides[1])).tolist()


def train_trl(train: list[dict], heldout: list[dict], seed: int, folder: str) -> list[float]:
    """The same with TRL's trainer and its tokenization."""
    pairs = []
    for row in train:
        (i, j), target = row["pairs"][0], row["targets"][0]
        chosen, rejected = (i, j) if target > 0.5 else (j, i)
        sides = {"chosen": row["completions"][chosen], "rejected": row["completions"][rejected]}
        pairs.append({name: row["prompt"] + side for name, side in sides.items()})
    args = RewardConfig(per_device_train_batch_size=1, gradient_accumulation_steps=16, **options(folder, seed))
    model, tokenizer = load_base_model(task="reward"), load_tokenizer()
    trainer = RewardTrainer(
        model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=LORA
    )
    trainer.train()
    model = trainer.model.eval()

    @torch.no_grad()
    def score(messages: list[dict]) -> float:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        with mixed_precision(model, autocast_dtype(args)):
            return model(input_ids=torch.tensor([ids], device=model.device)).logits.item()

    return [
        score(row["prompt"] + row["completions"][0]) - score(row["prompt"] + row["completions"][1]) for row in heldout
    ]


def right(deltas: list[float], heldout: list[dict]) -> np.ndarray:
    """1 if the preferred completion has the higher score, 0.5 if both scores are equal, else 0."""
    targets = np.array([row["targets"][0] for row in heldout])
    return np.where(np.array(deltas) == 0, 0.5, (np.array(deltas) > 0) == (targets > 0.5)).astype(float)


def summary(runs: dict[str, Any], heldout: list[dict]) -> dict[str, Any]:
    """Accuracies with confidence intervals over prompts, and the paired difference over the seeds of both trainers."""
    prompts = np.unique([str(row["prompt"]) for row in heldout], return_inverse=True)[1]
    targets = [row["targets"][0] for row in heldout]
    gaps = [len(plain_text(row["completions"][0])) - len(plain_text(row["completions"][1])) for row in heldout]
    found: dict[str, Any] = {"heldout": len(heldout), "longer_wins": longer_wins_baseline(gaps, targets)}
    hits = {name: right(run["deltas"], heldout) for name, run in runs.items()}
    for name, values in hits.items():
        found[name] = [float(values.mean()), *clustered_mean_ci(values, prompts)]
    pairs = {seed: [runs.get(f"{kind}-{seed}", {}).get("dtype") for kind in ("ours", "trl")] for seed in SEEDS}
    both = [seed for seed, (ours, trl) in pairs.items() if ours is not None and ours == trl]
    if both:
        difference = np.mean([hits[f"ours-{seed}"] - hits[f"trl-{seed}"] for seed in both], 0)
        found["ours_minus_trl"] = [float(difference.mean()), *clustered_mean_ci(difference, prompts)]
        found["seeds"] = both
    return found


def main() -> None:
    everything, heldout = rows()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(OUT.read_text()) if OUT.is_file() else {"command": "make study-reward", "runs": {}}
    wanted = [f"{kind}-{seed}" for seed in SEEDS for kind in ("ours", "trl")] + ["ours-all"]
    asked = sys.argv[1:] or wanted
    for name in (name for name in wanted if name in asked and name not in done["runs"]):
        kind, seed = name.split("-")
        train, start = everything if seed == "all" else everything[:PAIRS], time.process_time()
        set_seed(0 if seed == "all" else int(seed))  # the head is initialized when the model is loaded
        with TemporaryDirectory() as folder:
            run = train_ours if kind == "ours" else train_trl
            deltas = run(train, heldout, 0 if seed == "all" else int(seed), folder)
        minutes = round((time.process_time() - start) / 60, 1)  # CPU time, as a long run may be paused
        about = {"pairs": len(train), "dtype": str(preferred_dtype()).removeprefix("torch."), "cpu_minutes": minutes}
        done["runs"][name] = about | {"deltas": [round(d, 4) for d in deltas]}
        done["summary"] = summary(done["runs"], heldout)
        OUT.write_text(json.dumps(done) + "\n")
        print(f"{name}: {done['summary'][name]} in {minutes} CPU minutes", flush=True)
    for name, value in summary(done["runs"], heldout).items():
        print(f"{name:>16}: {value}")
    print(json.dumps(summary(done["runs"], heldout)))


if __name__ == "__main__":
    main()

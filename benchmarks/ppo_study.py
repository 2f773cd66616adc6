"""Study of PPO: KL with the adaptive controller, gold reward and training reward, and unsuitable settings.

make study-ppo          # writes docs/study/ppo.json and .png; continues where it was stopped, finished runs are kept

The runs:

- `stories260K-<seed>`: 150 rollouts of 64 stories of 40 tokens. The reward counts six happy words, at most four per
  story. The gold reward, which training does not use, is the sentiment of VADER. `kl_coef` adapts to `kl_target`.
- `smollm2-<seed>`: the embedded model on questions of HH-RLHF, 10 rollouts of 32 replies of 32 tokens, with the same
  rewards and a fixed `kl_coef`, in the dtype in which the machine is fastest (`dtype` in the file).
- `wrong`: stories260K without a KL penalty (`kl_coef` 0) and with 30 times the learning rate, with
  `load_best_model_at_end`.
- `wrong-warmup`: the same, but the learning rate rises over 40 steps, so that there is a good checkpoint to go back to.

`ppo_study.py NAME …` runs only these.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from hf_rlhf_ext import PPOConfig, PPOTrainer, load_base_model, load_comparisons, load_tokenizer
from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.data.text import encode_prompt, plain_text
from hf_rlhf_ext.metrics.plots import GOLD_COLOR, GRID, INK, LABEL_SIZE, PROXY_COLOR, TICK_SIZE
from hf_rlhf_ext.reward.scorer import dtype_name

SHARED = Path(os.environ.get("RLHF_SHARED", "../shared"))
OUT = Path("docs/study/ppo.json")
SEEDS = (0, 1, 2)
STORIES = str(SHARED / "models" / "stories260K")
OPENINGS = ["Once upon a time", "One day, a little girl", "Tom and Lily", "The big dog"]
WORDS = ("happy", "smile", "fun", "love", "laugh", "play")
ROLLOUTS, KL_TARGET, WARM_UP, WINDOW, BAND = 150, 6.0, 30, 10, 0.25
"""The KL is judged after `WARM_UP` rollouts, averaged over `WINDOW` rollouts, as the mean of one rollout is noisy."""
N_THREADS = torch.get_num_threads()
CURVES = {
    "kl": "objective/kl",
    "kl_coef": "objective/kl_coef",
    "score": "objective/scores",
    "explained_variance": "val/explained_variance",
    "clipfrac": "policy/clipfrac_avg",
    "length": "completions/mean_length",
}
EVALUATIONS = {"kl": "eval_objective/kl", "score": "eval_objective/scores", "gold": "eval_rewards/gold/mean"}


def happy_words(completions, **columns) -> list[float]:
    """The reward of training: number of happy words, at most four, so that repeating one does not help."""
    return [min(4.0, float(sum(plain_text(text).lower().count(word) for word in WORDS))) for text in completions]


def gold(completions, **columns) -> list[float]:
    """The gold reward: the compound sentiment of VADER, -1 to 1, from a lexicon of 7,500 words."""
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(plain_text(text))["compound"] for text in completions]


def options(folder: str, seed: int, steps_per_rollout: int, eval_every: int) -> dict[str, Any]:
    """The options of all runs, with one log per rollout."""
    return {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": False,
        "lr_scheduler_type": "constant",
        "value_clip_range": None,
        "logging_steps": steps_per_rollout,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "eval_steps": eval_every * steps_per_rollout,
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def stories_trainer(folder: str, seed: int, **changes) -> PPOTrainer:
    args = {
        "bf16": False,
        "per_device_train_batch_size": 64,
        "num_ppo_epochs": 2,
        "max_steps": 2 * ROLLOUTS,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-2,
        "vf_coef": 0.5,
        "max_completion_length": 40,
        "kl_coef": 0.2,
        "kl_target": KL_TARGET,
        "kl_horizon": 320,
        "logprobs_chunk_size": 4096,  # the vocabulary has 512 tokens, so logits are small
    }
    prompts = Dataset.from_dict({"prompt": OPENINGS * 16})
    return PPOTrainer(
        load_base_model(STORIES, dtype="float32"),
        happy_words,
        args=PPOConfig(**options(folder, seed, 2, 10) | args | changes),
        train_dataset=prompts,
        eval_dataset=prompts,
        eval_reward_funcs=gold,
        processing_class=load_tokenizer(STORIES),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def smollm2_trainer(folder: str, seed: int) -> PPOTrainer:
    """The embedded model on single questions of at most 60 tokens: 320 for training and 48 others for evaluation."""
    tokenizer = load_tokenizer()
    rows = load_comparisons(str(SHARED / "data" / "hh_helpful_train.jsonl"), split="train", group=False)[0].to_list()
    prompts = [row["prompt"] for row in rows[:500] if len(encode_prompt(tokenizer, row["prompt"])) <= 60]
    args = {
        "per_device_train_batch_size": 32,
        "max_tokens_per_batch": 1600,
        "num_ppo_epochs": 2,
        "num_mini_batches": 1,
        "max_steps": 2 * 10,
        "learning_rate": 3e-4,
        "value_learning_rate": 1e-3,
        "max_completion_length": 32,
        "temperature": 0.8,
        "kl_coef": 0.05,
    }
    return PPOTrainer(
        load_base_model(),
        happy_words,
        args=PPOConfig(**options(folder, seed, 2, 2) | machine_defaults() | args),
        train_dataset=Dataset.from_dict({"prompt": prompts[:320]}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[320:368]}),
        eval_reward_funcs=gold,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def curves(trainer: PPOTrainer) -> dict[str, Any]:
    """One number per rollout, and one per evaluation, from the log of the trainer."""
    steps, history = trainer.args.steps_per_rollout, trainer.state.log_history
    rollouts = [entry for entry in history if "objective/kl" in entry]
    evaluations = [entry for entry in history if "eval_objective/kl" in entry]
    found: dict[str, Any] = {name: [round(e[key], 4) for e in rollouts] for name, key in CURVES.items()}
    found["evaluations"] = {name: [round(e[key], 4) for e in evaluations] for name, key in EVALUATIONS.items()}
    found["evaluations"]["rollout"] = [entry["step"] // steps for entry in evaluations]
    return found


def learn(name: str) -> dict[str, Any]:
    kind, seed = name.rsplit("-", 1)
    with TemporaryDirectory() as folder:
        trainer = (stories_trainer if kind == "stories260K" else smollm2_trainer)(folder, int(seed))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curves(trainer) | {"dtype": dtype_name(trainer.model)}


class Lines(logging.Handler):
    """Keeps the warnings of the trainer."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def go_wrong(name: str) -> dict[str, Any]:
    """Trains without a KL penalty and with 30 times the learning rate, and records the stop and the best checkpoint."""
    heard = Lines()
    logging.getLogger("hf_rlhf_ext").addHandler(heard)
    guards = {"load_best_model_at_end": True, "metric_for_best_model": "eval_objective/scores", "max_kl": 5 * KL_TARGET}
    saving = {"eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    if name == "wrong-warmup":
        saving |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 40}
    with TemporaryDirectory() as folder:
        wrong = {"kl_coef": 0.0, "kl_target": None, "learning_rate": 30 * 1e-3}
        trainer = stories_trainer(folder, 0, **wrong, **guards, **saving)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        best = trainer.state.best_model_checkpoint
        kept = trainer.evaluate()
    logging.getLogger("hf_rlhf_ext").removeHandler(heard)
    return curves(trainer) | {
        "warnings": heard.lines,
        "stop_reason": next((line for line in heard.lines if "training stops" in line), None),
        "best_step": best and int(best.rsplit("-", 1)[1]),
        "kept": {name: round(kept[key], 4) for name, key in EVALUATIONS.items()},
    }


def moving_mean(values: list[float]) -> np.ndarray:
    return np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """A summary per run: KL after the warm-up and its target, rewards before and after, and the critic at the end."""
    found = {}
    for name, run in runs.items():
        e = run["evaluations"]
        line = {f"{key}_before_after": [e[key][0], e[key][-1]] for key in ("score", "gold", "kl")}
        if name.startswith("stories260K"):
            after = np.array(run["kl"][WARM_UP:])
            smooth = moving_mean(run["kl"][WARM_UP:])
            line |= {"rollouts": len(run["kl"]), "kl_target": KL_TARGET, "kl_mean": round(float(after.mean()), 3)}
            line["moving_mean_within_25"] = round(float((abs(smooth / KL_TARGET - 1) <= BAND).mean()), 3)
            line["moving_mean_range"] = [round(float(smooth.min()), 2), round(float(smooth.max()), 2)]
            line["rollouts_within_25"] = round(float((abs(after / KL_TARGET - 1) <= BAND).mean()), 3)
            line["explained_variance"] = round(fmean(run["explained_variance"][-50:]), 3)
        if name.startswith("wrong"):
            line |= {key: run[key] for key in ("stop_reason", "best_step", "kept")}
        found[name] = line
    return found


def plot(runs: dict[str, Any], path: Path) -> None:
    """Plots gold reward, KL with its target, and the critic, with one column per model and one line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 2)
    for column, kind in enumerate(("stories260K", "smollm2")):
        mine = [run for name, run in runs.items() if name.startswith(kind)]
        upper, middle, lower = panels[:, column]
        upper.set_title(f"{kind}, {len(mine)} seeds", fontsize=LABEL_SIZE + 1, color=INK, loc="left")
        for run in mine:
            upper.plot(run["evaluations"]["rollout"], run["evaluations"]["gold"], "o-", color=GOLD_COLOR, markersize=3)
            draw_kl(middle, run["kl"])
            lower.plot(run["explained_variance"], color=INK, alpha=0.6, linewidth=1)
        upper.set_ylabel("gold reward (sentiment)", fontsize=LABEL_SIZE, color=GOLD_COLOR)
        middle.set_ylabel("KL, nats per completion", fontsize=LABEL_SIZE, color=PROXY_COLOR)
        lower.set_ylabel("value explained variance", fontsize=LABEL_SIZE, color=INK)
        lower.set_xlabel("rollout", fontsize=LABEL_SIZE, color=INK)
        if kind == "stories260K":
            middle.axhspan(KL_TARGET * (1 - BAND), KL_TARGET * (1 + BAND), color=GRID, zorder=0, label="target ± 25 %")
            middle.axvline(WARM_UP, color=INK, linewidth=0.8, linestyle=":", label="end of the warm-up")
            named = dict(zip(*reversed(middle.get_legend_handles_labels()), strict=True))  # one entry for all seeds
            middle.legend(named.values(), named, frameon=False, fontsize=TICK_SIZE, labelcolor=INK, loc="lower right")
    for axes in panels.flatten():
        axes.tick_params(labelsize=TICK_SIZE, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_kl(axes, kl: list[float]) -> None:
    if len(kl) <= WINDOW:
        axes.plot(kl, "o-", color=PROXY_COLOR, markersize=3)
        return
    axes.plot(kl, color=PROXY_COLOR, alpha=0.2, linewidth=0.8, label="one rollout")
    smooth = moving_mean(kl)
    axes.plot(range(WINDOW - 1, len(kl)), smooth, color=PROXY_COLOR, linewidth=1.5, label=f"mean over {WINDOW}")


def main() -> None:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(OUT.read_text()) if OUT.is_file() else {"command": "make study-ppo", "curves": {}}
    wanted = [f"{kind}-{seed}" for kind in ("stories260K", "smollm2") for seed in SEEDS]
    wanted += ["wrong", "wrong-warmup"]
    asked = sys.argv[1:] or wanted
    for name in (name for name in wanted if name in asked and name not in done["curves"]):
        torch.set_num_threads(N_THREADS if name.startswith("smollm2") else 1)  # more threads do not help tiny tensors
        start = time.process_time()
        run = go_wrong(name) if name.startswith("wrong") else learn(name)
        run["cpu_minutes"] = round((time.process_time() - start) / 60, 1)  # a long run may be paused
        done["curves"][name] = run
        done["seeds"] = [seed for seed in SEEDS if f"stories260K-{seed}" in done["curves"]]
        done["summary"] = summary(done["curves"])
        OUT.with_suffix(".tmp").write_text(json.dumps(done) + "\n")
        OUT.with_suffix(".tmp").replace(OUT)  # so that the file is never incomplete
        print(f"{name}: {done['summary'][name]} in {run['cpu_minutes']} CPU minutes", flush=True)
    plot(done["curves"], OUT.with_suffix(".png"))
    print(json.dumps(summary(done["curves"])))


if __name__ == "__main__":
    main()

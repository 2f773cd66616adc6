"""The runs of the matrix: tiny models of every kind, trained by a recipe or from Python, and pushed to the stand-in."""

import json
import runpy
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from trl import SFTConfig

from hf_rlhf_ext import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PPOConfig,
    PPOTrainer,
    RewardEnsemble,
    RewardScorer,
    load_base_model,
)
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.hub.push import push_run
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.modeling.probing import evaluating

AXES = {
    "kind": ("sft", "pairs", "k-wise", "member", "ensemble", "ppo-head", "ppo-adapter"),
    "weights": ("adapter", "merged", "whole", "4-bit"),
    "form": ("text", "chat"),
    "maker": ("recipe", "python"),
}
IMPOSSIBLE = {
    ("ppo-adapter", "whole"): "the critic is a second adapter on the base, and a whole model has no base",
    ("ensemble", "merged"): "the members of an ensemble are merged one by one",
}
"""Kind and weights -> why there is no such model.

A whole model in 4 bits is no value of `weights`, since quantized weights cannot be trained. Tests check that all these
are refused.
"""

BASE, BRANCH_OF_BASE = "alice/base", "v1"
"""The base. Its `main` and its branch have different weights."""
PROBES, ANSWER = ("Tell me about day 3.", "What makes people happy in the garden?"), " A sunny day, and a long one!"
_ANSWERS = (" A sunny day.", " No.", " A sad day, and a long one.")
_STEPS = {"max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4}
"""A high learning rate, so that an output without the adapter is far from the trained one."""


@dataclass(frozen=True)
class Run:
    """One combination."""

    kind: str
    weights: str
    form: str
    maker: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.weights}-{self.form}-{self.maker}"

    @property
    def repo_id(self) -> str:
        return f"alice/{self.name}"

    @property
    def branch(self) -> str | None:
        """Half of the runs are pushed to a branch. `main` of their repositories is empty."""
        return "round-1" if (self.form == "chat") == (self.maker == "python") else None

    @property
    def base_revision(self) -> str | None:
        """Some runs train the newest base, as who gives no revision does."""
        return None if self.form == "text" and self.maker == "python" else BRANCH_OF_BASE

    @property
    def dtype(self) -> str:
        """Data type in which the base is loaded. Whole models are trained in fp32, with autocast."""
        return "bfloat16" if self.is_mixed_precision and "whole" not in self.weights else "float32"

    @property
    def is_reward_model(self) -> bool:
        return self.kind in ("pairs", "k-wise", "member", "ensemble")

    @property
    def is_mixed_precision(self) -> bool:
        """Some runs compute in bf16, on any machine. The others are fp32, which is compared more closely."""
        return self.form == "chat" and (self.maker == "recipe" or self.weights == "4-bit")

    @property
    def tolerance(self) -> float:
        """Largest difference of outputs, relative to the largest trained one if that is over 1.

        fp32 rounds at the 24th bit, bf16 at the 8th: one part in 256 a layer, of which some add up. 4-bit weights are
        the same on both sides, and are multiplied in bf16.
        """
        return 0.05 if self.is_mixed_precision or self.weights == "4-bit" else 1e-4

    @property
    def training(self) -> "Run":
        """The training that this run publishes: an adapter that is merged is that of another run."""
        kind = "ensemble" if self.kind == "member" else self.kind
        return replace(self, kind=kind, weights="adapter" if self.weights == "merged" else self.weights)


def possible_runs() -> list[Run]:
    runs = [Run(*values) for values in product(*AXES.values())]
    return [run for run in runs if (run.kind, run.weights) not in IMPOSSIBLE]


def covering(runs: Iterable[Run]) -> list[Run]:
    """A part of these runs in which every pair of values occurs that occurs in them (a greedy covering array).

    Among runs that bring as many new pairs, the one with the most new triples is taken.
    """
    pairs, triples = ({run: set(combinations(vars(run).items(), size)) for run in runs} for size in (2, 3))
    missing, unseen = set().union(*pairs.values()), set().union(*triples.values())
    chosen = []
    while missing:
        best = max(pairs, key=lambda run: (len(pairs[run] & missing), len(triples[run] & unseen)))
        chosen.append(best)
        missing -= pairs[best]
        unseen -= triples[best]
    return chosen


# Data


def as_form(form: str, text: str, role: str) -> str | list[dict[str, str]]:
    """The text of a prompt or completion, as text or as messages."""
    return text if form == "text" else [{"role": role, "content": text.strip()}]


def rows_of(kind: str, form: str) -> list[dict[str, Any]]:
    rows = []
    for number in range(8):
        row: dict[str, Any] = {"prompt": as_form(form, f"Tell me about day {number}.", "user")}
        answers = [as_form(form, answer, "assistant") for answer in _ANSWERS]
        if kind == "sft":
            row["completion"] = answers[0]
        elif kind == "k-wise":
            pairs = [[0, 1], [0, 2], [1, 2]]
            row |= {"completions": answers, "pairs": pairs, "targets": [1.0, 1.0, 0.5]}
        elif not kind.startswith("ppo"):
            row |= {"chosen": answers[0], "rejected": answers[1 + number % 2]}
        rows.append(row)
    return rows


def text_length(prompts, completions, **columns):
    """The reward of PPO on texts."""
    return [float(len(completion)) for completion in completions]


def chat_length(prompts, completions, **columns):
    """The reward of PPO on messages."""
    return [float(len(completion[-1]["content"])) for completion in completions]


REWARDS = {"text": text_length, "chat": chat_length}


def push_base(tokenizer, folder: Path) -> None:
    """Pushes the base to the stand-in, with different weights on its branches."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
        **sizes,
    )
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA random model.\n")
    api = HfApi()
    api.create_repo(BASE)
    api.create_branch(BASE, branch=BRANCH_OF_BASE)
    for seed, branch in enumerate(("main", BRANCH_OF_BASE)):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
        api.upload_folder(repo_id=BASE, folder_path=folder, revision=branch)


# What was trained


@dataclass
class Trained:
    """A finished training: its folder and its trainers, of which ensembles have several."""

    run: Run
    folder: Path
    trainers: list[Trainer]

    @property
    def tokenizer(self):
        return self.trainers[-1].processing_class

    @property
    def is_adapter(self) -> bool:
        return self.run.weights != "whole"

    @torch.no_grad()
    def logits(self, ids: list[int], *, with_adapter: bool = True) -> torch.Tensor:
        """Logits (T, V) of the trained policy in the precision of training."""
        trainer = self.trainers[-1]
        policy = trainer.stack.activate("policy") if isinstance(trainer, PPOTrainer) else nullcontext(trainer.model)
        with policy as model, evaluating(model), torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):
            with nullcontext() if with_adapter else model.disable_adapter():
                return model(input_ids=torch.tensor([ids])).logits[0].float()

    @cached_property
    def scorers(self) -> list[RewardScorer]:
        """The trained reward models as reward functions, in the precision of training."""
        found = []
        for trainer in self.trainers:
            known = trainer.normalization
            options = {"mean": known.mean, "std": known.std, "autocast": known.autocast_dtype}
            found.append(RewardScorer(trainer.model, trainer.processing_class, **options))
        return found

    def scores(self, prompt, completion) -> tuple[float, float]:
        """Raw score and reward of a completion; of an ensemble, the means of its members'."""
        raw = [scorer.raw([prompt], [completion])[0] for scorer in self.scorers]
        rewards = [scorer([prompt], [completion])[0] for scorer in self.scorers]
        return fmean(raw), fmean(rewards)

    def score_ids(self, sequences: list[list[int]], *, with_adapter: bool = True) -> torch.Tensor:
        """Raw scores of tokens by the last reward model, with its trained head."""
        scorer = self.scorers[-1]
        with nullcontext() if with_adapter else scorer.model.disable_adapter():
            return torch.tensor(scorer.score_ids(sequences))


class Workshop:
    """Trains and pushes runs, each training once."""

    def __init__(self, folder: Path, recipes: Path, patch):
        self.folder, self.recipes, self.patch = folder, recipes, patch
        self._trained: dict[Run, Trained] = {}
        self._started: list[Trainer] = []
        for trainer_class in (PublishingSFTTrainer, BradleyTerryTrainer, PPOTrainer):
            self._remember_trainers_of(trainer_class)

    def _remember_trainers_of(self, trainer_class: type[Trainer]) -> None:
        """Keeps the trainers that recipes make, as their outputs are what the cards must reproduce."""
        train = trainer_class.train

        def remembered(trainer, *args, **kwargs):
            self._started.append(trainer)
            return train(trainer, *args, **kwargs)

        self.patch.setattr(trainer_class, "train", remembered)

    def publish(self, run: Run) -> Trained:
        """Trains, and pushes what the run is about, as a user would. Returns what was trained."""
        trained = self.train(run.training)
        folder = trained.folder
        if run.kind == "member":
            folder = folder / "member-1"
            trained = replace(trained, run=run, trainers=trained.trainers[-1:])
        if run.weights == "merged":
            dtype = "bfloat16" if run.is_mixed_precision else "float32"
            folder = merge_run(folder, self.folder / run.name, dtype=dtype)
        if run != run.training or run.kind == "ensemble" and run.maker == "python":
            push_run(folder, run.repo_id, revision=run.branch)
        return replace(trained, run=run)

    def train(self, run: Run) -> Trained:
        """Trains, and pushes what the recipe or trainer pushes by itself."""
        if run not in self._trained:
            folder = self.folder / "runs" / run.name
            self._started.clear()
            if run.maker == "recipe":
                self._by_recipe(run, folder)
            else:
                self._from_python(run, folder)
            self._trained[run] = Trained(run, folder, list(self._started))
        return self._trained[run]

    def _by_recipe(self, run: Run, folder: Path) -> None:
        recipe = "reward" if run.is_reward_model else run.kind.partition("-")[0]
        data = self.folder / f"{run.kind}-{run.form}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(run.kind, run.form)))
        options = options_of(run, folder) | {
            "model_name_or_path": BASE,
            "model_revision": run.base_revision or "main",
            "dtype": run.dtype,
            "load_in_4bit": run.weights == "4-bit",
            "use_peft": run.weights != "whole",
            "dataset_name": data,
            "eval_rows": 2,
            "push_to_hub": True,
        }
        if run.kind == "ensemble":
            options["members"] = 2
        if recipe == "ppo":
            options["reward_funcs"] = f"{__file__}:{REWARDS[run.form].__name__}"
        words = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        script = str(self.recipes / f"{recipe}.py")
        self.patch.setattr(sys, "argv", [script, *words])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stopped:
            assert not stopped.code, f"the recipe {recipe} ended with {stopped.code}: {' '.join(words)}"

    def _from_python(self, run: Run, folder: Path) -> None:
        if run.kind != "ensemble":
            trainer = make_trainer(run, folder)
            trainer.train()
            trainer.push_to_hub()
            return
        names = ["member-0", "member-1"]
        for seed, name in enumerate(names):
            trainer = make_trainer(run, folder / name, seed=seed)
            trainer.train()
            trainer.save_model()
        RewardEnsemble.save(folder, names)


def options_of(run: Run, folder: Path) -> dict[str, Any]:
    """Options of the trainer, as a recipe and as Python have them."""
    options = _STEPS | {
        "output_dir": str(folder),
        "bf16": run.is_mixed_precision,
        "use_cpu": True,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "hub_model_id": run.repo_id,
        "hub_revision": run.branch,
    }
    if run.is_reward_model:
        options["learning_rate"] = 0.02  # with 0.05, rounding to bf16 moves the score of one of them by its own size
    elif run.kind.startswith("ppo"):
        options |= {"critic": run.kind.partition("-")[2], "max_completion_length": 4}
    return options


def make_trainer(run: Run, folder: Path, seed: int = 0, base: str | Path = BASE) -> Trainer:
    """The trainer of a run from Python, on a base on the stand-in or in a folder."""
    torch.manual_seed(seed)  # of the reward head
    model = load_base_model(
        base,
        task="reward" if run.is_reward_model else "causal_lm",
        dtype=run.dtype,
        load_in_4bit="4-bit" in run.weights,
        revision=run.base_revision if base == BASE else None,
    )
    adapter = None
    if "whole" not in run.weights:
        task_type = "SEQ_CLS" if run.is_reward_model else "CAUSAL_LM"
        # Without the revision of the base, which the library knows.
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task_type)
    rows = rows_of(run.kind, run.form)
    train, heldout = Dataset.from_list(rows[:6]), Dataset.from_list(rows[6:])
    given: dict[str, Any] = {"train_dataset": train, "eval_dataset": heldout, "peft_config": adapter}
    options = options_of(run, folder) | {"seed": seed}
    if run.is_reward_model:
        return BradleyTerryTrainer(model, BradleyTerryConfig(**options), **given)
    if run.kind == "sft":
        return PublishingSFTTrainer(model, args=SFTConfig(**options), **given)
    return PPOTrainer(model, REWARDS[run.form], args=PPOConfig(**options), **given)

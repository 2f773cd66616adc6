# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[quickstart]==0.1.*"]
# ///
"""PPO with a KL leash from an SFT adapter (or a base model) towards a reward model or a reward function.

python recipes/ppo.py --config recipes/configs/smollm2-135m/ppo.yaml --model_name_or_path runs/sft \
    --reward_model runs/reward --dataset_name prompts.jsonl
"""

# First: it hides what the libraries below say whenever they are imported.
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe

# isort: split
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel

from hf_rlhf_ext import PPOConfig, PPOTrainer, UserError, load_policy
from hf_rlhf_ext.data.formats import load_rows
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.metrics.plots import plot_ppo_run
from hf_rlhf_ext.metrics.preference import bootstrap_mean_ci
from hf_rlhf_ext.ppo.evaluation import EvaluatedCompletion
from hf_rlhf_ext.scripts import (
    DataArguments,
    ModelArguments,
    check_push,
    finish_run,
    lineage_of,
    machine_defaults,
    public_name,
    train_and_heldout,
)


@dataclass
class RewardArguments:
    """What the policy is rewarded by."""

    reward_model: list[str] = field(
        default_factory=list, metadata={"help": "Folders or Hub ids of reward models (adapters or whole models)."}
    )
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward functions by import path: `my_package.rewards.politeness`."}
    )
    eval_reward_model: list[str] = field(
        default_factory=list, metadata={"help": "Reward models that only evaluation asks: a gold or second opinion."}
    )
    eval_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward functions that only evaluation asks, by import path."}
    )
    value_model: str | None = field(
        default=None, metadata={"help": "Model that `--critic model` starts from: a folder or Hub id."}
    )
    ptx_dataset: str | None = field(
        default=None,
        metadata={"help": "Text for `--ptx_coef`: rows of `text`, of `prompt` and `completion`, or of `messages`."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without a better `metric_for_best_model` after which training ends."},
    )
    final_rows: int | None = field(
        default=None, metadata={"help": "Held-out prompts for the comparison before/after. If `None`, all of them."}
    )

    def __post_init__(self):
        if not self.reward_model and not self.reward_funcs:
            raise UserError("give a reward: --reward_model FOLDER, or --reward_funcs package.module.function.")

    def load(self) -> list[str | Callable]:
        return [*self.reward_model, *map(_imported, self.reward_funcs)]

    def load_eval(self) -> list[str | Callable] | None:
        return [*self.eval_reward_model, *map(_imported, self.eval_reward_funcs)] or None


ARGUMENTS = (DataArguments, RewardArguments, ModelArguments, PPOConfig)


class PPOResult(NamedTuple):
    """Held-out completions of the policy before and after PPO (prompt by prompt), and the trainer's log."""

    before: list[EvaluatedCompletion]
    after: list[EvaluatedCompletion]
    log_history: list[dict[str, Any]]
    report: dict[str, Any]


def train_ppo(
    data: DataArguments,
    rewards: RewardArguments,
    model_args: ModelArguments,
    args: PPOConfig,
    *,
    test: Dataset | None = None,
    eval_reward_funcs: list[Callable] | None = None,
) -> PPOResult:
    """Trains, compares held-out completions before and after, and saves policy, value head and report.

    `eval_rows` held-out prompts are sampled at every evaluation in training; `test` (by default the same ones) is for
    the comparison of the two ends.
    """
    check_push(args, model_args)
    start = time.monotonic()
    reward_funcs = rewards.load()  # first: a wrong import path should not cost the loading of the policy
    eval_reward_funcs = eval_reward_funcs or rewards.load_eval()
    prepare_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=data.overwrite)
    rows = load_rows(data.dataset_name, data.dataset_train_split, data.dataset_revision, config=data.dataset_config)
    split = data.dataset_test_split
    heldout = load_rows(data.dataset_name, split, data.dataset_revision, config=data.dataset_config) if split else None
    train, heldout = train_and_heldout(rows, data, heldout)
    test = test if test is not None else heldout
    if rewards.final_rows is not None:
        test = test.select(range(min(rewards.final_rows, len(test))))
    model, tokenizer = load_policy(
        model_args.model_name_or_path, revision=model_args.revision, is_trainable=True, **model_args.base_options(args)
    )
    trainer = PPOTrainer(
        model,
        reward_funcs,
        args=args,
        train_dataset=train,
        eval_dataset=heldout if len(heldout) else None,
        processing_class=tokenizer,
        eval_reward_funcs=eval_reward_funcs,
        peft_config=None if isinstance(model, PeftModel) else model_args.peft_config("CAUSAL_LM"),
        value_model=rewards.value_model,
        ptx_dataset=load_rows(rewards.ptx_dataset) if rewards.ptx_dataset else None,
        callbacks=[EarlyStoppingCallback(patience)] if (patience := rewards.early_stopping_patience) else None,
    )
    before = trainer.sample_and_score(test) if len(test) else []
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # pushed at the end, with its card
    after = trainer.sample_and_score(test) if len(test) else []
    plot_ppo_run(trainer.state.log_history, Path(args.output_dir) / "curves.png")
    measured = {"updates": trainer.updates, "kl_coef": trainer.kl_coef, "rewards": trainer.rewards.names}
    measured["start"] = "an adapter" if trainer.stack.roles["reference"].adapter else "the base model"
    card = None
    if len(test):
        measured |= compare(before, after)
        card = {
            "base_model": public_name(base_name(model)),
            "lineage": lineage(data, rewards, model_args, n_prompts=len(train)),
            "datasets": [] if Path(data.dataset_name).exists() else [data.dataset_name],
            "samples": read_samples(before, after),
            "plot": "curves.png",
            "caption": "reward, KL, entropy, length, critic and β over optimizer steps",
            "relation": "adapter" if isinstance(model, PeftModel) or model_args.use_peft else "finetune",
        }
    given, seconds = (data, rewards, model_args, args), time.monotonic() - start
    report = finish_run(args, "policy", {"ppo": measured}, given, seconds=seconds, card=card)
    return PPOResult(before, after, trainer.state.log_history, report)


def lineage(
    data: DataArguments, rewards: RewardArguments, model_args: ModelArguments, *, n_prompts: int
) -> dict[str, str]:
    """What the policy was made from: its start, the reward models, the prompts."""
    found = {"SFT": lineage_of(model_args.model_name_or_path, model_args.revision)}
    many = len(rewards.reward_model) > 1
    for number, name in enumerate(rewards.reward_model, start=1):
        found[f"reward model {number}" if many else "reward model"] = lineage_of(name)
    return found | {"prompts": lineage_of(data.dataset_name, data.dataset_revision, dataset=True, rows=n_prompts)}


def read_samples(before: list[EvaluatedCompletion], after: list[EvaluatedCompletion]) -> list[dict[str, str]]:
    """A few held-out prompts with the completions of both ends, for the card."""
    return [
        {"prompt": plain_text(first.prompt), "before": first.completion, "after": second.completion}
        for first, second in list(zip(before, after, strict=True))[:4]
    ]


def base_name(model: PreTrainedModel | PeftModel) -> str:
    """Name of the model under the adapter."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).config.name_or_path


def compare(before: list[EvaluatedCompletion], after: list[EvaluatedCompletion]) -> dict[str, Any]:
    """Means before and after over the same prompts, and the interval of the paired gain in the training reward."""
    gains = [b.score - a.score for a, b in zip(before, after, strict=True)]
    return {
        "proxy_before": fmean(row.score for row in before),
        "proxy_after": fmean(row.score for row in after),
        "proxy_gain_ci95": list(bootstrap_mean_ci(gains)),
        "kl": fmean(row.kl for row in after),
        "mean_length_before": fmean(row.n_tokens for row in before),
        "mean_length_after": fmean(row.n_tokens for row in after),
    }


def _imported(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    sys.path.insert(0, os.getcwd())  # where a user's own module usually is; Python puts only the script's folder there
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"reward_funcs: cannot import {path!r} ({error}): give package.module.function.") from error
    finally:
        sys.path.remove(os.getcwd())


def main() -> None:
    data, rewards, model_args, args = parse_recipe(ARGUMENTS, description=__doc__, defaults=machine_defaults())
    result = train_ppo(data, rewards, model_args, args)
    for name, value in result.report["ppo"].items():
        print(f"{name:>22}: {value:.3f}" if isinstance(value, float) else f"{name:>22}: {value}")
    print(f"Saved the policy in {args.output_dir}; load it with hf_rlhf_ext.load_policy.")


if __name__ == "__main__":
    run_recipe(main)

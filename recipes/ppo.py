# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
r"""PPO with a KL penalty. It starts from an SFT adapter or a base model; a reward model or a function gives the reward.

hf-rlhf ppo --config smollm2-135m/ppo.yaml --model_name_or_path runs/sft \
    --reward_model runs/reward --dataset_name prompts.jsonl

If a guard stops the run (--max_kl, --max_skipped_steps), report and card say so. Such a run is pushed only if
--load_best_model_at_end has restored the best model.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.cli.stopping import forget_checkpoints_of_stops, open_run, stoppable, stopping_callback

# isort: split
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from datasets import Dataset
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_rlhf_ext import PPOConfig, PPOTrainer, UserError, load_policy
from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.finish import check_push, finish_run
from hf_rlhf_ext.cli.first_checks import (
    check_model_folder,
    check_policy_folder,
    check_ppo,
    check_reward_folder,
    check_training,
)
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.idle_options import say_idle_options
from hf_rlhf_ext.cli.lineage import data_records, hub_dataset, lineage_of, with_commit_read
from hf_rlhf_ext.cli.memory_check import StartArguments, check_memory
from hf_rlhf_ext.cli.next_steps import use_of
from hf_rlhf_ext.cli.options import (
    DataArguments,
    ModelArguments,
    check_at_least,
    machine_defaults,
)
from hf_rlhf_ext.cli.output import print_metrics
from hf_rlhf_ext.cli.precision import print_quantization, refuse_options_of_a_new_adapter
from hf_rlhf_ext.cli.progress import readable, show_progress
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.reward_order import sum_of_rewards, weights_of_models_first
from hf_rlhf_ext.cli.row_records import RowRecord
from hf_rlhf_ext.cli.rows import check_heldout, describe_split, train_and_heldout
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.hub.push import later_command
from hf_rlhf_ext.hub.reports.provenance import data_record
from hf_rlhf_ext.hub.reports.trainer_report import (
    critic_facts,
    curves_caption,
    public_reward_names,
    section_steps,
    start_of,
    trainer_card_options,
)
from hf_rlhf_ext.metrics.plots import plot_ppo_run
from hf_rlhf_ext.ppo.evaluation import EvaluatedCompletion
from hf_rlhf_ext.ppo.reward_calls import formula_of
from hf_rlhf_ext.readers.formats import load_rows
from hf_rlhf_ext.readers.prompts import load_prompts
from hf_rlhf_ext.reward.preference_metrics import bootstrap_mean_ci
from hf_rlhf_ext.reward_functions.named import FACTORIES, texts_of
from hf_rlhf_ext.training.optimizers import require_optimizer

PLOT = "curves.png"
SAMPLES = 4
"""Number of held-out prompts whose completions the card shows."""
STARTS = {"sft": "SFT policy", "policy": "PPO policy", "dpo": "DPO policy"}
"""Names of the model that PPO starts from, by the kind of its card."""


@dataclass
class RewardArguments:
    """The rewards of training and of evaluation."""

    _argument_group_name = "rewards"

    reward_model: list[str] = field(
        default_factory=list, metadata={"help": "Folders or Hub ids of reward models, either adapters or whole models."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions, as `rewards.py:short`, `path/to/rewards.py:short` or `my_package.rewards:short`."
            f" Built-in ones are {', '.join(FACTORIES)}, with arguments as in `'exact_match(column=answer)'`."
        },
    )
    eval_reward_model: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward models for evaluation only, such as a gold reward: folders or Hub ids."},
    )
    eval_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward functions for evaluation only, as for `reward_funcs`."}
    )
    value_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model from which `--critic model` starts."}
    )
    ptx_dataset: str | None = field(
        default=None,
        metadata={"help": "Text for `--ptx_coef`: rows with `text`, `prompt` and `completion`, or `messages`."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Number of evaluations without a better `metric_for_best_model` after which training stops. If "
            "`None`, it does not stop early."
        },
    )
    final_rows: int | None = field(
        default=None, metadata={"help": "Held-out prompts for the comparison before and after PPO. If `None`, all."}
    )

    def __post_init__(self):
        self.reward_funcs = texts_of(self.reward_funcs, "reward_funcs")
        self.eval_reward_funcs = texts_of(self.eval_reward_funcs, "eval_reward_funcs")
        if not self.reward_model and not self.reward_funcs:
            raise UserError("give a reward: --reward_model FOLDER, or --reward_funcs rewards.py:function.")
        check_at_least(self, final_rows=0, early_stopping_patience=1)

    def check(self, args: PPOConfig) -> None:
        """Raises `UserError` for what the options and local folders show, before anything is loaded."""
        check_ppo(
            args, value_model=self.value_model, ptx_dataset=self.ptx_dataset, patience=self.early_stopping_patience
        )
        for name in self.reward_model:
            check_reward_folder(name)
        for name in self.eval_reward_model:
            check_reward_folder(name, "eval_reward_model")
        if self.value_model is not None:
            check_model_folder(self.value_model, "value_model")

    def load(self) -> list[str | Callable]:
        """The rewards of training, as `PPOTrainer` takes them."""
        return [*self.reward_model, *(reward_function(name, "reward_funcs") for name in self.reward_funcs)]

    def load_eval(self) -> list[str | Callable] | None:
        """The rewards that are used in evaluation only, or None."""
        functions = [reward_function(name, "eval_reward_funcs") for name in self.eval_reward_funcs]
        return [*self.eval_reward_model, *functions] or None

    def final_prompts(self, prompts: Dataset) -> Dataset:
        """The prompts for the comparison before and after PPO."""
        if self.final_rows is None:
            return prompts
        return prompts.select(range(min(self.final_rows, len(prompts))))

    def callbacks(self) -> list[TrainerCallback]:
        if self.early_stopping_patience is None:
            return []
        return [EarlyStoppingCallback(self.early_stopping_patience)]


@dataclass
class PromptArguments(DataArguments):
    """The prompts, and how many of them are used."""

    unused_options = {
        "dataset_format": "prompts have no format but their columns: see --columns",
        "ignore": "reward functions get all columns",
    }


ARGUMENTS = (PromptArguments, RewardArguments, StartArguments, ModelArguments, PPOConfig)


class PPOResult(NamedTuple):
    """Held-out completions before and after PPO (in the same order), the trainer's log, and the report."""

    before: list[EvaluatedCompletion]
    after: list[EvaluatedCompletion]
    log_history: list[dict[str, Any]]
    report: dict[str, Any]


@stoppable
def train_ppo(
    data: DataArguments,
    rewards: RewardArguments,
    model_args: ModelArguments,
    args: PPOConfig,
    *,
    test: Dataset | None = None,
    eval_reward_funcs: list[Callable] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    verbose: bool = False,
    says_rows: bool = True,
    memory: str | None = None,
) -> PPOResult:
    """Trains, compares held-out completions before and after, and saves policy, critic and report.

    Args:
        test: prompts for the comparison before and after PPO. Default are the held-out prompts (`eval_rows`), for
            which completions are also sampled at every evaluation during training.
        eval_reward_funcs: replace the rewards of `rewards` that are used in evaluation only.
        callbacks: added to the trainer.
        says_rows: whether to print how many prompts were read and held out. Dropped ones are always said.
        memory: what `check_memory` does where the run does not fit: `refuse`, `warn`, or `off` for no plan. If `None`,
            only the trainer's log says it.
    """
    check_push(args, model_args, data)
    model_args.check_task_type("CAUSAL_LM")
    require_optimizer(args, warn=False)
    check_training(args)
    rewards.check(args)
    start = time.monotonic()
    reward_funcs = rewards.load()  # first, so that a wrong import path is found before the policy is loaded
    eval_reward_funcs = eval_reward_funcs or rewards.load_eval()
    formula = sum_of_rewards(reward_funcs, args.reward_weights, args.reward_shaping)
    check_policy_folder(model_args.model_name_or_path)
    check_memory(
        "ppo",
        args,
        model_args,
        mode=memory,
        reward_model=[*rewards.reward_model, *rewards.eval_reward_model],
        value_model=rewards.value_model,
        evaluates=test is not None or data.holds_rows_out,
    )
    checkpoint = open_run("ppo", args, (data, rewards, model_args, args), overwrite=data.overwrite)
    if formula is not None:
        print(f"reward = {formula}")
    ptx_dataset = load_rows(rewards.ptx_dataset) if rewards.ptx_dataset else None
    train, heldout, rows_read = read_prompts(data, says_rows=says_rows)
    check_heldout(args, heldout)
    record = RowRecord(data, train, heldout)
    test_is_given = test is not None
    test = rewards.final_prompts(test if test_is_given else heldout)
    dataset = hub_dataset(data)

    model, tokenizer = load_policy(
        model_args.model_name_or_path, revision=model_args.revision, is_trainable=True, **model_args.base_options(args)
    )
    print_quantization(model)
    trainer = PPOTrainer(
        model,
        reward_funcs,
        args=args,
        train_dataset=train,
        eval_dataset=heldout if len(heldout) else None,
        processing_class=tokenizer,
        eval_reward_funcs=eval_reward_funcs,
        # An SFT adapter is trained further. A base model gets a new adapter.
        peft_config=None if isinstance(model, PeftModel) else model_args.peft_config("CAUSAL_LM"),
        value_model=rewards.value_model,
        ptx_dataset=ptx_dataset,
        callbacks=[*rewards.callbacks(), *callbacks, stopping_callback()],
    )
    show_progress(trainer, verbose=verbose, eval_rewards=eval_reward_names(trainer))
    # The same prompts and the same seed before and after, so that the gains are differences of pairs.
    before = sample_and_score(trainer, test, "before PPO")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # it is pushed at the end, with its card
    forget_checkpoints_of_stops(args)
    after = sample_and_score(trainer, test, "after PPO")
    has_plot = draw_plot(trainer, args)

    start_kind = kind_of_start(model_args)
    measured = measure(trainer, start_kind, before, after)
    card = trainer_card_options(trainer)
    dataset = with_commit_read(dataset, card)
    card |= {
        **describe_comparison(args, before, after, has_plot=has_plot),
        "lineage": lineage(data, rewards, model_args, start_kind, n_prompts=len(train)),
        "data": data_records(data, "prompts", train, () if test_is_given else test, dataset, known=card),
        "rows_read": [rows_read, *card.get("rows_read", ())],
        **dataset,
    }
    if test_is_given:
        card["data"].append(data_record(test, "evaluation"))
    if trainer.stop_reason is not None:
        keep_from_the_hub(args, trainer)
    seconds = time.monotonic() - start
    options = (data, rewards, model_args, args)
    content = {"ppo": measured, **record.write(args.output_dir, is_first_process=args.process_index == 0)}
    report = finish_run(args, "policy", content, options, seconds=seconds, card=card)
    return PPOResult(before, after, trainer.state.log_history, report)


def read_prompts(data: DataArguments, *, says_rows: bool = True) -> tuple[Dataset, Dataset, str]:
    """Returns prompts to train on, held-out prompts, and one line on what was read and dropped."""
    reading = {"config": data.dataset_config, "columns": data.column_roles()}
    rows, report = load_prompts(data.dataset_name, data.dataset_train_split, data.dataset_revision, **reading)
    if says_rows or report.dropped:
        print(report.summary())
    test = None
    if data.dataset_test_split:
        test, _ = load_prompts(data.dataset_name, data.dataset_test_split, data.dataset_revision, **reading)
    train, heldout = train_and_heldout(rows, data, test)
    if says_rows:
        print(describe_split(data, len(rows), train, heldout, unit="prompts"))
    return train, heldout, report.summary()


# What was measured


def eval_reward_names(trainer: PPOTrainer) -> list[str]:
    """Names of the rewards that only evaluation computes."""
    return [] if trainer.eval_rewards is None else trainer.eval_rewards.names


def sample_and_score(trainer: PPOTrainer, prompts: Dataset, when: str) -> list[EvaluatedCompletion]:
    """Samples a completion for each prompt, and prints the mean rewards; nothing without prompts."""
    if not len(prompts):
        return []
    start = time.monotonic()
    completions = trainer.sample_and_score(prompts)
    seconds = time.monotonic() - start
    means = [f"reward {readable(fmean(completion.score for completion in completions))}"]
    for name in eval_reward_names(trainer):
        # NaN is the score of a reward that does not apply to a prompt.
        scores = [completion.rewards[name] for completion in completions]
        scored = [score for score in scores if not math.isnan(score)]
        if scored:
            means.append(f"{name} {readable(fmean(scored))}")
    print(f"{when}: {', '.join(means)} on {len(prompts)} held-out prompts, {seconds:.1f} s", flush=True)
    return completions


def draw_plot(trainer: PPOTrainer, args: PPOConfig) -> bool:
    """Draws the run's curves. Returns False for a run without a log, which has nothing to draw."""
    logs = trainer.state.log_history
    has_metrics = any("objective/kl" in log or "eval_objective/kl" in log for log in logs)
    if args.process_index == 0:
        plot = Path(args.output_dir) / PLOT
        if has_metrics:
            plot_ppo_run(logs, plot)
        else:
            plot.unlink(missing_ok=True)  # of an earlier run
            print(f"No {PLOT}: the run has no log. Set --logging_strategy steps to get one.")
    return has_metrics


def measure(
    trainer: PPOTrainer,
    start_kind: str | None,
    before: list[EvaluatedCompletion],
    after: list[EvaluatedCompletion],
) -> dict[str, Any]:
    """PPO's part of the report."""
    reward_names, public_eval_names = public_reward_names(trainer)
    measured: dict[str, Any] = {
        "updates": trainer.updates,
        "kl_coef": trainer.kl_coef,
        "rewards": reward_names,
        **critic_facts(trainer),
        **section_steps(trainer),
    }
    formula = formula_of(reward_names, trainer.rewards.weights.tolist(), trainer.args.reward_shaping)
    if formula is not None:
        measured["reward_formula"] = formula
    if trainer.reward_warnings:
        measured["reward_warnings"] = trainer.reward_warnings
    start = start_of(trainer) if start_kind is None else f"the {STARTS[start_kind]}"
    if start is not None:
        measured["start"] = start
    if before:
        measured |= compare(before, after, dict(zip(eval_reward_names(trainer), public_eval_names, strict=True)))
    if trainer.stop_reason is not None:
        measured["stop_reason"] = trainer.stop_reason
    return measured


def compare(
    before: list[EvaluatedCompletion], after: list[EvaluatedCompletion], eval_rewards: Mapping[str, str]
) -> dict[str, Any]:
    """Means before and after PPO over the same prompts, with 95 % intervals of the paired gains and of the KL.

    `eval_rewards` has the rewards that are used in evaluation only: name in completions -> name in the report. Prompts
    without a score are left out of that reward's means.
    """
    kl = [completion.kl for completion in after]
    measured = {
        "n": len(after),
        "kl": fmean(kl),
        "kl_ci95": list(bootstrap_mean_ci(kl)),
        "eval_rewards": list(eval_rewards.values()),
    }
    pairs = list(zip(before, after, strict=True))
    for name, public in eval_rewards.items():
        measured.update(change(public, [(first.rewards[name], second.rewards[name]) for first, second in pairs]))
    measured.update(change("proxy", [(first.score, second.score) for first, second in pairs]))
    measured["mean_length_before"] = fmean(completion.n_tokens for completion in before)
    measured["mean_length_after"] = fmean(completion.n_tokens for completion in after)
    return measured


def change(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Means of a reward before and after PPO, and the mean gain with its interval; empty if no pair has scores."""
    # NaN is the score of a reward that does not apply to a prompt.
    scored = [pair for pair in pairs if not math.isnan(sum(pair))]
    if not scored:
        return {}
    gains = [after - before for before, after in scored]
    return {
        f"{name}_before": fmean(before for before, _ in scored),
        f"{name}_after": fmean(after for _, after in scored),
        f"{name}_gain": fmean(gains),
        f"{name}_n": len(scored),
        f"{name}_gain_ci95": list(bootstrap_mean_ci(gains)),
    }


# The card


def kind_of_start(model_args: ModelArguments) -> str | None:
    """The kind of card of the model that PPO starts from, read from the report in its folder; None without a report."""
    name = model_args.model_name_or_path
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            report = folder / "report.json"
        else:
            report = Path(hf_hub_download(name, "report.json", revision=model_args.revision))
        kind = json.loads(report.read_text(encoding="utf-8"))["card"]["kind"]
    except Exception:  # no file, no network, no id on the Hub, or another kind of report
        return None
    return kind if kind in STARTS else None


def lineage(
    data: DataArguments, rewards: RewardArguments, model_args: ModelArguments, start_kind: str | None, *, n_prompts: int
) -> dict[str, str]:
    """What the policy was made from: the first policy, the reward models, and the prompts."""
    made_from = {STARTS.get(start_kind, "start"): lineage_of(model_args.model_name_or_path, model_args.revision)}
    for number, name in enumerate(rewards.reward_model, start=1):
        label = "reward model" if len(rewards.reward_model) == 1 else f"reward model {number}"
        made_from[label] = lineage_of(name)
    made_from["prompts"] = lineage_of(data.dataset_name, data.dataset_revision, dataset=True, rows=n_prompts)
    return made_from


def describe_comparison(
    args: PPOConfig, before: list[EvaluatedCompletion], after: list[EvaluatedCompletion], *, has_plot: bool
) -> dict[str, Any]:
    """The card's plot and note, and the first held-out prompts with their completions before and after PPO."""
    samples = []
    for first, second in zip(before[:SAMPLES], after[:SAMPLES], strict=True):
        prompt = plain_text(first.prompt)
        samples.append({"prompt": prompt, "before": first.completion, "after": second.completion})
    card: dict[str, Any] = {"samples": samples}
    if has_plot:
        card["plot"] = PLOT
        card["caption"] = curves_caption(args)
    if before:
        card["notes"] = [
            f"One completion for each of {len(before)} prompts, before and after, at temperature "
            f"{args.temperature:g}, seed {args.seed}, cut at {args.max_completion_length} tokens; the samples are of "
            "the first prompts."
        ]
    return card


def keep_from_the_hub(args: PPOConfig, trainer: PPOTrainer) -> None:
    """Does not push a run that a guard stopped, unless the best model was restored. Prints how to push it anyway."""
    best_is_back = args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    if not args.push_to_hub or best_is_back:
        return
    args.push_to_hub = False
    private = args.hub_private_repo is not False
    later = later_command(args.output_dir, args.hub_model_id, private=private, revision=args.hub_revision)
    print(f"warning: a guard stopped the run, so it is not pushed. To push it anyway: {later}", file=sys.stderr)


def main() -> None:
    data, rewards, terminal, model_args, args = parse_recipe(
        ARGUMENTS,
        description=__doc__,
        defaults=machine_defaults() | {"output_dir": "runs/ppo", "unrenderable": "drop"},
        main_options=main_options.PPO,
    )
    refuse_options_of_a_new_adapter(model_args)
    say_idle_options(data, rewards, model_args, args)
    models, functions = rewards.reward_model, rewards.reward_funcs
    args.reward_weights = weights_of_models_first(sys.argv[1:], models, functions, args.reward_weights)
    with library_output(verbose=terminal.verbose):
        result = train_ppo(data, rewards, model_args, args, verbose=terminal.verbose, memory=terminal.check_memory)
    measured = dict(result.report["ppo"])
    stop_reason = measured.pop("stop_reason", None)
    reward_warnings = measured.pop("reward_warnings", [])
    print_metrics(measured)
    for line in reward_warnings:
        print(f"warning: {line}.")
    if stop_reason is not None:
        print(f"A guard stopped training early: {stop_reason}.")
    print(f"Saved the policy in {args.output_dir}; load it with hf_rlhf_ext.load_policy. Next:")
    print(*use_of(args.output_dir), sep="\n")


if __name__ == "__main__":
    run_recipe(main)

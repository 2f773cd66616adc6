# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Trains a Bradley-Terry reward model on comparisons: pairs, or K completions per prompt, in any supported format.

hf-rlhf reward --config smollm2-135m/reward.yaml --dataset_name preferences.jsonl
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.cli.stopping import forget_checkpoints_of_stops, open_run, part_of, stoppable, stopping_callback

# isort: split
import copy
import gc
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, UserError, load_comparisons
from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.finish import check_push, finish_run, recorded_card
from hf_rlhf_ext.cli.first_checks import check_model_folder, check_training
from hf_rlhf_ext.cli.idle_options import say_idle_options
from hf_rlhf_ext.cli.lineage import base_lineage, data_records, hub_dataset, lineage_of, with_commit_read
from hf_rlhf_ext.cli.memory_check import StartArguments, check_memory
from hf_rlhf_ext.cli.options import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    check_at_least,
    machine_defaults,
)
from hf_rlhf_ext.cli.output import print_metrics
from hf_rlhf_ext.cli.precision import print_quantization
from hf_rlhf_ext.cli.program import how_to_run
from hf_rlhf_ext.cli.progress import show_progress
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.row_records import RowRecord
from hf_rlhf_ext.cli.rows import check_heldout, describe_comparisons, describe_split, refine, train_and_heldout
from hf_rlhf_ext.data.text import Unrenderable
from hf_rlhf_ext.data.tokenization import fit_row, start_ids, tokenize_row
from hf_rlhf_ext.hub.reports.trainer_report import section_steps, trainer_card_options
from hf_rlhf_ext.metrics.plots import plot_judged
from hf_rlhf_ext.modeling.adapters import bare_model
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.quality.reward_check import RewardCheck, check_reward
from hf_rlhf_ext.reward.ensemble import COMBINATIONS, RewardEnsemble, combine_rewards
from hf_rlhf_ext.reward.model_setup import length_limit
from hf_rlhf_ext.reward.preference_metrics import METRIC_NAMES, JudgedPairs
from hf_rlhf_ext.training.best_model import check_metric_name
from hf_rlhf_ext.training.optimizers import require_optimizer

PLOT = "evaluation.png"
REPORTED = ("accuracy", "nll", "brier", "ece", "longer_wins_baseline", "gain")
"""Metrics of an evaluation that the report has."""


@dataclass
class EnsembleArguments:
    """Several reward models instead of one, which reduces over-optimization."""

    _argument_group_name = "ensemble"

    members: int = field(default=1, metadata={"help": "Number of reward models to train, with seeds seed, seed + 1, …"})
    combine: str = field(
        default="mean",
        metadata={
            "help": "How the members' rewards are combined. `conservative` is mean - λ std.",
            "choices": list(COMBINATIONS),
        },
    )
    penalty: float = field(
        default=1.0, metadata={"help": "λ of `conservative`, in standard deviations of the members' rewards."}
    )

    def __post_init__(self):
        if self.members < 1:
            raise UserError(f"members: {self.members}: use 1 or more.")
        check_at_least(self, penalty=0)


ARGUMENTS = (
    DataArguments,
    ComparisonArguments,
    EnsembleArguments,
    StartArguments,
    ModelArguments,
    BradleyTerryConfig,
)


# One reward model


@stoppable
def train_reward(
    data: DataArguments,
    model_args: ModelArguments,
    args: BradleyTerryConfig,
    *,
    comparisons: ComparisonArguments | None = None,
    normalization_dataset: Dataset | None = None,
    extra_report: dict[str, Any] | None = None,
    rows: tuple[Dataset, Dataset, str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    verbose: bool = False,
    says_rows: bool = True,
    memory: str | None = None,
) -> dict[str, Any]:
    """Trains and evaluates a reward model. Saves adapter, head, normalization, report and card; returns the report.

    `rows` are what `read_comparisons` returned; if None, they are read. With `says_rows=False`, how many were read and
    held out is only printed if it is not what the file has. `callbacks` are added to the trainer. `memory` is what
    `check_memory` does where the run does not fit.
    """
    check_options(data, model_args, args)
    check_memory("reward", args, model_args, mode=memory, evaluates=data.holds_rows_out)
    if comparisons is None:
        comparisons = ComparisonArguments()
    checkpoint = open_run("reward", args, (data, comparisons, model_args, args), overwrite=data.overwrite)
    start = time.monotonic()
    train, heldout, rows_read = rows or read_comparisons(data, comparisons, says_rows=says_rows)
    check_heldout(args, heldout)
    check_metric_name(args, heldout, METRIC_NAMES, may_exist=lambda name: name.startswith("accuracy/"))
    record = RowRecord(data, train, heldout)
    dataset = hub_dataset(data)

    # Before the weights, which may take minutes.
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, revision=model_args.revision, trust_remote_code=args.trust_remote_code
    )
    trainer = BradleyTerryTrainer(
        load_base_model(
            model_args.model_name_or_path, task="reward", revision=model_args.revision, **model_args.base_options(args)
        ),
        args=args,
        train_dataset=train,
        eval_dataset=heldout if len(heldout) else None,
        processing_class=tokenizer,
        peft_config=model_args.peft_config("SEQ_CLS"),
        normalization_dataset=normalization_dataset,
        callbacks=[*callbacks, stopping_callback()],
    )
    print_quantization(trainer.model)
    show_progress(trainer, verbose=verbose)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # it is pushed at the end, with its card
    forget_checkpoints_of_stops(args)
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here needs

    # Counted after tokenization, which may leave out long rows.
    n_pairs = sum(len(pairs) for pairs in trainer.train_dataset["pairs"])
    measured = {
        "pairs": n_pairs,
        **evaluate(trainer, args, n_heldout=len(heldout)),
        **section_steps(trainer),
        **(extra_report or {}),
    }
    card = trainer_card_options(trainer)
    card |= describe_sources(data, model_args, args, trainer.train_dataset, heldout, dataset, known=card)
    card["rows_read"] = [rows_read, *card.get("rows_read", ())]  # and what the trainer dropped
    options = (data, comparisons, model_args, args)
    seconds = time.monotonic() - start
    return finish_run(
        args,
        "reward_model",
        {
            "reward_model": measured,
            **record.write(args.output_dir, is_first_process=args.process_index == 0, with_digests=True),
        },
        options,
        seconds=seconds,
        card=card,
    )


def check_options(data: DataArguments, model_args: ModelArguments, args: BradleyTerryConfig) -> None:
    """Raises `UserError` for what the options show, before the folder of the run is made or emptied."""
    check_push(args, model_args, data)
    model_args.check_task_type("SEQ_CLS")
    require_optimizer(args, warn=False)
    check_training(args)
    check_model_folder(model_args.model_name_or_path)


def read_comparisons(
    data: DataArguments, comparisons: ComparisonArguments, *, says_rows: bool = True
) -> tuple[Dataset, Dataset, str]:
    """Returns comparisons to train on, held-out comparisons, and one line on what was read and dropped."""
    reading = data.reading() | {"category_column": comparisons.category_column}
    rows, report = load_comparisons(data.dataset_name, split=data.dataset_train_split, **reading)
    if says_rows or report.dropped:
        print(describe_comparisons(rows, report))
    test = None
    if data.dataset_test_split:
        test, _ = load_comparisons(data.dataset_name, split=data.dataset_test_split, **reading)
    n_read = len(rows)
    rows = refine(rows, comparisons)
    train, heldout = train_and_heldout(rows, data, test)
    if says_rows or len(rows) != n_read:
        print(describe_split(data, len(rows), train, heldout, unit="prompts"))
    return train, heldout, report.summary()


def evaluate(trainer: BradleyTerryTrainer, args: BradleyTerryConfig, *, n_heldout: int) -> dict[str, Any]:
    """Evaluates on the held-out comparisons and draws the plot. Returns metrics for the report, or nothing."""
    plot = Path(args.output_dir) / PLOT
    if not n_heldout:
        plot.unlink(missing_ok=True)  # of an earlier run
        return {}
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    if args.process_index == 0:
        plot_judged(trainer.judged, plot)
    return summarize(metrics, trainer.judged)


def summarize(metrics: dict[str, float], judged: JudgedPairs) -> dict[str, Any]:
    """Metrics for the report, with their intervals, their groups, and the numbers of pairs and prompts."""
    summary: dict[str, Any] = {name: metrics[name] for name in REPORTED if name in metrics}
    for name in ("accuracy", "gain"):
        if f"{name}_low" in metrics:  # a single prompt has no interval
            summary[f"{name}_ci95"] = [metrics[f"{name}_low"], metrics[f"{name}_high"]]
    summary["heldout_pairs"] = int(metrics["pairs"])
    summary["decided_pairs"] = int((judged.targets != 0.5).sum())
    summary["prompts"] = len(set(judged.prompts.tolist()))
    summary["groups"] = judged.groups()
    return summary


def describe_sources(
    data: DataArguments,
    model_args: ModelArguments,
    args: BradleyTerryConfig,
    train: Dataset,
    heldout: Dataset,
    dataset: dict[str, Any],
    *,
    known: dict[str, Any],
) -> dict[str, Any]:
    """The card's entries on what the model was made from, with the plot if one was drawn.

    Args:
        dataset: what `hub_dataset` returned.
        known: what the trainer knows, as `trainer_card_options` returns it.
    """
    dataset = with_commit_read(dataset, known)
    source = lineage_of(data.dataset_name, data.dataset_revision, dataset=True, rows=len(train))
    has_plot = (Path(args.output_dir) / PLOT).is_file()
    return {
        "lineage": {
            **base_lineage(known, model_args.model_name_or_path, model_args.revision),
            "comparisons": source,
        },
        "data": data_records(data, "comparisons", train, heldout, dataset, known=known),
        "plot": PLOT if has_plot else None,
        **dataset,
    }


# Several reward models


@stoppable
def train_ensemble(
    data: DataArguments,
    model_args: ModelArguments,
    args: BradleyTerryConfig,
    ensemble: EnsembleArguments,
    *,
    comparisons: ComparisonArguments | None = None,
    verbose: bool = False,
    says_rows: bool = True,
    memory: str | None = None,
) -> dict[str, Any]:
    """Trains each member with its own seed, head and data order, and evaluates the combined reward."""
    check_options(data, model_args, args)
    check_memory("reward", args, model_args, mode=memory, evaluates=data.holds_rows_out)
    start = time.monotonic()
    if comparisons is None:
        comparisons = ComparisonArguments()
    folder = Path(args.output_dir)
    options = (data, comparisons, ensemble, model_args, args)
    open_run("reward", args, options, overwrite=data.overwrite, has_parts=True)
    PartialState().wait_for_everyone()  # until an earlier run's members are deleted
    dataset = hub_dataset(data)
    rows = read_comparisons(data, comparisons, says_rows=says_rows)

    reports = []
    for number in range(ensemble.members):
        print(f"Member {number + 1} of {ensemble.members}, seed {args.seed + number}")
        with part_of(f"member {number + 1} of {ensemble.members}", "finished members are kept"):
            reports.append(train_member(number, data, model_args, args, comparisons, rows, verbose=verbose))
    names = [member_name(number) for number in range(ensemble.members)]
    if args.process_index == 0:
        RewardEnsemble.save(folder, names, combine=ensemble.combine, penalty=ensemble.penalty)
    PartialState().wait_for_everyone()  # all of them read it below

    train, heldout, _ = rows  # what was read is in the card of each member
    record = RowRecord(data, train, heldout)
    measured = {"pairs": reports[0]["pairs"], "members": reports, "combine": ensemble.combine}
    if len(heldout):
        measured.update(evaluate_ensemble(heldout, args, ensemble))
    # The members differ in their seeds only: what the trainer of the first one knew holds for all, except its energy.
    card = recorded_card(folder / names[0])
    card.pop("emissions", None)
    card |= describe_sources(data, model_args, args, train, heldout, dataset, known=card)
    seconds = time.monotonic() - start
    return finish_run(
        args,
        "reward_model",
        {"reward_model": measured, **record.write(folder, is_first_process=args.process_index == 0, with_digests=True)},
        options,
        seconds=seconds,
        card=card,
    )


def member_name(number: int) -> str:
    return f"member-{number}"


def train_member(
    number: int,
    data: DataArguments,
    model_args: ModelArguments,
    args: BradleyTerryConfig,
    comparisons: ComparisonArguments,
    rows: tuple[Dataset, Dataset, str],
    *,
    verbose: bool = False,
) -> dict[str, Any]:
    """Trains one member of an ensemble, unless an earlier run did. Returns its part of the report."""
    folder = Path(args.output_dir) / member_name(number)
    report_file = folder / "report.json"
    if report_file.is_file():
        return json.loads(report_file.read_text())["reward_model"]

    member_args = copy.deepcopy(args)
    member_args.output_dir = str(folder)
    member_args.seed = args.seed + number
    if args.data_seed is not None:
        member_args.data_seed = args.data_seed + number
    member_args.push_to_hub = False  # the ensemble is pushed as one
    member_args.resume_from_checkpoint = last_complete_checkpoint(folder)
    if member_args.resume_from_checkpoint is None:
        data = replace(data, overwrite=True)  # the folder has nothing that could be resumed
    set_seed(member_args.seed)
    report = train_reward(data, model_args, member_args, comparisons=comparisons, rows=rows, verbose=verbose)
    gc.collect()  # a trainer is in a reference cycle: without it, its model stays in memory beside the next one
    return report["reward_model"]


def evaluate_ensemble(heldout: Dataset, args: BradleyTerryConfig, ensemble: EnsembleArguments) -> dict[str, Any]:
    """Evaluates the combined reward and draws the plot. Returns metrics for the report."""
    folder = Path(args.output_dir)
    combined = RewardEnsemble.from_pretrained(
        folder, batch_size=args.per_device_eval_batch_size, trust_remote_code=args.trust_remote_code
    )
    checked, disagreement = check_ensemble(combined, heldout, args)
    if args.process_index == 0:
        xlabel = f"reward, {ensemble.combine} of the members"
        plot_judged(checked.judged, folder / PLOT, bins=checked.reliability, xlabel=xlabel)
    return {"disagreement": disagreement, **summarize(checked.metrics, checked.judged)}


def check_ensemble(ensemble: RewardEnsemble, heldout: Dataset, args: BradleyTerryConfig) -> tuple[RewardCheck, float]:
    """Metrics of the combined reward, on the tokens of the members' own metrics, and their mean disagreement."""
    first = ensemble.members[0]
    rows, sequences = fitting_sequences(
        heldout, first.tokenizer, length_limit(bare_model(first.model), args.max_length), args
    )
    raw = np.array([member.score_ids(sequences) for member in ensemble.members])  # (members, completions)
    means = np.array([[member.mean] for member in ensemble.members])  # (members, 1)
    stds = np.array([[member.std] for member in ensemble.members])
    rewards = (raw - means) / stds
    combined = combine_rewards(rewards, ensemble.combine, ensemble.penalty)
    # `check_reward` asks for the scores of all rows at once, in this order.
    checked = check_reward(
        lambda prompts, completions, **columns: raw.mean(0).tolist(),
        rows,
        reward=lambda prompts, completions, **columns: combined.tolist(),
        probes=False,
        length=lambda text: len(first.tokenizer(text)["input_ids"]),
    )
    return checked, float(rewards.std(0).mean())


def fitting_sequences(
    heldout: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None, args: BradleyTerryConfig
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Returns the rows that are evaluated, and the token ids of prompt and completion for each of their completions."""
    rows = []
    sequences = []
    for number, row in enumerate(heldout):
        try:
            ids = tokenize_row(row, tokenizer)
        except Unrenderable:  # the trainer has reported it
            continue
        if limit is not None:
            ids = fit_row(
                ids,
                max_length=limit,
                where=f"eval row {number}",
                overflow=args.overflow,
                start_ids=start_ids(tokenizer),
            )
        if ids is None:  # too long, with --overflow drop
            continue
        rows.append(row)
        for completion_ids in ids["completion_ids"]:
            sequences.append(ids["prompt_ids"] + completion_ids)
    return rows, sequences


def main() -> None:
    defaults = machine_defaults() | {"output_dir": "runs/reward", "unrenderable": "drop"}
    data, comparisons, ensemble, terminal, model_args, args = parse_recipe(
        ARGUMENTS, description=__doc__, defaults=defaults, main_options=main_options.REWARD
    )
    say_idle_options(data, comparisons, ensemble, model_args, args)
    set_seed(args.seed)  # the head is initialized when the model is loaded
    how = {"comparisons": comparisons, "verbose": terminal.verbose, "memory": terminal.check_memory}
    with library_output(verbose=terminal.verbose):
        if ensemble.members > 1:
            report = train_ensemble(data, model_args, args, ensemble, **how)
        else:
            report = train_reward(data, model_args, args, **how)
    measured = report["reward_model"]
    print_metrics({name: value for name, value in measured.items() if not isinstance(value, dict | list)})
    if "accuracy" not in measured:
        print("No rows were held out, so nothing was measured: see --eval_rows and --dataset_test_split.")
    print(f"Saved the reward model in {args.output_dir}. Next, with your own prompts:")
    policy = f"--model_name_or_path {shlex.quote(model_args.model_name_or_path)}"
    if model_args.model_name_or_path == EMBEDDED_MODEL:
        policy = "--config smollm2-135m/ppo.yaml"
    print(
        f"  {how_to_run('ppo')} {policy} --reward_model {shlex.quote(args.output_dir)} "
        "--dataset_name YOUR_PROMPTS.jsonl --output_dir runs/ppo"
    )


if __name__ == "__main__":
    run_recipe(main)

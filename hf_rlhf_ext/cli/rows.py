"""Filters rows, and splits them into rows to train on and held-out rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from ..data.schema import LoadReport
from ..data.text import is_text, text_key
from ..errors import UserError
from ..quality.refine import filter_comparisons, weigh_by_reliability
from ..readers.mixture import categorize, filter_by_rating, load_mix, sample_mix
from .options import ComparisonArguments, DataArguments, DemonstrationArguments


def refine(rows: Dataset, options: ComparisonArguments) -> Dataset:
    """Applies the filters and the reliability model that the options ask for, and prints what they did."""
    limits_asked_for = options.max_length_gap is not None or options.min_agreement is not None
    if options.drop_contradictions or limits_asked_for:
        rows, report = filter_comparisons(
            rows,
            drop_contradictions=options.drop_contradictions,
            max_length_gap=options.max_length_gap,
            min_agreement=options.min_agreement,
        )
        print(report.summary())
    if options.reliability:
        rows, accuracies = weigh_by_reliability(rows)
        by_annotator = ", ".join(f"{name} {accuracy:.2f}" for name, accuracy in accuracies.items())
        print(f"annotators' accuracy: {by_annotator}")
    return rows


def choose_demonstrations(rows: Dataset, options: DemonstrationArguments) -> tuple[Dataset, dict[str, Any]]:
    """Filters demonstrations by rating and samples the mix. Also returns the report's part on what was done."""
    report: dict[str, Any] = {}
    if options.min_rating is not None:
        rows, report["rating"] = filter_by_rating(rows, options.min_rating)
    if options.mix is not None:
        # Our readers name the column `category`. Rows of plain text keep the names of the source.
        came_through_a_reader = {"completion", "category"} <= set(rows.column_names)
        column = "category" if came_through_a_reader else options.category_column
        rows = categorize(rows, column, options.category_rules)
        rows, mixed = sample_mix(rows, load_mix(options.mix), rows=options.mix_rows, seed=options.mix_seed)
        report["mix"] = asdict(mixed)
        print(mixed.summary())
    return rows, report


def describe_comparisons(rows: Dataset, report: LoadReport) -> str:
    """One line on what was read: rows, prompts, pairs and ties, and what was merged and dropped."""
    targets = [target for of_row in rows["targets"] for target in of_row]
    ties = sum(target == 0.5 for target in targets)
    parts = [report.summary(), f"{len(targets)} pairs of {len(rows)} prompts, {ties} ties"]
    n_merged = report.kept - len(rows)
    if n_merged > 0:
        parts.append(f"{n_merged} rows merged: their prompts are those of other rows")
    return "; ".join(parts)


def describe_split(data: DataArguments, n_read: int, train: Dataset, heldout: Dataset, *, unit: str) -> str:
    """One line on how many of `n_read` rows are trained on and held out. `unit` is what a row is, in the plural."""
    parts = [f"{Path(data.dataset_name).name}: {len(train)} {unit} to train on"]
    parts.append(f"{len(heldout)} held out (heldout.jsonl)" if len(heldout) else "none held out (--eval_rows)")
    unused = n_read - len(train)
    if data.dataset_test_split is None:
        unused -= len(heldout)
    if unused:
        parts.append(f"{unused} not used")
    return ", ".join(parts)


def train_and_heldout(train: Dataset, data: DataArguments, test: Dataset | None = None) -> tuple[Dataset, Dataset]:
    """Returns the rows to train on, and held-out rows whose prompts are not among them.

    Held-out rows come from `test`, or from `train` after the rows to train on.

    Raises:
        UserError: no rows are left to train on, or there are fewer held-out rows than `eval_rows`.
    """
    n_train = len(train)
    if data.train_rows is not None:
        n_train = min(data.train_rows, n_train)
    elif test is None:
        n_train -= data.eval_rows  # the last ones are held out
    if n_train < 1:
        raise UserError(
            f"{data.dataset_name}: {len(train)} rows, none left to train on at eval_rows={data.eval_rows}: lower "
            "--eval_rows."
        )

    # A prompt that is trained on must not be in the evaluation.
    trained_prompts = {prompt_of(row) for row in train.select(range(n_train))}
    if test is None:
        heldout = _next_new_rows(train, n_train, data.eval_rows, trained_prompts)
    else:
        heldout = _new_rows(test, trained_prompts)
        if data.eval_rows:
            heldout = heldout.select(range(min(data.eval_rows, len(heldout))))
    if len(heldout) < data.eval_rows:
        raise UserError(
            f"{data.dataset_name}: {len(heldout)} held-out rows for eval_rows={data.eval_rows}: lower --eval_rows."
        )
    return train.select(range(n_train)), heldout


def _next_new_rows(rows: Dataset, start: int, wanted: int, trained_prompts: set[str]) -> Dataset:
    """The first `wanted` rows from `start` whose prompt is new, or fewer if there are not enough."""
    # One row at a time, to stop as soon as there are enough: the dataset may be large.
    chosen: list[int] = []
    for index in range(start, len(rows)):
        if len(chosen) == wanted:
            break
        if prompt_of(rows[index]) not in trained_prompts:
            chosen.append(index)
    return rows.select(chosen)


def _new_rows(test: Dataset, trained_prompts: set[str]) -> Dataset:
    """All rows whose prompt is new. Prints how many others were left out."""
    chosen = [index for index, row in enumerate(test) if prompt_of(row) not in trained_prompts]
    left_out = len(test) - len(chosen)
    if left_out:
        print(f"{left_out} of {len(test)} test rows left out: their prompts are in the training data")
    return test.select(chosen)


def check_heldout(args: TrainingArguments, heldout: Dataset) -> None:
    """Raises for evaluation during training without held-out rows. Trainer would do so after the model is loaded."""
    strategy = args.eval_strategy.value
    if strategy != "no" and not len(heldout):
        raise UserError(
            f"eval_strategy: {strategy} needs held-out rows: pass --eval_rows or --dataset_test_split, or "
            "--eval_strategy no."
        )


def prompt_of(row: dict[str, Any]) -> str:
    """The text by which prompts are compared: the prompt, a conversation without its last turn, or a whole row.

    White space makes no difference.
    """
    if row.get("prompt") is not None:
        return _key(row["prompt"])
    if row.get("messages"):
        return _key(row["messages"][:-1] or row["messages"])
    return json.dumps(row, sort_keys=True, default=str)


def _key(prompt: Any) -> str:
    return text_key(prompt) if is_text(prompt) else str(prompt)

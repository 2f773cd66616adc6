"""Rows that a recipe trains on and holds out, after the filters that were asked for."""

from dataclasses import asdict
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from ..errors import UserError
from ..quality.refine import filter_comparisons, weigh_by_reliability
from ..readers.mixture import categorize, filter_by_rating, load_mix, sample_mix
from .options import ComparisonArguments, DataArguments, DemonstrationArguments


def refine(rows: Dataset, options: ComparisonArguments) -> Dataset:
    """Comparisons after the filters and the reliability model that were asked for; says what they did."""
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
    """Demonstrations by rating and mix as asked for, and what that did, for the report."""
    report: dict[str, Any] = {}
    if options.min_rating is not None:
        rows, report["rating"] = filter_by_rating(rows, options.min_rating)
    if options.mix is not None:
        # The readers keep the source's column as `category`; plain text comes as it is.
        came_through_a_reader = {"completion", "category"} <= set(rows.column_names)
        column = "category" if came_through_a_reader else options.category_column
        rows = categorize(rows, column, options.category_rules)
        rows, mixed = sample_mix(rows, load_mix(options.mix), rows=options.mix_rows, seed=options.mix_seed)
        report["mix"] = asdict(mixed)
        print(mixed.summary())
    return rows, report


def train_and_heldout(train: Dataset, data: DataArguments, test: Dataset | None = None) -> tuple[Dataset, Dataset]:
    """Train rows, and `eval_rows` held-out ones whose prompt is new: of `test`, else the next ones of `train`.

    Raises:
        UserError: no rows to train on, or fewer held-out rows than asked for.
    """
    n_train = len(train)
    if data.train_rows is not None:
        n_train = min(data.train_rows, n_train)
    elif test is None:
        n_train -= data.eval_rows  # the last ones are held out
    if n_train < 1:
        raise UserError(f"{data.dataset_name}: {len(train)} rows, none left to train on at eval_rows={data.eval_rows}.")

    # A prompt that is trained on says nothing when it is held out too.
    trained_prompts = {_prompt(row) for row in train.select(range(n_train))}
    if test is None:
        heldout = _next_new_rows(train, n_train, data.eval_rows, trained_prompts)
    else:
        heldout = _new_rows(test, trained_prompts)
        if data.eval_rows:
            heldout = heldout.select(range(min(data.eval_rows, len(heldout))))
    if len(heldout) < data.eval_rows:
        raise UserError(f"{data.dataset_name}: {len(heldout)} held-out rows for eval_rows={data.eval_rows}: lower it.")
    return train.select(range(n_train)), heldout


def _next_new_rows(rows: Dataset, start: int, wanted: int, trained_prompts: set[str]) -> Dataset:
    """The first `wanted` rows from `start` whose prompt is new; fewer where there are not so many."""
    # One row at a time, to stop as soon as there are enough: a data set may be large, and `wanted` is small.
    chosen: list[int] = []
    for index in range(start, len(rows)):
        if len(chosen) == wanted:
            break
        if _prompt(rows[index]) not in trained_prompts:
            chosen.append(index)
    return rows.select(chosen)


def _new_rows(test: Dataset, trained_prompts: set[str]) -> Dataset:
    """All rows whose prompt is new; says how many are not."""
    chosen = [index for index, row in enumerate(test) if _prompt(row) not in trained_prompts]
    left_out = len(test) - len(chosen)
    if left_out:
        print(f"{left_out} of {len(test)} test rows left out: their prompts are trained on")
    return test.select(chosen)


def check_heldout(args: TrainingArguments, heldout: Dataset) -> None:
    """Refuses evaluation in training without rows, before a model is loaded: Trainer would say so after that."""
    strategy = args.eval_strategy.value
    if strategy != "no" and not len(heldout):
        raise UserError(
            f"eval_strategy: {strategy} needs held-out rows: pass --eval_rows or --dataset_test_split, or "
            "--eval_strategy no."
        )


def _prompt(row: dict[str, Any]) -> str:
    """What tells two prompts apart: the prompt, a conversation without its last turn, or all of a row of plain text."""
    if "prompt" in row:
        return str(row["prompt"])
    if "messages" in row:
        return str(row["messages"][:-1])
    return str(row)

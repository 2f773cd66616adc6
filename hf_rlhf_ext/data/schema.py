"""The comparison row: one prompt, K completions, any number of judgements; and the way in for TRL's preference rows.

Columns: `prompt` (str or messages), `completions` (K ≥ 2 distinct str or messages), `pairs` ([i, j]: completion i
against completion j), `targets` (P(i ≻ j): 1.0 a win, 0.5 a tie), `weights` (1 / number of pairs of the prompt by
default: InstructGPT, arXiv:2203.02155, sec. 3.5, where a prompt counts once); optional `margins` (i minus j, in units
of reward), `votes`, `flags`, `category`, `source`, `row`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, List, Value

from ..errors import UserError
from .text import is_messages
from .transcripts import is_transcript, split_at_common_history, split_messages, split_text

REQUIRED = ("prompt", "completions", "pairs", "targets")
_FIXED_FEATURES = {
    "pairs": List(List(Value("int64"))),
    "targets": List(Value("float64")),
    "weights": List(Value("float64")),
    "margins": List(Value("float64")),
    "flags": List(Value("string")),
    "category": Value("string"),
    "source": Value("string"),
    "row": Value("int64"),
}


class PreferenceDataError(UserError):
    """Preference data that cannot be used: the message names source, row, column and the mend."""


@dataclass
class LoadReport:
    """What became of every row of a source: `dropped` maps a reason to row numbers in the source."""

    source: str = ""
    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    flagged: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        self.dropped.setdefault(reason, []).append(row)

    def summary(self) -> str:
        """One line: counts, and the first rows of each reason."""
        line = f"{self.source or 'data set'}: {self.kept} of {self.rows_in} rows kept"
        for verb, reasons in (("dropped", self.dropped), ("flagged", self.flagged)):
            for reason, rows in reasons.items():
                shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
                line += f"; {len(rows)} {verb}: {reason} (row {shown})"
        return line


def validate_comparison(row: dict[str, Any], *, source: str = "", index: int | None = None) -> None:
    """Raises `PreferenceDataError`, in one line, unless `row` is a comparison row (see the module's docstring)."""
    where = (source or "comparisons") + (f" row {index}" if index is not None else "")

    def refuse(column: str, problem: str, mend: str):
        raise PreferenceDataError(f"{where}: `{column}` {problem}: {mend}.")

    for column in REQUIRED:
        if row.get(column) is None:
            refuse(column, "is missing", f"a comparison row needs {', '.join(REQUIRED)}")
    _check_texts(row["prompt"], row["completions"], refuse)
    _check_judgements(row, len(row["completions"]), refuse)


def _check_texts(prompt: Any, completions: Any, refuse) -> None:
    if not isinstance(prompt, str) and not is_messages(prompt):
        refuse("prompt", f"is a {type(prompt).__name__}", "give a string or a list of messages with role and content")
    if not isinstance(completions, list) or len(completions) < 2:
        refuse("completions", "has fewer than two entries", "a comparison needs at least two completions")
    for k, completion in enumerate(completions):
        if isinstance(prompt, str) != isinstance(completion, str) or not _is_text(completion):
            kind = "string" if isinstance(prompt, str) else "list of messages"
            refuse("completions", f"entry {k} is a {type(completion).__name__}", f"the prompt is a {kind}: give that")
        if completion in completions[:k]:
            first = completions.index(completion)
            refuse("completions", f"entries {first} and {k} are equal", "merge them, or drop the row")


def _check_judgements(row: dict[str, Any], n_completions: int, refuse) -> None:
    pairs = row["pairs"]
    if not pairs:
        refuse("pairs", "is empty", "give at least one [i, j]")
    for column in ("targets", "weights", "margins"):
        values = row.get(column)
        if values is not None and len(values) != len(pairs):
            refuse(column, f"has {len(values)} entries for {len(pairs)} pairs", "give one a pair")
    for pair in pairs:
        integers = len(pair) == 2 and all(isinstance(k, int) and not isinstance(k, bool) for k in pair)
        if not integers or not all(0 <= k < n_completions for k in pair):
            refuse("pairs", f"holds {list(pair)}", f"give two indices between 0 and {n_completions - 1}")
        if pair[0] == pair[1]:
            refuse("pairs", f"holds {list(pair)}", "a completion cannot be compared with itself")
    for value in row["targets"]:
        if not _is_number(value) or not 0 <= value <= 1:
            refuse("targets", f"holds {value!r}", "P(i ≻ j) lies between 0 and 1")
    for value in row.get("weights") or ():
        if not _is_number(value) or value < 0:
            refuse("weights", f"holds {value!r}", "weights are finite and not negative")
    for value in row.get("margins") or ():
        if not _is_number(value):
            refuse("margins", f"holds {value!r}", "margins are finite numbers, i minus j")


def to_comparisons(dataset: Dataset, *, source: str = "") -> tuple[Dataset, LoadReport]:
    """Turns TRL preference rows, or rows that are comparison rows already, into validated comparison rows.

    TRL rows: `prompt`, `chosen`, `rejected` as text or messages; or `chosen` and `rejected` alone, whole conversations
    with the prompt implicit: messages and HH-RLHF transcripts are split at the common history, other text where the two
    begin to differ. Columns `margin` and `category` are kept. Rows whose sides are equal or not text are dropped and
    counted; empty completions are kept and flagged.

    Raises:
        PreferenceDataError: no rows, no usable columns, an invalid comparison row, text and messages mixed.
    """
    columns = _column_names(dataset, source)
    if {"prompt", "completions", "pairs", "targets"} <= columns:
        convert = _own_row
    elif {"chosen", "rejected"} <= columns:
        convert = _trl_row
    else:
        raise PreferenceDataError(
            f"{source or 'data set'}: found columns {', '.join(sorted(columns)) or '(none)'}; preference data need "
            f"chosen and rejected (with or without prompt), or {', '.join(REQUIRED)}: rename yours."
        )
    report = LoadReport(source=source, rows_in=len(dataset))
    rows = list(_converted(dataset, convert, report))
    if not rows:
        raise PreferenceDataError(f"{report.summary()}: no usable row is left, check the source.")
    return _as_dataset(rows, source), report


def _column_names(dataset: Any, source: str) -> set[str]:
    where = source or "data set"
    if not isinstance(dataset, Dataset):
        raise PreferenceDataError(
            f"{where}: expected a datasets.Dataset, got {type(dataset).__name__}: pick one split, without streaming."
        )
    if len(dataset) == 0:
        raise PreferenceDataError(f"{where}: the data set has no rows: check the path, the split and any filter.")
    return set(dataset.column_names)


def _converted(rows: Iterable[dict], convert, report: LoadReport) -> Iterator[dict]:
    for index, row in enumerate(rows):
        converted = convert(row, index, report)
        if converted is None:
            continue
        if any(_is_empty(completion) for completion in converted["completions"]):
            converted["flags"] = sorted({*converted["flags"], "empty_completion"})
        for flag in converted["flags"]:
            report.flagged.setdefault(flag, []).append(index)
        report.kept += 1
        yield converted


def _own_row(row: dict[str, Any], index: int, report: LoadReport) -> dict[str, Any]:
    """A comparison row with every optional column that training reads filled in."""
    validate_comparison(row, source=report.source, index=index)
    n_pairs = len(row["pairs"])
    return row | {
        "weights": row.get("weights") or [1 / n_pairs] * n_pairs,
        "margins": row.get("margins") or [0.0] * n_pairs,
        "flags": row.get("flags") or [],
        "row": index if row.get("row") is None else row["row"],
    }


def _trl_row(row: dict[str, Any], index: int, report: LoadReport) -> dict[str, Any] | None:
    """A TRL preference row as a comparison of two, or None (counted in `report`) where it holds no usable one."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    margin = row.get("margin")
    for column in ("chosen", "rejected"):
        if not _is_text(row[column]):
            return report.drop(f"{column} is not text", index)
    if isinstance(chosen, str) != isinstance(rejected, str):
        return report.drop("one side is text, the other messages", index)
    if prompt is not None and not _is_text(prompt):
        return report.drop("prompt is not text", index)
    if margin is not None and not _is_number(margin):
        return report.drop("margin is not a finite number", index)
    if chosen == rejected:
        return report.drop("chosen and rejected are equal", index)
    flags: list[str] = []
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):  # TRL: such a prompt is in both sides too
        prompt, chosen, rejected, flags = _split(chosen, rejected)
        if prompt is None:
            return report.drop("the two sides share no prompt", index)
        if chosen == rejected:
            return report.drop("chosen and rejected are equal", index)
    return {
        "prompt": prompt,
        "completions": [chosen, rejected],
        "pairs": [[0, 1]],
        "targets": [1.0],
        "weights": [1.0],
        "margins": [float(margin or 0.0)],
        "flags": flags,
        "category": row.get("category"),
        "source": report.source or None,
        "row": index,
    }


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any, list[str]]:
    if not isinstance(chosen, str):
        return *split_messages(chosen, rejected), []
    if is_transcript(chosen) and is_transcript(rejected):
        return split_at_common_history(chosen, rejected)
    return *split_text(chosen, rejected), []


def _as_dataset(rows: list[dict[str, Any]], source: str) -> Dataset:
    """Rows as a data set whose column types do not depend on which rows happen to be first or empty."""
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        first = isinstance(rows[0]["prompt"], str)
        other = next(k for k, row in enumerate(rows) if isinstance(row["prompt"], str) != first)
        kinds = ("text", "messages") if first else ("messages", "text")
        raise PreferenceDataError(
            f"{source or 'data set'}: row {rows[0]['row']} is {kinds[0]}, row {rows[other]['row']} is {kinds[1]}: "
            "give all rows one kind, or load them as two data sets."
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    columns = {name: [row.get(name) for row in rows] for name in names}
    inferred = Dataset.from_dict({name: columns[name] for name in names if name not in _FIXED_FEATURES}).features
    return Dataset.from_dict(columns, features=Features({n: _FIXED_FEATURES.get(n) or inferred[n] for n in names}))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or is_messages(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_empty(completion: Any) -> bool:
    text = completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)
    return not text.strip()

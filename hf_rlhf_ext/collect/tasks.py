"""A task: one prompt and its completions that people judge. Also reads and writes `tasks.jsonl`, one task a line."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line

Text = str | list[dict[str, Any]]
"""Text, or a list of messages with `role` and `content`."""
_MOST_WHOLE = 2**63 - 1
"""Largest number that a store holds."""


@dataclass(frozen=True)
class Task:
    """One prompt whose completions people compare, rank (more than two) or rate (only one).

    Attributes:
        prompt: Text, or a list of messages.
        completions: The answers, each text or a list of messages like the prompt. No two may be equal, where white
            space does not count.
        made_by: How each completion was made, one record per completion, such as `{"policy": "sft", "seed": 0}`. May be
            empty.
        category: Use case of the prompt.
        source: Dataset that the prompt comes from.
        row: Row number in the source.
        wanted: How many people should judge the task. A store may raise it. It does not limit gold questions.
        gold: For a question with a known answer: `{"best": [i, …]}`, the indices of the best completions.
        batch: Name of the batch that the task belongs to, such as "round-1". In a store, the first of its batches.
        id: Number in the store, or None before the task is in a store.

    Raises:
        UserError: The values are not a task. The message names the column.
    """

    prompt: Text
    completions: list[Text]
    made_by: list[dict[str, Any]] = field(default_factory=list)
    category: str | None = None
    source: str | None = None
    row: int | None = None
    wanted: int = 1
    gold: dict[str, Any] | None = None
    batch: str | None = None
    id: int | None = None

    def __post_init__(self):
        _check_texts(self.prompt, self.completions)
        _check_made_by(self.made_by, len(self.completions))
        _check_gold(self.gold, len(self.completions))
        if not is_whole(self.wanted) or not 1 <= self.wanted <= _MOST_WHOLE:
            raise UserError(f"`wanted` is {self.wanted!r}: give the number of people who should judge it, at least 1")
        for name in ("category", "source", "batch"):
            value = getattr(self, name)
            if value is not None and not _is_encodable(value):
                raise UserError(f"`{name}` is {value!r}: give text, or leave it out")
        for name in ("row", "id"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and abs(value) <= _MOST_WHOLE):
                raise UserError(f"`{name}` is {value!r}: give a whole number up to 2^63 - 1, or leave it out")

    @property
    def kind(self) -> str:
        """What a person does: "rate" one completion, "compare" two, or "rank" more than two."""
        n_completions = len(self.completions)
        if n_completions == 1:
            return "rate"
        return "compare" if n_completions == 2 else "rank"

    @property
    def fingerprint(self) -> str:
        """Hash of the prompt and the completions in any order: equal for two tasks that ask the same."""
        completions = sorted(json.dumps(completion, sort_keys=True) for completion in self.completions)
        text = json.dumps([self.prompt, completions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Task":
        """Returns the task in one line of `tasks.jsonl`.

        Raises:
            UserError: A column is missing, unknown or wrong.
        """
        if not isinstance(row, dict):
            raise UserError(f"it is a {type(row).__name__}: give an object with prompt and completions")
        names = [column.name for column in fields(cls)]
        for name in ("prompt", "completions"):
            if row.get(name) is None:
                raise UserError(f"`{name}` is missing: a task needs prompt and completions")
        unknown = [name for name in row if name not in names]
        if unknown:
            raise UserError(f"column {unknown[0]!r} is unknown: remove it, a task has {', '.join(names)}")
        given = {name: value for name, value in row.items() if value is not None}
        return cls(**given)

    def to_row(self) -> dict[str, Any]:
        """Returns one line of `tasks.jsonl`. Columns that are not set are left out."""
        row = {}
        for column in fields(self):
            value = getattr(self, column.name)
            if value is not None and value != []:
                row[column.name] = value
        return row


def is_whole(value: Any) -> bool:
    """True for an integer. Booleans do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for a finite number. Booleans do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_encodable(value: Any) -> bool:
    """True for text that UTF-8 can hold. JSON may carry single halves of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_texts(prompt: Any, completions: Any) -> None:
    if not _is_text(prompt):
        raise UserError("`prompt` is not text: give a string, or a list of messages with role and content")
    if not isinstance(completions, list) or not completions:
        raise UserError("`completions` is not a list of texts: give at least two completions, or one to rate")
    wanted = "string" if isinstance(prompt, str) else "list of messages"
    places: dict[str, int] = {}
    for k, completion in enumerate(completions):
        if not _is_text(completion) or isinstance(completion, str) != isinstance(prompt, str):
            raise UserError(
                f"`completions` entry {k} is a {type(completion).__name__}: give a {wanted}, like the prompt"
            )
        text = completion
        if not isinstance(completion, str):
            text = json.dumps(completion, sort_keys=True, ensure_ascii=False)
        words = " ".join(text.split())
        if words in places:
            raise UserError(f"`completions` entries {places[words]} and {k} are equal: remove one of them")
        places[words] = k


def _is_text(value: Any) -> bool:
    # `data.text.is_text` says the same, but its module takes most of a second to import.
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)


def _check_made_by(made_by: Any, n_completions: int) -> None:
    if not isinstance(made_by, list) or not all(isinstance(record, dict) for record in made_by):
        raise UserError("`made_by` is not a list of records: give one record per completion, or leave it out")
    if made_by and len(made_by) != n_completions:
        raise UserError(
            f"`made_by` has {len(made_by)} records for {n_completions} completions: give one per completion"
        )


def _check_gold(gold: Any, n_completions: int) -> None:
    if gold is None:
        return
    if n_completions == 1:
        raise UserError("`gold` is for two or more completions: no rating of one would be wrong, leave it out")
    best = gold.get("best") if isinstance(gold, dict) else None
    if not isinstance(best, list) or not best:
        raise UserError('`gold` names no best completion: give {"best": [index, …]}, counted from 0')
    for index in best:
        if not is_whole(index) or not 0 <= index < n_completions:
            raise UserError(f"`gold` names completion {index!r}: give indices from 0 to {n_completions - 1}")
    if len(set(best)) == n_completions:
        raise UserError("`gold` names every completion as the best: no answer could be wrong, name fewer")


def read_tasks(path: str | Path) -> list[Task]:
    """Reads a file with one task a line, as JSON.

    Raises:
        UserError: The file cannot be read, or a line is no task. The message names the file and the row, from 0.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: texts may hold U+2028 as it is
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}: give a file of tasks, one a line.") from None
    tasks: list[Task] = []
    for line in lines:
        if not line.strip():
            continue
        try:
            tasks.append(Task.from_row(json.loads(line)))
        except (UserError, ValueError, RecursionError) as error:
            raise UserError(f"{path} row {len(tasks)}: {first_line(error)}.") from None
    if not tasks:
        raise UserError(f"{path}: it has no tasks: give one JSON object with prompt and completions a line.")
    return tasks


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Writes tasks, one a line. The file is complete or absent.

    Raises:
        UserError: The file cannot be written.
    """
    write_rows([task.to_row() for task in tasks], path)


def json_line(row: dict[str, Any]) -> str:
    """A row as JSON on one line, also for readers to which more than a line feed ends a line."""
    text = json.dumps(row, ensure_ascii=False)
    for separator in ("\x85", "\u2028", "\u2029"):
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text + "\n"


def write_rows(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Writes rows as JSON, one a line. The file is complete or absent: it is written under another name first.

    Raises:
        UserError: The file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8", errors="replace") as file:
            for row in rows:
                file.write(json_line(row))
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {first_line(error)}: give another file.") from None

"""The rows of a reward benchmark in one shape, and the scores that a reward model gives them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...data.text import Messages


@dataclass(frozen=True)
class BenchmarkRow:
    """One row of a benchmark.

    Attributes:
        prompt: Text of the user, or messages.
        completions: Texts of completions: first those that are right, then those that are wrong.
        n_correct: Number of right completions, from the first one.
        group: Subset, domain or source of the row, as published.
        unit: Rows with the same unit belong together, so that a sample has all of them or none.
        split: What a benchmark reports separately, such as the model whose answers are judged. Empty without that.
    """

    prompt: str | Messages
    completions: tuple[str, ...]
    n_correct: int
    group: str
    unit: str
    split: str = ""


@dataclass(frozen=True)
class ScoredRow:
    """A row with one score for each completion, in its order."""

    row: BenchmarkRow
    scores: tuple[float, ...]

    @property
    def correct(self) -> tuple[float, ...]:
        """Scores of the right completions."""
        return self.scores[: self.row.n_correct]

    @property
    def wrong(self) -> tuple[float, ...]:
        """Scores of the wrong completions."""
        return self.scores[self.row.n_correct :]


@dataclass
class Coverage:
    """How many rows were scored, and why others were not.

    Attributes:
        rows: Rows that should have been scored.
        scored: Rows that were.
        left_out: Number of the others by reason.
    """

    rows: int
    scored: int
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of the rows that were scored."""
        return self.scored / self.rows if self.rows else 0.0


def rows_digest(rows: Sequence[BenchmarkRow | Mapping[str, Any]]) -> str:
    """SHA-256 of the content of rows: the same for the same rows in a file and on the Hub."""
    digest = hashlib.sha256()
    for row in rows:
        content = dict(row) if isinstance(row, Mapping) else vars(row)
        digest.update(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace"))
        digest.update(b"\n")
    return digest.hexdigest()


class BadRow(ValueError):
    """Why a row does not have the published shape. The loader adds which row it is."""


def text_of(record: Mapping[str, Any], column: str) -> str:
    """The text in a column. Raises `BadRow` if there is none."""
    value = record.get(column)
    if not isinstance(value, str):
        raise BadRow(f"`{column}` is {_kind(value)}, not text")
    return value


def texts_of(record: Mapping[str, Any], column: str, n: int | None = None) -> tuple[str, ...]:
    """The list of texts in a column, `n` of them if that is given. Raises `BadRow` if it is something else."""
    value = record.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise BadRow(f"`{column}` is {_kind(value)}, not a list of texts")
    if not value:
        raise BadRow(f"`{column}` is empty")
    if n is not None and len(value) != n:
        raise BadRow(f"`{column}` has {len(value)} texts, not {n}")
    return tuple(value)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"

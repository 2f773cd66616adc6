"""Rows of the table of what is supported (docs/support.md). Each row is the parameter of a test or of two."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: what a reader looks for, in Markdown, such as `LoRA` or "`optim='adafactor'`".
        says: `None` if it works; otherwise a fragment of the one-line message with which it is refused.
        value: what the test makes of the row, such as a configuration, or a function that returns one.
        note: a few words beside "works" or "refused", in Markdown; may be empty.
        needs: a Python package without which the row is refused. It is not installed for the tests. May be empty.
        trainer: which trainer the row is about, `ppo`, `reward` or `both`.
    """

    name: str
    says: str | None = None
    value: Any = None
    note: str = ""
    needs: str = ""
    trainer: str = "both"

    @property
    def id(self) -> str:
        """The part of the test's id in brackets: letters, digits and hyphens of the name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def each(rows: Sequence[Row]):
    """Parametrizes a test with the argument `row` over these rows."""
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids), f"two rows have the same id: {sorted(ids)}"
    return pytest.mark.parametrize("row", rows, ids=ids)

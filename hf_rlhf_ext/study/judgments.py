"""Asking a judge for many judgments: batches, rows on which it fails, and how many it judged."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.text import plain_text, text_key
from ..errors import UserError, first_line

Text = str | list[dict[str, Any]]
"""Text, or a list of messages."""
TIE = 0.5
"""Outcome of a pair whose sides are equally good."""


@dataclass
class Coverage:
    """How much of what a judge was asked it has judged.

    Attributes:
        unit: what is counted: "completions" of a judge that scores, or "pairs" of one that compares.
        judged: number with a judgment.
        no_answer: number for which the judge returned None, since it does not apply to them or does not know.
        failed: number on which the judge failed, also when it was asked for this one alone.
        not_asked: number of pairs that nobody was asked for, since `judgments` of people is smaller.
        disagreed: number of judged pairs whose two orders had different winners. They count as ties.
        same_text: number of pairs with the same text on both sides, which are ties that nobody is asked for.
        first_error: message of the first failure.
    """

    unit: str
    judged: int = 0
    no_answer: int = 0
    failed: int = 0
    not_asked: int = 0
    disagreed: int = 0
    same_text: int = 0
    first_error: str | None = None

    @property
    def asked(self) -> int:
        """Number of completions or pairs that the judge was asked for."""
        return self.judged + self.no_answer + self.failed

    def as_dict(self) -> dict[str, Any]:
        """All counts for a report, with their shares: `share` is judged / asked, `disagreement` is disagreed / judged.

        A share of none is None.
        """
        counts = asdict(self)
        counts["asked"] = self.asked
        counts["share"] = self.judged / self.asked if self.asked else None
        counts["disagreement"] = self.disagreed / self.judged if self.judged else None
        return counts


class Failed:
    """Stands for the judgment of a row on which a judge failed."""


FAILED = Failed()


def ask_in_batches(ask: Callable[[list[int]], Sequence[Any]], n: int, batch_size: int) -> tuple[list[Any], str | None]:
    """Asks for n rows in batches. The rows of a batch that fails are asked for one by one.

    Args:
        ask: returns one value for each of the rows with these numbers, or raises.
        n: number of rows.
        batch_size: number of rows that are asked for at once.

    Returns:
        One value each, `FAILED` where the judge fails on a single row; and the message of the first failure, if any.
    """
    values: list[Any] = [FAILED] * n
    first_error = None
    for start in range(0, n, batch_size):
        rows = list(range(start, min(start + batch_size, n)))
        try:
            values[start : start + len(rows)] = _one_each(ask, rows)
            continue
        except Exception as error:  # whatever a user's judge raises
            if len(rows) == 1:
                first_error = first_error or described(error)
                continue
        for row in rows:
            try:
                values[row] = _one_each(ask, [row])[0]
            except Exception as error:
                first_error = first_error or described(error)
    return values, first_error


def _one_each(ask: Callable[[list[int]], Sequence[Any]], rows: list[int]) -> list[Any]:
    values = list(ask(rows))
    if len(values) != len(rows):
        raise UserError(f"it returned {len(values)} values for {len(rows)} rows: return one each")
    return values


def described(error: BaseException) -> str:
    """One line about an error of a judge: the message of our own, or type, message and place of another."""
    if isinstance(error, UserError):
        return first_line(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} (line {place.lineno} of {Path(place.filename).name})"


def as_read(prompt: Text) -> Text:
    """The prompt as a judge of texts reads it: text, or a list of messages where there are several."""
    if isinstance(prompt, str) or len(prompt) > 1:
        return prompt
    return plain_text(prompt)


def are_same(first: Text, second: Text) -> bool:
    """Whether two completions differ in white space at most."""
    return text_key(first) == text_key(second)

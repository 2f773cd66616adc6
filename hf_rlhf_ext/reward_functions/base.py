"""What all reward functions of this package share: how they are called, and how they read texts and columns."""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

from ..data.text import plain_text
from ..errors import UserError

logger = logging.getLogger(__name__)


class RewardFunction:
    """A reward function with TRL's signature, `f(prompts, completions, **columns)`.

    It is an object and not a closure, so that it can be pickled, as TRL's asynchronous trainer does. Completions are
    texts or lists of messages, whose contents are read.

    Args:
        columns: names of the dataset's columns that it reads. A trainer of this library checks them before training.

    Raises:
        UserError: a name is one that TRL uses for something else.
    """

    __name__ = "reward"
    """Name of the reward in logs."""
    looked_for: tuple[str, ...] = ()
    """Patterns of the words that it looks for in every completion. A study compares them with those of its judge."""

    def __init__(self, columns: Sequence[str] = ()):
        from ..ppo.rewards import RESERVED_COLUMNS  # imports torch, which reading the functions' help does not need

        for column in columns:
            if not isinstance(column, str) or not column:
                raise UserError(f"{self.__name__}: column={column!r} is no name of a column: give its text.")
            if column in RESERVED_COLUMNS:
                raise UserError(
                    f"{self.__name__}: a column {column!r} is not passed to reward functions: rename it in the dataset."
                )
        self.columns = tuple(columns)
        self.call_text = self.__name__
        """How the function was asked for, such as `exact_match(column=answer)`: reports name it by this text."""
        self.__signature__ = _signature(self.columns)

    def __repr__(self) -> str:
        return self.call_text

    def __call__(self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] = (), **columns: Any) -> list:
        """Scores of completions.

        Args:
            prompts: B prompts, as text or as messages.
            completions: B completions, as text or as messages.
            columns: further arguments of TRL's reward functions, and columns of the dataset with B values each.

        Returns:
            B scores; `None` for a completion that this function does not score.
        """
        for column in self.columns:
            if column not in columns:
                raise UserError(
                    f"reward function {self.__name__!r} needs the column {column!r}: add it to the dataset, or name "
                    "another one."
                )
            given = columns[column]
            if isinstance(given, str) or len(given) != len(completions):
                raise UserError(
                    f"reward function {self.__name__!r}: the column {column!r} is no list of {len(completions)} "
                    "values: give one for each completion."
                )
        texts = [plain_text(completion) for completion in completions]
        return self.scores(texts, prompts, columns)

    def is_same_as(self, other: "RewardFunction") -> bool:
        """Whether two functions give the same scores: they are of one kind, and what they were given is equal."""
        return type(self) is type(other) and self._given() == other._given()

    def _given(self) -> dict[str, Any]:
        """What the function was made with."""
        return {name: value for name, value in vars(self).items() if name[0] != "_" and name != "call_text"}

    def scores(self, texts: list[str], prompts: Sequence[Any] | None, columns: dict[str, Any]) -> list[float | None]:
        """Scores of B texts; each function has its own."""
        raise NotImplementedError


class AnswerFunction(RewardFunction):
    """A reward function that compares each completion with the value of a column, `None` where that has no value.

    Args:
        column: name of the column.
        after: a mark such as `</think>`: only what follows its last occurrence is the answer, and a completion without
            the mark scores 0.
    """

    def __init__(self, column: str, after: str | None = None):
        super().__init__([column])
        if after == "":
            raise UserError(f"{self.__name__}: after is empty: give the mark, such as </think>, or leave it out.")
        self.after = after

    def scores(self, texts: list[str], prompts: Sequence[Any] | None, columns: dict[str, Any]) -> list[float | None]:
        (column,) = self.columns
        scores: list[float | None] = []
        for text, expected in zip(texts, columns[column], strict=True):
            if is_missing(expected):
                scores.append(None)
                continue
            answer = text_after(text, self.after)
            scores.append(0.0 if answer is None else self.score(answer, expected))
        return scores

    def score(self, answer: str, expected: Any) -> float | None:
        """Score of one answer."""
        raise NotImplementedError


def text_after(text: str, mark: str | None) -> str | None:
    """What follows the last occurrence of a mark; `None` if the text lacks it. Without a mark, all of the text."""
    if mark is None:
        return text
    before, found, rest = text.rpartition(mark)
    return rest if found else None


def is_missing(expected: Any) -> bool:
    """Whether a row has no answer: `None`, NaN (which pandas makes of it), or a list without values."""
    if isinstance(expected, Real):
        return math.isnan(expected)
    return expected is None or (_is_list(expected) and all(map(is_missing, expected)))


def accepted_texts(expected: Any, column: str) -> list[str]:
    """The texts that a value of a column accepts: a list has one or more, anything else is one.

    Raises:
        UserError: the value is neither text, number nor a list of these.
    """
    values = expected if _is_list(expected) else [expected]
    return [_text_of(value, column) for value in values if not is_missing(value)]


def _is_list(value: Any) -> bool:
    is_array = hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0  # of NumPy or torch
    return is_array or isinstance(value, list | tuple | set | frozenset)


def _text_of(value: Any, column: str) -> str:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        if not isinstance(value, float):
            value = str(value) if "float" in str(value.dtype) else value.item()
    if isinstance(value, float) and math.isfinite(value):
        # As people write it: 72 for 72.0, which a column with missing values has, and no exponent.
        return format(Decimal(str(value)).to_integral() if value.is_integer() else Decimal(str(value)), "f")
    if isinstance(value, str | bool | int | float):
        return str(value)
    raise UserError(f"column {column!r} has {repr(value)[:80]} as an answer: give text, a number, or a list of these.")


class WarnOnce:
    """Logs each warning the first time only: a reward function is called hundreds of times."""

    def __init__(self):
        self._said: set[str] = set()

    def __call__(self, topic: str, message: str, *values: Any) -> None:
        """Logs a warning, unless there was one on this topic."""
        if topic not in self._said:
            self._said.add(topic)
            logger.warning(message, *values)


def log_number(columns: dict[str, Any], name: str, value: float) -> None:
    """Logs a number with the trainer's metrics, where a trainer calls the function."""
    log_metric: Callable[[str, float], None] | None = columns.get("log_metric")
    if log_metric is not None:
        log_metric(name, value)


def _signature(columns: Iterable[str]) -> inspect.Signature:
    """The signature that a trainer checks against the columns of a dataset."""
    names = ["prompts", "completions", *(column for column in columns if column.isidentifier())]
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in dict.fromkeys(names)]
    parameters.append(inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)

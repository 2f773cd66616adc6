"""A gold reward of the user's own, with its mistakes reported in one line."""

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import UserError


class CheckedGold:
    """Calls a gold reward and checks what it returns.

    Args:
        function: returns one number for each completion, or None where it does not apply. It is called with prompts and
            completions: both text, but a prompt of several messages is a list of messages. A parameter that is named
            `completions` gets the completions wherever it stands, as in reward functions of TRL.
        name: how the option names it.
        needs_all: whether every completion needs a number, as simulated annotators judge by it.
    """

    def __init__(self, function: Callable[..., Sequence[float | None]], name: str, *, needs_all: bool):
        self.function = function
        self.name = name
        self.needs_all = needs_all

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float | None]:
        """The gold reward of each completion; None where there is none.

        Raises:
            UserError: the function fails, or does not return one number for each completion.
        """
        try:
            returned = call_with_texts(self.function, prompts, completions)
        except UserError:
            raise
        except Exception as error:  # raised by the user's file
            place = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error}"
            if place.filename != __file__:  # else it does not take these arguments
                problem += f", line {place.lineno} of {Path(place.filename).name}"
            raise UserError(f"gold: {self.name} failed ({problem}): it takes prompts and completions.") from error
        try:
            values = list(returned)
        except TypeError:
            kind = type(returned).__name__
            raise UserError(f"gold: {self.name} returned {kind}: it must return a list with one number each.") from None
        if len(values) != len(completions):
            raise UserError(
                f"gold: {self.name} returned {len(values)} values for {len(completions)} completions: return one each."
            )
        return [self._checked(value) for value in values]

    def _checked(self, value: Any) -> float | None:
        if value is None or (is_number(value) and math.isnan(value)):
            if self.needs_all:
                raise UserError(
                    f"gold: {self.name} returned {value} for a completion, and simulated annotators judge by it: "
                    "return a number for each."
                )
            return None
        if not is_number(value) or math.isinf(value):
            raise UserError(f"gold: {self.name} returned {value!r} for a completion: return a finite number, or None.")
        return float(value)


def is_number(value: Any) -> bool:
    """Whether it is a number of Python, or one of NumPy or torch that holds a single value."""
    return isinstance(value, Real) or (hasattr(value, "item") and getattr(value, "ndim", None) == 0)


def call_with_texts(function: Callable, prompts: Sequence[Any], completions: Sequence[str]) -> Any:
    """Calls a reward function by the names of its parameters if it has `completions`, else with both in this order."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables of C have no signature
        return function(prompts, completions)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    completions_parameter = parameters.get("completions")
    if completions_parameter is None or completions_parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        return function(prompts, completions)
    if takes_any or "prompts" in parameters:
        return function(prompts=prompts, completions=completions)
    return function(prompts, completions)

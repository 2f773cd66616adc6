"""How a reward function is called: what may be one, which parameters it must have, and coroutines that it returns."""

import asyncio
import difflib
import functools
import inspect
import math
import os
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from threading import Thread
from typing import Any

from torch import nn
from transformers import Pipeline, PreTrainedTokenizerBase

from ..compat import get_callable_name
from ..errors import UserError, first_line

HOOKS = ("trainer_state", "log_metric", "log_extra")
"""Arguments that the trainer passes to reward functions besides texts and columns, as in TRL."""
TEXTS = ("prompts", "completions")
"""The first arguments of a reward function."""


# --- what is given ---------------------------------------------------------------------------------------------------


def as_list(given: Any) -> list:
    """Returns the entries of a list or tuple, or a list of the single thing that is given."""
    return list(given) if isinstance(given, list | tuple) else [given]


def given_name(func: Any) -> str:
    """The name of a reward as it was given: a path, a Hub id, or the name of the function."""
    if isinstance(func, str | Path):
        return str(func)
    return get_callable_name(func)


def distinct_names(names: list[str]) -> list[str]:
    """Appends its number to each name that occurs more than once, so that logs are unambiguous."""
    distinct = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    # `f`, `f` and a function that is called `f_0`: once more.
    return distinct if len(set(distinct)) == len(names) else distinct_names(distinct)


def weighted_sum(names: Sequence[str], weights: Sequence[float]) -> str:
    """The reward as a formula, such as `1 × runs/reward + 0.5 × short`."""
    terms = ""
    for name, weight in zip(names, weights, strict=True):
        sign = "-" if weight < 0 else "+"
        joined = f" {sign} " if terms else sign.removeprefix("+")
        terms += f"{joined}{abs(weight):g} × {name}"
    return terms


def formula_of(names: Sequence[str], weights: Sequence[float], shaping: str | None = None) -> str | None:
    """What is maximized as a formula, such as `PAR(1 × runs/reward + 0.5 × short)`.

    Args:
        names: names of the rewards.
        weights: their weights.
        shaping: `reward_shaping` of `PPOConfig`.

    Returns:
        The formula; `None` for one reward of weight 1 as it is.
    """
    is_plain = list(weights) == [1]
    if shaping is None:
        return None if is_plain else weighted_sum(names, weights)
    inner = names[0] if is_plain else weighted_sum(names, weights)
    return f"{shaping.upper()}({inner})"


def checked_weights(weights: Any, names: Sequence[str], option: str) -> list[float]:
    """Returns the weight of each reward function; 1 each for `None`.

    Args:
        weights: what was given as weights.
        names: names of the functions in their order.
        option: what the functions are called in the message.

    Raises:
        UserError: if the weights are not one finite number for each function.
    """
    if weights is None:
        return [1.0] * len(names)
    if hasattr(weights, "tolist"):  # a tensor or an array
        weights = weights.tolist()
    if not isinstance(weights, list | tuple):
        raise UserError(
            f"reward_weights={describe(weights)} is no list: give a list with one number for each of {option}."
        )
    if len(weights) != len(names):
        raise UserError(
            f"reward_weights has {len(weights)} entries for {len(names)} {option}: give one each, in the order "
            f"{', '.join(names)}."
        )
    for weight in weights:
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise UserError(f"reward_weights={list(weights)!r}: {weight!r} is not a finite number: give one for each.")
    return list(weights)


def check_given(reward_funcs: Any, weights: Any, option: str) -> list:
    """Returns the entries of what was given as reward functions, before any model is loaded.

    Raises:
        UserError: if there is none, if an entry is neither a function nor a model nor a name, or if the weights do not
            fit.
    """
    funcs = as_list(reward_funcs)
    if not funcs or any(func is None for func in funcs):
        raise UserError(f"{option}: give at least one callable, reward model or path.")
    checked_weights(weights, [given_name(func) for func in funcs], option)
    for func in funcs:
        if not isinstance(func, str | Path) and not is_reward_model(func):
            check_function(func, option)
    return funcs


def check_tokenizers(tokenizers: Sequence[Any], n_funcs: int, option: str) -> None:
    """Raises `UserError` unless there is a tokenizer or `None` for each reward function."""
    if len(tokenizers) != n_funcs:
        raise UserError(
            f"reward_processing_classes has {len(tokenizers)} entries for {n_funcs} {option}: give one each."
        )
    for tokenizer in tokenizers:
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"reward_processing_classes: {describe(tokenizer)} is not a tokenizer: pass that of the reward model, "
                "such as AutoTokenizer.from_pretrained(...), or None for a function."
            )


def describe(value: Any) -> str:
    """Returns the value as Python writes it if that is short, else its type."""
    written = repr(value)
    is_short = len(written) <= 60 and written.isprintable()
    return written if is_short else f"an object of type {type(value).__name__}"


def is_reward_model(func: Any) -> bool:
    """Whether a module is a model of Transformers or PEFT, and not a function of texts that has weights."""
    return isinstance(func, nn.Module) and hasattr(func, "config")


def check_function(func: Any, option: str) -> None:
    """Raises `UserError` for what is not called as a reward function, with the way to make it one.

    Args:
        func: what was given as a reward function, and is neither a path nor a model.
        option: name of the argument.
    """
    name = get_callable_name(func)
    if inspect.isclass(func):
        raise UserError(f"{option}: {name} is a class, not an object: pass one, as in {name}().")
    if isinstance(func, Pipeline):
        raise UserError(
            f"{option}: a {name} takes texts only: wrap it in a function, as in "
            "lambda prompts, completions, **columns: [answer['score'] for answer in pipe(completions)], or pass its "
            "model."
        )
    if isinstance(func, nn.Module) and not _takes_texts(func.forward):
        raise UserError(
            f"{option}: the module {name} has no config, so it is no reward model, and its forward does not take "
            f"prompts and completions: wrap it in a function (prompts, completions, **columns)."
        )
    if not callable(func):
        raise UserError(f"{option}: {describe(func)} is not a function, a model or a path.")


def _takes_texts(function: Callable) -> bool:
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_all or any(name in parameters for name in (*TEXTS, "completion_ids"))


# --- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """The parameters of a reward function, which is called with names only.

    Attributes:
        named: names of its parameters; `None` if they are not known, as of a function that is written in C.
        takes_all: whether it takes any other name too.
        required: those without a default.
        by_position: those that cannot be given by name.
    """

    named: frozenset[str] | None = None
    takes_all: bool = True
    required: tuple[str, ...] = ()
    by_position: tuple[str, ...] = ()

    @classmethod
    def of(cls, func: Callable) -> "Parameters":
        """Reads the signature of a function or of a module's `forward`."""
        try:
            signature = inspect.signature(func.forward if isinstance(func, nn.Module) else func)
        except (TypeError, ValueError):
            return cls()
        parameters = signature.parameters.values()
        plain = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        return cls(
            named=frozenset(parameter.name for parameter in plain),
            takes_all=any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters),
            required=tuple(parameter.name for parameter in plain if parameter.default is parameter.empty),
            by_position=tuple(parameter.name for parameter in plain if parameter.kind is parameter.POSITIONAL_ONLY),
        )

    def select(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of the arguments that the function takes: all, or those that it names."""
        if self.takes_all or self.named is None:
            return arguments
        return {name: value for name, value in arguments.items() if name in self.named}


def check_parameters(func: Callable, name: str, passed_on: Sequence[str], *, where: str) -> None:
    """Raises `UserError` if a function cannot be called with the arguments of the trainer and a dataset's columns.

    Args:
        func: the reward function.
        name: its name in the message.
        passed_on: names of the columns that are passed on.
        where: name of the dataset in the message.
    """
    parameters = Parameters.of(func)
    arguments = [*TEXTS, "completion_ids", *HOOKS, *passed_on]
    if any(parameter in arguments for parameter in parameters.by_position):
        raise UserError(
            f"reward function {name!r} takes arguments by their position, but gets all by name: remove the slash from "
            "its parameters, as in (prompts, completions, **kwargs)."
        )
    missing = [parameter for parameter in parameters.required if parameter not in arguments]
    takes_nothing = parameters.named is not None and not parameters.takes_all
    if takes_nothing and not parameters.named.intersection((*TEXTS, "completion_ids")):
        needed = f" needs {missing[0]!r}, which is no column of {where}, and" if missing else ""
        raise UserError(
            f"reward function {name!r}{needed} does not take 'completions': "
            "write its parameters as (prompts, completions, **kwargs)."
        )
    if missing:
        nearest = difflib.get_close_matches(missing[0], arguments, n=1)
        hint = f"did you mean {nearest[0]!r}? Else " if nearest else ""
        raise UserError(
            f"reward function {name!r} needs {missing[0]!r}, but {where} has no such column to pass on "
            f"(it has {', '.join(passed_on) or 'none'}): {hint}add the column, or give the parameter a default."
        )


# --- failures --------------------------------------------------------------------------------------------------------

MISTAKES = (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError)
"""Errors that a mistake in a function raises. Others, such as those of a connection, keep their type."""


@contextmanager
def failures_named(func: Callable, name: str, completions: Sequence[Any]) -> Iterator[None]:
    """Raises mistakes in a reward function as a `UserError` in one line, with the function, its file and the line.

    Args:
        func: the reward function.
        name: its name in the message.
        completions: the completions that it got.
    """
    try:
        yield
    except UserError:
        raise
    except MISTAKES as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        remedy = "correct the function"
        is_of_type = isinstance(error, AttributeError | TypeError)  # no index that is out of range
        if completions and isinstance(completions[0], list) and is_of_type and "list" in str(error):
            remedy = "for prompts in messages a completion is a list of messages: its text is completion[0]['content']"
        elif completions and isinstance(completions[0], str) and "string indices" in str(error):
            remedy = "for prompts as text a completion is text, and no list of messages"
        raise UserError(f"reward function {name!r} failed: {cause}{_place_in(func, error)}: {remedy}.") from error


def _place_in(func: Callable, error: BaseException) -> str:
    """File and line in the function where an error comes from; empty if it is not known."""
    while isinstance(func, functools.partial):
        func = func.func
    if isinstance(func, nn.Module):
        func = func.forward
    code = getattr(inspect.unwrap(func), "__code__", None) or getattr(type(func).__call__, "__code__", None)
    calls = [call for call in traceback.extract_tb(error.__traceback__) if code and call.filename == code.co_filename]
    return f" ({Path(calls[-1].filename).name}, line {calls[-1].lineno})" if calls else ""


# --- coroutines ------------------------------------------------------------------------------------------------------


def comes_later(output: Any) -> bool:
    """Whether a function returned a coroutine, or a list with coroutines for its completions."""
    return inspect.isawaitable(output) or _has_coroutines(output)


async def resolved(output: Any) -> Any:
    """Awaits what a function returned: a coroutine, a list with one for each completion, or scores as they are."""
    try:
        if inspect.isawaitable(output):
            output = await output
        if _has_coroutines(output):
            output = await _together(map(resolved, output))
    except (KeyboardInterrupt, SystemExit) as error:  # either would end the event loop, on which the caller waits
        raise RuntimeError(f"an async reward function raised {type(error).__name__}") from error
    return output


def awaited(outputs: list[Any]) -> list[Any]:
    """Returns what functions returned, with the results of coroutines in their place. They run at the same time."""
    if not any(map(comes_later, outputs)):
        return outputs
    future = asyncio.run_coroutine_threadsafe(_together(map(resolved, outputs)), _event_loop())
    try:
        return future.result()
    except BaseException:  # also Ctrl-C
        future.cancel()
        raise


async def _together(coroutines: Iterable[Awaitable]) -> list[Any]:
    """Awaits all at the same time. At the first error, the others are canceled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all async reward functions, in a thread of its own: in a notebook, the main thread runs one.

    It is kept for the next call, as TRL does: a client or a semaphore that a function uses again belongs to the loop
    of its first use.
    """
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop


if hasattr(os, "register_at_fork"):  # a new process has no such thread
    os.register_at_fork(after_in_child=_event_loop.cache_clear)


def _has_coroutines(output: Any) -> bool:
    return isinstance(output, list | tuple) and any(map(inspect.isawaitable, output))

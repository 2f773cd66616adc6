"""How a reward function is called: what may be one, which parameters it must have, and coroutines that it returns."""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

from torch import nn
from transformers import Pipeline, PreTrainedTokenizerBase

from ..compat import get_callable_name
from ..errors import UserError

HOOKS = ("trainer_state", "log_metric", "log_extra")
"""Arguments that the trainer passes to reward functions besides texts and columns, as in TRL."""
TEXTS = ("prompts", "completions")
"""The first arguments of a reward function."""


# --- what is given ---------------------------------------------------------------------------------------------------


def as_list(given: Any) -> list:
    """Returns the entries of a list or tuple, or a list of the single thing that is given."""
    return list(given) if isinstance(given, list | tuple) else [given]


def checked_weights(weights: Any, n_funcs: int, option: str) -> list[float]:
    """Returns the weight of each reward function; 1 each for `None`.

    Raises:
        UserError: if the weights are not one finite number for each function.
    """
    if weights is None:
        return [1.0] * n_funcs
    if hasattr(weights, "tolist"):  # a tensor or an array
        weights = weights.tolist()
    if not isinstance(weights, list | tuple):
        raise UserError(
            f"reward_weights={describe(weights)} is no list: give a list with one number for each of {option}."
        )
    if len(weights) != n_funcs:
        raise UserError(f"reward_weights has {len(weights)} entries for {n_funcs} {option}: give one each.")
    for weight in weights:
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise UserError(f"reward_weights={list(weights)!r}: {weight!r} is not a finite number: give one for each.")
    return list(weights)


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
    return takes_all or all(name in parameters for name in TEXTS)


# --- parameters ------------------------------------------------------------------------------------------------------


def check_parameters(func: Callable, name: str, passed_on: Sequence[str], *, where: str) -> None:
    """Raises `UserError` if a function cannot be called with the arguments of the trainer and a dataset's columns.

    Args:
        func: the reward function.
        name: its name in the message.
        passed_on: names of the columns that are passed on.
        where: name of the dataset in the message.
    """
    try:
        signature = inspect.signature(func.forward if isinstance(func, nn.Module) else func)
    except (TypeError, ValueError):  # such as a function written in C
        return
    arguments = dict.fromkeys((*TEXTS, "completion_ids", *HOOKS, *passed_on))
    parameters = signature.parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    unexpected = [argument for argument in arguments if argument not in signature.parameters]
    missing = [parameter.name for parameter in parameters if _needs_value(parameter, arguments)]
    if any(parameter.kind is parameter.POSITIONAL_ONLY and parameter.name in arguments for parameter in parameters):
        raise UserError(
            f"reward function {name!r} takes arguments by their position, but gets all by name: remove the slash from "
            "its parameters, as in (prompts, completions, **kwargs)."
        )
    if missing and unexpected and not takes_all:
        raise UserError(
            f"reward function {name!r} needs {missing[0]!r}, which is no column of {where}, and does not take "
            f"{unexpected[0]!r}: write its parameters as (prompts, completions, **kwargs)."
        )
    if unexpected and not takes_all:
        raise UserError(
            f"reward function {name!r} does not take {unexpected[0]!r}: add **kwargs to its parameters, as it "
            "gets the columns of the dataset, and more, by name."
        )
    if missing:
        raise UserError(
            f"reward function {name!r} needs {missing[0]!r}, but {where} has no such column to pass on "
            f"(it has {', '.join(passed_on) or 'none'}): add the column, or give the parameter a default."
        )


def _needs_value(parameter: inspect.Parameter, arguments: dict[str, None]) -> bool:
    is_filled = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    has_value = parameter.name in arguments or parameter.default is not parameter.empty
    return not is_filled and not has_value


# --- coroutines ------------------------------------------------------------------------------------------------------


def awaited(outputs: list[Any]) -> list[Any]:
    """Returns what functions returned, with the results of coroutines in their place. They run at the same time.

    A function may return a coroutine, or a list with one for each completion.
    """
    if not any(inspect.isawaitable(output) or _has_coroutines(output) for output in outputs):
        return outputs

    async def result(output: Any) -> Any:
        if inspect.isawaitable(output):
            output = await output
        if _has_coroutines(output):
            output = await asyncio.gather(*map(result, output))
        return output

    async def gather() -> list:
        return await asyncio.gather(*map(result, outputs))

    with ThreadPoolExecutor(1) as pool:  # a new thread, as the main thread of a notebook already runs an event loop
        return pool.submit(asyncio.run, gather()).result()


def _has_coroutines(output: Any) -> bool:
    return isinstance(output, list | tuple) and any(map(inspect.isawaitable, output))

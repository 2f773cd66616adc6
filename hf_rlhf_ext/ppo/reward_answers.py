"""What reward functions return, as plain numbers: one per completion, or one per token of each completion.

Numbers of NumPy, torch and pandas count as numbers, and so do truth values. What has no plain meaning is refused in one
line with the function's name.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .reward_calls import describe

SCORES = ("reward", "rewards", "score", "scores")
"""The key of a dict that is taken: it has this key alone."""
LARGEST = torch.finfo(torch.float32).max


def checked_answer(
    output: Any, expected: int, name: str, completion_ids: list[list[int]] | None = None
) -> list[float | None] | list[list[Any] | None]:
    """Checks what one function returned.

    Args:
        output: a list, a tuple, a generator, a tensor, an array or a column of pandas, or a dict with one of these
            under `reward` or `score`.
        expected: number of completions.
        name: name of the function.
        completion_ids: token ids of each completion. If any has more than one token, a tensor with one element for
            each completion has scores, not rewards of tokens.

    Returns:
        A number per completion, or a list per completion, which `checked_tokens` checks; `None` is kept.

    Raises:
        UserError: for anything else.
    """
    may_be_tokens = completion_ids is not None and all(len(ids) == 1 for ids in completion_ids)
    rows = _rows(output, expected, name, flatten=not may_be_tokens)
    if rows is None or len(rows) != expected:
        returned = describe(output) if rows is None else f"{len(rows)} scores"
        raise UserError(
            f"reward function {name!r} returned {returned} for {expected} completions: return one score each."
        )
    rows = _plain_rows(rows, flatten=not may_be_tokens)
    is_list = [isinstance(row, list) for row in rows]
    if not any(is_list):
        return [None if row is None else _number(row, name, f"completion {i}") for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if row is not None and not is_list[i]:
            raise UserError(
                f"reward function {name!r} returned {describe(row)} for completion {i} and a list for completion "
                f"{is_list.index(True)}: return a number for every completion, or a list with one number per token for "
                "every completion."
            )
    return rows


def checked_tokens(
    rows: list[list | None], completion_ids: list[list[int]] | None, name: str
) -> list[list[float] | None]:
    """Token rewards as floats; raises `UserError` unless there is one reward per token of each completion."""
    if completion_ids is None:
        raise UserError(
            f"reward function {name!r} returned token rewards, which need completion_ids: pass them, or return one "
            "score per completion."
        )
    for i, (row, ids) in enumerate(zip(rows, completion_ids, strict=True)):
        if row is not None and len(row) != len(ids):
            raise UserError(
                f"reward function {name!r} returned {len(row)} token rewards for completion {i}, which has {len(ids)} "
                "tokens: return one for each of completion_ids, including the stop token."
            )
    checked: list[list[float] | None] = []
    for i, row in enumerate(rows):
        if row is not None:
            row = [_number(value, name, f"token {t} of completion {i}") for t, value in enumerate(row)]
        checked.append(row)
    return checked


def total(row: float | Sequence[float] | None) -> float:
    """The score of one completion, NaN if there is none."""
    if row is None:
        return math.nan
    if isinstance(row, list):
        return math.fsum(row)
    return row


def padded(rows: list[list[float] | None], width: int) -> Tensor:
    """Token rewards as (B, `width`) fp32, zero in the padding and for `None`."""
    table = torch.zeros(len(rows), width, dtype=torch.float32)
    for i, row in enumerate(rows):
        if row:
            table[i, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return table


def _rows(output: Any, expected: int, name: str, *, flatten: bool) -> list | None:
    """One entry per completion; `None` for what has no entries in an order."""
    if isinstance(output, Mapping):
        output = _of_dict(output, name)
    if isinstance(output, set | frozenset):
        raise UserError(
            f"reward function {name!r} returned a set, which has no order and equal scores once: return a list."
        )
    if inspect.isasyncgen(output):
        raise UserError(f"reward function {name!r} returned an async generator: return a list.")
    if hasattr(output, "to_numpy"):  # pandas
        output = output.to_numpy()
    if getattr(output, "ndim", None) is not None:
        shape = tuple(output.shape)
        if shape == (1, expected) != (1, 1) or (flatten and shape == (expected, 1)):  # as classifiers return it
            output = output.reshape(-1)
        return _as_python(output) if output.ndim else None
    if not isinstance(output, Iterable):
        return None
    return list(output)


def _of_dict(output: Mapping, name: str) -> Any:
    keys = list(output)
    if len(keys) == 1 and keys[0] in SCORES:
        return output[keys[0]]
    found = ", ".join(map(describe, keys[:5])) or "no key"
    raise UserError(
        f"reward function {name!r} returned a dict with {found}: return a list with the score of each completion, and "
        "log other numbers with log_metric."
    )


def _as_python(array: Any) -> Any:
    """A tensor or an array as a list, or as a number if it has no dimensions."""
    if isinstance(array, Tensor):
        array = array.detach()
    return array.tolist() if hasattr(array, "tolist") else list(array)


def _plain_rows(rows: list, *, flatten: bool) -> list:
    """The rows with plain lists and numbers in place of tensors and arrays.

    With `flatten`, tensors of one element each are numbers.
    """
    plain = []
    for row in rows:
        is_array = getattr(row, "ndim", None) is not None
        flatten = flatten and (row is None or (is_array and math.prod(row.shape) == 1))
        if isinstance(row, Mapping) and len(row) == 1 and next(iter(row)) in SCORES:
            row = next(iter(row.values()))
        elif is_array:
            row = _as_python(row)
        elif isinstance(row, tuple):
            row = list(row)
        plain.append(row)
    return [_only_element(row) for row in plain] if flatten else plain


def _only_element(row: Any) -> Any:
    while isinstance(row, list) and len(row) == 1:
        row = row[0]
    return row


def _number(value: Any, name: str, where: str) -> float:
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        value = value.item()
    if not isinstance(value, Real | Decimal):
        raise UserError(f"reward function {name!r} returned {describe(value)} for {where}: return a number.")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not abs(number) <= LARGEST:  # also NaN
        raise UserError(
            f"reward function {name!r} returned {number} for {where}: return a finite number, or None where "
            "another function scores the completion."
        )
    return number

"""The numbers among the options: Python does not check their types, and a YAML file reads `1e-3` as text."""

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from ..errors import UserError

_WORDS = {int: "an integer", float: "a number"}
_REMEDIES = {
    "max_grad_norm": "set it to 0 for no limit",
    "logging_steps": "to turn it off, set logging_strategy='no'",
    "save_steps": "to turn it off, set save_strategy='no'",
    "eval_steps": "to turn it off, set eval_strategy='no'",
    "num_train_epochs": "set it, or max_steps, to the length of the run",
}
"""What to do instead of an infinite value, or None where it is no value of the option."""


def read_numbers(args: TrainingArguments, remedies: Mapping[str, str] = MappingProxyType({})) -> None:
    """Makes the numeric options numbers, and refuses what is none.

    The text of a number becomes the number, and so does a scalar of NumPy or torch; 4.0 becomes 4 where an integer is
    needed. NaN and infinity are refused.

    Args:
        args: options of a trainer; changed in place.
        remedies: what to do instead of an infinite value, by option.

    Raises:
        UserError: for the first option that is no number, or not a finite one.
    """
    remedies = {**_REMEDIES, **remedies}
    types = _types_of(type(args))
    for option in fields(args):
        kinds = types[option.name]
        kind = _kind(kinds)
        value = getattr(args, option.name)
        if kind is None or (value is None and NoneType in kinds):
            continue
        number = _as_number(value, kind)
        if number is None and isinstance(value, str) and str in kinds:
            continue  # a word that the option takes too
        remedy = remedies.get(option.name, "leave it out" if value is None else "")
        ending = f": {remedy}." if remedy else "."
        if number is None:
            raise UserError(f"{option.name}: must be {_WORDS[kind]}, got {value!r}{ending}")
        if math.isnan(number):
            raise UserError(f"{option.name} is NaN: give a number.")
        if math.isinf(number):
            raise UserError(f"{option.name} must not be infinite, got {number}{ending}")
        if type(number) is not type(value):
            setattr(args, option.name, number)


@cache
def _types_of(config: type) -> dict[str, tuple]:
    """The types that each option may have. `HfArgumentParser` takes the None out of those in `dataclasses.fields`."""
    types = {}
    for name, hint in get_type_hints(config).items():
        types[name] = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return types


def _kind(types: tuple) -> type | None:
    """`int` or `float` if the option may be one number; otherwise `None`."""
    if bool in types:
        return None
    return next((kind for kind in (float, int) if kind in types), None)


def _as_number(value: Any, kind: type) -> int | float | None:
    """The value as a number of the kind; `None` if it is none."""
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:  # of NumPy or torch
        value = value.item()
    if isinstance(value, str):
        value = _read(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        return int(value)
    value = float(value)
    if kind is int and math.isfinite(value):
        return int(value) if value.is_integer() else None
    return value


def _read(text: str) -> int | float | None:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return None

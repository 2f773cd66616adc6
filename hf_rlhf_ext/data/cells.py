"""Reads cells of rows: numbers, labels, truth values, and what chat templates read.

The functions take values as JSON, Arrow or CSV files provide them. For any other value they raise `Unusable`, which
names the column.
"""

from typing import Any

from .schema import Row, Unusable, is_number
from .templates import template_columns

_TRUTH = {"true": 1.0, "false": 0.0}
_YES = ("true", "yes", "1", "1.0")
_NO = ("false", "no", "0", "0.0", "-1", "-1.0")


# --- numbers and labels ----------------------------------------------------------------------------------------------


def number(row: Row, column: str) -> float:
    """Returns the cell as a finite number. A number may be written as text, as in CSV files."""
    value = row.get(column)
    if isinstance(value, bool):
        value = float(value)
    elif isinstance(value, str):
        value = _parse_number(value)
    if not is_number(value):
        raise Unusable(f"{column} is not a finite number")
    return float(value)


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        word = text.strip().lower()
        return _TRUTH.get(word)


def is_absent(value: Any) -> bool:
    """True for None, for an empty CSV cell, and for NaN, which pandas writes for a missing number."""
    is_nan = value != value
    return value is None or value == "" or is_nan


def optional_number(
    row: Row,
    column: str,
    flag: str,
    flags: list[str],
) -> float | None:
    """Returns an optional number: None if the cell is empty; None, with `flag` added, if it is not a number."""
    if is_absent(row.get(column)):
        return None
    try:
        return number(row, column)
    except Unusable:
        flags.append(flag)
        return None


def truth(value: Any) -> bool | None:
    """Returns whether a label says yes: true, 1 or "yes". None for anything that is neither yes nor no."""
    if isinstance(value, str):
        word = value.strip().lower()
        return word in _YES if word in (*_YES, *_NO) else None
    if isinstance(value, int | float) and value in (-1, 0, 1):
        return value > 0
    return None


def as_label(value: Any) -> str | None:
    """Returns a label such as a category as text. None for anything but text or a whole number."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, int) and is_number(value):
        return str(value)
    return None


# --- what the chat template reads ------------------------------------------------------------------------------------


def tools_as_json(value: Any, flags: list[str]) -> str | None:
    """Returns descriptions of functions as JSON text, or None without any. `bad_tools` is flagged."""
    return _template_column("tools", value, flags)


def template_kwargs_record(value: Any, flags: list[str]) -> Any:
    """Returns further arguments of the chat template, or None without any. `bad_chat_template_kwargs` is flagged."""
    return _template_column("chat_template_kwargs", value, flags)


def _template_column(name: str, value: Any, flags: list[str]) -> Any:
    if is_absent(value):
        return None
    return template_columns({name: value}, flags).get(name)

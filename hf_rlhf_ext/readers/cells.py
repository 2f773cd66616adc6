"""Helpers that read one cell of a public dataset: text, records, lists written as JSON."""

import json

from ..data.schema import Row, Unusable, is_list_of


def text_cell(row: Row, column: str, default: str | None = None) -> str:
    """Returns the text of the cell, or `default` if the cell is missing."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise Unusable(f"{column} is not text")
    return value


def records(row: Row, column: str) -> list[Row]:
    """Returns the list of records in the cell."""
    value = row[column]
    if not is_list_of(value, dict):
        raise Unusable(f"{column} is not a list of records")
    return value


def text_list(row: Row, column: str) -> list[str]:
    """Returns the list of texts in the cell, which may also be written as JSON. The list must not be empty."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not value or not is_list_of(value, str):
        raise Unusable(f"{column} is not a list of texts")
    return value

"""What the columns of a source hold, seen in its first rows: the basis of detection and of the account of columns."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from ..data.schema import Row

SAMPLE = 100
"""Rows that are looked at."""


@dataclass(frozen=True)
class Profile:
    """The columns of a source, with the values of its first rows.

    Attributes:
        rows: The first rows that could be read, at most `SAMPLE`.
        values: Column -> its values that are not empty, in the order of the rows. A column that is empty in all of
            these rows has an empty list.
    """

    rows: list[Row]
    values: dict[str, list[Any]]

    @property
    def columns(self) -> list[str]:
        return list(self.values)

    @property
    def first(self) -> Row:
        """Column -> its first value that is not empty, or None."""
        return {column: values[0] if values else None for column, values in self.values.items()}

    def without(self, columns: Collection[str]) -> "Profile":
        """The profile of the same rows without some of their columns."""
        rows = [without_columns(row, columns) for row in self.rows]
        values = {column: of_column for column, of_column in self.values.items() if column not in columns}
        return Profile(rows, values)


def without_columns(row: Row, columns: Collection[str]) -> Row:
    """Returns the row without some of its columns."""
    if row.keys().isdisjoint(columns):
        return row
    return {column: value for column, value in row.items() if column not in columns}


def profile_of(rows: Iterable[Row | str], columns: Iterable[str] = ()) -> Profile:
    """Looks at the first rows. `columns` are known to exist, even if these rows do not have them."""
    sample: list[Row] = []
    values: dict[str, list[Any]] = {column: [] for column in columns}
    for number, row in enumerate(rows):
        if number >= SAMPLE:
            break
        if not isinstance(row, dict):  # a row that cannot be read is the reason, as text
            continue
        sample.append(row)
        for column, value in row.items():
            of_column = values.setdefault(column, [])
            if not is_hollow(value):
                of_column.append(value)
    return Profile(sample, values)


def with_late_columns(profile: Profile, rows: Iterable[Row | str], columns: Iterable[str]) -> Profile:
    """Adds those of the columns that only later rows have, each with its first value. All rows may be looked at."""
    missing = set(columns) - profile.values.keys()
    if not missing:
        return profile
    values = dict(profile.values)
    for row in rows:
        if not missing:
            break
        if not isinstance(row, dict):
            continue
        for column in missing & row.keys():
            values[column] = []
            if not is_hollow(row[column]):
                values[column] = [row[column]]
                missing.discard(column)
    return Profile(profile.rows, values)


def is_hollow(value: Any) -> bool:
    """True for a cell that does not show what its column holds: None, NaN, and empty text, lists and records."""
    if value is None or value != value:
        return True
    return isinstance(value, str | list | dict) and not value

"""The kinds of data that a trainer may be given, as datasets in memory."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..errors import UserError, first_line
from .schema import dataset_of

_TABLES = ("pandas", "polars", "arrow")
"""Formats of a `Dataset` in which a row is a table."""

Given = Any
"""A `Dataset`, a list of rows, a `pandas.DataFrame`, or a `torch.utils.data.Dataset` of rows."""


def as_dataset(given: Given | None, option: str) -> Dataset | None:
    """Returns the data as a `datasets.Dataset`; `None` is returned as it is.

    Of a `Dataset` in a format of tables or with hidden columns, rows are read as Python objects, with all columns.

    Args:
        given: the data. Rows of a list and of a `torch.utils.data.Dataset` are dicts.
        option: name of the argument, for messages.

    Raises:
        UserError: for streamed data, for several sets, and for what has no rows that are dicts.
    """
    if given is None:
        return None
    if isinstance(given, Dataset):
        shown = given.format["columns"]
        hides_columns = shown is not None and set(shown) != set(given.column_names)
        return as_python(given) if hides_columns or given.format["type"] in _TABLES else given
    if isinstance(given, Mapping):
        raise UserError(f"{option} {_describe_sets(given, option)}")
    if isinstance(given, (IterableDataset, torch.utils.data.IterableDataset)):
        raise UserError(
            f"{option} is streamed: read as many rows as you need into memory, as in "
            "Dataset.from_list(list(streamed.take(1000)))."
        )
    if type(given).__module__.split(".")[0] == "pandas" and hasattr(given, "columns"):
        return Dataset.from_pandas(given, preserve_index=False)
    if isinstance(given, torch.utils.data.Dataset) and hasattr(given, "__len__"):
        given = [given[index] for index in range(len(given))]
    if isinstance(given, (list, tuple)):
        return _dataset_of_rows(given, option)
    raise UserError(
        f"{option} is of type {type(given).__name__}: pass a datasets.Dataset, which load_dataset(..., split='train') "
        "returns."
    )


def as_python(dataset: Dataset) -> Dataset:
    """Returns the dataset without `set_format`, so that rows are Python objects. A transform of the user's is kept."""
    format_type = dataset.format["type"]
    return dataset if format_type in (None, "custom") else dataset.with_format(None)


def as_datasets(given: Given | Mapping[str, Given] | None, option: str) -> Dataset | dict[str, Dataset] | None:
    """Returns one dataset, or a dict of several, as an evaluation takes them. See `as_dataset`.

    Raises:
        UserError: as `as_dataset`, and for a dict without sets.
    """
    if not isinstance(given, Mapping):
        return as_dataset(given, option)
    if not given:
        raise UserError(f"{option} is a dict without sets: leave it out, or give it a dataset.")
    return {name: as_dataset(part, f"{option}[{name!r}]") for name, part in given.items()}


def _describe_sets(given: Mapping[str, Any], option: str) -> str:
    """What is wrong with a dict of sets, with the set to pass instead."""
    names = list(given)
    if not names:
        return "is a dict without sets: pass a datasets.Dataset."
    if not all(isinstance(part, (Dataset, IterableDataset)) for part in given.values()):
        return "is a dict: pass a datasets.Dataset, which Dataset.from_dict makes of a dict of columns."
    word = "eval" if option.startswith("eval") else "train"
    chosen = next((name for name in names if name == word), names[0])
    listed = ", ".join(map(repr, names))
    return f"has the splits {listed} and must be one dataset: pass one split, as in {option}=dataset[{chosen!r}]."


def _dataset_of_rows(rows: list | tuple, option: str) -> Dataset:
    names: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{option} row {number} is of type {type(row).__name__}: pass rows that are dicts, or a "
                "datasets.Dataset."
            )
        names |= dict.fromkeys(row)
    if not rows:
        raise UserError(f"{option} is empty: give it at least one row.")
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        return dataset_of(columns)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{option}: the rows do not fit into columns ({first_line(error)}): give each column one type."
        ) from error

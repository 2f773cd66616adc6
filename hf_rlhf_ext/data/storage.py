"""Writes rows of any shape into Arrow columns: in one piece, or in batches, of which only one is in memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Json, LargeList, List, Value

from .json_columns import entries_of

Row = dict[str, Any]
_TEXT = Value("string")


def usual_type(values: Iterable[Any]) -> Any | None:
    """Returns the type of a column of texts, or of messages with the same fields, which are all text, or lists of them.

    None for any other column, and for one without values.
    """
    depth, entries = entries_of(values)
    if not entries:
        return None
    first = entries[0]
    feature: Any = None
    if isinstance(first, str):
        if all(isinstance(entry, str) for entry in entries):
            feature = _TEXT
    elif isinstance(first, dict) and "role" in first:
        fields = first.keys()
        if all(isinstance(entry, dict) and entry.keys() == fields and _is_flat(entry) for entry in entries):
            feature = dict.fromkeys(first, _TEXT)
    if feature is None:
        return None
    for _ in range(depth):
        feature = List(feature)
    return feature


def _is_flat(entry: Row) -> bool:
    return all(isinstance(value, str) for value in entry.values())


def arrow_table(columns: dict[str, Sequence[Any]], features: Features) -> pa.Table:
    """Returns the columns as a table that `datasets` reads with these features.

    Raises:
        TypeError, ValueError, OverflowError, RecursionError: A column cannot be stored.
    """
    schema = features.arrow_schema
    arrays = [_array(name, values, features, schema.field(name).type) for name, values in columns.items()]
    return pa.Table.from_arrays(arrays, schema=schema)


def as_dataset_of(columns: dict[str, Sequence[Any]], features: Features) -> Dataset:
    """Returns the columns as a dataset in memory. Raises as `arrow_table`."""
    return Dataset(arrow_table(columns, features), info=DatasetInfo(features=features))


def _array(name: str, values: Sequence[Any], features: Features, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    feature = features[name]
    if not _has_json(feature):
        try:
            return pa.array(values, type=kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # `datasets` converts some values, or says what is wrong
            pass
    return Dataset.from_dict({name: values}, features=Features({name: feature})).data.table.column(0).combine_chunks()


def _has_json(feature: Any) -> bool:
    while isinstance(feature, List | LargeList):
        feature = feature.feature
    if isinstance(feature, dict):
        return any(map(_has_json, feature.values()))
    return isinstance(feature, Json)


def list_array(values: Sequence[Sequence[int]]) -> pa.ListArray:
    """Returns lists of token ids as an Arrow array, five times as fast as `pyarrow.array`."""
    return pa.ListArray.from_arrays(_offsets(values), np.fromiter(chain.from_iterable(values), np.int64))


def nested_list_array(values: Sequence[Sequence[Sequence[int]]]) -> pa.ListArray:
    """Returns lists of lists of token ids as an Arrow array."""
    return pa.ListArray.from_arrays(_offsets(values), list_array(list(chain.from_iterable(values))))


def _offsets(values: Sequence[Sequence[Any]]) -> np.ndarray:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, values), np.int32, len(values)), out=offsets[1:])
    return offsets


class TokenCounts(NamedTuple):
    """Numbers of tokens of tokenized rows: arrays of int64 with an entry per row.

    Attributes:
        prompt: Tokens of the prompt.
        completions: Tokens of all completions together.
        longest: Tokens of the longest completion.
        n_completions: Number of completions.
    """

    prompt: np.ndarray
    completions: np.ndarray
    longest: np.ndarray
    n_completions: np.ndarray


def token_counts(tokenized: Dataset) -> TokenCounts:
    """Counts the tokens of rows with `prompt_ids` and `completion_ids`, without making lists of them."""
    parts = [TokenCounts(*(np.zeros(0, np.int64) for _ in TokenCounts._fields))]
    for batch in tokenized.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(1000):
        of_rows = batch["completion_ids"].combine_chunks()
        n_completions = _lengths_in(of_rows)
        lengths = _lengths_in(of_rows.flatten())
        starts = np.cumsum(n_completions) - n_completions
        prompt = _lengths_in(batch["prompt_ids"].combine_chunks())
        longest = np.maximum.reduceat(lengths, starts)
        parts.append(TokenCounts(prompt, np.add.reduceat(lengths, starts), longest, n_completions))
    return TokenCounts(*map(np.concatenate, zip(*parts, strict=True)))


def _lengths_in(lists: pa.ListArray) -> np.ndarray:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)


class TypesOfRows:
    """Finds the types of columns in batches of rows, without keeping the rows.

    Attributes:
        names: The columns with a value, in the order in which they appear in the rows.
        unusual: Columns of which the type depends on all their values.
    """

    def __init__(self, known: dict[str, Any]):
        self._known = known
        self._order: dict[str, None] = {}
        self._filled: set[str] = set()
        self._types: dict[str, Any] = {}
        self.unusual: set[str] = set()

    def look_at(self, rows: Sequence[Row]) -> None:
        """Takes the types of a batch into account."""
        for row in rows:
            if not row.keys() <= self._order.keys():
                self._order |= dict.fromkeys(row)
        for name in self._order:
            values = [value for row in rows if (value := row.get(name)) is not None]
            if not values:
                continue
            self._filled.add(name)
            if name in self._known or name in self.unusual:
                continue
            kind = usual_type(values)
            if kind is None or self._types.setdefault(name, kind) != kind:
                self.unusual.add(name)

    @property
    def names(self) -> list[str]:
        return [name for name in self._order if name in self._filled]

    def usual(self) -> dict[str, Any]:
        """The types of columns that all batches agree on."""
        return {name: kind for name, kind in self._types.items() if name not in self.unusual}


def columns_of(rows: Sequence[Row], names: Iterable[str]) -> dict[str, list[Any]]:
    """Returns the values of each column; None in rows that lack it."""
    return {name: [row.get(name) for row in rows] for name in names}


def values_of(rows: Iterable[Row], name: str) -> Iterator[Any]:
    """Yields the values of one column."""
    for row in rows:
        yield row.get(name)

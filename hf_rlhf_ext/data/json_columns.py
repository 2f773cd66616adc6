"""Storage of records of any shape, such as tool calls, in Arrow columns without a change of any value.

An Arrow column has one type. Records with different fields get all fields of all records, filled up with None, and in a
column with the text "02139" and the number 169 one of them changes its type. `datasets` stores such values as JSON, but
reads text that looks like JSON ("02139", "null") as what it looks like. Here, whole records are written as JSON.
"""

import json
import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from datasets import Dataset, IterableDataset, Json, LargeList, List
from datasets.utils.json import ujson_loads

Row = dict[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------------


def as_json_column(values: list[Any]) -> tuple[list[Any], Any] | None:
    """Returns a column of messages with each message as JSON text, and the type of the column.

    Returns:
        None if the column needs no JSON: it has no messages, or only messages with the same fields, which are all text.

    Raises:
        TypeError, ValueError: A message has a value that JSON does not have.
    """
    depth, entries = entries_of(values)
    if not any(isinstance(entry, dict) and "role" in entry for entry in entries):
        return None
    fields = entries[0].keys() if isinstance(entries[0], dict) else None
    if all(isinstance(entry, dict) and entry.keys() == fields and _is_flat(entry) for entry in entries):
        return None
    feature: Any = Json()
    for _ in range(depth):
        feature = List(feature)
    return json_values(values, feature), feature


def json_values(values: Iterable[Any], feature: Any) -> list[Any]:
    """Returns the values of a column with the type that `as_json_column` gave, with each message as JSON text."""
    depth = 0
    while isinstance(feature, List):
        feature = feature.feature
        depth += 1
    return [_encoded(value, depth) for value in values]


def entries_of(values: Iterable[Any]) -> tuple[int, list[Any]]:
    """Returns the entries of lists of lists that are no lists themselves, and how deep they are."""
    depth = 0
    entries = [value for value in values if value is not None]
    while entries and all(isinstance(entry, list) for entry in entries):
        depth += 1
        entries = [inner for entry in entries for inner in entry if inner is not None]
    return depth, entries


def _is_flat(entry: Row) -> bool:
    return all(isinstance(value, str) for value in entry.values())


def _encoded(value: Any, depth: int) -> Any:
    if value is None:
        return None
    if depth == 0:
        return json_text(value)
    return [_encoded(entry, depth - 1) for entry in value]


def json_text(value: Any) -> str:
    """Returns JSON text that `datasets` reads as exactly this value.

    Raises:
        TypeError: The value is not one that JSON has.
        ValueError: The same, or a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    is_exact = ujson_loads(text) == value
    return text if is_exact else _exact_text(value)


def _exact_text(value: Any) -> str:
    if isinstance(value, float):
        return _exact_float(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_exact_text(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_exact_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _exact_float(value: float) -> str:
    """Returns a spelling that the reader of `datasets` rounds to this number.

    It rounds about one number in a hundred to a neighbor, depending on the place of the decimal point: it reads 0.35427
    as 0.35427000000000003, and 354.27e-3 as 0.35427. Numbers below 1e-280 may still be rounded.
    """
    for spelling in _spellings(value):
        try:
            read = ujson_loads(spelling)
        except ValueError:  # too many digits
            continue
        if read == value and isinstance(read, float):
            return spelling
    return repr(value)


def _spellings(value: float) -> Iterator[str]:
    yield repr(value)
    for number in (value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf)):
        sign, digits, exponent = Decimal(repr(number)).as_tuple()
        for zeros in range(6):
            text = "".join(map(str, digits)) + "0" * zeros
            for point in range(1, len(text) + 1):
                shift = exponent - zeros + len(text) - point
                yield f"{'-' if sign else ''}{text[:point]}.{text[point:] or '0'}e{shift}"


# --- reading ---------------------------------------------------------------------------------------------------------

_OF_PLAIN_TURNS = frozenset(("role", "content", "from", "value"))


class RowsWithoutFill:
    """The rows of a dataset, without the None that Arrow fills in where a record lacks a field that others have.

    Only records inside a column are changed. A message keeps `content: None`. Can be iterated more than once.
    """

    def __init__(self, dataset: Dataset | IterableDataset):
        self.dataset = dataset
        features = getattr(dataset, "features", None) or {}
        self.columns = [name for name, feature in features.items() if _has_filled_records(feature)]

    @property
    def column_names(self) -> list[str] | None:
        return self.dataset.column_names

    def __iter__(self) -> Iterator[Row]:
        for row in rows_of(self.dataset):
            yield self.clean(row)

    def __len__(self) -> int:
        return len(self.dataset)

    def clean(self, row: Row) -> Row:
        """Returns the row of the dataset without what Arrow filled in."""
        if not self.columns:
            return row
        cleaned = dict(row)
        for name in self.columns:
            if name in cleaned:
                cleaned[name] = without_fill(cleaned[name])
        return cleaned


def rows_of(dataset: Dataset | IterableDataset) -> Iterable[Row]:
    """The rows, of which a dataset in memory or on disk decodes many together, in a fifth of the time."""
    if isinstance(dataset, Dataset) and dataset.format["type"] is None and dataset.column_names:
        return _decoded_in_batches(dataset)
    return dataset


def _decoded_in_batches(dataset: Dataset) -> Iterator[Row]:
    names = dataset.column_names if dataset.format["columns"] is None else dataset.format["columns"]
    for batch in dataset.iter(1000):
        for cells in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, cells, strict=True))


def without_arrow_fill(rows: Iterable[Any]) -> Iterable[Any]:
    """Wraps a dataset in `RowsWithoutFill`, and returns other rows, such as those of a JSON file, unchanged."""
    if isinstance(rows, Dataset | IterableDataset):
        cleaned = RowsWithoutFill(rows)
        return cleaned if cleaned.columns else rows
    return rows


def without_fill(value: Any) -> Any:
    """Removes fields that are None from a record and from the records inside it."""
    if isinstance(value, list):
        return [without_fill(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    is_message = "role" in value and "content" in value
    cleaned = {}
    for name, entry in value.items():
        if entry is not None or (is_message and name == "content"):
            cleaned[name] = without_fill(entry)
    return cleaned


def _has_filled_records(feature: Any) -> bool:
    """True for a column with records, unless they are turns with nothing but speaker and text."""
    inner = feature
    while isinstance(inner, List | LargeList):
        inner = inner.feature
    # The class `Sequence` of older datasets is a `List` or a record of lists by now. JSON has no filled fields.
    return isinstance(inner, dict) and not set(inner) <= _OF_PLAIN_TURNS

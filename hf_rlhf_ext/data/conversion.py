"""Conversion of source rows to the schema, shared by all readers, with counts of kept and dropped rows.

A reader converts a source row to one or several rows, or raises `Unusable` with the reason. The steps are:

1. `readable_rows` numbers and counts the source rows.
2. `read_each` calls the reader.
3. `convert` completes the rows that the reader returned.
4. `collect` keeps rows with one kind of prompt, text or messages, and counts them.

Every dropped row has a reason in the report.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import starmap
from typing import Any, NamedTuple

from datasets import Dataset

from .cache import Spool
from .cells import as_label
from .json_columns import rows_of, without_arrow_fill
from .schema import Comparison, LoadReport, PreferenceDataError, Row, Unusable, settle, without_missing
from .templates import template_columns

_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode
Reader = Callable[[Row, int], Comparison | list[Comparison]]
"""Converts a source row, given with its row number."""


class Reading(NamedTuple):
    """Result of reading source rows that belong together: one row, several rows, or the reason why there is none.

    In most formats these are the rows read from one source row. A table of answers needs several source rows for one
    comparison.
    """

    indices: list[int]
    result: Comparison | list[Comparison] | Unusable


class Converted(NamedTuple):
    """Rows in the schema, made from the source rows `indices`, with all their flags."""

    indices: list[int]
    rows: list[Comparison]
    flags: list[str]

    @property
    def is_text(self) -> bool:
        return isinstance(self.rows[0]["prompt"], str)


def require_rows(dataset: Any, source: str) -> None:
    """Raises `PreferenceDataError` unless `dataset` is a dataset in memory with at least one row."""
    name = source or "dataset"
    if not isinstance(dataset, Dataset):
        raise PreferenceDataError(
            f"{name}: expected a datasets.Dataset, got {type(dataset).__name__}: pick one split, without streaming."
        )
    if len(dataset) == 0:
        raise PreferenceDataError(f"{name}: the dataset has no rows: check path, split and filters.")


def list_columns(columns: Iterable[Any], most: int = 12) -> str:
    """Lists the first column names in sorted order, each with at most 40 characters, and counts the rest."""
    names = sorted(map(str, columns))
    shown = []
    for name in names[:most]:
        # A message is one line, so a line break or half a surrogate pair in a name is escaped.
        if not name.isprintable():
            name = repr(name)
        if len(name) > 40:
            name = f"{name[:39]}…"
        shown.append(name)
    text = ", ".join(shown)
    rest = len(names) - len(shown)
    if rest:
        text += f" and {rest} more"
    return text or "(none)"


# --- reading ---------------------------------------------------------------------------------------------------------


def readable_rows(rows: Iterable[Row | str], report: LoadReport) -> Iterator[tuple[int, Row]]:
    """Yields (number, row). A string in place of a row is the reason why it could not be read, and is reported.

    What Arrow filled into the records of a dataset is removed.
    """
    for index, row in enumerate(rows_of(without_arrow_fill(rows))):
        report.rows_in += 1
        if isinstance(row, str):
            report.drop(row, index)
        else:
            yield index, row


def read_each(rows: Iterable[tuple[int, Row]], read: Reader) -> Iterator[Reading]:
    """Calls the reader for each row."""
    for index, row in rows:
        yield Reading([index], _result_or_reason(read, row, index))


def _result_or_reason(
    read: Reader,
    row: Row,
    index: int,
) -> Comparison | list[Comparison] | Unusable:
    try:
        return read(row, index)
    except Unusable as reason:
        return reason
    except KeyError as missing:  # this row lacks a column that others have
        return Unusable(f"{missing.args[0]} is missing")
    except RecursionError:
        return Unusable("nested too deeply")


def with_labels(
    result: Comparison | list[Comparison],
    row: Row,
    category_column: str = "category",
) -> Comparison | list[Comparison]:
    """Adds category, source and what the chat template reads of the source row, unless the result has its own."""
    flags: list[str] = []
    labels = template_columns(row, flags)
    labels["category"] = as_label(row.get(category_column))
    labels["source"] = as_label(row.get("source"))

    def labeled(one: Comparison) -> Comparison:
        together = labels | without_missing(one)
        if flags:
            together["flags"] = [*(together.get("flags") or ()), *flags]
        return together

    if isinstance(result, list):
        return list(map(labeled, result))
    return labeled(result)


# --- finishing and counting ------------------------------------------------------------------------------------------


def convert(
    readings: Iterable[Reading],
    report: LoadReport,
    *,
    valid: bool = False,
) -> Iterator[Converted]:
    """Yields completed rows in the order of the readings. Source rows without a result are reported with the reason.

    `valid` means that the rows are comparison rows that were validated already, so they are not changed.
    """
    for reading in readings:
        try:
            converted = _finish(reading, report.source, valid=valid)
        except Unusable as reason:
            for index in reading.indices:
                report.drop(str(reason), index)
        else:
            yield converted


def _finish(reading: Reading, source: str, *, valid: bool) -> Converted:
    """Returns the usable rows of a reading, cleaned by `settle` and numbered. Raises `Unusable` if there is none."""
    indices, result = reading
    if isinstance(result, Unusable):
        raise result
    results = result if isinstance(result, list) else [result]

    first = min(indices, default=-1)
    rows: list[Comparison] = []
    last_reason: Unusable | None = None
    for row in results:
        try:
            # Demonstrations have no pairs, so `settle` does not apply.
            if "pairs" in row and not valid:
                row = settle(row)
            _check_encodes(row)
        except Unusable as reason:
            last_reason = reason
            continue
        # If a row has its own `source` and `row`, they are kept.
        place = {"source": source or None, "row": first}
        rows.append(place | without_missing(row))
    if not rows:
        raise last_reason or Unusable("no usable part")  # the reader returned an empty list

    flags: set[str] = set()
    if last_reason is not None:
        flags.add(f"partly left out: {last_reason}")
    for row in rows:
        flags.update(row.get("flags") or ())
    return Converted(indices, rows, sorted(flags))


def _check_encodes(row: Comparison) -> None:
    """Raises `Unusable` for half of a surrogate pair, which JSON can contain but which cannot be stored as text."""
    try:
        _as_json(row).encode()
    except UnicodeEncodeError as error:
        raise Unusable("contains half of a surrogate pair, which is not valid text") from error
    except RecursionError as error:
        raise Unusable("nested too deeply") from error


def keep_one_kind(
    converted: Iterable[Converted],
    report: LoadReport,
    *,
    text: bool | None = None,
) -> Iterator[Comparison]:
    """Yields and counts rows with one kind of prompt: text (`text=True`), messages (False) or as in row 0 (None).

    A column can hold only one kind, so rows of the other kind are dropped and reported.
    """
    for part in converted:
        if text is None:
            text = part.is_text
        if part.is_text != text:
            reason = (
                "prompt is messages, but other prompts are text"
                if text
                else "prompt is text, but other prompts are messages"
            )
            for index in part.indices:
                report.drop(reason, index)
            continue
        # Count source rows, not results: one message tree may give several comparisons.
        report.kept += len(part.indices)
        for flag in part.flags:
            for index in part.indices:
                report.flag(flag, index)
        yield from part.rows


def collect(converted: Iterable[Converted], report: LoadReport) -> list[Comparison]:
    """Returns the rows with the more frequent kind of prompt, text or messages.

    Raises:
        PreferenceDataError: No usable row is left.
    """
    return list(Collected(converted, report))


class Collected:
    """The rows with the more frequent kind of prompt, text or messages, which wait on disk.

    Args:
        converted: The rows, all of which are read at once, unless `is_text` is given.
        report: Counts the rows when they are iterated for the first time.
        is_text: Whether all prompts are text, or none, if it is known. Then no row waits, and they are iterated once.

    Attributes:
        is_text: Whether prompts are text.

    Raises:
        PreferenceDataError: No row is usable. If `is_text` is given, it is raised when the rows are iterated.
    """

    def __init__(self, converted: Iterable[Converted], report: LoadReport, *, is_text: bool | None = None):
        self._report = report
        self._have_been_counted = False
        self._counts = {True: 0, False: 0}
        counted = self._counted(converted)
        self._parts: Iterable[tuple]
        if is_text is not None:
            self._parts = counted
            self.is_text = is_text
            return
        self._parts = Spool(counted)
        # If both are equally frequent, messages are kept.
        self.is_text = self._counts[True] > self._counts[False]
        self._require_any()

    def _require_any(self) -> None:
        if not any(self._counts.values()):
            raise PreferenceDataError(f"{self._report.summary()}: no usable row is left: check the source.")

    def _counted(self, converted: Iterable[Converted]) -> Iterator[tuple]:
        for part in converted:
            self._counts[part.is_text] += 1
            yield tuple(part)

    def __iter__(self) -> Iterator[Comparison]:
        report = LoadReport() if self._have_been_counted else self._report
        self._have_been_counted = True
        yield from keep_one_kind(starmap(Converted, self._parts), report, text=self.is_text)
        self._require_any()

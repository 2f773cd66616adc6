"""From source rows to rows of the schema: what every reader shares, and the counting of kept and dropped rows.

A reader turns a source row into one or several rows, or raises `Unusable` with the reason. Around it, in this order:
`readable_rows` numbers and counts the source, `read_each` calls the reader, `convert` finishes what it returned, and
`collect` keeps rows that fit into one column and counts them. Nothing is dropped without a reason in the report.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from datasets import Dataset

from .cells import as_label
from .schema import Comparison, LoadReport, PreferenceDataError, Row, Unusable, settle, without_missing

Reader = Callable[[Row, int], Comparison | list[Comparison]]
"""Takes a source row and its number."""


class Reading(NamedTuple):
    """What was read from source rows that belong together, by number: one row, several, or why there is none.

    One source row for most formats; a table of answers needs several for one comparison.
    """

    indices: list[int]
    result: Comparison | list[Comparison] | Unusable


class Converted(NamedTuple):
    """Rows of the schema from the source rows `indices`, and the flags of all of them."""

    indices: list[int]
    rows: list[Comparison]
    flags: list[str]

    @property
    def is_text(self) -> bool:
        return isinstance(self.rows[0]["prompt"], str)


def require_rows(dataset: Any, source: str) -> None:
    """Raises `PreferenceDataError` for anything but a data set in memory with at least one row."""
    name = source or "data set"
    if not isinstance(dataset, Dataset):
        raise PreferenceDataError(
            f"{name}: expected a datasets.Dataset, got {type(dataset).__name__}: pick one split, without streaming."
        )
    if len(dataset) == 0:
        raise PreferenceDataError(f"{name}: the data set has no rows: check path, split and filters.")


def list_columns(columns: Iterable[Any]) -> str:
    """The first dozen column names in order, each at most 40 characters, and how many more there are."""
    names = sorted(map(str, columns))
    shown = []
    for name in names[:12]:
        # A message is one line: a line break or half a surrogate pair in a name is spelled out.
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
    """(number, row) of every row; a string stands for a row that could not be read, and is the reason."""
    for index, row in enumerate(rows):
        report.rows_in += 1
        if isinstance(row, str):
            report.drop(row, index)
        else:
            yield index, row


def read_each(rows: Iterable[tuple[int, Row]], read: Reader) -> Iterator[Reading]:
    """The reader on one row after the other."""
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
    except KeyError as missing:  # a column that other rows have
        return Unusable(f"{missing.args[0]} is missing")
    except RecursionError:
        return Unusable("nested too deeply")


def with_labels(
    result: Comparison | list[Comparison],
    row: Row,
    category_column: str = "category",
) -> Comparison | list[Comparison]:
    """The result with `category` and `source` as the source row says them, unless the result has its own."""
    category = as_label(row.get(category_column))
    labels = {"category": category, "source": as_label(row.get("source"))}
    if isinstance(result, list):
        return [labels | without_missing(one) for one in result]
    return labels | without_missing(result)


# --- finishing and counting ------------------------------------------------------------------------------------------


def convert(
    readings: Iterable[Reading],
    report: LoadReport,
    *,
    valid: bool = False,
) -> Iterator[Converted]:
    """Finished rows in the order of the readings; the report gets every source row that gave none, with the reason.

    `valid` says that the rows are comparison rows that were validated: they stay as they are.
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
    """The usable rows of a reading, settled and numbered; raises `Unusable` where there is none."""
    indices, result = reading
    if isinstance(result, Unusable):
        raise result
    results = result if isinstance(result, list) else [result]

    first = min(indices, default=-1)
    rows: list[Comparison] = []
    last_reason: Unusable | None = None
    for row in results:
        try:
            # Demonstrations have no pairs: there is nothing to settle.
            if "pairs" in row and not valid:
                row = settle(row)
            _check_encodes(row)
        except Unusable as reason:
            last_reason = reason
            continue
        # A row's own `source` and `row` win over the place where it was read.
        place = {"source": source or None, "row": first}
        rows.append(place | without_missing(row))
    if not rows:
        raise last_reason or Unusable("no usable part")

    flags: set[str] = set()
    if last_reason is not None:
        flags.add(f"partly left out: {last_reason}")
    for row in rows:
        flags.update(row.get("flags") or ())
    return Converted(indices, rows, sorted(flags))


def _check_encodes(row: Comparison) -> None:
    """JSON can spell half of a surrogate pair, which is no text that could be stored or tokenized."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise Unusable("holds half of a surrogate pair, which is not text") from error
    except RecursionError as error:
        raise Unusable("nested too deeply") from error


def keep_one_kind(
    converted: Iterable[Converted],
    report: LoadReport,
    *,
    text: bool | None = None,
) -> Iterator[Comparison]:
    """Rows whose prompts are all text (`text=True`), all messages (False) or as the first one (None); counts them.

    A column holds one kind: rows of the other kind are dropped and named.
    """
    for part in converted:
        if text is None:
            text = part.is_text
        if part.is_text != text:
            reason = (
                "prompt is messages, not text as elsewhere" if text else "prompt is text, not messages as elsewhere"
            )
            for index in part.indices:
                report.drop(reason, index)
            continue
        # Source rows are counted, not results: one tree may give several comparisons.
        report.kept += len(part.indices)
        for flag in part.flags:
            for index in part.indices:
                report.flag(flag, index)
        yield from part.rows


def collect(converted: Iterable[Converted], report: LoadReport) -> list[Comparison]:
    """All rows of the more frequent kind of prompt.

    Raises:
        PreferenceDataError: none is left.
    """
    parts = list(converted)
    n_text = sum(part.is_text for part in parts)
    n_messages = len(parts) - n_text  # where there are as many, messages stay
    rows = list(keep_one_kind(parts, report, text=n_text > n_messages))
    if not rows:
        raise PreferenceDataError(f"{report.summary()}: no usable row is left, check the source.")
    return rows

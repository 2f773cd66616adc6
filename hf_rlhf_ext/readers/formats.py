"""Readers: any public preference or instruction data set becomes comparisons or demonstrations, and a report."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from datasets import Dataset, IterableDataset, config, load_from_disk
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..data.conversion import (
    Converted,
    collect,
    convert,
    keep_one_kind,
    list_columns,
    read_each,
    readable_rows,
    require_rows,
    with_labels,
)
from ..data.schema import (
    Comparison,
    LoadReport,
    PreferenceDataError,
    Row,
    as_dataset,
    group_by_prompt,
    own_row,
    with_defaults,
)
from .registry import COMPARISONS, DEMONSTRATIONS, Format
from .sources import AnyDataset, Source, load_rows, open_source

__all__ = ["UnknownFormat", "load_comparisons", "load_demonstrations", "load_rows", "to_comparisons"]


class UnknownFormat(PreferenceDataError):
    """No known format has the columns of the data."""


_FORMAT_VERSION = 2
"""Part of every cache key: a change of what a reader makes of a row must not meet yesterday's result."""


def load_comparisons(
    source: str | Path | AnyDataset,
    format: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    group: bool = True,
    streaming: bool = False,
) -> tuple[Dataset | IterableDataset, LoadReport]:
    """Reads preference data of any public shape as comparison rows (`data.schema`).

    Args:
        source: what `load_rows` takes: a data set, a file, a folder, a Hub id.
        format: a name in `COMPARISONS`; None detects it from columns and first values.
        split, revision, config: as `load_rows`.
        group: merge the rows of a prompt into one (`schema.group_by_prompt`); a streamed source is not grouped.
        streaming: convert while iterating; the report is complete when the iteration is.

    Returns:
        The rows, and a report of what became of every row of the source (`rows_in == kept + all dropped`). Data over
        10,000 rows or 8 MB are converted once and kept in the data sets cache.

    Raises:
        PreferenceDataError: an unreadable source, an unknown format (the message lists what was looked for), no usable
            row, a comparison row that breaks the schema. Where some prompts are text and others messages, the rows of
            the rarer kind are dropped (streamed: of the kind that the first row is not).
    """
    opened = open_source(source, split, revision, config=config, streaming=streaming)
    return _load(opened, COMPARISONS, format, group=group and not streaming, streaming=streaming)


def load_demonstrations(
    source: str | Path | AnyDataset,
    format: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    every_turn: bool = False,
    category_column: str = "category",
    streaming: bool = False,
) -> tuple[Dataset | IterableDataset, LoadReport]:
    """Reads instruction data of any public shape: `prompt`, `completion`; `category`, `rating`, `tools` where given.

    The last answer of a conversation is the completion, everything before it the prompt; `every_turn` makes a row of
    each answer. `category` is what `category_column` of the source says. Otherwise as `load_comparisons`.
    """
    opened = open_source(source, split, revision, config=config, streaming=streaming)
    options = {"every_turn": every_turn, "category_column": category_column}
    return _load(opened, DEMONSTRATIONS, format, streaming=streaming, **options)


def to_comparisons(dataset: Dataset, *, source: str = "") -> tuple[Dataset, LoadReport]:
    """`load_comparisons` of a data set in memory, without grouping: a row in is a row out."""
    require_rows(dataset, source)
    return _load(Source(source, dataset), COMPARISONS, None)


def detect(
    rows: Iterable[Row | str],
    formats: tuple[Format, ...],
    name: str,
    asked: str | None,
) -> Format:
    """The format of the rows by their columns and the first value of each; `asked` names it instead."""
    where = name or "data set"
    candidates = formats
    if asked is not None:
        candidates = tuple(fmt for fmt in formats if fmt.name == asked)
        if not candidates:
            names = dict.fromkeys(fmt.name for fmt in formats)  # some formats have two forms
            known = ", ".join(names)
            raise PreferenceDataError(f"{where}: no format {asked!r}; known are {known}.")
    first = _first_values(rows)
    for fmt in candidates:
        if fmt.matches(first):
            return fmt

    columns = list_columns(first)
    wanted = "; ".join(map(str, candidates))
    hint = ""
    if len(first) == 1 and any(mark in columns for mark in ";\t|"):
        hint = " Is the delimiter a comma?"
    raise UnknownFormat(f"{where}: found columns {columns}; looked for {wanted}: rename yours.{hint}")


def _first_values(rows: Iterable[Row | str]) -> Row:
    """Every column of the first hundred rows, with its first value; empty text and lists tell nothing, as None."""
    first: Row = {}
    for n, row in enumerate(rows):
        if n >= 100:
            break
        if not isinstance(row, dict):
            continue
        for column, value in row.items():
            # An empty list says nothing about what others hold: the format is told by the first filled one.
            is_hollow = isinstance(value, str | list | dict) and not value
            if first.get(column) is None:
                first[column] = None if is_hollow else value
    return first


def _load(
    source: Source,
    formats: tuple[Format, ...],
    name: str | None,
    *,
    group: bool = False,
    streaming: bool = False,
    **options: Any,
) -> tuple[Dataset | IterableDataset, LoadReport]:
    fmt = detect(source.rows, formats, source.name, name)
    report = LoadReport(source=source.name, order_known=fmt.order_known)
    if streaming:
        if fmt.gathers:
            raise PreferenceDataError(f"{source.name}: format {fmt.name} needs all rows at once: leave streaming out.")
        rows = _Stream(source, fmt, report, options)
        return IterableDataset.from_generator(_iterate, gen_kwargs={"stream": rows}), report

    # Large sources are converted once: the rows and their report are read again from the cache.
    cached = _cache_folder(source, fmt, group, options)
    if cached is not None and (cached / "report.json").is_file():
        report = LoadReport(**json.loads((cached / "report.json").read_text()))
        return load_from_disk(str(cached / "rows")), report

    rows = collect(convert_source(source, fmt, report, **options), report)
    if group:
        rows = group_by_prompt(rows, report)
    dataset = as_dataset(rows, source.name)
    if cached is None:
        return dataset, report
    _keep(cached, dataset, report)
    # From disk, as every later call: rows that are mapped need not be in memory.
    return load_from_disk(str(cached / "rows")), report


def _cache_folder(
    source: Source,
    fmt: Format,
    group: bool,
    options: dict[str, Any],
) -> Path | None:
    """Where the converted rows of a large source are kept; None for small ones and for those without fingerprint."""
    if not source.large or not source.fingerprint:
        return None
    key = Hasher.hash((_FORMAT_VERSION, source.fingerprint, fmt.name, group, options))
    return Path(config.HF_DATASETS_CACHE) / "hf_rlhf_ext" / key


def _keep(folder: Path, dataset: Dataset, report: LoadReport) -> None:
    """Writes rows and report under another name and renames, so that an incomplete folder is never read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(dir=folder.parent, prefix="unfinished-"))
    dataset.save_to_disk(str(unfinished / "rows"))
    (unfinished / "report.json").write_text(json.dumps(asdict(report)))
    try:
        unfinished.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(unfinished)


class _Stream:
    """What a streamed data set iterates; copied by nothing, so that the caller's report is the one that fills."""

    def __init__(self, source: Source, fmt: Format, report: LoadReport, options: dict[str, Any]):
        self.source = source
        self.fmt = fmt
        self.report = report
        self.options = options

    def __iter__(self) -> Iterator[Comparison]:
        # Every pass counts afresh.
        self.report.rows_in = 0
        self.report.kept = 0
        self.report.dropped.clear()
        self.report.flagged.clear()
        converted = convert_source(self.source, self.fmt, self.report, **self.options)
        for row in keep_one_kind(converted, self.report):
            yield with_defaults(row) if "pairs" in row else row


def _iterate(stream: _Stream) -> Iterator[Comparison]:
    yield from stream


def convert_source(
    source: Source, fmt: Format, report: LoadReport, *, category_column: str = "category", **options: Any
) -> Iterator[Converted]:
    """Rows of the source in the schema, in its order; the report gets every row that is none, with the reason."""
    is_ours = fmt.convert is own_row

    def read(row: Row, index: int) -> Comparison | list[Comparison]:
        if is_ours:
            return own_row(row, source=source.name, index=index)
        return with_labels(fmt.convert(row, **options), row, category_column)

    shown = tqdm(source.rows, desc=source.name or "rows", unit=" rows", disable=not source.large)
    rows = readable_rows(shown, report)
    readings = fmt.convert(rows) if fmt.gathers else read_each(rows, read)
    return convert(readings, report, valid=is_ours)

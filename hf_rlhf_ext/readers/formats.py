"""Loads public preference and instruction datasets as comparisons or demonstrations, with a report."""

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
    """Raised when the columns of the data match no known format."""


_FORMAT_VERSION = 3
"""Part of every cache key. Increase it when a reader's output changes, so that old cached results are not used."""


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
    """Loads preference data in any supported public format as comparison rows.

    A comparison row has the columns `prompt`, `completions`, `pairs` and `targets`; `hf_rlhf_ext.data.schema` describes
    all columns. Prompts are either all text or all lists of messages. If a source mixes both, the rows of the less
    frequent kind are dropped (with `streaming`: the rows that differ from the first one).

    A source with at least 10,000 rows, or a file over 8 MB, is converted once and stored in the cache of `datasets`.

    Args:
        source: Dataset in memory, path of a file or folder, or dataset id on the Hub. See `load_rows`.
        format: Name of the format, one of `hf_rlhf_ext.readers.registry.COMPARISONS`. `None` detects it from the column
            names and the first values.
        split: Split to load, such as `"train"` or `"train[:500]"`. It may be `None` if there is only one split.
        revision: Branch, tag or commit of a dataset on the Hub.
        config: Configuration ("subset") of a dataset on the Hub or in a folder, if it has several.
        group: Whether to merge rows with the same prompt into one row. Has no effect with `streaming`.
        streaming: Whether to convert the rows while iterating. The report is complete after the iteration.

    Returns:
        The comparison rows, and a `LoadReport` that accounts for every row of the source: `rows_in` equals `kept` plus
            all dropped rows.

    Raises:
        UnknownFormat: The columns match no known format. The message lists the formats that were tried.
        PreferenceDataError: The source cannot be read, no row is usable, or a comparison row violates the schema.
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
    """Loads instruction data in any supported public format as demonstrations.

    A demonstration has the columns `prompt` and `completion`, and `category`, `rating` and `tools` if the source has
    them. The last answer of a conversation is the completion, and all turns before it are the prompt.

    Args:
        source: Dataset in memory, path of a file or folder, or dataset id on the Hub. See `load_rows`.
        format: Name of the format, one of `hf_rlhf_ext.readers.registry.DEMONSTRATIONS`. `None` detects it from the
            column names and the first values.
        split: Split to load, such as `"train"` or `"train[:500]"`. It may be `None` if there is only one split.
        revision: Branch, tag or commit of a dataset on the Hub.
        config: Configuration ("subset") of a dataset on the Hub or in a folder, if it has several.
        every_turn: Whether to make one row per answer of a conversation instead of one row for its last answer.
        category_column: Column of the source that is copied to `category`.
        streaming: Whether to convert the rows while iterating. The report is complete after the iteration.

    Returns:
        The demonstrations, and a `LoadReport` that accounts for every row of the source.

    Raises:
        UnknownFormat: The columns match no known format. The message lists the formats that were tried.
        PreferenceDataError: The source cannot be read, or no row is usable.
    """
    opened = open_source(source, split, revision, config=config, streaming=streaming)
    options = {"every_turn": every_turn, "category_column": category_column}
    return _load(opened, DEMONSTRATIONS, format, streaming=streaming, **options)


def to_comparisons(dataset: Dataset, *, source: str = "") -> tuple[Dataset, LoadReport]:
    """Runs `load_comparisons` on a dataset in memory, without merging rows that have the same prompt."""
    require_rows(dataset, source)
    return _load(Source(source, dataset), COMPARISONS, None)


def detect(
    rows: Iterable[Row | str],
    formats: tuple[Format, ...],
    name: str,
    asked: str | None,
) -> Format:
    """Returns the format of the rows, found by their columns and first values, or the format named `asked`."""
    where = name or "dataset"
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
    """Returns the columns of the first hundred rows, each with its first value that is not empty (else None)."""
    first: Row = {}
    for n, row in enumerate(rows):
        if n >= 100:
            break
        if not isinstance(row, dict):
            continue
        for column, value in row.items():
            # An empty list does not show what its entries look like, so a later value is used.
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
            raise PreferenceDataError(
                f"{source.name}: format {fmt.name} does not support streaming, since it needs all rows at once: "
                "leave streaming out."
            )
        rows = _Stream(source, fmt, report, options)
        return IterableDataset.from_generator(_iterate, gen_kwargs={"stream": rows}), report

    # Large sources are converted once. Later calls read the rows and the report from the cache.
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
    # Read from disk like every later call: memory-mapped rows take no memory.
    return load_from_disk(str(cached / "rows")), report


def _cache_folder(
    source: Source,
    fmt: Format,
    group: bool,
    options: dict[str, Any],
) -> Path | None:
    """Returns the cache folder for a large source. None for a small source, or one without a fingerprint."""
    if not source.large or not source.fingerprint:
        return None
    key = Hasher.hash((_FORMAT_VERSION, source.fingerprint, fmt.name, group, options))
    return Path(config.HF_DATASETS_CACHE) / "hf_rlhf_ext" / key


def _keep(folder: Path, dataset: Dataset, report: LoadReport) -> None:
    """Writes rows and report to a temporary folder, then renames it, so that an incomplete folder is never read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(dir=folder.parent, prefix="unfinished-"))
    dataset.save_to_disk(str(unfinished / "rows"))
    (unfinished / "report.json").write_text(json.dumps(asdict(report)))
    try:
        unfinished.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(unfinished)


class _Stream:
    """The rows behind a streamed dataset. Nothing copies it, so iterating fills the report that the caller has."""

    def __init__(self, source: Source, fmt: Format, report: LoadReport, options: dict[str, Any]):
        self.source = source
        self.fmt = fmt
        self.report = report
        self.options = options

    def __iter__(self) -> Iterator[Comparison]:
        # Every pass counts from zero.
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
    """Converts the rows of the source to the schema, in order. Dropped rows go to the report with a reason."""
    is_ours = fmt.convert is own_row

    def read(row: Row, index: int) -> Comparison | list[Comparison]:
        if is_ours:
            return own_row(row, source=source.name, index=index)
        return with_labels(fmt.convert(row, **options), row, category_column)

    shown = tqdm(source.rows, desc=source.name or "rows", unit=" rows", disable=not source.large)
    rows = readable_rows(shown, report)
    readings = fmt.convert(rows) if fmt.gathers else read_each(rows, read)
    return convert(readings, report, valid=is_ours)

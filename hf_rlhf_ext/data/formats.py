"""Readers: any public preference or instruction data set becomes comparisons or demonstrations, and a report."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset, config, load_from_disk
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from .cells import as_label
from .registry import COMPARISONS, DEMONSTRATIONS, Format
from .schema import (
    Comparison,
    LoadReport,
    PreferenceDataError,
    Unusable,
    as_dataset,
    group_by_prompt,
    own_row,
    settle,
    with_defaults,
)
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
    if not isinstance(dataset, Dataset):
        raise PreferenceDataError(
            f"{source or 'data set'}: expected a datasets.Dataset, got {type(dataset).__name__}: pick one split, "
            "without streaming."
        )
    if len(dataset) == 0:
        raise PreferenceDataError(f"{source or 'data set'}: the data set has no rows: check path, split and filters.")
    return _load(Source(source, dataset), COMPARISONS, None)


def detect(rows: Iterable[dict[str, Any] | str], formats: tuple[Format, ...], name: str, asked: str | None) -> Format:
    """The format of the rows by their columns and the first value of each; `asked` names it instead."""
    if asked is not None:
        found = [fmt for fmt in formats if fmt.name == asked]
        if not found:
            known = ", ".join(dict.fromkeys(fmt.name for fmt in formats))
            raise PreferenceDataError(f"{name or 'data set'}: no format {asked!r}; known are {known}.")
    first = _first_values(rows)
    for fmt in found if asked else formats:
        if fmt.matches(first):
            return fmt
    columns = _shown(first)
    wanted = "; ".join(f"{fmt.name} ({fmt.columns.replace(' ', ', ')})" for fmt in (found if asked else formats))
    hint = " Is the delimiter a comma?" if len(first) == 1 and any(mark in columns for mark in ";\t|") else ""
    where = name or "data set"
    raise UnknownFormat(f"{where}: found columns {columns}; looked for {wanted}: rename yours.{hint}")


def _shown(columns: Iterable[Any]) -> str:
    """The first dozen names, each shortened, and how many more there are."""
    names = sorted(map(str, columns))
    shown = [name if name.isprintable() else repr(name) for name in names[:12]]
    shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in shown]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"


def _first_values(rows: Iterable[dict[str, Any] | str]) -> dict[str, Any]:
    """Every column of the first hundred rows, with its first value; empty text and lists tell nothing, as None."""
    first: dict[str, Any] = {}
    for n, row in enumerate(rows):
        if n >= 100:
            break
        if isinstance(row, dict):
            for column, value in row.items():
                if first.get(column) is None:
                    first[column] = None if isinstance(value, str | list | dict) and not value else value
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
        return IterableDataset.from_generator(_stream, gen_kwargs={"load": rows}), report
    key = Hasher.hash((_FORMAT_VERSION, source.fingerprint, fmt.name, group, options)) if source.fingerprint else None
    cached = Path(config.HF_DATASETS_CACHE) / "hf_rlhf_ext" / key if key and source.large else None
    if cached and (cached / "report.json").is_file():
        return load_from_disk(str(cached / "rows")), LoadReport(**json.loads((cached / "report.json").read_text()))
    lots = list(converted(source, fmt, report, **options))
    rows = list(_of_one_kind(lots, report, sum(lot.is_text for lot in lots) * 2 > len(lots)))
    if not rows:
        raise PreferenceDataError(f"{report.summary()}: no usable row is left, check the source.")
    dataset = as_dataset(group_by_prompt(rows, report) if group else rows, source.name)
    if cached is None:
        return dataset, report
    _keep(cached, dataset, report)
    return load_from_disk(str(cached / "rows")), report


def _keep(folder: Path, dataset: Dataset, report: LoadReport) -> None:
    """Writes rows and report under another name and renames, so that a half-written folder is never read."""
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
        self.source, self.fmt, self.report, self.options = source, fmt, report, options

    def __iter__(self) -> Iterator[Comparison]:
        self.report.rows_in = self.report.kept = 0
        self.report.dropped.clear()
        self.report.flagged.clear()
        for row in _of_one_kind(converted(self.source, self.fmt, self.report, **self.options), self.report):
            yield with_defaults(row) if "pairs" in row else row


def _stream(load: _Stream) -> Iterator[Comparison]:
    yield from load


class Lot(NamedTuple):
    """Source rows that were read together, by number, and what they became: a tree several, a table of answers one."""

    indices: list[int]
    rows: list[Comparison]
    flags: list[str]

    @property
    def is_text(self) -> bool:
        return isinstance(self.rows[0]["prompt"], str)


def _of_one_kind(lots: Iterable[Lot], report: LoadReport, text: bool | None = None) -> Iterator[Comparison]:
    """Rows whose prompts are all text or all messages (None: as the first), as a column holds; counts them."""
    for lot in lots:
        text = lot.is_text if text is None else text
        if lot.is_text != text:
            kinds = ("messages", "text") if text else ("text", "messages")
            for index in lot.indices:
                report.drop(f"prompt is {kinds[0]}, not {kinds[1]} as elsewhere", index)
            continue
        report.kept += len(lot.indices)
        for flag in lot.flags:
            for index in lot.indices:
                report.flag(flag, index)
        yield from lot.rows


def converted(
    source: Source, fmt: Format, report: LoadReport, *, category_column: str = "category", **options: Any
) -> Iterator[Lot]:
    """Rows of the source in the schema, in its order; the report gets every row that is none, with the reason."""

    def readable() -> Iterator[tuple[int, dict[str, Any]]]:
        shown = tqdm(source.rows, desc=source.name or "rows", unit=" rows", disable=not source.large)
        for index, row in enumerate(shown):
            report.rows_in += 1
            if isinstance(row, str):
                report.drop(row, index)
            else:
                yield index, row

    def convert(row: dict[str, Any], index: int) -> Any:
        if fmt.convert is own_row:
            return own_row(row, source=source.name, index=index)
        named = {"category": as_label(row.get(category_column)), "source": as_label(row.get("source"))}
        found = fmt.convert(row, **options)
        return [named | _given(one) for one in found] if isinstance(found, list) else named | _given(found)

    if fmt.gathers:
        results = fmt.convert(readable())
    else:
        results = (([index], _attempt(convert, row, index)) for index, row in readable())
    for indices, found in results:
        try:
            yield _finished(found, indices, source.name, row_is_ours=fmt.convert is own_row)
        except Unusable as reason:
            for index in indices:
                report.drop(str(reason), index)


def _given(row: Comparison) -> Comparison:
    return {name: value for name, value in row.items() if value is not None}


def _attempt(convert: Callable[..., Any], row: dict[str, Any], index: int) -> Any:
    try:
        return convert(row, index)
    except Unusable as reason:
        return reason
    except KeyError as missing:  # a column that other rows have
        return Unusable(f"{missing.args[0]} is missing")
    except RecursionError:
        return Unusable("nested too deeply")


def _finished(found: Any, indices: list[int], source: str, *, row_is_ours: bool) -> Lot:
    if isinstance(found, Unusable):
        raise found
    rows: list[Comparison] = []
    reason: Unusable | None = None
    for row in found if isinstance(found, list) else [found]:
        try:
            row = settle(row) if "pairs" in row and not row_is_ours else row
            _check_encodes(row)
        except Unusable as error:
            reason = error
            continue
        rows.append({"source": source or None, "row": min(indices, default=-1)} | _given(row))
    if not rows:
        raise reason or Unusable("no usable part")
    partly = {f"partly left out: {reason}"} if reason else set()
    return Lot(indices, rows, sorted(partly.union(*(row.get("flags") or () for row in rows))))


def _check_encodes(row: Comparison) -> None:
    """JSON can spell half of a surrogate pair, which is no text that could be stored or tokenised."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise Unusable("holds half of a surrogate pair, which is not text") from error
    except RecursionError as error:
        raise Unusable("nested too deeply") from error

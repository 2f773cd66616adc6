"""Where rows come from: files, saved data sets, the Hub, memory; as they are, bad ones marked."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    load_dataset,
    load_from_disk,
)
from datasets.fingerprint import Hasher

from .schema import PreferenceDataError

# Columns of text are text: pandas would read the reply "42" as a number and "NA" as missing.
_OPTIONS = {"csv": {"converters": dict.fromkeys(("prompt", "chosen", "rejected", "category"), str)}}
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
MAX_LINE = 2**28
"""Characters: a longer line is not read, as it would have to fit into memory several times over."""

AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict


@dataclass(frozen=True)
class Source:
    """Rows to convert. `rows` can be iterated again and gives a string, the reason, in place of a row it cannot read.

    `fingerprint` identifies the rows and `size` says how many there are, or bytes of a file; None where unknown.
    """

    name: str
    rows: Iterable[dict[str, Any] | str]
    fingerprint: str | None = None
    large: bool = False


def open_source(
    source: str | Path | AnyDataset, split: str | None = None, revision: str | None = None, streaming: bool = False
) -> Source:
    """Rows of anything that `load_rows` reads; json and csv files are read here, row by row, mixed types and all."""
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and _builder(path) in ("json", "csv"):
        _check_split(path, split)
        stat = path.stat()
        key = Hasher.hash((str(path.resolve()), stat.st_size, stat.st_mtime_ns, split))
        return Source(path.name, _FileRows(path, split), key, large=stat.st_size > 2**23)
    name = path.name if path is not None else ""
    data = load_rows(source, split, revision, streaming=streaming)
    if isinstance(data, IterableDataset):
        return Source(name, data)
    if len(data) == 0:
        raise PreferenceDataError(f"{name or 'data set'}: the data set has no rows: check path, split and filters.")
    return Source(name, data, data._fingerprint, large=len(data) >= 10_000)


def load_rows(
    source: str | Path | AnyDataset, split: str | None = None, revision: str | None = None, *, streaming: bool = False
) -> Dataset | IterableDataset:
    """Rows as they are.

    Args:
        source: a data set in memory, a file (.json, .jsonl, .parquet, .csv, each also with .gz), a folder written by
            `save_to_disk`, a folder of files named after their splits, or a data set id on the Hub.
        split: which of several; slices such as `"train[:500]"` work for files and the Hub; None where there is one.
        revision: branch, tag or commit on the Hub.
        streaming: read files and the Hub while iterating, for data that exceed memory.

    Raises:
        PreferenceDataError: no such file, an unknown ending, an unreadable file, no such split.
    """
    if isinstance(source, Dataset | DatasetDict | IterableDataset | IterableDatasetDict):
        return _pick(source, split, "data set")
    if not isinstance(source, str | Path):
        raise PreferenceDataError(f"data set: expected a data set, a path or a Hub id, got {type(source).__name__}.")
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return _pick(load_from_disk(str(path)), split, path.name)
    if path.is_file():
        return _load_file(path, split, streaming)
    if not path.is_dir() and (_builder(path) or path.is_absolute() or str(source).startswith((".", "~"))):
        raise PreferenceDataError(f"dataset: no file or saved data set at {source}: check the path.")
    name = str(path) if path.is_dir() else str(source)
    try:
        data = load_dataset(name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # each builder and the Hub client raise errors of their own
        reason = str(error).splitlines()[0]
        raise PreferenceDataError(f"dataset: cannot read {source}, split {split!r}: {reason}") from error
    return _pick(data, None, str(source))


def _builder(path: Path) -> str | None:
    return _BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _check_split(path: Path, split: str | None) -> None:
    if split is not None and split.split("[")[0] != "train":
        raise PreferenceDataError(f"{path.name}: a file has no split {split!r}: leave it out, or pass 'train[:500]'.")


def _load_file(path: Path, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    builder = _builder(path)
    if builder is None:
        raise PreferenceDataError(f"{path.name}: unknown ending; known are {', '.join(_BUILDERS)}, each also with .gz.")
    _check_split(path, split)
    options = _OPTIONS.get(builder, {}) | {"streaming": streaming}
    try:
        return load_dataset(builder, data_files=str(path), split=split or "train", **options)
    except Exception as error:  # each builder raises errors of its own
        reason = next(iter(str(error.__cause__ or error).splitlines()), "it is empty")
        raise PreferenceDataError(f"{path.name}: cannot be read as {builder}: {reason}") from error


def _pick(data: AnyDataset, split: str | None, name: str) -> Dataset | IterableDataset:
    if isinstance(data, Dataset | IterableDataset):
        if split is not None:
            raise PreferenceDataError(f"{name}: it has no splits: leave split={split!r} out.")
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise PreferenceDataError(f"{name}: splits are {', '.join(data)}: pass split= one of them (got {split!r}).")
    return data[split]


@dataclass(frozen=True)
class _FileRows:
    """Rows of a json, jsonl or csv file, `.gz` of these too; `split` may slice them ("train[:500]")."""

    path: Path
    split: str | None

    def __iter__(self) -> Iterator[dict[str, Any] | str]:
        rows = self._rows()
        if self.split in (None, "train"):
            yield from rows
            return
        kept = list(rows)
        cut = ReadInstruction.from_spec(self.split).to_absolute({"train": len(kept)})
        for part in cut:
            yield from kept[part.from_ : part.to]

    def _rows(self) -> Iterator[dict[str, Any] | str]:
        kind = _builder(self.path)
        try:
            with (gzip.open if self.path.suffix == ".gz" else open)(
                self.path, "rt", encoding="utf-8-sig", newline="" if kind == "csv" else None
            ) as file:
                yield from _csv_rows(file) if kind == "csv" else _json_rows(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._refusal(kind, "the gzip file is damaged or cut short: fetch it again") from error
        except UnicodeDecodeError as error:
            raise self._refusal(kind, f"byte {error.start} is not UTF-8: convert the file") from error
        except (_BadFile, csv.Error) as error:
            raise self._refusal(kind, str(error)) from error

    def _refusal(self, kind: str | None, reason: str) -> PreferenceDataError:
        return PreferenceDataError(f"{self.path.name}: cannot be read as {kind}: {reason}")


class _BadFile(Exception):
    """Why a file as a whole is not what its ending says."""


def _json_rows(file: IO[str]) -> Iterator[dict[str, Any] | str]:
    """Objects of a JSON array, or one a line."""
    first = next((c for c in iter(lambda: file.read(1), "") if not c.isspace()), "")
    if not first:
        raise _BadFile("it is empty")
    if first in ("[", "{") and _is_document(file, first):
        file.seek(0)
        yield from _document(file)
        return
    file.seek(0)
    for n, line in enumerate(iter(lambda: file.readline(MAX_LINE), "")):
        if len(line) >= MAX_LINE:
            raise _BadFile(f"line {n + 1} is longer than {MAX_LINE:,} characters: write one row a line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if n == 0:
                html = ", it looks like HTML" if line.lstrip().startswith("<") else ""
                raise _BadFile(f"line 1 is not JSON{html}: {getattr(error, 'msg', error)}") from error
            yield "not JSON"
        else:
            yield row if isinstance(row, dict) else "not a record"


def _is_document(file: IO[str], first: str) -> bool:
    """True for a file that is one JSON value and not one a line: an array, or an object that goes on after a line."""
    file.seek(0)
    line = next(iter(lambda: file.readline(MAX_LINE).strip("\ufeff"), ""), "")
    if first == "[":
        return True
    try:
        json.loads(line)
    except ValueError:
        return line.strip() == "{"
    return False


def _document(file: IO[str]) -> Iterator[dict[str, Any] | str]:
    text = file.read(4 * MAX_LINE)
    if len(text) >= 4 * MAX_LINE:
        raise _BadFile(f"one JSON value of more than {4 * MAX_LINE:,} characters: write one row a line")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadFile(f"line {getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}") from error
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        value = lists[0] if len(lists) == 1 and len(value) <= 2 else [value]
    for row in value:
        yield row if isinstance(row, dict) else "not a record"


def _csv_rows(file: IO[str]) -> Iterator[dict[str, Any] | str]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.DictReader(file, strict=True)
    if not reader.fieldnames:
        raise _BadFile("it is empty")
    for row in reader:
        if None in row:
            yield "more cells than columns"
        else:
            yield row

"""Where rows come from: files, saved data sets, the Hub, memory; as they are, bad ones marked."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    concatenate_datasets,
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
    source: str | Path | AnyDataset,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    streaming: bool = False,
) -> Source:
    """Rows of anything that `load_rows` reads; json and csv files are read here, row by row, mixed types and all."""
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and _builder(path) in ("json", "csv"):
        _check_file(path, split, config)
        stat = path.stat()
        key = Hasher.hash((str(path.resolve()), stat.st_size, stat.st_mtime_ns, split))
        return Source(path.name, _FileRows(path, split), key, large=stat.st_size > 2**23)
    name = path.name if path is not None else ""
    data = load_rows(source, split, revision, config=config, streaming=streaming)
    if isinstance(data, IterableDataset):
        return Source(name, data)
    if len(data) == 0:
        raise PreferenceDataError(f"{name or 'data set'}: the data set has no rows: check path, split and filters.")
    return Source(name, data, data._fingerprint, large=len(data) >= 10_000)


def load_rows(
    source: str | Path | AnyDataset,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Rows as they are.

    Args:
        source: a data set in memory, a file (.json, .jsonl, .parquet, .csv, each also with .gz), a folder written by
            `save_to_disk`, a folder of files named after their splits, or a data set id on the Hub.
        split: which of several; a file and a data set without splits are "train", and slices such as `"train[:500]"`
            work everywhere but on a stream; None where there is one.
        revision: branch, tag or commit on the Hub.
        config: which configuration ("subset") of a data set on the Hub or in a folder, where it has several.
        streaming: read files and the Hub while iterating, for data that exceed memory.

    Raises:
        PreferenceDataError: no such file, an unknown ending, an unreadable file, no such split.
    """
    if isinstance(source, Dataset | DatasetDict | IterableDataset | IterableDatasetDict):
        _refuse_config("data set", config)
        return _pick(source, split, "data set")
    if not isinstance(source, str | Path):
        raise PreferenceDataError(f"data set: expected a data set, a path or a Hub id, got {type(source).__name__}.")
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        _refuse_config(path.name, config)
        return _pick(load_from_disk(str(path)), split, path.name)
    if path.is_file():
        return _load_file(path, split, config, streaming)
    if not path.is_dir() and (_builder(path) or path.is_absolute() or str(source).startswith((".", "~"))):
        raise PreferenceDataError(f"dataset: no file or saved data set at {source}: check the path.")
    name = str(path) if path.is_dir() else str(source)
    try:
        data = load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # each builder and the Hub client raise errors of their own
        reason, *more = [line for line in str(error).splitlines() if line] or [type(error).__name__]
        if more and "available configs" in more[0]:
            reason += f" {more[0]}: pass config= (recipes: --dataset_config) one of them"
        raise PreferenceDataError(f"dataset: cannot read {source}, split {split!r}: {reason}") from error
    return _pick(data, None, str(source))


def _refuse_config(name: str, config: str | None) -> None:
    if config is not None:
        raise PreferenceDataError(f"{name}: only the Hub and folders have configurations: leave config={config!r} out.")


def _builder(path: Path) -> str | None:
    return _BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _check_file(path: Path, split: str | None, config: str | None) -> None:
    """A file is one split, "train", of no configuration: anything else is refused before a row is read."""
    _refuse_config(path.name, config)
    if split is not None and split.split("[")[0] != "train":
        raise PreferenceDataError(f"{path.name}: a file has no split {split!r}: leave it out, or pass 'train[:500]'.")
    _cut(split, {"train": 2**62}, path.name)


class _Part(NamedTuple):
    name: str
    rows: range


def _cut(split: str | None, sizes: dict[str, int], name: str) -> list[_Part]:
    """Which rows of which split `"train[:500]+test"` asks for; None is all of "train"."""
    try:
        parts = ReadInstruction.from_spec(split or "train").to_absolute(sizes)
    except (AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PreferenceDataError(f"{name}: split {split!r}: {reason}: slices are written 'train[:500]'.") from error
    return [_Part(part.splitname, range(part.from_, part.to)) for part in parts]


def _load_file(path: Path, split: str | None, config: str | None, streaming: bool) -> Dataset | IterableDataset:
    builder = _builder(path)
    if builder is None:
        raise PreferenceDataError(f"{path.name}: unknown ending; known are {', '.join(_BUILDERS)}, each also with .gz.")
    _check_file(path, split, config)
    options = _OPTIONS.get(builder, {}) | {"streaming": streaming}
    try:
        return load_dataset(builder, data_files=str(path), split=split or "train", **options)
    except Exception as error:  # each builder raises errors of its own
        reason = next(iter(str(error.__cause__ or error).splitlines()), "it is empty")
        raise PreferenceDataError(f"{path.name}: cannot be read as {builder}: {reason}") from error


def _pick(data: AnyDataset, split: str | None, name: str) -> Dataset | IterableDataset:
    """The split, or slices of splits; a data set without splits is its own "train", as a file is."""
    parts = {"train": data} if isinstance(data, Dataset | IterableDataset) else data
    if split is None and len(parts) == 1:
        return next(iter(parts.values()))
    if split in parts:
        return parts[split]
    sliced = split is not None and ("[" in split or "+" in split)
    if not sliced or any(isinstance(part, IterableDataset) for part in parts.values()):
        raise PreferenceDataError(f"{name}: splits are {', '.join(parts)}: pass split= one of them (got {split!r}).")
    cut = _cut(split, {key: len(part) for key, part in parts.items()}, name)
    return concatenate_datasets([parts[part.name].select(part.rows) for part in cut])


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
        cut = _cut(self.split, {"train": len(kept)}, self.path.name)
        if not any(part.rows for part in cut):
            raise PreferenceDataError(f"{self.path.name}: split {self.split!r} is none of its {len(kept)} rows.")
        for part in cut:
            yield from kept[part.rows.start : part.rows.stop]

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
            raise self._refusal(kind, f"line {self._broken_line()} is not UTF-8: convert the file") from error
        except (_BadFile, csv.Error) as error:
            raise self._refusal(kind, str(error)) from error

    def _broken_line(self) -> int:
        """The first line that is not UTF-8: the decoder itself counts bytes of its buffer only."""
        decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
        with (gzip.open if self.path.suffix == ".gz" else open)(self.path, "rb") as file:
            for part in iter(lambda: file.read(2**20), b""):
                try:
                    decoder.decode(part)
                except UnicodeDecodeError as error:
                    return line + error.object[: error.start].count(b"\n")
                line += part.count(b"\n")
        return line  # cut short in the middle of a character

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


_WRAPPERS = ("data", "rows", "train", "examples", "instances")
"""Keys of an object that holds the rows of a whole file."""


def _is_document(file: IO[str], first: str) -> bool:
    """True for a file that is one JSON value and not one a line: an array, or an object that goes on after a line.

    An object on one line alone is a row, unless it is a wrapper of rows.
    """
    file.seek(0)
    line = file.readline(MAX_LINE).strip("\ufeff")
    if first == "[":
        return True
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return line.rstrip().endswith(("{", "[", ","))  # it goes on
    wraps = len(value) <= 2 and any(isinstance(value.get(key), list) for key in _WRAPPERS)
    return wraps and not file.read().strip()


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

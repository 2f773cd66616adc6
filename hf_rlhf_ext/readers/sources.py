"""Reads rows from files, saved datasets, the Hub or memory, without converting them. Unreadable rows are marked."""

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

from ..data.schema import PreferenceDataError, Row

# Read these columns as text: pandas would read the reply "42" as a number and "NA" as missing.
_CSV_CONVERTERS = {
    "prompt": str,
    "chosen": str,
    "rejected": str,
    "category": str,
}
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
MAX_LINE = 2**28
"""Longest line that is read, in characters. A line needs several times its size in memory."""
_MANY_ROWS = 10_000
_MANY_BYTES = 2**23
"""A larger source is converted once and cached."""

AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict


@dataclass(frozen=True)
class Source:
    """Rows to convert.

    Attributes:
        name: Name of the source, for messages.
        rows: The rows; they can be iterated more than once. A row that cannot be read is a string, the reason.
        fingerprint: Identifies the content of the rows; None if it is not known.
        large: Whether converting the rows takes a while, so that a progress bar is shown and the result is cached.
    """

    name: str
    rows: Iterable[Row | str]
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
    """Opens anything that `load_rows` reads. JSON and CSV files are read row by row, so that types may differ."""
    name = ""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        name = path.name
        if path.is_file() and _builder(path) in ("json", "csv"):
            return _open_file(path, split, config)
    # Everything else is read by the library `datasets`.
    rows = load_rows(source, split, revision, config=config, streaming=streaming)
    # The length of a stream is not known before its end.
    if isinstance(rows, IterableDataset):
        return Source(name, rows)
    if len(rows) == 0:
        raise PreferenceDataError(f"{name or 'dataset'}: the dataset has no rows: check path, split and filters.")
    return Source(name, rows, rows._fingerprint, large=len(rows) >= _MANY_ROWS)


def _open_file(path: Path, split: str | None, config: str | None) -> Source:
    _check_file(path, split, config)
    stat = path.stat()
    identity = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, split)
    is_large = stat.st_size > _MANY_BYTES
    return Source(path.name, _FileRows(path, split), Hasher.hash(identity), large=is_large)


def load_rows(
    source: str | Path | AnyDataset,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Loads rows from a file, a folder, the Hub or memory, without converting them.

    Args:
        source: Dataset in memory, path of a file (`.json`, `.jsonl`, `.parquet` or `.csv`, each also with `.gz`), path
            of a folder written by `save_to_disk`, path of a folder with one file per split, or dataset id on the Hub.
        split: Split to load. A file, or a dataset without splits, is the split `"train"`. Slices such as
            `"train[:500]"` are supported except for streams. It may be `None` if there is only one split.
        revision: Branch, tag or commit of a dataset on the Hub.
        config: Configuration ("subset") of a dataset on the Hub or in a folder, if it has several.
        streaming: Whether to read while iterating, for data that does not fit into memory.

    Returns:
        The rows; an `IterableDataset` with `streaming`.

    Raises:
        PreferenceDataError: The file does not exist, has an unknown extension or cannot be read, or the split does not
            exist.
    """
    if isinstance(source, Dataset | DatasetDict | IterableDataset | IterableDatasetDict):
        _refuse_config("dataset", config)
        return _pick(source, split, "dataset")
    if not isinstance(source, str | Path):
        raise PreferenceDataError(f"dataset: expected a dataset, a path or a Hub id, got {type(source).__name__}.")

    path = Path(source).expanduser()
    if _is_saved(path):
        _refuse_config(path.name, config)
        return _pick(load_from_disk(str(path)), split, path.name)
    if path.is_file():
        return _load_file(path, split, config, streaming)
    if path.is_dir():
        name = str(path)
    elif _looks_like_path(source):
        raise PreferenceDataError(f"dataset: no file or saved data set at {source}: check the path.")
    else:
        name = str(source)
    try:
        rows = load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # each builder and the Hub client raise errors of their own
        reason = _first_line(error)
        raise PreferenceDataError(f"dataset: cannot read {source}, split {split!r}: {reason}") from error
    return _pick(rows, None, str(source))


def _is_saved(path: Path) -> bool:
    """True if the folder was written by `save_to_disk`."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _looks_like_path(source: str | Path) -> bool:
    """True if the source cannot be an id on the Hub."""
    path = Path(source).expanduser()
    if path.is_absolute() or _builder(path):
        return True
    return str(source).startswith((".", "~"))


def _first_line(error: Exception) -> str:
    """Returns the first line of the error, with a remedy if a configuration is missing."""
    lines = [line for line in str(error).splitlines() if line]
    if not lines:
        return type(error).__name__
    reason = lines[0]
    if len(lines) > 1 and "available configs" in lines[1]:
        reason += f" {lines[1]}: pass one of them as config= (recipes: --dataset_config)"
    return reason


def _refuse_config(name: str, config: str | None) -> None:
    if config is not None:
        raise PreferenceDataError(
            f"{name}: only datasets on the Hub and folders have configurations: leave config={config!r} out."
        )


def _builder(path: Path) -> str | None:
    return _BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _check_file(path: Path, split: str | None, config: str | None) -> None:
    """Raises if a split other than "train" or a configuration is requested of a file, before any row is read."""
    _refuse_config(path.name, config)
    name = "train" if split is None else split.split("[")[0]
    if name != "train":
        raise PreferenceDataError(f"{path.name}: a file has no split {split!r}: leave it out, or pass 'train[:500]'.")
    # The number of rows is not known yet. This only checks the syntax of the slice.
    _cut(split, {"train": 2**62}, path.name)


class _Slice(NamedTuple):
    """A range of rows of one split."""

    split: str
    rows: range


def _cut(
    split: str | None,
    sizes: dict[str, int],
    name: str,
) -> list[_Slice]:
    """Returns the rows of each split that `"train[:500]+test"` selects. None selects all of "train"."""
    try:
        instructions = ReadInstruction.from_spec(split or "train").to_absolute(sizes)
    except (AssertionError, ValueError) as error:  # raised by `datasets` for a slice that it cannot parse
        reason = str(error).splitlines()[0]
        raise PreferenceDataError(f"{name}: split {split!r}: {reason}: write a slice as 'train[:500]'.") from error
    return [_Slice(part.splitname, range(part.from_, part.to)) for part in instructions]


def _load_file(
    path: Path,
    split: str | None,
    config: str | None,
    streaming: bool,
) -> Dataset | IterableDataset:
    builder = _builder(path)
    if builder is None:
        known = ", ".join(_BUILDERS)
        raise PreferenceDataError(f"{path.name}: unknown ending; known are {known}, each also with .gz.")
    _check_file(path, split, config)
    options = {"converters": _CSV_CONVERTERS} if builder == "csv" else {}
    try:
        return load_dataset(builder, data_files=str(path), split=split or "train", streaming=streaming, **options)
    except Exception as error:  # each builder raises errors of its own
        lines = str(error.__cause__ or error).splitlines()
        reason = lines[0] if lines else "it is empty"
        raise PreferenceDataError(f"{path.name}: cannot be read as {builder}: {reason}") from error


def _pick(dataset: AnyDataset, split: str | None, name: str) -> Dataset | IterableDataset:
    """Returns the split, or slices of splits. A dataset without splits counts as the split "train", like a file."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = dataset
    else:
        splits = {"train": dataset}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split in splits:
        return splits[split]

    is_sliced = split is not None and ("[" in split or "+" in split)
    is_stream = any(isinstance(rows, IterableDataset) for rows in splits.values())
    if not is_sliced or is_stream:
        known = ", ".join(splits)
        raise PreferenceDataError(f"{name}: splits are {known}: pass one of them as split= (got {split!r}).")
    sizes = {key: len(rows) for key, rows in splits.items()}
    chosen = []
    for part in _cut(split, sizes, name):
        rows = splits[part.split]
        chosen.append(rows.select(part.rows))
    return concatenate_datasets(chosen)


# --- files of json, jsonl and csv, row by row ------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileRows:
    """Rows of a JSON, JSONL or CSV file, which may be compressed (`.gz`). `split` may slice them ("train[:500]")."""

    path: Path
    split: str | None

    def __iter__(self) -> Iterator[Row | str]:
        if self.split in (None, "train"):
            yield from self._rows()
            return
        rows = list(self._rows())  # percentages need the number of rows
        slices = _cut(self.split, {"train": len(rows)}, self.path.name)
        if not any(part.rows for part in slices):
            name = self.path.name
            raise PreferenceDataError(f"{name}: split {self.split!r} selects none of the {len(rows)} rows.")
        for part in slices:
            for n in part.rows:
                yield rows[n]

    def _rows(self) -> Iterator[Row | str]:
        kind = _builder(self.path)
        # The csv module handles line breaks itself, including those inside quotes.
        newline = "" if kind == "csv" else None
        read = _csv_rows if kind == "csv" else _json_rows
        try:
            with self._open("rt", encoding="utf-8-sig", newline=newline) as file:
                yield from read(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._refusal(kind, "the gzip file is damaged or incomplete: download it again") from error
        except UnicodeDecodeError as error:
            raise self._refusal(kind, f"line {self._broken_line()} is not UTF-8: convert the file to UTF-8") from error
        except (_BadFile, csv.Error) as error:
            raise self._refusal(kind, str(error)) from error

    def _open(self, mode: str, **options: Any) -> IO:
        opener = gzip.open if self.path.suffix == ".gz" else open
        return opener(self.path, mode, **options)

    def _broken_line(self) -> int:
        """Returns the number of the first line that is not UTF-8. The decoder only knows positions in its buffer."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        line = 1
        with self._open("rb") as file:
            while part := file.read(2**20):
                try:
                    decoder.decode(part)
                except UnicodeDecodeError as error:
                    return line + error.object[: error.start].count(b"\n")
                line += part.count(b"\n")
        return line  # the file ends in the middle of a character

    def _refusal(self, kind: str | None, reason: str) -> PreferenceDataError:
        return PreferenceDataError(f"{self.path.name}: cannot be read as {kind}: {reason}")


class _BadFile(Exception):
    """Why the content of a whole file does not match its extension."""


_WRAPPERS = ("data", "rows", "train", "examples", "instances")
"""Keys under which a JSON object may hold all rows of a file."""


def _json_rows(file: IO[str]) -> Iterator[Row | str]:
    """Yields the objects of a JSON array, or one object per line."""
    first = _first_character(file)
    file.seek(0)
    if not first:
        raise _BadFile("it is empty")
    if first == "{":
        is_document = _is_object_of_many_lines(file)
    else:
        is_document = first == "["
    file.seek(0)
    if is_document:
        yield from _document_rows(file)
    else:
        yield from _line_rows(file)


def _first_character(file: IO[str]) -> str:
    """Returns the first character that is not white space, or ""."""
    while character := file.read(1):
        if not character.isspace():
            return character
    return ""


def _is_object_of_many_lines(file: IO[str]) -> bool:
    """True for a file that is a single JSON object, not one object per line.

    A single object on one line counts as a row, unless it contains a list of rows.
    """
    line = file.readline(MAX_LINE).strip("\ufeff")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        goes_on = ("{", "[", ",")
        return line.rstrip().endswith(goes_on)
    if not _is_wrapper(value):
        return False
    return not file.read().strip()  # nothing follows


def _is_wrapper(value: Row) -> bool:
    """True for an object with a list of rows under one of the usual keys, and at most one other entry."""
    has_rows = any(isinstance(value.get(key), list) for key in _WRAPPERS)
    return has_rows and len(value) <= 2


def _document_rows(file: IO[str]) -> Iterator[Row | str]:
    """Yields the rows of a file that is one JSON value: an array, an object with an array inside, or a single row."""
    text = file.read(4 * MAX_LINE)
    if len(text) >= 4 * MAX_LINE:
        raise _BadFile(f"one JSON value of more than {4 * MAX_LINE:,} characters: write one row per line")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", "?")
        raise _BadFile(f"line {line}: {_reason(error)}") from error
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        if len(lists) == 1 and len(value) <= 2:
            value = lists[0]
        else:
            value = [value]
    for row in value:
        yield _record(row)


def _record(value: Any) -> Row | str:
    return value if isinstance(value, dict) else "not a JSON object"


def _reason(error: Exception) -> str:
    """Returns the message of a JSON error, without the position in the file."""
    return str(getattr(error, "msg", error))


def _line_rows(file: IO[str]) -> Iterator[Row | str]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) >= MAX_LINE:
            raise _BadFile(f"line {number} is longer than {MAX_LINE:,} characters: write one row per line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1:  # not a file of JSON at all
                html = ", it looks like HTML" if line.lstrip().startswith("<") else ""
                raise _BadFile(f"line 1 is not JSON{html}: {_reason(error)}") from error
            yield "not JSON"
        else:
            yield _record(row)


def _csv_rows(file: IO[str]) -> Iterator[Row | str]:
    csv.field_size_limit(MAX_LINE)  # Python's default limit of 131,072 characters is too low for some conversations
    reader = csv.DictReader(file, strict=True)
    if not reader.fieldnames:
        raise _BadFile("it is empty")
    for row in reader:
        has_more_cells = None in row  # the reader stores extra cells under the key None
        yield "more cells than columns" if has_more_cells else row

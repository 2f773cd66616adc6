"""Reads rows from files, saved datasets, the Hub or memory, without converting them. Unreadable rows are marked."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.fingerprint import Hasher

from ..data.schema import PreferenceDataError, Row
from ..errors import first_line
from .columns import holds_text
from .files import KINDS, csv_layout, kind_of, rows_of, table_rows

_PARQUET = ".parquet"
_KNOWN = ", ".join([*(ending for ending in KINDS if ending != ".txt"), _PARQUET])
_MISSING = ["", "NA", "N/A", "#N/A", "<NA>", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "None"]
"""Cells of a csv file that are missing values, in columns that hold no text."""
_PANDAS_INDEX = "__index_level_0__"
"""The column of pandas' names of rows, which it makes of cells without a column."""
_MANY_ROWS = 10_000
_MANY_BYTES = 2**23
"""A larger source is converted once and cached."""

AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict
AnySource = str | Path | AnyDataset | list[Row] | Any
"""A dataset, a list of rows, a pandas DataFrame, a path, or an id on the Hub."""


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
    source: AnySource,
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
        if path.is_file() and kind_of(path) == "text":
            raise PreferenceDataError(
                f"{name}: a .txt file has one prompt per line and no answers; for answers, known are {_KNOWN}."
            )
        if path.is_file() and kind_of(path):
            return _open_file(path, split, config)
        if path.is_dir() and not _is_saved(path):
            files = _files_of_folder(path, config)
            if files:
                return _open_files(path.name, files, split)
    elif is_table(source):
        return Source(name, _rows_of_table(source, split), large=len(source) >= _MANY_ROWS)
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
    return _open_files(path.name, {"train": (path,)}, split, config)


def _open_files(name: str, files: "_Files", split: str | None, sheet: str | None = None) -> Source:
    split = _known_split(split, files, name)
    identity: list[Any] = [split, sheet]
    n_bytes = 0
    for paths in files.values():
        for path in paths:
            stat = path.stat()
            n_bytes += stat.st_size
            identity += [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    rows = _FileRows(name, files, split, sheet)
    return Source(name, rows, Hasher.hash(tuple(identity)), large=n_bytes > _MANY_BYTES)


def _files_of_folder(path: Path, config: str | None) -> "_Files | None":
    """Returns the files of each split of a folder of JSON or CSV files. None if `datasets` has to read the folder.

    `datasets` finds the splits, from the names of the files or from the folder's README.
    """
    try:
        builder = load_dataset_builder(str(path), config)
    except Exception:  # `load_rows` raises the same error with a remedy
        return None
    plain = type(builder.config)()
    if builder.name not in ("json", "csv"):
        return None
    # Another delimiter or the like may be set in the README.
    options = ("sep", "delimiter", "names", "column_names", "skiprows", "encoding", "field", "features")
    if any(getattr(builder.config, option, None) != getattr(plain, option, None) for option in options):
        return None
    files: dict[str, tuple[Path, ...]] = {}
    for split, names in (builder.config.data_files or {}).items():
        files[str(split)] = tuple(map(Path, names))
    every_file = [file for paths in files.values() for file in paths]
    if not every_file or not all(file.is_file() and kind_of(file) == builder.name for file in every_file):
        return None
    return files


def is_table(source: Any) -> bool:
    """True for a list of rows, and for a DataFrame of pandas."""
    if isinstance(source, list):
        return True
    return type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "itertuples")


def _rows_of_table(source: Any, split: str | None) -> list[Row | str]:
    """Returns the rows of a list or DataFrame, which count as the split "train"."""
    rows: list[Row | str] = []
    for row in source if isinstance(source, list) else table_rows(source):
        rows.append(row if isinstance(row, dict) else "not a dict")
    if not rows:
        raise PreferenceDataError("dataset: there are no rows: check how they were made.")
    if split in (None, "train"):
        return rows
    if not _is_sliced(split):
        raise _no_split(split, ["train"], "dataset")
    picked = []
    for part in _cut(split, {"train": len(rows)}, "dataset"):
        picked += rows[part.rows.start : part.rows.stop]
    return picked


def load_rows(
    source: AnySource,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Loads rows from a file, a folder, the Hub or memory, without converting them.

    Args:
        source: Dataset in memory, list of dicts, pandas DataFrame, path of a file (`.json`, `.jsonl`, `.parquet`,
            `.csv`, `.tsv`, or `.txt` with one prompt per line, each also with `.gz`; `.xlsx` needs openpyxl), path of a
            folder written by `save_to_disk`, path of a folder with one file per split, or dataset id on the Hub.
        split: Split to load. A file, or a dataset without splits, is the split `"train"`. Slices such as
            `"train[:500]"` are supported except for streams. It may be `None` if there is only one split.
        revision: Branch, tag or commit of a dataset on the Hub.
        config: Configuration ("subset") of a dataset on the Hub or in a folder, or sheet of an xlsx file, if it has
            several.
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
    if is_table(source):
        _refuse_config("dataset", config)
        return _as_dataset(_rows_of_table(source, split), "dataset", streaming)
    if not isinstance(source, str | Path):
        kind = type(source).__name__
        raise PreferenceDataError(
            f"dataset: expected a dataset, a list of dicts, a DataFrame, a path or a Hub id, got {kind}."
        )

    path = Path(source).expanduser()
    if _is_saved(path):
        _refuse_config(path.name, config)
        return _pick(load_from_disk(str(path)), split, path.name)
    if path.is_file():
        return _load_file(path, split, config, streaming)
    if path.is_dir():
        file = _only_file_of(path, split)
        if file is not None and config is None:
            return _load_file(file, "train", None, streaming)
        name = str(path)
    elif _looks_like_path(source):
        raise PreferenceDataError(f"dataset: no file or saved data set at {source}: check the path.")
    else:
        name = str(source)
    try:
        options = _csv_options_of(name, config, revision)
        rows = load_dataset(name, config, split=split, revision=revision, streaming=streaming, **options)
    except Exception as error:  # each builder and the Hub client raise errors of their own
        reason = _with_remedy(error)
        raise PreferenceDataError(f"dataset: cannot read {source}, split {split!r}: {reason}") from error
    return _pick(rows, None, str(source))


def _only_file_of(folder: Path, split: str | None) -> Path | None:
    """The `.jsonl` file of a split, if the folder has just this one for it; None otherwise.

    `datasets` reads all splits at once, and refuses a column without values in one split and with texts in another.
    """
    file = folder / f"{split}.jsonl"
    # A README may say which files a split has, as may names such as train-00001.jsonl.
    of_split = [item for item in folder.iterdir() if str(split) in item.name or item.name == "README.md"]
    return file if split is not None and file.is_file() and of_split == [file] else None


def _as_dataset(rows: Iterable[Row | str], name: str, streaming: bool) -> Dataset | IterableDataset:
    """Returns rows that were read one by one as a dataset. Rows that could not be read are left out."""
    readable = [row for row in rows if isinstance(row, dict)]
    try:
        dataset = Dataset.from_list(readable, on_mixed_types="use_json")
    except (TypeError, ValueError, OverflowError) as error:
        raise PreferenceDataError(f"{name}: the rows fit into no table: {first_line(error)}") from error
    return dataset.to_iterable_dataset() if streaming else dataset


def _csv_options_of(name: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """Returns the options for a folder or dataset of csv files, so that the answers "42" and "None" stay text."""
    builder = load_dataset_builder(name, config, revision=revision)
    if builder.name != "csv":
        return {}
    files = [Path(file) for of_split in (builder.config.data_files or {}).values() for file in of_split]
    layout = csv_layout(files[0]) if files and files[0].is_file() and kind_of(files[0]) else None
    if layout is not None and builder.config.sep == ",":  # otherwise the folder's README says it
        return _csv_options(layout.names) | {"sep": layout.delimiter, "skiprows": layout.skipped}
    rows = builder.as_streaming_dataset()
    first_split = next(iter(rows.values()))
    columns = [name for name in next(iter(first_split), {}) if name != _PANDAS_INDEX]
    if len(columns) != 1 or not re.search(r"\w[;\t|]\w", columns[0]):
        return _csv_options(columns)
    # The whole header is one column: another character than the comma separates the cells.
    delimiter = max(";\t|", key=columns[0].count)
    return _csv_options(columns[0].split(delimiter)) | {"sep": delimiter}


def _csv_options(columns: Iterable[str]) -> dict[str, Any]:
    """Returns options for pandas: "42" and "None" are text in columns that hold text, and missing values elsewhere."""
    text = []
    other = []
    for column in columns:
        (text if holds_text(column) else other).append(column)
    return {
        "converters": dict.fromkeys(text, str),
        "na_values": dict.fromkeys(other, _MISSING),
        "keep_default_na": False,
    }


def _is_saved(path: Path) -> bool:
    """True if the folder was written by `save_to_disk`."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _looks_like_path(source: str | Path) -> bool:
    """True if the source cannot be an id on the Hub."""
    path = Path(source).expanduser()
    if path.is_absolute() or kind_of(path) or _is_parquet(path):
        return True
    return str(source).startswith((".", "~"))


def _with_remedy(error: Exception) -> str:
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


def _is_parquet(path: Path) -> bool:
    return path.name.removesuffix(".gz").lower().endswith(_PARQUET)


def _check_file(path: Path, split: str | None, config: str | None) -> None:
    """Raises if a split other than "train" or a configuration is requested of a file, before any row is read."""
    if kind_of(path) != "xlsx":  # whose sheets are configurations
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
        raise PreferenceDataError(
            f"{name}: split {split!r}: {first_line(error)}: write a slice as 'train[:500]'."
        ) from error
    return [_Slice(part.splitname, range(part.from_, part.to)) for part in instructions]


def _load_file(
    path: Path,
    split: str | None,
    config: str | None,
    streaming: bool,
) -> Dataset | IterableDataset:
    kind = kind_of(path)
    if kind is None and not _is_parquet(path):
        raise PreferenceDataError(f"{path.name}: unknown ending; known are {_KNOWN}, .txt, each also with .gz.")
    _check_file(path, split, config)
    builder = {None: "parquet", "tsv": "csv"}.get(kind, kind)
    options: dict[str, Any] = {}
    layout = None
    if builder == "csv":
        layout = csv_layout(path)
    if layout is not None:
        options = _csv_options(layout.names) | {"sep": layout.delimiter, "skiprows": layout.skipped}
        if not streaming:
            _check_cells(path)
    # For `datasets`, the column of a text file would be `text`, and commas in a table of one column would separate.
    has_one_column = layout is not None and len(layout.names) == 1
    if kind in ("text", "xlsx") or has_one_column:
        return _as_dataset(_open_file(path, split, config).rows, path.name, streaming)
    try:
        return load_dataset(builder, data_files=str(path), split=split or "train", streaming=streaming, **options)
    except Exception as error:  # each builder raises errors of its own
        lines = str(error.__cause__ or error).splitlines()
        reason = lines[0] if lines else "it is empty"
        raise PreferenceDataError(f"{path.name}: cannot be read as {builder}: {reason}") from error


def _check_cells(path: Path) -> None:
    """Raises `PreferenceDataError` for the first row of a csv file with more cells than columns.

    pandas would take the first cells of all rows for the names of the rows, and shift the others.
    """
    for number, row in enumerate(rows_of(path)):
        if not isinstance(row, dict):
            raise PreferenceDataError(
                f"{path.name} row {number}: {row}: put double quotes around texts that have the delimiter in them."
            )


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

    is_stream = any(isinstance(rows, IterableDataset) for rows in splits.values())
    if not _is_sliced(split) or is_stream:
        raise _no_split(split, splits, name)
    sizes = {key: len(rows) for key, rows in splits.items()}
    chosen = []
    for part in _cut(split, sizes, name):
        rows = splits[part.split]
        chosen.append(rows.select(part.rows))
    return concatenate_datasets(chosen)


def _is_sliced(split: str | None) -> bool:
    return split is not None and ("[" in split or "+" in split)


def _no_split(split: str | None, splits: Iterable[str], name: str) -> PreferenceDataError:
    known = ", ".join(splits)
    return PreferenceDataError(f"{name}: splits are {known}: pass one of them as split= (got {split!r}).")


# --- files, row by row ------------------------------------------------------------------------------------------------

_Files = Mapping[str, tuple[Path, ...]]
"""Split -> its files."""


def _known_split(split: str | None, files: _Files, name: str) -> str:
    """Returns the split to read, the only one for None. Raises if there is no such split."""
    if split is None and len(files) == 1:
        return next(iter(files))
    if split is None or (split not in files and not _is_sliced(split)):
        raise _no_split(split, files, name)
    return split


@dataclass(frozen=True)
class _FileRows:
    """Rows of one split of some files, or of slices of splits ("train[:500]+test")."""

    name: str
    files: _Files
    split: str
    sheet: str | None = None

    def __iter__(self) -> Iterator[Row | str]:
        if self.split in self.files:
            yield from self._rows(self.split)
            return
        # Percentages need the number of rows.
        any_size = dict.fromkeys(self.files, 2**62)
        rows = {}
        for part in _cut(self.split, any_size, self.name):
            rows[part.split] = list(self._rows(part.split))
        sizes = {name: len(of_split) for name, of_split in rows.items()}
        slices = _cut(self.split, sizes, self.name)
        if not any(part.rows for part in slices):
            n_rows = sum(sizes.values())
            raise PreferenceDataError(f"{self.name}: split {self.split!r} selects none of the {n_rows} rows.")
        for part in slices:
            for n in part.rows:
                yield rows[part.split][n]

    def _rows(self, split: str) -> Iterator[Row | str]:
        for path in self.files[split]:
            yield from rows_of(path, self.sheet)

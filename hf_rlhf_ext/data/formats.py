"""Readers: from wherever rows live to a data set, and from there to comparisons and a report."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .schema import LoadReport, PreferenceDataError, to_comparisons

# Columns of text are text: pandas would read the reply "42" as a number and "NA" as missing.
_OPTIONS = {"csv": {"converters": dict.fromkeys(("prompt", "chosen", "rejected", "category"), str)}}
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_comparisons(
    source: str | Path | Dataset | DatasetDict, split: str | None = None, revision: str | None = None
) -> tuple[Dataset, LoadReport]:
    """Reads preference data as comparison rows: `load_rows`, then `data.schema.to_comparisons` with its `LoadReport`.

    Raises `PreferenceDataError` as both do.
    """
    name = Path(source).name if isinstance(source, str | Path) else ""
    return to_comparisons(load_rows(source, split, revision), source=name)


def load_rows(
    source: str | Path | Dataset | DatasetDict, split: str | None = None, revision: str | None = None
) -> Dataset:
    """Rows as they are.

    Args:
        source: a data set in memory, a file (.json, .jsonl, .parquet, .csv, each also with .gz), a folder written by
            `save_to_disk`, a folder of files named after their splits, or a data set id on the Hub.
        split: which of several; slices such as `"train[:500]"` work for files and the Hub; None where there is one.
        revision: branch, tag or commit on the Hub.

    Raises:
        PreferenceDataError: no such file, an unknown ending, an unreadable file, no such split.
    """
    if isinstance(source, Dataset | DatasetDict):
        return _pick(source, split, "data set")
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return _pick(load_from_disk(str(path)), split, path.name)
    if path.is_file():
        return _read_file(path, split)
    if not path.is_dir() and (_builder(path) or path.is_absolute() or str(source).startswith((".", "~"))):
        raise PreferenceDataError(f"dataset: no file or saved data set at {source}: check the path.")
    name = str(path) if path.is_dir() else str(source)
    try:
        data = load_dataset(name, split=split, revision=revision)
    except Exception as error:  # each builder and the Hub client raise errors of their own
        reason = str(error).splitlines()[0]
        raise PreferenceDataError(f"dataset: cannot read {source}, split {split!r}: {reason}") from error
    return _pick(data, None, str(source))


def _builder(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    return _BUILDERS.get(Path(name).suffix)


def _read_file(path: Path, split: str | None) -> Dataset:
    builder = _builder(path)
    if builder is None:
        raise PreferenceDataError(f"{path.name}: unknown ending; known are {', '.join(_BUILDERS)}, each also with .gz.")
    if split is not None and split.split("[")[0] != "train":
        raise PreferenceDataError(f"{path.name}: a file has no split {split!r}: leave it out, or pass 'train[:500]'.")
    try:
        return load_dataset(builder, data_files=str(path), split=split or "train", **_OPTIONS.get(builder, {}))
    except Exception as error:  # each builder raises errors of its own
        reason = next(iter(str(error.__cause__ or error).splitlines()), "it is empty")
        raise PreferenceDataError(f"{path.name}: cannot be read as {builder}: {reason}") from error


def _pick(data: Dataset | DatasetDict, split: str | None, name: str) -> Dataset:
    if isinstance(data, Dataset):
        if split is not None:
            raise PreferenceDataError(f"{name}: it has no splits: leave split={split!r} out.")
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise PreferenceDataError(f"{name}: splits are {', '.join(data)}: pass split= one of them (got {split!r}).")
    return data[split]

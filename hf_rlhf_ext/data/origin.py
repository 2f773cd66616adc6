"""Where the rows of a dataset come from: a dataset on the Hub with its commit, or a file by its name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from datasets import Dataset

_HUB_FILE = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<commit>[0-9a-f]{40})/")
"""Address of a file of a dataset on the Hub, as the library `datasets` writes it."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_USUAL_CONFIG = re.compile(r"default(-[0-9a-f]+)?")
_FORMATS = ("json", "csv", "parquet", "arrow", "text", "pandas", "generator", "xml")
"""Names that `datasets` gives to data that it reads from files with one of its own builders."""


@dataclass(frozen=True)
class DataOrigin:
    """Where the rows of a dataset come from, as far as it is known.

    Attributes:
        name: Hub id, or the name of a file or folder without its path.
        revision: Commit of a dataset on the Hub.
        config: Configuration ("subset") of the dataset, if it has several.
        split: Split, such as `"train"` or `"train[:100]"`.
        rows: Number of rows that were given; `None` for a stream.
        columns: Names of their columns; `None` if they are not known.
    """

    name: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    rows: int | None = None
    columns: tuple[str, ...] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, dataset: Any) -> Self | None:
        """The origin of a dataset that a trainer is given; `None` without one. Of rows in a list, only their number.

        `map`, `filter`, `select` and `train_test_split` keep the origin.
        """
        if dataset is None:
            return None
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        names = getattr(dataset, "column_names", None)
        columns = tuple(names) if isinstance(names, list) else None
        info = getattr(dataset, "info", None)
        if info is None:
            return cls(rows=rows, columns=columns)
        name, revision = _recorded(info) or _cached(dataset, info) or (_own_name(info), None)
        if name is None:  # the split of data in memory is not one that others find
            return cls(rows=rows, columns=columns)
        config = info.config_name
        if config is None or _USUAL_CONFIG.fullmatch(config):
            config = None
        split = None if dataset.split is None else str(dataset.split)
        if revision is None and split == "train":  # every file has this split
            split = None
        return cls(name, revision, config, split, rows, columns)

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is an id on the Hub."""
        return self.revision is not None


def with_origin(dataset: Dataset, source: Any, name: str) -> Dataset:
    """Returns the dataset with a note of where its rows come from, for `DataOrigin.of`.

    Args:
        dataset: Rows that were made from those of `source`.
        source: The rows that were read.
        name: What was read, as the user named it. Of a path, only the last part is kept.
    """
    origin = DataOrigin.of(source) or DataOrigin()
    info = dataset.info
    if origin.is_on_hub:
        info.download_checksums = {f"hf://datasets/{origin.name}@{origin.revision}/": {}}
        info.config_name = origin.config
    elif name:
        info.dataset_name = Path(name).name
    dataset._split = getattr(source, "split", None)
    return dataset


def origins_of(train: Any, evaluation: Any = None, **others: Any) -> dict[str, DataOrigin]:
    """The origins of the datasets of a trainer.

    Args:
        train: Dataset of training.
        evaluation: Dataset of evaluation, or several by name.
        others: Further datasets by name.

    Returns:
        Their origins by name: `"train"`, `"eval"` or `"eval_NAME"` of each set, and the names of the others.
    """
    given = {"train": train}
    if isinstance(evaluation, Mapping):
        given |= {f"eval_{name}": part for name, part in evaluation.items()}
    else:
        given["eval"] = evaluation
    origins = {name: DataOrigin.of(dataset) for name, dataset in (given | others).items()}
    return {name: origin for name, origin in origins.items() if origin is not None}


def _recorded(info: Any) -> tuple[str, str] | None:
    """Hub id and commit in the addresses of the files that were read; `None` if they are of no or of several ones."""
    found = {match.group("name", "commit") for match in map(_HUB_FILE.match, info.download_checksums or {}) if match}
    return found.pop() if len(found) == 1 else None


def _cached(dataset: Any, info: Any) -> tuple[str, str] | None:
    """Hub id and commit from the folder in which `datasets` keeps what it read from the Hub; `None` for other data.

    The folder is `OWNER___NAME/CONFIG/VERSION/COMMIT`. That of a local file has a digest of another length.
    """
    if info.dataset_name is None:  # joined with other data
        return None
    found = set()
    for file in getattr(dataset, "cache_files", None) or ():
        parts = Path(file["filename"]).parts
        if len(parts) < 5 or not _COMMIT.fullmatch(parts[-2]):
            return None
        found.add((parts[-5].replace("___", "/", 1), parts[-2]))
    return found.pop() if len(found) == 1 else None


def _own_name(info: Any) -> str | None:
    """The name of a file or folder, without its path."""
    name = info.dataset_name
    return None if not name or name in _FORMATS else Path(name).name

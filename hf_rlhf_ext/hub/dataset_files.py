"""Splits of a data set as files that `load_dataset` reads without a guess: names, columns, shards and header."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import Dataset, DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.naming import _split_re
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from ..errors import UserError

logger = logging.getLogger(__name__)

Shards = Mapping[str, Mapping[str, Path]]
"""Split -> name of a file in the repository -> the file."""
ALL_SPLITS = "all"
"""`load_dataset(split="all")` reads all splits, so that no split of several can have this name."""


def check_split_names(names: Iterable[str]) -> None:
    """Refuses splits that `load_dataset` could not load.

    Raises:
        UserError: A name is not possible. The message has one that is.
    """
    names = [str(name) for name in names]
    for name in names:
        if not re.fullmatch(_split_re, name):
            raise UserError(
                f"push_comparisons: load_dataset takes no split named {name!r} (letters, digits and _, with dots "
                f"between): rename it, for example to {_possible_name(name)}."
            )
        if name == ALL_SPLITS and len(names) > 1:
            raise UserError(
                f"push_comparisons: load_dataset takes {name!r} for all splits: rename it, for example to all_rows."
            )


def _possible_name(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "train"


def without_empty(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Returns the splits that have rows. Logs a warning for each of the others.

    Raises:
        UserError: There are no rows at all.
    """
    kept = {}
    for name, rows in splits.items():
        if len(rows) > 0:
            kept[name] = rows
        else:
            logger.warning("push_comparisons: split %s has no rows, so it is left out.", name)
    if not kept:
        raise UserError("push_comparisons: no split has rows: give at least one comparison.")
    return kept


def with_one_schema(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Returns the splits with the same columns and types, since `load_dataset` reads all of them together.

    A column that has only empty values in one split gets the type that it has in another.

    Raises:
        UserError: A split has other columns, or a column has other values in another split.
    """
    first, *others = splits
    columns = splits[first].column_names
    for name in others:
        differing = set(columns).symmetric_difference(splits[name].column_names)
        if differing:
            raise UserError(
                f"push_comparisons: only one of the splits {first} and {name} has the column {min(differing)}: give "
                "all splits the same columns, since load_dataset reads them together."
            )
    features = Features({column: _type_of(column, splits) for column in columns})
    same = {}
    for name, rows in splits.items():
        rows = rows.select_columns(columns)
        try:
            same[name] = rows if rows.features == features else rows.cast(features)
        except (TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UserError(
                f"push_comparisons: the columns of split {name} have other types than those of {first}: give all "
                "splits the same, since load_dataset reads them together."
            ) from error
    return same


def _type_of(column: str, splits: Mapping[str, Dataset]) -> object:
    """Returns the type of a column in the first split in which it has values."""
    types = [rows.features[column] for rows in splits.values()]
    known = [type for type in types if not _has_null(type)]
    return known[0] if known else types[0]


def _has_null(feature: object) -> bool:
    """True if a type, or a part of it, is that of a column without values."""
    return "Value('null')" in repr(feature)


def write_shards(splits: Mapping[str, Dataset], folder: Path, shard_bytes: int) -> dict[str, dict[str, Path]]:
    """Writes each split as parquet files of at most about `shard_bytes`, named as `datasets` names them."""
    shards: dict[str, dict[str, Path]] = {}
    for split, rows in splits.items():
        count = min(len(rows), _n_bytes(rows) // shard_bytes + 1)
        shards[split] = {}
        for index in range(count):
            path = folder / f"{split}-{index:05d}-of-{count:05d}.parquet"
            rows.shard(count, index, contiguous=True).to_parquet(path)
            shards[split][f"data/{path.name}"] = path
    return shards


def _n_bytes(rows: Dataset) -> int:
    """Returns the approximate size of the rows in memory, also of a selection from a larger table."""
    table = rows.data
    return round(table.nbytes * len(rows) / max(table.num_rows, 1))


def with_loading(card: str, splits: Mapping[str, Dataset], shards: Shards) -> str:
    """Returns a card whose header tells `load_dataset` the files of each split, their columns and their rows."""
    parsed = DatasetCard(card)
    info = DatasetInfo(features=next(iter(splits.values())).features)
    info.splits = SplitDict()
    data_files = []
    for split, rows in splits.items():
        info.splits.add(SplitInfo(split, num_bytes=_n_bytes(rows), num_examples=len(rows)))
        data_files.append({"split": split, "path": f"data/{split}-*"})
    info.dataset_size = sum(split.num_bytes for split in info.splits.values())
    info.download_size = sum(path.stat().st_size for paths in shards.values() for path in paths.values())
    DatasetInfosDict({"default": info}).to_dataset_card_data(parsed.data)
    MetadataConfigs({"default": {"data_files": data_files}}).to_dataset_card_data(parsed.data)
    return str(parsed)

"""Reads the rows of a benchmark from files or from the Hub."""

import difflib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...data.origin import DataOrigin
from ...errors import UserError, first_line
from ...readers.files import kind_of, rows_of
from ...readers.sources import load_rows
from . import reward_bench
from .registry import BENCHMARKS, Benchmark, benchmark_of
from .rows import BadRow, BenchmarkRow, rows_digest

RM_BENCH_WHOLE = "total_dataset.json"
"""File of RM-Bench that has the rows of all others in its folder."""
_FILTERED = "_filtered"
"""End of the name of RM-Bench's file of one domain, without ending: `chat_filtered.json` has no column `domain`."""
_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz")


@dataclass(frozen=True)
class LoadedBenchmark:
    """The rows of a benchmark.

    Attributes:
        benchmark: Which one.
        rows: Its rows, or a sample of them.
        positions: Place of each of `rows` among all rows.
        total: Number of all rows.
        dataset: Hub id, or the name of the file or folder.
        revision: Commit of a dataset on the Hub.
        sha256: Digest of the content of all rows.
    """

    benchmark: Benchmark
    rows: list[BenchmarkRow]
    positions: list[int]
    total: int
    dataset: str
    revision: str | None
    sha256: str

    @property
    def is_sample(self) -> bool:
        """Whether rows were left out by `sample`."""
        return len(self.rows) < self.total

    def sample(self, limit: int, seed: int) -> "LoadedBenchmark":
        """A random sample of at most `limit` rows. Rows that belong together are both in it or both not.

        Raises:
            UserError: `limit` is smaller than the number of rows that belong together.
        """
        if limit >= len(self.rows):
            return self
        units: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            units.setdefault(row.unit, []).append(position)
        order = list(units)
        random.Random(seed).shuffle(order)
        taken: list[int] = []
        for unit in order:
            if len(taken) + len(units[unit]) <= limit:
                taken += units[unit]
        if not taken:
            raise UserError(f"limit: {limit} is smaller than the rows that belong together: raise it.")
        taken.sort()
        return replace(self, rows=[self.rows[k] for k in taken], positions=[self.positions[k] for k in taken])


def is_benchmark(word: str) -> bool:
    """Whether a word of `--benchmark` names a public benchmark: `NAME`, or `NAME=` and a file, folder or Hub id."""
    return word.partition("=")[0] in BENCHMARKS


def load_benchmark(word: str, *, prior_sets: bool = False) -> LoadedBenchmark | None:
    """Loads what a word of `--benchmark` stands for.

    Args:
        word: `rm-bench` loads its published rows from the Hub, `rm-bench=PLACE` those of a file, a folder or another
            dataset on the Hub. A file or folder alone is recognized by the shape of its rows.
        prior_sets: Whether `reward-bench` from the Hub has the rows of its four prior sets too. A folder may hold them
            beside the other rows.

    Returns:
        The rows. None for a file, folder or dataset that has the shape of no benchmark: comparisons of your own.

    Raises:
        UserError: There is no such file or benchmark, it cannot be loaded, or a row has another shape.
    """
    name, _, place = word.partition("=")
    if name in BENCHMARKS:
        return _load_place(BENCHMARKS[name], place) if place else _load_published(name, prior_sets)
    path = Path(word).expanduser()
    if path.exists():
        records, _ = _records_of_path(path)
        benchmark = benchmark_of(records[0]) if records else None
        return None if benchmark is None else _load_place(benchmark, word)
    if word.count("/") == 1 and not word.startswith((".", "~", "/")) and not word.endswith(_ENDINGS):
        known = {benchmark.hub_id: benchmark for benchmark in BENCHMARKS.values()}
        return _load_published(known[word].name, prior_sets) if word in known else None
    near = difflib.get_close_matches(word, BENCHMARKS, n=1)
    meant = f", did you mean `{near[0]}`?" if near else ":"
    raise UserError(
        f"benchmark: {word!r} is neither a benchmark nor a file{meant} give one of {', '.join(BENCHMARKS)}, "
        "NAME=FILE, or a file of comparisons."
    )


# --- places -----------------------------------------------------------------------------------------------------------


def _load_published(name: str, prior_sets: bool) -> LoadedBenchmark:
    benchmark = BENCHMARKS[name]
    records, revision = _records_of_hub(benchmark, benchmark.hub_id, benchmark.splits)
    dataset = benchmark.hub_id
    if prior_sets and name == reward_bench.NAME:
        for prior_set in reward_bench.PRIOR_SETS:
            more, _ = _records_of_hub(benchmark, reward_bench.PRIOR_HUB_ID, (prior_set,))
            records += [record | {"subset": prior_set} for record in more]
        dataset = f"{dataset} and {reward_bench.PRIOR_HUB_ID}"
    return _loaded(benchmark, records, dataset, revision)


def _load_place(benchmark: Benchmark, place: str) -> LoadedBenchmark:
    path = Path(place).expanduser()
    if path.exists():
        records, name = _records_of_path(path)
        return _loaded(benchmark, records, name, None)
    if place.startswith((".", "/", "~")) or place.endswith(_ENDINGS) or place.count("/") != 1:
        raise UserError(f"benchmark: no file or folder at {place} for {benchmark.name}: check the path.")
    records, revision = _records_of_hub(benchmark, place, benchmark.splits)
    return _loaded(benchmark, records, place, revision)


def _records_of_hub(
    benchmark: Benchmark, hub_id: str, splits: Iterable[str]
) -> tuple[list[dict[str, Any]], str | None]:
    records: list[dict[str, Any]] = []
    revision = None
    for split in splits:
        try:
            rows = load_rows(hub_id, split)
        except Exception as error:  # no network, no access, or another split
            raise UserError(
                f"benchmark: {hub_id} cannot be loaded ({first_line(error)}): without a network, give its files, as "
                f"--benchmark {benchmark.name}=FILE."
            ) from error
        origin = DataOrigin.of(rows)
        revision = origin.revision if origin else None
        records += list(rows)
    return records, revision


def _records_of_path(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of a file, or of all files of a folder, and the name for reports."""
    if path.is_file():
        return _records_of_file(path), path.name
    files = sorted(part for part in path.iterdir() if part.is_file() and part.suffix in _ENDINGS)
    whole = [file for file in files if file.name == RM_BENCH_WHOLE]
    files = whole or files
    if not files or (path / "dataset_info.json").is_file():  # folders that the library `datasets` reads
        return [dict(row) for row in load_rows(path)], path.name
    records = []
    for file in files:
        records += _records_of_file(file)
    return records, f"{path.name}/{whole[0].name}" if whole else path.name


def _records_of_file(path: Path) -> list[dict[str, Any]]:
    if kind_of(path) is None:  # parquet
        records: list[Any] = [dict(row) for row in load_rows(path)]
    else:
        records = list(rows_of(path))
    for number, record in enumerate(records):
        if isinstance(record, str):
            raise UserError(f"benchmark: {path.name} row {number}: {record}: correct the row.")
    stem = path.name.partition(".")[0]
    if stem.endswith(_FILTERED):
        records = [{"domain": stem.removesuffix(_FILTERED)} | record for record in records]
    return records


def _loaded(
    benchmark: Benchmark, records: Sequence[Mapping[str, Any]], dataset: str, revision: str | None
) -> LoadedBenchmark:
    if not records:
        raise UserError(f"benchmark: {dataset} has no rows: check the file.")
    rows = []
    for number, record in enumerate(records):
        try:
            rows.append(benchmark.read_row(record, number))
        except BadRow as error:
            raise UserError(
                f"benchmark: {dataset} row {number} is no row of {benchmark.title}: {error}: use the published file."
            ) from error
    positions = list(range(len(rows)))
    return LoadedBenchmark(benchmark, rows, positions, len(rows), dataset, revision, rows_digest(rows))

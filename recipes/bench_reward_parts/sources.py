"""What is scored: the rows of public benchmarks, and comparisons of the user's own."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf_ext import load_comparisons
from hf_rlhf_ext.cli.row_records import digest_of
from hf_rlhf_ext.data.json_columns import RowsWithoutFill
from hf_rlhf_ext.data.origin import DataOrigin
from hf_rlhf_ext.data.templates import TEMPLATE_COLUMNS
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.privacy import strip_local_paths
from hf_rlhf_ext.modeling.source import public_name
from hf_rlhf_ext.study.reward_benchmarks.loading import LoadedBenchmark, load_benchmark
from hf_rlhf_ext.study.reward_benchmarks.measures import Outcome
from hf_rlhf_ext.study.reward_benchmarks.own import measure_comparisons
from hf_rlhf_ext.study.reward_benchmarks.registry import Benchmark
from hf_rlhf_ext.study.reward_benchmarks.rows import ScoredRow, rows_digest
from hf_rlhf_ext.study.reward_benchmarks.scoring import Scorable

Reading = Callable[[str], Mapping[str, Any]]
"""Name of a dataset -> arguments of `load_comparisons`."""


@dataclass
class BenchSource:
    """Rows to score.

    Attributes:
        key: Name in the report.
        title: Name in tables and cards.
        dataset: Hub id, or the name of the file or folder.
        revision: Commit on the Hub.
        sha256: Digest of all rows.
        total: Number of all rows, of which `rows` may be a sample.
        rows: The rows, as they are scored.
        benchmark: The public benchmark. None for the user's own comparisons.
        contents: By position: the row of the benchmark, or the comparison row.
        prompts: By position: digest of the prompt of a comparison row.
    """

    key: str
    title: str
    dataset: str
    revision: str | None
    sha256: str
    total: int
    rows: list[Scorable]
    benchmark: Benchmark | None = None
    contents: dict[int, Any] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)

    @property
    def is_sample(self) -> bool:
        """Whether not all rows are scored."""
        return len(self.rows) < self.total

    def measure(self, scores: Mapping[int, Sequence[float]], *, seed: int, calibrated: bool) -> Outcome:
        """The numbers of scored rows.

        Args:
            scores: Scores of rows by position.
            seed: Seed of the intervals.
            calibrated: Whether the scores are log-odds, for the user's own comparisons.
        """
        if self.benchmark is None:
            rows = [self.contents[position] for position in scores]
            return measure_comparisons(rows, list(scores.values()), calibrated=calibrated)
        scored = [ScoredRow(self.contents[position], tuple(values)) for position, values in scores.items()]
        return self.benchmark.aggregate(scored, seed=seed)


def read_benchmarks(
    words: Sequence[str], reading: Reading, *, prior_sets: bool, limit: int | None, seed: int
) -> list[BenchSource]:
    """Reads the rows of everything that `--benchmark` names.

    Raises:
        UserError: Something cannot be read, or two are the same.
    """
    sources: list[BenchSource] = []
    for word in words:
        loaded = load_benchmark(word, prior_sets=prior_sets)
        if loaded is None:
            source = _own_comparisons(word, reading(word), limit, seed)
        else:
            source = _public_benchmark(loaded, limit, seed)
        if source.key in [other.key for other in sources]:
            raise UserError(f"benchmark: {source.key} is given twice: leave one out, or measure it in another folder.")
        sources.append(source)
        sample = f", a random sample of {len(source.rows)} (seed {seed})" if source.is_sample else ""
        print(f"{source.title}: {source.total} rows of {source.dataset}{sample}")
    return sources


def _public_benchmark(loaded: LoadedBenchmark, limit: int | None, seed: int) -> BenchSource:
    if limit is not None:
        loaded = loaded.sample(limit, seed)
    contents = dict(zip(loaded.positions, loaded.rows, strict=True))
    return BenchSource(
        key=loaded.benchmark.name,
        title=loaded.benchmark.title,
        dataset=strip_local_paths(loaded.dataset),
        revision=loaded.revision,
        sha256=loaded.sha256,
        total=loaded.total,
        rows=[Scorable(position, row.prompt, row.completions) for position, row in contents.items()],
        benchmark=loaded.benchmark,
        contents=contents,
    )


def _own_comparisons(word: str, reading: Mapping[str, Any], limit: int | None, seed: int) -> BenchSource:
    dataset, report = load_comparisons(word, **reading)
    print(report.summary())
    rows = list(RowsWithoutFill(dataset))
    positions = list(range(len(rows)))
    if limit is not None and limit < len(rows):
        positions = sorted(random.Random(seed).sample(positions, limit))
    origin = DataOrigin.of(dataset)
    name = public_name(word)
    scorable = []
    for position in positions:
        row = rows[position]
        columns = {column: row[column] for column in TEMPLATE_COLUMNS if row.get(column)}
        scorable.append(Scorable(position, row["prompt"], row["completions"], columns))
    return BenchSource(
        key=strip_local_paths(name),
        title=strip_local_paths(name),
        dataset=strip_local_paths(name),
        revision=origin.revision if origin else None,
        sha256=rows_digest(rows),
        total=len(rows),
        rows=scorable,
        contents={position: rows[position] for position in positions},
        prompts={position: digest_of(rows[position]) for position in positions},
    )

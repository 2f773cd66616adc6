"""The benchmarks by name, and where their rows are published."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import judgebench, reward_bench, reward_bench_2, rm_bench
from .measures import Outcome
from .rows import BenchmarkRow


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    Attributes:
        name: Name on the command line.
        title: Name in tables and cards.
        hub_id: Dataset on the Hub.
        splits: Its splits.
        source: The published aggregation, with its commit.
        matches: Whether a record of a file has the published shape.
        read_row: Record and its number -> row. Raises `BadRow`.
        aggregate: Scored rows -> the numbers of the benchmark. It takes `seed`, of the intervals.
    """

    name: str
    title: str
    hub_id: str
    splits: tuple[str, ...]
    source: str
    matches: Callable[[Mapping[str, Any]], bool]
    read_row: Callable[[Mapping[str, Any], int], BenchmarkRow]
    aggregate: Callable[..., Outcome]

    @classmethod
    def of(cls, module: ModuleType) -> "Benchmark":
        """The benchmark that a module describes."""
        return cls(
            name=module.NAME,
            title=module.TITLE,
            hub_id=module.HUB_ID,
            splits=module.SPLITS,
            source=module.SOURCE,
            matches=module.matches,
            read_row=module.read_row,
            aggregate=module.aggregate,
        )


# To add a benchmark, add its module here.
BENCHMARKS: dict[str, Benchmark] = {
    module.NAME: Benchmark.of(module) for module in (reward_bench, reward_bench_2, rm_bench, judgebench)
}


def benchmark_of(record: Mapping[str, Any]) -> Benchmark | None:
    """The benchmark whose published shape a record has. None if it has none of them."""
    for benchmark in BENCHMARKS.values():
        if benchmark.matches(record):
            return benchmark
    return None

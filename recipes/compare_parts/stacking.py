"""The results of all seeds in one place, and small functions on them."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from hf_rlhf_ext.study.statistics import Interval, mean_interval

CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
"""Field of a `Clock` by the name of the clock."""

Result = Mapping[str, Any]
Values = list[float | None]


class Stack:
    """The results of all seeds in one place, one value for each seed and held-out prompt.

    A system that is missing in a seed has no values there, so that all lists have the same length.

    Args:
        results: results of the seeds.
    """

    def __init__(self, results: Sequence[Result]):
        self.results = list(results)
        self.reference: str = results[0]["reference"]
        self.clock = CLOCKS[results[0]["clock"]]
        self.seeds: list[int] = []
        self.prompts: list[str] = []
        self.categories: list[str | None] = []
        for result in results:
            self.seeds += [result["seed"]] * result["prompts"]
            self.prompts += result["prompt_ids"]
            self.categories += result["categories"]

    @property
    def names(self) -> list[str]:
        """All systems, in the order of the first seed that has them."""
        names: dict[str, None] = {}
        for result in self.results:
            names.update(dict.fromkeys(result["systems"]))
        return list(names)

    @property
    def judges(self) -> list[str]:
        """Names of the judges, the one of the main table first."""
        return list(self.results[0]["outcomes"])

    def entries(self, name: str) -> Iterator[tuple[Result, Mapping[str, Any]]]:
        """Result and entry of each seed in which a system worked."""
        for result in self.results:
            entry = result["systems"].get(name)
            if entry is not None and entry["status"] == "ok":
                yield result, entry

    def works(self, name: str) -> bool:
        """Whether a system worked in at least one seed."""
        return next(self.entries(name), None) is not None

    def values(self, name: str, *path: str) -> Values:
        """What a system has at `path`, such as ("gold", "vader"): one value for each seed and prompt."""
        stacked: Values = []
        for result in self.results:
            found: Any = result["systems"].get(name, {})
            for part in path:
                found = (found or {}).get(part)
            stacked += found if found is not None else [None] * result["prompts"]
        return stacked

    def outcomes(self, judge: str, first: str, second: str) -> Values:
        """P(the answer of `first` is better) for each seed and prompt."""
        stacked: Values = []
        for result in self.results:
            pairs = result["outcomes"].get(judge, {})
            if f"{first}|{second}" in pairs:
                stacked += pairs[f"{first}|{second}"]
            elif f"{second}|{first}" in pairs:
                stacked += [None if value is None else 1 - value for value in pairs[f"{second}|{first}"]]
            else:
                stacked += [None] * result["prompts"]
        return stacked

    def mean(self, values: Values) -> dict[str, Any] | None:
        """Mean with its interval; None without any value."""
        return as_dict(mean_interval(values, self.seeds, self.prompts)) if any_value(values) else None

    def seconds(self, name: str, which: str) -> float | None:
        """Mean over the seeds of the time of training, in seconds. `which` is "own" or "total"."""
        times = [entry[which][self.clock] for _, entry in self.entries(name)]
        return fmean(times) if times else None


# --- small functions --------------------------------------------------------------------------------------------------


def as_dict(interval: Interval) -> dict[str, Any]:
    """An interval for JSON."""
    return interval.as_dict()


def any_value(values: Sequence[float | None]) -> bool:
    """Whether there is at least one value."""
    return any(value is not None for value in values)


def mean_or_none(values: Sequence[float | None] | None) -> float | None:
    """Mean of the values that are there."""
    known = [value for value in values or () if value is not None]
    return fmean(known) if known else None


def difference(first: Values, second: Values) -> Values:
    """`first` - `second`, where both are there."""
    pairs = zip(first, second, strict=True)
    return [None if one is None or other is None else one - other for one, other in pairs]


def mean_of_numbers(mappings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each number over several mappings with the same names."""
    names = [name for name, value in mappings[0].items() if isinstance(value, int | float)]
    return {name: fmean(mapping[name] for mapping in mappings) for name in names}

"""Merges rows with the same prompt without holding all rows in memory, as `schema.group_by_prompt` does with a list."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property

from .cache import Spool
from .schema import Comparison, LoadReport, merge_rows, prompt_key


class Grouped:
    """One row per prompt, in the order of the first rows. Only rows that share their prompt are held in memory.

    Args:
        rows: The rows, which are read once.
        report: Takes the flags of merged rows.
    """

    def __init__(self, rows: Iterable[Comparison], report: LoadReport):
        self._report = report
        self._groups = array("q")  # of each row, the number of its group
        self._sizes = array("q")  # of each group
        self._rows = Spool(self._numbered(rows))

    def _numbered(self, rows: Iterable[Comparison]) -> Iterator[Comparison]:
        numbers: dict[bytes, int] = {}
        for row in rows:
            key = hashlib.blake2b(repr(prompt_key(row)).encode(errors="surrogatepass"), digest_size=16).digest()
            number = numbers.setdefault(key, len(numbers))
            if number == len(self._sizes):
                self._sizes.append(0)
            self._sizes[number] += 1
            self._groups.append(number)
            yield row

    def __iter__(self) -> Iterator[Comparison]:
        merged = self._merged
        first_of: set[int] = set()
        for number, row in zip(self._groups, self._rows, strict=True):
            if self._sizes[number] == 1:
                yield row  # unchanged, including its weights
            elif number not in first_of:
                first_of.add(number)
                yield merged[number]

    @cached_property
    def _merged(self) -> dict[int, Comparison]:
        """The merged rows of all groups of two or more rows, by the numbers of the groups."""
        shared: dict[int, list[Comparison]] = {}
        for number, row in zip(self._groups, self._rows, strict=True):
            if self._sizes[number] > 1:
                shared.setdefault(number, []).append(row)
        merged = {number: merge_rows(shared.pop(number), self._report) for number in list(shared)}
        if "duplicated_row" in self._report.flagged:
            self._report.flagged["duplicated_row"].sort()  # they were found in the order of the prompts
        return merged

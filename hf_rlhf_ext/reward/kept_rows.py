"""Batches that keep their rows, so that they are split into passes where it is known how much fits (`auto_batch`)."""

from dataclasses import dataclass, replace
from typing import Any, Self

from ..data.collators import DataCollatorForComparisons
from ..data.schema import Row
from .even_batches import Batch


@dataclass(frozen=True)
class KeptRows:
    """The rows of a batch. It is no list, as accelerate would look at every number in it.

    Attributes:
        rows: tokenized comparisons.
        collator: makes micro-batches of them.
    """

    rows: list[Row]
    collator: DataCollatorForComparisons

    def micro_batches(self, max_tokens: int | None) -> tuple[list[Batch], list[int]]:
        """The micro-batches of at most `max_tokens` tokens, and the number of each prompt in the batch."""
        collated = replace(self.collator, max_tokens=max_tokens)(self.rows)
        if max_tokens is None:
            return [collated], list(range(len(self.rows)))
        return collated["micro_batches"], collated["order"]

    def n_parts(self, max_tokens: int) -> int:
        """The number of micro-batches of at most `max_tokens` tokens."""
        micro_batches, _ = self.micro_batches(max_tokens)
        return len(micro_batches)

    def of_micro_batch(self, batch: dict[str, Any], number: int) -> Self:
        """The rows of one micro-batch of a batch that `split` has split."""
        counts = [len(micro_batch["completion_counts"]) for micro_batch in batch["micro_batches"]]
        first = sum(counts[:number])
        numbers = batch["order"][first : first + counts[number]]
        return replace(self, rows=[self.rows[n] for n in numbers])


@dataclass(frozen=True)
class RowKeepingCollator:
    """Collates rows into a batch with the key `rows`, which `split` makes micro-batches of.

    Args:
        collator: makes micro-batches.
    """

    collator: DataCollatorForComparisons

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        return {"rows": KeptRows(rows, self.collator)}


def split(batch: dict[str, Any], max_tokens: int | None) -> None:
    """Splits a batch into micro-batches of at most `max_tokens` tokens, in place. A batch without `rows` stays."""
    if "rows" in batch:
        batch["micro_batches"], batch["order"] = batch["rows"].micro_batches(max_tokens)

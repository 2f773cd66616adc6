"""Tokenised comparisons as batches of tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError

LAYOUTS = ("plain",)


@dataclass(frozen=True)
class DataCollatorForComparisons:
    """Turns tokenised comparison rows into one batch: every completion once, after its prompt, in a row of its own.

    Rows hold `prompt_ids`, `completion_ids` (K lists), `pairs`, `targets`, `weights` and, if the source has them,
    `margins`. With N completions and P pairs in all, padded on the right to L tokens, a batch holds

    - `input_ids`, `attention_mask`: (N, L) int64, rows in the order of prompts and their completions;
    - `pairs`: (P, 2) int64, row numbers of `input_ids`;
    - `targets`, `weights`, `margins`: (P,) fp32, margins 0 where a row has none;
    - `prompt_index`: (P,) int64, which prompt of the batch a pair belongs to;
    - `completion_counts`: (B,) int64, K of each prompt; `completion_lengths`: (N,) int64, tokens without the prompt.

    It never truncates: the trainer has settled over-long rows (`overflow`) while their row number was known.
    """

    pad_token_id: int
    layout: str = "plain"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UserError(f"layout: {self.layout!r} does not exist; there is {', '.join(map(repr, LAYOUTS))}.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
        counts = torch.tensor([len(row["completion_ids"]) for row in rows])  # (B,)
        first_rows = (counts.cumsum(0) - counts).tolist()
        pairs = [[first + i, first + j] for row, first in zip(rows, first_rows, strict=True) for i, j in row["pairs"]]
        prompt_index = [index for index, row in enumerate(rows) for _ in row["pairs"]]
        margins = [m for row in rows for m in row.get("margins") or [0.0] * len(row["pairs"])]
        return {
            **pad_right(sequences, self.pad_token_id, self.pad_to_multiple_of),
            "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            "targets": torch.tensor([t for row in rows for t in row["targets"]], dtype=torch.float32),
            "weights": torch.tensor([w for row in rows for w in row["weights"]], dtype=torch.float32),
            "margins": torch.tensor(margins, dtype=torch.float32),
            "prompt_index": torch.tensor(prompt_index, dtype=torch.int64),
            "completion_counts": counts,
            "completion_lengths": torch.tensor([len(ids) for row in rows for ids in row["completion_ids"]]),
        }


def pad_right(sequences: list[list[int]], pad_token_id: int, multiple_of: int | None = None) -> dict[str, Tensor]:
    """N token lists as `input_ids` and `attention_mask`, (N, L) int64; L rounded up to `multiple_of` if given."""
    input_ids = pad_sequence(
        [torch.tensor(ids, dtype=torch.int64) for ids in sequences], batch_first=True, padding_value=pad_token_id
    )
    if multiple_of:
        missing = -input_ids.shape[1] % multiple_of
        input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=pad_token_id)
    lengths = torch.tensor([len(ids) for ids in sequences])
    # From lengths, not `input_ids != pad_token_id`: where pad is also eos, that would hide a real eos.
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": attention_mask.long()}

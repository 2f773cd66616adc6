"""Tokenised comparisons as batches of tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from .tokenization import CATEGORY_CODE

LAYOUTS = ("shared_prefix", "plain")


@dataclass(frozen=True)
class DataCollatorForComparisons:
    """Turns tokenised comparison rows into one batch, or into micro-batches of at most `max_tokens` tokens.

    Rows hold `prompt_ids`, `completion_ids` (K lists), `pairs`, `targets`, `weights` and, if the source has them,
    `margins`. A batch of B prompts with N completions and P pairs in all holds, in either layout,

    - `pairs`: (P, 2) int64, numbers of completions in the batch;
    - `targets`, `weights`, `margins`: (P,) fp32, margins 0 where a row has none;
    - `prompt_index`: (P,) int64, which prompt of the batch a pair belongs to;
    - `categories`: (B,) int64, `category_code` of each row, -1 where it has none;
    - `completion_counts`: (B,) int64, K of each prompt; `completion_lengths`: (N,) int64, tokens without the prompt;

    and, padded on the right to L tokens, in the layout

    - `"plain"`, a row for every completion after its prompt: `input_ids`, `attention_mask` (N, L) int64;
    - `"shared_prefix"`, `[prompt, y1 … yK]` for every prompt, short ones side by side in R ≤ B rows: `input_ids`,
      `segments`, `owners`, `positions` (R, L) int64 (`modeling.prefix`), and `score_at` (N, 2) int64, row and column of
      each completion's last token.

    With `max_tokens` the result is `{"micro_batches": [batch, …], "order": [n, …]}`: prompts of similar length packed
    so that rows times L stays within it, and their numbers in the batch; a prompt that exceeds it alone is a
    micro-batch of its own.

    It never truncates: the trainer has settled over-long rows (`overflow`) while their row number was known.
    """

    pad_token_id: int
    layout: str = "plain"
    pad_to_multiple_of: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UserError(f"layout: {self.layout!r} does not exist; there is {', '.join(map(repr, LAYOUTS))}.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.max_tokens is None:
            return self._batch(rows)
        parts = self._parts_shared(rows) if self.layout == "shared_prefix" else self._parts_plain(rows)
        batches = [self._batch([rows[n] for n in part]) for part in parts]
        return {"micro_batches": batches, "order": [n for part in parts for n in part]}

    def _parts_plain(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        parts: list[list[int]] = []
        n_rows = 0
        for n in sorted(range(len(rows)), key=lambda n: self._length(rows[n])):
            height = len(rows[n]["completion_ids"])
            # In order of length: this one is the longest so far.
            if parts and (n_rows + height) * self._rounded_up(self._length(rows[n])) <= self.max_tokens:
                parts[-1].append(n)
                n_rows += height
            else:
                parts.append([n])
                n_rows = height
        return parts

    def _parts_shared(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        parts: list[list[int]] = []
        left = list(range(len(rows)))
        while left:
            lengths = [self._length(rows[n]) for n in left]
            width = max(lengths)
            place = fill_rows(lengths, width, max(1, self.max_tokens // self._rounded_up(width)))
            parts.append([n for n, row in zip(left, place, strict=True) if row is not None])
            left = [n for n, row in zip(left, place, strict=True) if row is None]
        return parts

    def _length(self, row: dict[str, Any]) -> int:
        lengths = list(map(len, row["completion_ids"]))
        return len(row["prompt_ids"]) + (sum(lengths) if self.layout == "shared_prefix" else max(lengths))

    def size(self, row: dict[str, Any]) -> int:
        """Tokens that a row takes alone, padding included."""
        n_rows = 1 if self.layout == "shared_prefix" else len(row["completion_ids"])
        return n_rows * self._rounded_up(self._length(row))

    def _rounded_up(self, length: int) -> int:
        return length + _missing(length, self.pad_to_multiple_of)

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        counts = torch.tensor([len(row["completion_ids"]) for row in rows])  # (B,)
        first_rows = (counts.cumsum(0) - counts).tolist()
        pairs = [[first + i, first + j] for row, first in zip(rows, first_rows, strict=True) for i, j in row["pairs"]]
        prompt_index = [index for index, row in enumerate(rows) for _ in row["pairs"]]
        margins = [m for row in rows for m in row.get("margins") or [0.0] * len(row["pairs"])]
        return {
            **(self._shared(rows) if self.layout == "shared_prefix" else self._plain(rows)),
            "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            "targets": torch.tensor([t for row in rows for t in row["targets"]], dtype=torch.float32),
            "weights": torch.tensor([w for row in rows for w in row["weights"]], dtype=torch.float32),
            "margins": torch.tensor(margins, dtype=torch.float32),
            "prompt_index": torch.tensor(prompt_index, dtype=torch.int64),
            "completion_counts": counts,
            "categories": torch.tensor([row.get(CATEGORY_CODE, -1) for row in rows]),
            "completion_lengths": torch.tensor([len(ids) for row in rows for ids in row["completion_ids"]]),
        }

    def _plain(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
        return pad_right(sequences, self.pad_token_id, self.pad_to_multiple_of)

    def _shared(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [self._length(row) for row in rows]
        place = fill_rows(lengths, max(lengths))
        fill = {"input_ids": self.pad_token_id, "segments": -1, "owners": -1, "positions": 0}
        columns: dict[str, list[list[int]]] = {name: [[] for _ in range(max(place) + 1)] for name in fill}
        used = [0] * (max(place) + 1)  # segments of each row so far
        score_at = []
        for number, row in zip(place, rows, strict=True):
            owner, start = used[number], len(row["prompt_ids"])
            used[number] += 1 + len(row["completion_ids"])
            ids, segments, owners, positions = (columns[name][number] for name in fill)
            for k, part in enumerate((row["prompt_ids"], *row["completion_ids"])):
                ids += part
                segments += [owner + k] * len(part)
                owners += [owner] * len(part)
                first = start if k else 0
                positions += range(first, first + len(part))
                if k:
                    score_at.append([number, len(ids) - 1])
        padded = {name: _padded(values, fill[name], self.pad_to_multiple_of) for name, values in columns.items()}
        return padded | {"score_at": torch.tensor(score_at)}


def fill_rows(lengths: list[int], width: int, height: int | None = None) -> list[int | None]:
    """Which row of `width` each length goes into, longest first into the fullest row with room (best fit decreasing).

    None for what no more fits into `height` rows; without `height` there are as many rows as it takes.
    """
    room: list[int] = []
    place: list[int | None] = [None] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = [row for row, free in enumerate(room) if free >= lengths[n]]
        if not fits and (height is None or len(room) < height):
            fits = [len(room)]
            room.append(width)
        if fits:
            place[n] = min(fits, key=room.__getitem__)
            room[place[n]] -= lengths[n]
    return place


def pad_right(sequences: list[list[int]], pad_token_id: int, multiple_of: int | None = None) -> dict[str, Tensor]:
    """N token lists as `input_ids` and `attention_mask`, (N, L) int64; L rounded up to `multiple_of` if given."""
    input_ids = _padded(sequences, pad_token_id, multiple_of)
    lengths = torch.tensor([len(ids) for ids in sequences])
    # From lengths, not `input_ids != pad_token_id`: where pad is also eos, that would hide a real eos.
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": attention_mask.long()}


def _padded(sequences: list[list[int]], value: int, multiple_of: int | None) -> Tensor:
    """N lists as (N, L) int64, filled up on the right."""
    padded = pad_sequence(
        [torch.tensor(ids, dtype=torch.int64) for ids in sequences], batch_first=True, padding_value=value
    )
    return torch.nn.functional.pad(padded, (0, _missing(padded.shape[1], multiple_of)), value=value)


def _missing(length: int, multiple_of: int | None) -> int:
    return -length % multiple_of if multiple_of else 0

"""Tokenized comparisons as batches of tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from .schema import Row
from .tokenization import CATEGORY_CODE

LAYOUTS = ("shared_prefix", "plain")


@dataclass(frozen=True)
class DataCollatorForComparisons:
    """Turns tokenized comparison rows into one batch, or into micro-batches of at most `max_tokens` tokens.

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
            known = ", ".join(map(repr, LAYOUTS))
            raise UserError(f"layout: {self.layout!r} does not exist; there is {known}.")

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        if self.max_tokens is None:
            return self._batch(rows)
        if self._is_shared:
            parts = self._parts_shared(rows)
        else:
            parts = self._parts_plain(rows)
        batches = []
        order = []
        for part in parts:
            part_rows = [rows[n] for n in part]
            batches.append(self._batch(part_rows))
            order += part
        return {"micro_batches": batches, "order": order}

    @property
    def _is_shared(self) -> bool:
        return self.layout == "shared_prefix"

    # --- which prompts go into one micro-batch ------------------------------------------------------------------------

    def _parts_plain(self, rows: list[Row]) -> list[list[int]]:
        """Numbers of the rows of each micro-batch, in order of length so that padding is little."""
        lengths = [self._length(row) for row in rows]
        parts: list[list[int]] = []
        height = 0  # of the last micro-batch: a row per completion
        for n in sorted(range(len(rows)), key=lengths.__getitem__):
            # In order of length: this one is the longest so far.
            width = self._rounded_up(lengths[n])
            further = len(rows[n]["completion_ids"])
            if parts and (height + further) * width <= self.max_tokens:
                parts[-1].append(n)
                height += further
            else:
                parts.append([n])
                height = further
        return parts

    def _parts_shared(self, rows: list[Row]) -> list[list[int]]:
        """Numbers of the rows of each micro-batch: the longest one left sets the width, others fill the rest."""
        parts: list[list[int]] = []
        left = list(range(len(rows)))
        while left:
            lengths = [self._length(rows[n]) for n in left]
            width = max(lengths)
            # One row at least: a prompt that exceeds the budget alone is a micro-batch of its own.
            height = max(1, self.max_tokens // self._rounded_up(width))
            places = fill_rows(lengths, width, height)
            part: list[int] = []
            still_left: list[int] = []
            for n, place in zip(left, places, strict=True):
                if place is None:
                    still_left.append(n)
                else:
                    part.append(n)
            parts.append(part)
            left = still_left
        return parts

    def _length(self, row: Row) -> int:
        """Tokens of the row that this prompt takes: with all its completions, or with the longest."""
        lengths = list(map(len, row["completion_ids"]))
        taken = sum(lengths) if self._is_shared else max(lengths)
        return len(row["prompt_ids"]) + taken

    def size(self, row: Row) -> int:
        """Tokens that a row takes alone, padding included."""
        width = self._rounded_up(self._length(row))
        if self._is_shared:
            return width
        return len(row["completion_ids"]) * width

    def _rounded_up(self, length: int) -> int:
        return length + _missing(length, self.pad_to_multiple_of)

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _batch(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = self._shared(rows) if self._is_shared else self._plain(rows)
        batch |= _judgements(rows)
        batch |= _counts(rows)
        return batch

    def _plain(self, rows: list[Row]) -> dict[str, Tensor]:
        sequences = []
        for row in rows:
            prompt_ids = row["prompt_ids"]
            for completion_ids in row["completion_ids"]:
                sequences.append(prompt_ids + completion_ids)
        return pad_right(sequences, self.pad_token_id, self.pad_to_multiple_of)

    def _shared(self, rows: list[Row]) -> dict[str, Tensor]:
        lengths = [self._length(row) for row in rows]
        places = fill_rows(lengths, max(lengths))
        n_rows = max(places) + 1
        packed = [_PackedRow() for _ in range(n_rows)]
        score_at = []
        for place, row in zip(places, rows, strict=True):
            last_columns = packed[place].add(row["prompt_ids"], row["completion_ids"])
            score_at += [[place, column] for column in last_columns]

        multiple = self.pad_to_multiple_of
        return {
            "input_ids": _padded([row.input_ids for row in packed], self.pad_token_id, multiple),
            # Padding belongs to no segment, so that no token sees it.
            "segments": _padded([row.segments for row in packed], -1, multiple),
            "owners": _padded([row.owners for row in packed], -1, multiple),
            "positions": _padded([row.positions for row in packed], 0, multiple),
            "score_at": torch.tensor(score_at),
        }


def _judgements(rows: list[Row]) -> dict[str, Tensor]:
    """The pairs of all rows, by number of the completion in the batch, and what is known of each pair."""
    pairs: list[list[int]] = []
    prompt_index: list[int] = []
    targets: list[float] = []
    weights: list[float] = []
    margins: list[float] = []
    first = 0  # number of the row's first completion in the batch
    for index, row in enumerate(rows):
        n_pairs = len(row["pairs"])
        for i, j in row["pairs"]:
            pairs.append([first + i, first + j])
        prompt_index += [index] * n_pairs
        targets += row["targets"]
        weights += row["weights"]
        margins += row.get("margins") or [0.0] * n_pairs
        first += len(row["completion_ids"])
    return {
        "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        "targets": torch.tensor(targets, dtype=torch.float32),
        "weights": torch.tensor(weights, dtype=torch.float32),
        "margins": torch.tensor(margins, dtype=torch.float32),
        "prompt_index": torch.tensor(prompt_index, dtype=torch.int64),
    }


def _counts(rows: list[Row]) -> dict[str, Tensor]:
    """What is known of prompts and completions beside their tokens."""
    counts: list[int] = []
    categories: list[int] = []
    lengths: list[int] = []
    for row in rows:
        completion_ids = row["completion_ids"]
        counts.append(len(completion_ids))
        categories.append(row.get(CATEGORY_CODE, -1))
        lengths += map(len, completion_ids)
    return {
        "completion_counts": torch.tensor(counts),
        "categories": torch.tensor(categories),
        "completion_lengths": torch.tensor(lengths),
    }


class _PackedRow:
    """One row of the shared layout: `[prompt, y1 … yK]`, of several prompts side by side.

    A segment is a prompt or one completion; `owners` names, for each token, the segment of its prompt.
    """

    def __init__(self):
        self.input_ids: list[int] = []
        self.segments: list[int] = []
        self.owners: list[int] = []
        self.positions: list[int] = []
        self._n_segments = 0

    def add(
        self,
        prompt_ids: list[int],
        completion_ids: list[list[int]],
    ) -> list[int]:
        """Appends a prompt with its completions; returns the column of each completion's last token."""
        owner = self._n_segments
        self._add_segment(prompt_ids, owner, first_position=0)
        last_columns = []
        for ids in completion_ids:
            # Every completion continues the prompt, as if it were alone.
            self._add_segment(ids, owner, first_position=len(prompt_ids))
            last_columns.append(len(self.input_ids) - 1)
        return last_columns

    def _add_segment(self, ids: list[int], owner: int, first_position: int) -> None:
        self.input_ids += ids
        self.segments += [self._n_segments] * len(ids)
        self.owners += [owner] * len(ids)
        self.positions += range(first_position, first_position + len(ids))
        self._n_segments += 1


def fill_rows(
    lengths: list[int],
    width: int,
    height: int | None = None,
) -> list[int | None]:
    """Which row of `width` each length goes into, longest first into the fullest row with room (best fit decreasing).

    None for what no more fits into `height` rows; without `height` there are as many rows as it takes.
    """
    room: list[int] = []  # free tokens of each row
    places: list[int | None] = [None] * len(lengths)
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for n in longest_first:
        length = lengths[n]
        with_room = [row for row, free in enumerate(room) if free >= length]
        if with_room:
            fullest = min(with_room, key=room.__getitem__)
        elif height is None or len(room) < height:
            fullest = len(room)
            room.append(width)
        else:
            continue
        places[n] = fullest
        room[fullest] -= length
    return places


def pad_right(
    sequences: list[list[int]],
    pad_token_id: int,
    multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """N token lists as `input_ids` and `attention_mask`, (N, L) int64; L rounded up to `multiple_of` if given."""
    input_ids = _padded(sequences, pad_token_id, multiple_of)
    lengths = torch.tensor([len(ids) for ids in sequences])
    # From lengths, not `input_ids != pad_token_id`: where pad is also eos, that would hide a real eos.
    columns = torch.arange(input_ids.shape[1])
    attention_mask = columns < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": attention_mask.long()}


def _padded(
    sequences: list[list[int]],
    value: int,
    multiple_of: int | None,
) -> Tensor:
    """N lists as (N, L) int64, filled up on the right."""
    tensors = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    padded = pad_sequence(tensors, batch_first=True, padding_value=value)
    missing = _missing(padded.shape[1], multiple_of)
    return torch.nn.functional.pad(padded, (0, missing), value=value)


def _missing(length: int, multiple_of: int | None) -> int:
    """Tokens from `length` to the next multiple."""
    return -length % multiple_of if multiple_of else 0

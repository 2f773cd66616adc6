"""Collator that turns tokenized comparisons into batches of tensors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from .schema import Row
from .storage import token_counts
from .tokenization import CATEGORY_CODE

LAYOUTS = ("shared_prefix", "plain")


@dataclass(frozen=True)
class DataCollatorForComparisons:
    """Collates tokenized comparison rows into one batch, or into micro-batches of at most `max_tokens` tokens.

    The input rows have the columns `prompt_ids`, `completion_ids` (K lists), `pairs`, `targets`, `weights` and,
    optionally, `margins` and `category_code`. A batch with B prompts, N completions and P pairs contains, in both
    layouts:

    - `pairs`: (P, 2) int64, indices of the two completions in the batch.
    - `targets`, `weights`, `margins`: (P,) float32. `margins` is 0 for rows without margins.
    - `prompt_index`: (P,) int64, index of the prompt that the pair belongs to.
    - `categories`: (B,) int64, `category_code` of each row, or -1.
    - `completion_counts`: (B,) int64, number of completions K of each prompt.
    - `completion_lengths`: (N,) int64, number of tokens of each completion, without the prompt.
    - `token_counts`: (B,) int64, number of tokens that each prompt takes with its completions, without padding.

    In the layout `"plain"`, each completion is one row after its prompt, padded on the right to L tokens:

    - `input_ids`, `attention_mask`: (N, L) int64.

    In the layout `"shared_prefix"`, each prompt appears once, as `[prompt, y1 … yK]`. Short sequences share a row, so
    there are R ≤ B rows, padded on the right to L tokens. With `one_row`, all share one row, R = 1:

    - `input_ids`, `segments`, `owners`, `positions`: (R, L) int64, see `hf_rlhf_ext.modeling.prefix`.
    - `score_at`: (N, 2) int64, row and column of the last token of each completion.

    With `max_tokens`, the result is `{"micro_batches": [batch, …], "order": [n, …]}`. Prompts of similar length are
    packed together so that a micro-batch has at most `max_tokens` tokens, padding included. `order` holds the index of
    each prompt in the input. A prompt that exceeds `max_tokens` alone is a micro-batch of its own.

    The collator never truncates. The trainer handles rows that are too long before, see its option `overflow`.

    Args:
        pad_token_id: Token id used for padding.
        layout: `"plain"` or `"shared_prefix"`.
        pad_to_multiple_of: If set, L is rounded up to a multiple of this number.
        max_tokens: If set, the batch is split into micro-batches of at most this many tokens.
        one_row: Whether all sequences of the layout `"shared_prefix"` share one row, so that nothing is padded.
            Attention by segments computes no more for a long row, and a mask would.

    Raises:
        UserError: The layout does not exist.
    """

    pad_token_id: int
    layout: str = "plain"
    pad_to_multiple_of: int | None = None
    max_tokens: int | None = None
    one_row: bool = False

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            known = ", ".join(map(repr, LAYOUTS))
            raise UserError(f"layout: {self.layout!r} does not exist; choose one of {known}.")

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        if self.max_tokens is None:
            return self._batch(rows)
        if self._is_shared and self.one_row:
            parts = self._parts_of_one_row(rows)
        elif self._is_shared:
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
        """Returns the row numbers of each micro-batch, sorted by length so that there is little padding."""
        lengths = [self._length(row) for row in rows]
        parts: list[list[int]] = []
        height = 0  # rows of the last micro-batch, one per completion
        for n in sorted(range(len(rows)), key=lengths.__getitem__):
            # Rows are sorted by length, so this one is the longest so far.
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
        """Returns the row numbers of each micro-batch. The longest remaining row sets the width, others fill it up."""
        parts: list[list[int]] = []
        left = list(range(len(rows)))
        while left:
            lengths = [self._length(rows[n]) for n in left]
            width = max(lengths)
            # At least one row: a prompt that exceeds max_tokens alone is a micro-batch of its own.
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

    def _parts_of_one_row(self, rows: list[Row]) -> list[list[int]]:
        """Returns the row numbers of each micro-batch, which is one row: the longest first, each where it fits best."""
        lengths = [self._length(row) for row in rows]
        width = self.max_tokens - self.max_tokens % (self.pad_to_multiple_of or 1)
        # A prompt that exceeds max_tokens alone is a micro-batch of its own.
        parts = [[n] for n, length in enumerate(lengths) if length > width]
        others = [n for n, length in enumerate(lengths) if length <= width]
        places = fill_rows([lengths[n] for n in others], width)
        filled: list[list[int]] = [[] for _ in range(max(places, default=-1) + 1)]
        for n, place in zip(others, places, strict=True):
            filled[place].append(n)
        return parts + filled

    def _length(self, row: Row) -> int:
        """Returns the row length that this prompt needs, in tokens: with all completions, or with the longest."""
        lengths = list(map(len, row["completion_ids"]))
        taken = sum(lengths) if self._is_shared else max(lengths)
        return len(row["prompt_ids"]) + taken

    def _n_tokens(self, row: Row) -> int:
        """Returns the number of tokens of a row, without padding. The plain layout repeats the prompt."""
        n_prompts = 1 if self._is_shared else len(row["completion_ids"])
        return n_prompts * len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))

    def size(self, row: Row) -> int:
        """Returns the number of tokens that a row takes alone, padding included."""
        width = self._rounded_up(self._length(row))
        if self._is_shared:
            return width
        return len(row["completion_ids"]) * width

    def sizes(self, rows: Dataset) -> np.ndarray:
        """Returns `size` of each row of a dataset."""
        counts = token_counts(rows)
        width = counts.prompt + (counts.completions if self._is_shared else counts.longest)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return width if self._is_shared else counts.n_completions * width

    def _rounded_up(self, length: int) -> int:
        return length + _missing(length, self.pad_to_multiple_of)

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _batch(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = self._shared(rows) if self._is_shared else self._plain(rows)
        batch |= _judgments(rows)
        batch |= _counts(rows)
        batch["token_counts"] = torch.tensor([self._n_tokens(row) for row in rows])
        return batch

    def _plain(self, rows: list[Row]) -> dict[str, Tensor]:
        sequences = []
        for row in rows:
            prompt_ids = row["prompt_ids"]
            for completion_ids in row["completion_ids"]:
                sequences.append(prompt_ids + completion_ids)
        return pad_right(sequences, self.pad_token_id, self.pad_to_multiple_of)

    def _shared(self, rows: list[Row]) -> dict[str, Tensor]:
        if self.one_row:
            places = [0] * len(rows)
        else:
            lengths = [self._length(row) for row in rows]
            places = fill_rows(lengths, max(lengths))
        groups = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        return packed_rows(groups, places, self.pad_token_id, self.pad_to_multiple_of)


def _judgments(rows: list[Row]) -> dict[str, Tensor]:
    """Returns the pairs of all rows, as indices of completions in the batch, with targets, weights and margins."""
    pairs: list[list[int]] = []
    prompt_index: list[int] = []
    targets: list[float] = []
    weights: list[float] = []
    margins: list[float] = []
    first = 0  # index of the row's first completion in the batch
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
    """Returns the completion counts, categories and completion lengths."""
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


def packed_rows(
    groups: list[tuple[list[int], list[list[int]]]],
    places: list[int],
    pad_token_id: int,
    multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Packs prompts with their completions into rows of the layout `"shared_prefix"`.

    Args:
        groups: Token ids of B prompts, each with the token ids of its completions. A prompt without completions is a
            sequence of its own.
        places: Number of the row of each group, from 0, without gaps.
        pad_token_id: Token id used for padding.
        multiple_of: If set, L is rounded up to a multiple of this number.

    Returns:
        `input_ids`, `segments`, `owners`, `positions`, (R, L) int64, and `score_at`, (N, 2) int64, see
        `DataCollatorForComparisons`. A prompt without completions is scored at its last token.
    """
    packed = [_PackedRow() for _ in range(max(places) + 1)]
    score_at = []
    for place, (prompt_ids, completion_ids) in zip(places, groups, strict=True):
        last_columns = packed[place].add(prompt_ids, completion_ids)
        score_at += [[place, column] for column in last_columns]
    return {
        "input_ids": _padded([row.input_ids for row in packed], pad_token_id, multiple_of),
        # Padding belongs to no segment, so that no token sees it.
        "segments": _padded([row.segments for row in packed], -1, multiple_of),
        "owners": _padded([row.owners for row in packed], -1, multiple_of),
        "positions": _padded([row.positions for row in packed], 0, multiple_of),
        "score_at": torch.tensor(score_at),
    }


class _PackedRow:
    """One row of the layout `"shared_prefix"`: `[prompt, y1 … yK]`, for one or several prompts.

    A segment is a prompt or one completion. `owners` holds, for each token, the segment of its prompt.
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
        """Appends a prompt with its completions.

        Returns the column of the last token of each completion, or of the prompt if it has none.
        """
        if not prompt_ids:  # the completions share nothing, so that each is a sequence of its own
            return [self.add(ids, [])[0] for ids in completion_ids]
        owner = self._n_segments
        self._add_segment(prompt_ids, owner, first_position=0)
        last_columns = []
        for ids in completion_ids:
            # The positions of every completion continue those of the prompt, as if it were the only one.
            self._add_segment(ids, owner, first_position=len(prompt_ids))
            last_columns.append(len(self.input_ids) - 1)
        return last_columns or [len(self.input_ids) - 1]

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
    """Assigns each length to a row of `width` tokens by best fit decreasing: longest first, into the fullest row.

    Args:
        lengths: Lengths in tokens, each at most `width`.
        width: Tokens per row.
        height: Largest number of rows. `None` uses as many rows as needed.

    Returns:
        The row of each length, or None if it does not fit into `height` rows.
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
    """Pads N token lists to `input_ids` and `attention_mask`, (N, L) int64, with L a multiple of `multiple_of`."""
    input_ids = _padded(sequences, pad_token_id, multiple_of)
    lengths = torch.tensor([len(ids) for ids in sequences])
    # Use lengths, not `input_ids != pad_token_id`: if the pad token is also the stop token, that would mask it.
    columns = torch.arange(input_ids.shape[1])
    attention_mask = columns < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": attention_mask.long()}


def _padded(
    sequences: list[list[int]],
    value: int,
    multiple_of: int | None,
) -> Tensor:
    """Pads N lists on the right to (N, L) int64."""
    tensors = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    padded = pad_sequence(tensors, batch_first=True, padding_value=value)
    missing = _missing(padded.shape[1], multiple_of)
    return torch.nn.functional.pad(padded, (0, missing), value=value)


def _missing(length: int, multiple_of: int | None) -> int:
    """Returns the number of tokens from `length` to the next multiple."""
    return -length % multiple_of if multiple_of else 0

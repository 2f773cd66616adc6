"""Which sequences go through the model together, and the rows of several processes as one batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def budget_chunks(lengths: Sequence[int], *, max_rows: int, max_tokens: int | None) -> list[list[int]]:
    """Indices of `lengths` in chunks of at most `max_rows`, and of at most `max_tokens` with their padding.

    With `max_tokens`, sequences of similar length go together, longest first (out of memory shows at once); without it
    they stay in their order. A sequence longer than `max_tokens` is a chunk of its own.
    """
    if max_tokens is None:
        starts = range(0, len(lengths), max_rows)
        return [list(range(start, min(start + max_rows, len(lengths)))) for start in starts]
    chunks: list[list[int]] = []
    # Longest first: every chunk is as wide as its first sequence, and the widest one comes first.
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in longest_first:
        if chunks and _has_room(chunks[-1], lengths, max_rows, max_tokens):
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def _has_room(chunk: list[int], lengths: Sequence[int], max_rows: int, max_tokens: int) -> bool:
    """Whether one sequence more fits: all are padded to the first one, which is the longest."""
    width = lengths[chunk[0]]
    return len(chunk) < max_rows and (len(chunk) + 1) * width <= max_tokens


def concat_rows(parts: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Batches with the same keys as one, row after row: (B, …) tensors, those of (B, T) padded right to the widest.

    Padding is `pad_token_id` in `input_ids`, zero elsewhere.
    """
    merged = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].ndim > 1:
            width = max(tensor.shape[1] for tensor in tensors)
            fill = pad_token_id if name == "input_ids" else 0
            tensors = [_pad_to(tensor, width, fill) for tensor in tensors]
        merged[name] = torch.cat(tensors)
    return merged


def _pad_to(tensor: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)

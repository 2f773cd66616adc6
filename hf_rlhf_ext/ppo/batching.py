"""Splits sequences into batches, and concatenates the batches of several processes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def budget_chunks(lengths: Sequence[int], *, max_rows: int, max_tokens: int | None) -> list[list[int]]:
    """Splits sequences into chunks that fit a budget of rows and tokens.

    With `max_tokens`, sequences of similar length are put together, and the longest come first, so that a run that
    lacks memory fails early. Otherwise the order is kept.

    Args:
        lengths: number of tokens of each sequence.
        max_rows: maximum number of sequences per chunk.
        max_tokens: maximum number of tokens per chunk, including padding; `None` means no limit. A sequence that is
            longer is a chunk by itself.

    Returns:
        For each chunk, the indices of its sequences in `lengths`.
    """
    if max_tokens is None:
        starts = range(0, len(lengths), max_rows)
        return [list(range(start, min(start + max_rows, len(lengths)))) for start in starts]
    chunks: list[list[int]] = []
    # Longest first: each chunk is as wide as its first sequence.
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in longest_first:
        if chunks and _has_room(chunks[-1], lengths, max_rows, max_tokens):
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def _has_room(chunk: list[int], lengths: Sequence[int], max_rows: int, max_tokens: int) -> bool:
    """Whether one more sequence fits. All are padded to the length of the first one, which is the longest."""
    width = lengths[chunk[0]]
    return len(chunk) < max_rows and (len(chunk) + 1) * width <= max_tokens


def concat_rows(parts: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Concatenates batches with the same keys along their rows.

    Args:
        parts: batches of tensors (B, …). Tensors (B, T) are padded on the right to the largest T.
        pad_token_id: padding of `input_ids`; all other tensors are padded with zero.

    Returns:
        One batch.
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

"""Splits sequences into batches, and concatenates the batches of several processes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..modeling.packing import Layout


def budget_chunks(
    lengths: Sequence[int], *, max_rows: int, max_tokens: int | None, padded: bool = True
) -> list[list[int]]:
    """Splits sequences into chunks that fit a budget of rows and tokens.

    With `max_tokens`, sequences of similar length are put together, and the longest come first, so that a run that
    lacks memory fails early. Otherwise the order is kept.

    Args:
        lengths: number of tokens of each sequence.
        max_rows: maximum number of sequences per chunk.
        max_tokens: maximum number of tokens per chunk, including padding; `None` means no limit. A sequence that is
            longer is a chunk by itself.
        padded: whether sequences are padded to the longest one of their chunk.

    Returns:
        For each chunk, the indices of its sequences in `lengths`.
    """
    if max_tokens is None:
        starts = range(0, len(lengths), max_rows)
        return [list(range(start, min(start + max_rows, len(lengths)))) for start in starts]
    chunks: list[list[int]] = []
    tokens = 0  # of the last chunk
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in longest_first:
        # Each chunk is as wide as its first sequence.
        more = lengths[chunks[-1][0]] if chunks and padded else lengths[index]
        if chunks and len(chunks[-1]) < max_rows and tokens + more <= max_tokens:
            chunks[-1].append(index)
            tokens += more
        else:
            chunks.append([index])
            tokens = lengths[index]
    return chunks


def prompt_chunks(
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    *,
    per_prompt: int,
    layout: Layout,
    max_rows: int,
    max_tokens: int | None,
) -> list[list[int]]:
    """Splits sequences into chunks as `budget_chunks` does, but never between the completions of a prompt.

    Args:
        lengths: number of tokens of each sequence, prompt and completion together.
        prompt_lengths: number of tokens of the prompt of each sequence.
        per_prompt: number of consecutive sequences that have the same prompt.
        layout: how they pass through the model. A shared prompt counts once.
        max_rows: maximum number of sequences per chunk.
        max_tokens: maximum number of tokens per chunk, including padding; `None` means no limit. The sequences of a
            prompt are a chunk by themselves if they exceed a maximum.

    Returns:
        For each chunk, the indices of its sequences in `lengths`.
    """
    if per_prompt == 1:
        return budget_chunks(lengths, max_rows=max_rows, max_tokens=max_tokens)
    groups = [range(start, start + per_prompt) for start in range(0, len(lengths), per_prompt)]
    sizes = []
    for rows in groups:
        if layout is Layout.PLAIN:
            sizes.append(per_prompt * max(lengths[row] for row in rows))
        else:
            sizes.append(sum(lengths[row] for row in rows) - (per_prompt - 1) * prompt_lengths[rows[0]])
    chunks = budget_chunks(
        sizes,
        max_rows=max(1, max_rows // per_prompt),
        max_tokens=max_tokens,
        padded=layout is not Layout.SEGMENTS,
    )
    return [[row for group in chunk for row in groups[group]] for chunk in chunks]


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

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
        return [list(range(i, min(i + max_rows, len(lengths)))) for i in range(0, len(lengths), max_rows)]
    chunks: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        fits = chunks and len(chunks[-1]) < max_rows and (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] <= max_tokens
        chunks[-1].append(index) if fits else chunks.append([index])
    return chunks


def concat_rows(parts: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Batches with the same keys as one, row after row: (B, …) tensors, those of (B, T) padded right to the widest.

    Padding is `pad_token_id` in `input_ids`, zero elsewhere.
    """
    merged = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].ndim > 1:
            width, fill = max(t.shape[1] for t in tensors), pad_token_id if name == "input_ids" else 0
            tensors = [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in tensors]
        merged[name] = torch.cat(tensors)
    return merged

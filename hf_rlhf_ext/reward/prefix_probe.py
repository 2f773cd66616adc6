"""A probe before training: whether the shared-prefix layout gives a model's scores of plain rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collators import DataCollatorForComparisons
from ..modeling.adapters import evaluating
from ..modeling.prefix import why_not
from .scores import score_batch

_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What an architecture may raise for a mask of this layout."""


@torch.no_grad()
def shared_prefix_problem(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Why the shared-prefix layout does not give this model's scores of plain rows; None where it does.

    First what `modeling.prefix.why_not` knows; then a probe: completions of three random prompts, two of which share a
    row of 12 tokens, in both layouts, must agree to 1e-3 of the largest score in fp32 and to 5 % in bf16 or 4 bits.
    """
    problem = why_not(model, device)
    if problem is not None:
        return problem

    config = model.config.get_text_config()
    rows = _probe_rows(config.vocab_size)
    try:
        with _probe_config(config), evaluating(model):
            shared = _scores(model, rows, "shared_prefix")
            plain = _scores(model, rows, "plain")
    except _REFUSALS as error:
        reason = str(error) or type(error).__name__
        return f"it refuses the layout: {reason.splitlines()[0]}"

    # A quantized model's first parameter may be packed bytes: the dtype is that of a floating one.
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    difference = float((shared - plain).abs().max())
    if difference <= tolerance * float(plain.abs().max()):
        return None
    return f"a probe scores {difference:.2g} apart from plain rows"


def _probe_rows(vocab_size: int) -> list[dict[str, Any]]:
    """Tokenized comparison rows of three prompts: one fills a row of 12 tokens, the other two fit into one together."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(vocab_size, 1000), (12,), generator=generator).tolist()
    return [
        _probe_row(ids[:4], [ids[4:7], ids[7:8], ids[8:]]),
        _probe_row(ids[:3], [ids[3:5], ids[5:7]]),
        _probe_row(ids[7:8], [ids[8:10], ids[10:]]),
    ]


def _probe_row(prompt_ids: list[int], completion_ids: list[list[int]]) -> dict[str, Any]:
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        # The collator wants judgments, scores do not.
        "pairs": [[0, 1]],
        "targets": [1.0],
        "weights": [1.0],
    }


@contextmanager
def _probe_config(config: Any) -> Iterator[None]:
    """Sets what a forward pass of the probe needs in the model's text config; restores it after."""
    pad_token_id = config.pad_token_id
    window = getattr(config, "sliding_window", None)
    if pad_token_id is None:  # without one, Transformers refuses batches
        config.pad_token_id = 0
    if window:
        config.sliding_window = min(window, 3)  # one that such short texts notice
    try:
        yield
    finally:
        config.pad_token_id = pad_token_id
        if window:
            config.sliding_window = window


def _scores(model: nn.Module, rows: list[dict[str, Any]], layout: str) -> Tensor:
    batch = DataCollatorForComparisons(0, layout=layout)(rows)
    device = next(model.parameters()).device
    on_device = {name: values.to(device) for name, values in batch.items()}
    return score_batch(model, on_device)

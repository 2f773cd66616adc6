"""A test before training: whether a model gives the same scores in the shared-prefix layout as in plain rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collators import DataCollatorForComparisons
from ..errors import first_line
from ..modeling.prefix import why_not
from ..modeling.probing import evaluating
from .scores import score_batch

_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
"""Exceptions that a model may raise for the attention mask of this layout."""


@torch.no_grad()
def shared_prefix_problem(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Tests whether a model gives the same scores in the shared-prefix layout as in plain rows.

    First it checks what `modeling.prefix.why_not` knows. Then it scores completions of three random prompts in both
    layouts. The scores must agree to 0.1 percent of the largest score in fp32, and to 5 percent in bf16 or 4 bits.

    Args:
        model: the reward model.
        device: device of training; `None` means the current device of the model.

    Returns:
        Why the layout is not supported, in a few words; `None` if it is.
    """
    problem = why_not(model, device)
    if problem is not None:
        return problem

    config = model.config.get_text_config()
    rows = _probe_rows(config.vocab_size)
    try:
        with probe_config(config), evaluating(model):
            shared = _scores(model, rows, "shared_prefix")
            plain = _scores(model, rows, "plain")
    except _REFUSALS as error:
        return f"it does not accept the layout: {first_line(error)}"

    # The first parameter of a quantized model may be packed bytes, so take the dtype of a floating-point one.
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    difference = float((shared - plain).abs().max())
    if difference <= tolerance * float(plain.abs().max()):
        return None
    return f"its scores differ from those of plain rows by {difference:.2g} in a test"


def _probe_rows(vocab_size: int) -> list[dict[str, Any]]:
    """Tokenized comparison rows of three prompts. One of them has 12 tokens, and the other two fit in 12 together."""
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
        # The collator needs judgments, although scores do not depend on them.
        "pairs": [[0, 1]],
        "targets": [1.0],
        "weights": [1.0],
    }


@contextmanager
def probe_config(config: Any) -> Iterator[None]:
    """Inside the context, sets what a forward pass of the test needs in the model's text config."""
    pad_token_id = config.pad_token_id
    window = getattr(config, "sliding_window", None)
    if pad_token_id is None:  # Transformers refuses batches without one
        config.pad_token_id = 0
    if window:
        config.sliding_window = min(window, 3)  # small enough to have an effect on such short texts
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

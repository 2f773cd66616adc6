"""The shared-prefix layout: `[prompt, y1 … yK]` side by side, where every completion sees the prompt and itself.

Position ids restart after the prompt, so that each completion's hidden states are those of a row of its own, with the
prompt computed once; a row may hold several prompts, which do not see each other. Batches hold (B, L) `segments`, a
number for every prompt and completion of a row, and (B, L) `owners`, the number of the prompt that a token belongs to;
both are -1 in padding.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from .adapters import bare_model
from .heads import is_encoder

COLUMNS = ("input_ids", "segments", "owners", "positions")
WINDOWED = "sliding_attention"
FULL = "full_attention"
FLEX = "flex_attention"


def mask_function(
    segments: Tensor, owners: Tensor, positions: Tensor, window: int | None = None
) -> Callable[..., Tensor]:
    """Who attends to whom, as FlexAttention's `mask_mod(batch, head, query, key)` (index tensors that broadcast).

    A token sees earlier tokens of its prompt and of its own segment; `window` limits the distance in *position*, as a
    row of its own would have it. Padding sees itself: a query without any key would be NaN.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        to = segments[batch, key]
        seen = ((to == owners[batch, query]) | (to == segments[batch, query])) & (key <= query) & (to >= 0)
        if window is not None:
            seen = seen & (positions[batch, query] - positions[batch, key] < window)
        return seen | (query == key)

    return sees


def prefix_mask(segments: Tensor, owners: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """`mask_function` of (B, L) segments, owners and positions as a tensor, (B, 1, L, L) bool."""
    rows, length = segments.shape
    index = torch.arange(length, device=segments.device)
    batch = torch.arange(rows, device=segments.device)[:, None, None, None]
    return mask_function(segments, owners, positions, window)(batch, None, index[:, None], index)


def model_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What `model(...)` takes for a batch in this layout: ids, position ids, and masks as its layers want them."""
    input_ids, segments, owners, positions = (batch[name] for name in COLUMNS)
    config = bare_model(model).config.get_text_config()
    types, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)

    def mask(limit: int | None) -> Any:
        if config._attn_implementation == FLEX:
            n_rows, length = segments.shape
            sees = mask_function(segments, owners, positions, limit)
            return create_block_mask(sees, n_rows, None, length, length, device=segments.device)
        allowed = prefix_mask(segments, owners, positions, limit)
        if config._attn_implementation != "eager":
            return allowed
        # Eager adds its mask: a bool one would shift the scores by one instead of hiding anything.
        dtype = (
            torch.get_autocast_dtype(input_ids.device.type) if torch.is_autocast_enabled() else bare_model(model).dtype
        )
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    if WINDOWED in types:  # one mask for all layers would be passed through and be silently wrong
        masks = {FULL: mask(None), WINDOWED: mask(window)}
    else:
        masks = mask(None if types else window)  # Mistral has a window and no layer types
    return {"input_ids": input_ids, "position_ids": positions, "attention_mask": masks}


def why_not(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Why the layout cannot be used with this model, as far as its configuration tells; None where it may.

    `device` is where it will train, by default where it is.
    """
    base = bare_model(model)
    config = base.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ()) - {FULL, WINDOWED}
    if odd:
        return f"it has layers of type {', '.join(sorted(odd))}"
    if is_encoder(base):
        return "it is an encoder"
    if getattr(base, "_is_stateful", False):
        return "it carries a state from token to token"
    if any("local" in str(kind) for kind in getattr(config, "attention_layers", None) or ()):
        return "it has local attention"
    backbone = getattr(base, base.base_model_prefix, base)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "its backbone takes no position ids"
    if config._attn_implementation not in ("sdpa", "eager", FLEX):
        return f"its attention is {config._attn_implementation}, not sdpa, eager or {FLEX}"
    if config._attn_implementation == FLEX and (device or base.device).type == "cpu":
        return f"{FLEX} has no backward pass on a CPU"
    return None

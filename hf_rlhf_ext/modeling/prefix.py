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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from .adapters import bare_model
from .heads import is_encoder

WINDOWED = "sliding_attention"
FULL = "full_attention"
FLEX = "flex_attention"


def mask_function(
    segments: Tensor,
    owners: Tensor,
    positions: Tensor,
    window: int | None = None,
) -> Callable[..., Tensor]:
    """Who attends to whom, as FlexAttention's `mask_mod(batch, head, query, key)` (index tensors that broadcast).

    A token sees earlier tokens of its prompt and of its own segment; `window` limits the distance in *position*, as a
    row of its own would have it. Padding sees itself: a query without any key would be NaN.
    """

    def sees(
        batch: Tensor,
        head: Tensor,
        query: Tensor,
        key: Tensor,
    ) -> Tensor:
        key_segment = segments[batch, key]
        same_prompt = key_segment == owners[batch, query]
        same_segment = key_segment == segments[batch, query]
        earlier = key <= query
        no_padding = key_segment >= 0
        visible = (same_prompt | same_segment) & earlier & no_padding
        if window is not None:
            distance = positions[batch, query] - positions[batch, key]
            visible = visible & (distance < window)
        return visible | (query == key)

    return sees


def prefix_mask(
    segments: Tensor,
    owners: Tensor,
    positions: Tensor,
    window: int | None = None,
) -> Tensor:
    """`mask_function` of (B, L) segments, owners and positions as a tensor, (B, 1, L, L) bool."""
    n_rows, length = segments.shape
    batch = torch.arange(n_rows, device=segments.device)[:, None, None, None]  # (B, 1, 1, 1)
    key = torch.arange(length, device=segments.device)
    query = key[:, None]
    sees = mask_function(segments, owners, positions, window)
    return sees(batch, None, query, key)


def model_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What `model(...)` takes for a batch in this layout: ids, position ids, and masks as its layers want them."""
    config = bare_model(model).config.get_text_config()
    layer_types = _layer_types(config)
    window = getattr(config, "sliding_window", None)

    if WINDOWED in layer_types:
        # One mask for all layers would be passed through and be silently wrong.
        masks = {FULL: _attention_mask(model, batch, None), WINDOWED: _attention_mask(model, batch, window)}
    elif layer_types:
        masks = _attention_mask(model, batch, None)
    else:
        masks = _attention_mask(model, batch, window)  # Mistral has a window and no layer types
    return {"input_ids": batch["input_ids"], "position_ids": batch["positions"], "attention_mask": masks}


def _layer_types(config: PreTrainedConfig) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _attention_mask(model: nn.Module, batch: dict[str, Tensor], window: int | None) -> Tensor | BlockMask:
    """The mask of the batch in the form that the model's attention takes; `window` as in `mask_function`."""
    base = bare_model(model)
    attention = base.config.get_text_config()._attn_implementation
    segments = batch["segments"]
    if attention == FLEX:
        n_rows, length = segments.shape
        sees = mask_function(segments, batch["owners"], batch["positions"], window)
        return create_block_mask(sees, n_rows, None, length, length, device=segments.device)

    allowed = prefix_mask(segments, batch["owners"], batch["positions"], window)
    if attention != "eager":
        return allowed
    # Eager adds its mask: a bool one would shift the scores by one instead of hiding anything.
    dtype = base.dtype
    if torch.is_autocast_enabled():
        dtype = torch.get_autocast_dtype(segments.device.type)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def why_not(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Why the layout cannot be used with this model, as far as its configuration tells; None where it may.

    `device` is where it will train, by default where it is.
    """
    base = bare_model(model)
    config = base.config.get_text_config()
    unsupported_layers = _layer_types(config) - {FULL, WINDOWED}
    if unsupported_layers:
        return f"it has layers of type {', '.join(sorted(unsupported_layers))}"
    if is_encoder(base):
        return "it is an encoder"
    if getattr(base, "_is_stateful", False):
        return "it carries a state from token to token"
    attention_layers = getattr(config, "attention_layers", None) or ()  # GPT-Neo
    if any("local" in str(kind) for kind in attention_layers):
        return "it has local attention"
    backbone = getattr(base, base.base_model_prefix, base)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "its backbone takes no position ids"
    if config._attn_implementation not in ("sdpa", "eager", FLEX):
        return f"its attention is {config._attn_implementation}, not sdpa, eager or {FLEX}"
    if config._attn_implementation == FLEX and (device or base.device).type == "cpu":
        return f"{FLEX} has no backward pass on a CPU"
    return None

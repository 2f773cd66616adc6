"""The shared-prefix layout: one row `[prompt, y1 … yK]`, in which each completion attends to the prompt and to itself.

Position ids restart after the prompt for each completion. Its hidden states are therefore the same as in a separate
row, but the prompt is computed only once. A row may contain several prompts, which do not attend to each other. Batches
have (B, L) `segments`, the number of the prompt or completion of each token, and (B, L) `owners`, the number of the
prompt that each token belongs to. Both are -1 in the padding.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from ..errors import UserError
from .adapters import bare_model
from .heads import is_encoder
from .packing import Layout
from .segment_plans import SegmentPlan
from .segments import PLAN, SEGMENTS, sentinel

WINDOWED = "sliding_attention"
FULL = "full_attention"
FLEX = "flex_attention"

_TAKING_MASKS = ("sdpa", "eager", FLEX, SEGMENTS)
"""Kinds of attention that compute with a mask of this layout."""


def mask_function(
    segments: Tensor,
    owners: Tensor,
    positions: Tensor,
    window: int | None = None,
) -> Callable[..., Tensor]:
    """The attention mask as a function `mask_mod(batch, head, query, key)` for FlexAttention.

    A token attends to earlier tokens of its prompt and of its own segment. Padding attends to itself, as a query
    without keys would give NaN.

    Args:
        segments: (B, L) int64, see the module.
        owners: (B, L) int64, see the module.
        positions: (B, L) int64, position ids.
        window: size of the sliding window, as a distance of position ids; `None` means no window.

    Returns:
        The function. Its arguments are index tensors that broadcast, and it returns a bool tensor.
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
    """The attention mask of `mask_function` as a tensor, (B, 1, L, L) bool."""
    n_rows, length = segments.shape
    batch = torch.arange(n_rows, device=segments.device)[:, None, None, None]  # (B, 1, 1, 1)
    key = torch.arange(length, device=segments.device)
    query = key[:, None]
    sees = mask_function(segments, owners, positions, window)
    return sees(batch, None, query, key)


def model_inputs(model: nn.Module, batch: dict[str, Any], layout: Layout | None = None) -> dict[str, Any]:
    """The arguments of `model(...)` for a batch in this layout: ids, position ids, and attention masks or a plan.

    Args:
        model: a causal LM or sequence-classification model, also inside DDP or PEFT.
        batch: `input_ids`, `segments`, `owners` and `positions`, (R, L) each. A `SegmentPlan` of these tensors may be
            in it as `segment_plan`; without one, it is built here, which waits for an accelerator once.
        layout: `MASK`, or `SEGMENTS`, which needs a model whose attention is set to it; `None` means `SEGMENTS` if it
            is, and otherwise `MASK`.

    Raises:
        UserError: if the attention of the model was changed after the layout was chosen, to one that cannot compute it.
    """
    config = bare_model(model).config.get_text_config()
    layer_types = _layer_types(config)
    window = getattr(config, "sliding_window", None)
    if layout is None:
        layout = Layout.SEGMENTS if config._attn_implementation == SEGMENTS else Layout.MASK
    by_segments = layout == Layout.SEGMENTS
    _check_attention(config._attn_implementation, layout)

    further = {}
    if by_segments:
        plan = batch.get(PLAN)
        if plan is None:
            plan = SegmentPlan.of(batch["segments"], batch["owners"], batch["positions"])
        further[PLAN] = plan

    def mask(window: int | None) -> Tensor | BlockMask:
        if by_segments:
            return sentinel(window, batch["input_ids"].device)
        return _attention_mask(model, batch, window)

    if WINDOWED in layer_types:
        # One mask for all layers would be silently wrong.
        masks = {FULL: mask(None), WINDOWED: mask(window)}
    elif layer_types:
        masks = mask(None)
    else:
        masks = mask(window)  # Mistral has a window but no layer types
    return {"input_ids": batch["input_ids"], "position_ids": batch["positions"], "attention_mask": masks, **further}


def _check_attention(attention: str, layout: Layout) -> None:
    """Raises `UserError` if an attention does not compute a layout, which it may not say itself.

    Eager attention, for instance, would add the sentinel of a plan to all pairs, and mask nothing.
    """
    needed = (SEGMENTS,) if layout == Layout.SEGMENTS else _TAKING_MASKS
    if attention not in needed:
        raise UserError(
            f"attn_implementation: the model was set to {attention!r} after its layout was chosen, which needs "
            f"{needed[0]!r}: set it before you make the trainer, or back with set_attn_implementation({needed[0]!r})."
        )


def _layer_types(config: PreTrainedConfig) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _attention_mask(model: nn.Module, batch: dict[str, Tensor], window: int | None) -> Tensor | BlockMask:
    """The attention mask in the form that the attention of the model needs. `window` is as in `mask_function`."""
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
    # Eager attention adds its mask, so that a bool mask would hide nothing.
    dtype = base.dtype
    if torch.is_autocast_enabled(segments.device.type):
        dtype = torch.get_autocast_dtype(segments.device.type)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def why_not(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Checks by its configuration whether a model supports the layout.

    Args:
        model: the model.
        device: device of training; `None` means the current device of the model.

    Returns:
        Why the layout is not supported, in a few words; `None` if it may be supported.
    """
    base = bare_model(model)
    config = base.config.get_text_config()
    unsupported_layers = _layer_types(config) - {FULL, WINDOWED}
    if unsupported_layers:
        return f"it has layers of type {', '.join(sorted(unsupported_layers))}"
    if is_encoder(base):
        return "it is an encoder"
    if getattr(base, "_is_stateful", False):
        return "it passes a state from token to token"
    attention_layers = getattr(config, "attention_layers", None) or ()  # GPT-Neo
    if any("local" in str(kind) for kind in attention_layers):
        return "it has local attention"
    backbone = getattr(base, base.base_model_prefix, base)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "its backbone accepts no position ids"
    if config._attn_implementation not in _TAKING_MASKS:
        return f"its attention is {config._attn_implementation}, not sdpa, eager or {FLEX}"
    if config._attn_implementation == FLEX and (device or base.device).type == "cpu":
        return f"{FLEX} has no backward pass on a CPU"
    return None

"""Attention by segments: rows `[prompt, y1 … yK]` of the shared-prefix layout, exact and without a mask over the row.

Linear layers see the prompt once. Attention splits the tokens of a batch: prompts attend causally, and the queries of a
completion attend to the keys of its prompt and to its own. A dense mask would cost (P + K·T)² for a prompt of P tokens
and K completions of T; this costs P² + K·T·(P + T), as do separate rows, which compute all other layers K times.

Importing this module registers the attention under the name `SEGMENTS` at Transformers. A model that is set to it
computes what it computes with "sdpa", unless the forward pass gets a `SegmentPlan` as the keyword `segment_plan` (see
`modeling.prefix.model_inputs`). Transformers hands keywords down to the attention of every layer, also when gradient
checkpointing computes a layer again.

Shapes: R rows of L tokens; H heads of queries and G of keys, of D units; `slots` are places in padded batches.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .segment_plans import Family, SegmentPlan

SEGMENTS = "segments"
"""Name of this attention at Transformers."""

PLAN = "segment_plan"
"""Keyword of a model's forward pass for the `SegmentPlan`."""

_WITHOUT_EFFECT = {
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}
"""Keywords that sdpa ignores too. `sliding_window` is another: with sdpa it is the mask that has the window."""

_SENTINEL_DTYPE = torch.uint8


def sentinel(window: int | None, device: torch.device) -> Tensor:
    """What a model gets instead of an attention mask, which it hands down to its layers as it is.

    Args:
        window: size of the sliding window of the layers that get it; `None` without one.
        device: device of the model.

    Returns:
        (1, 1, 1, 1) uint8, or (1, 1, 2, `window`) for layers with a window. Its shape says what it means, since reading
        a value would wait for the device. SDPA takes no mask of this dtype, so that it is not taken for one.
    """
    shape = (1, 1, 1, 1) if window is None else (1, 1, 2, window)
    return torch.zeros((1, 1, 1, 1), dtype=_SENTINEL_DTYPE, device=device).expand(shape)


def _is_sentinel(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == _SENTINEL_DTYPE and mask.dim() == 4 and mask.shape[2] in (1, 2)


def segments_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segment_plan: SegmentPlan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` of Transformers calls it.

    Args:
        module: the layer.
        query: (R, H, L, D).
        key: (R, G, L, D).
        value: (R, G, L, E), E may differ from D.
        attention_mask: of `sentinel`; without a plan, as in sdpa.
        segment_plan: the plan of the batch; `None` means sdpa.
        options: keywords of the layer, such as `scaling` and `dropout`.

    Returns:
        (R, L, H, E), and `None` for the weights.

    Raises:
        ValueError: if a layer needs something that this attention does not support, such as a soft cap.
    """
    if segment_plan is None:
        if _is_sentinel(attention_mask):
            raise ValueError("the model does not hand keywords down to its attention")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling, dropout = options.pop("scaling", None), options.pop("dropout", 0.0)
    _check_supported(module, query, key, attention_mask, segment_plan, options)
    window = None if attention_mask.shape[2] == 1 else attention_mask.shape[3]

    query, key, value = (_as_autocast(x) for x in (query, key, value))
    plan = segment_plan.to(query.device)
    slots = [_to_slots(x, plan) for x in (query, key, value)]
    outputs = []
    for number, family in enumerate(plan.families):
        (prompt_q, answer_q), (prompt_k, own_k), (prompt_v, own_v) = (x[2 * number : 2 * number + 2] for x in slots)
        prompt_q, prompt_k, prompt_v = (
            x.unflatten(0, (family.n_prompts, family.prompt_length)) for x in (prompt_q, prompt_k, prompt_v)
        )
        mask = plan.mask(number, "prompts", window, query.dtype)
        outputs.append(_attend(prompt_q, prompt_k, prompt_v, mask, dropout, scaling).flatten(0, 1))
        if family.per_prompt == 0:
            continue
        mask = plan.mask(number, "completions", window, query.dtype)
        repeats = 1 if _can_group(query, key, value, mask) else query.shape[1] // key.shape[1]
        answer_q = answer_q.unflatten(0, (-1, family.completion_length))
        answer_k = _behind_prompts(prompt_k, own_k, family, repeats)
        answer_v = _behind_prompts(prompt_v, own_v, family, repeats)
        outputs.append(_attend(answer_q, answer_k, answer_v, mask, dropout, scaling).flatten(0, 1))
    merged = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    tokens = _Reordered.apply(merged, plan.inverse, plan.index, plan.padding, plan.empty_slots)
    return tokens.unflatten(0, plan.shape), None


AttentionInterface.register(SEGMENTS, segments_attention)
# Without this, Transformers would silently use no mask where this attention is set but no plan is given.
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)


def _check_supported(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, plan: SegmentPlan, options: dict[str, Any]
) -> None:
    """Raises `ValueError` for everything that would be ignored silently."""
    is_causal = options.pop("is_causal", None)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise ValueError("attention by segments is causal, and this layer is not")
    options.pop("sliding_window", None)  # the layer's mask says it
    unknown = [name for name, value in options.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown:
        raise ValueError(f"attention by segments does not support {', '.join(sorted(unknown))}")
    if not _is_sentinel(mask):
        raise ValueError("the model changes the attention mask, which attention by segments does not support")
    rows, _, length, _ = query.shape
    if (rows, length) != plan.shape or key.shape[2] != length:
        raise ValueError(f"the plan is of a batch {plan.shape}, and queries are {rows} rows of {length} tokens")


def _as_autocast(x: Tensor) -> Tensor:
    """A tensor in the dtype in which SDPA computes. Without a mask, it calls kernels that autocast does not reach."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class _Reordered(torch.autograd.Function):
    """Rows of a tensor in another order, and their gradients back, both as `index_select`, which is fast."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, there: Tensor, back: Tensor, holes_there: Tensor | None, holes_back: Tensor
    ) -> Tensor:
        ctx.back, ctx.holes = back, holes_back
        return _selected(rows, there, holes_there)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _selected(gradient, ctx.back, ctx.holes), None, None, None, None


def _selected(rows: Tensor, index: Tensor, holes: Tensor | None) -> Tensor:
    """`rows[index]`, with zeros in the rows `holes`."""
    selected = rows.index_select(0, index)
    if holes is not None and len(holes):
        selected.index_fill_(0, holes, 0)
    return selected


def _to_slots(x: Tensor, plan: SegmentPlan) -> tuple[Tensor, ...]:
    """The slots of all families of a tensor (R, heads, L, units): prompts and completions of each, in turn."""
    tokens = x.transpose(1, 2).flatten(0, 1)  # (R·L, heads, units)
    # Slots without a token need no zeros: no query of a token sees them.
    slots = _Reordered.apply(tokens, plan.index, plan.inverse, None, plan.padding)
    return slots.split([size for family in plan.families for size in family.sizes])


def _behind_prompts(prompts: Tensor, completions: Tensor, family: Family, repeats: int) -> Tensor:
    """Keys or values of completions behind those of their prompts, each head `repeats` times.

    Args:
        prompts: (n, P, G, D).
        completions: (n·K·T, G, D).
        family: their family.
        repeats: heads of queries for each head of keys.

    Returns:
        (n·K, P + T, G·repeats, D).
    """
    n, _, heads, units = prompts.shape
    shared = prompts[:, None].expand(n, family.per_prompt, -1, heads, units)
    own = completions.unflatten(0, (n, family.per_prompt, family.completion_length))
    if repeats > 1:
        shared = shared[..., None, :].expand(*shared.shape[:-1], repeats, units)
        own = own[..., None, :].expand(*own.shape[:-1], repeats, units)
    return torch.cat([shared, own], 2).flatten(0, 1).reshape(-1, shared.shape[2] + own.shape[2], heads * repeats, units)


def _can_group(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether attention takes fewer heads of keys than of queries as they are, without copies and in a fast kernel."""
    if query.device.type == "cpu":
        return True
    # As in Transformers: elsewhere, only the kernel without a mask does.
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and is_half and mask is None and key.shape[-1] == value.shape[-1] <= 256


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of (B, queries, H, D) to (B, keys, G, D), lower-right causal without a mask: (B, queries, H, E)."""
    if query.shape[2] != key.shape[2] and not _can_group(query, key, value, mask):
        repeats = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    is_causal = mask is None and query.shape[1] == key.shape[1]
    if mask is None and not is_causal:
        mask = causal_lower_right(query.shape[1], key.shape[1])
    output = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)

"""How a model can compute completions that share a prompt: by segments, with a mask, or only in plain rows."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from ..errors import first_line
from .adapter_kinds import why_own_rows
from .adapters import bare_model
from .logprobs import captured_hidden_states
from .packing import Layout
from .prefix import model_inputs, why_not
from .probing import probing
from .segments import SEGMENTS

__all__ = ["Layout", "LayoutChoice", "find_layout", "probe_config"]

_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
"""Exceptions that a model may raise for a mask or a keyword that it does not know."""

_PROBE_LENGTHS = ((4, (3, 1, 4)), (3, (2, 2)), (1, (2, 2, 3)))
"""Tokens of the prompts and of their completions in the test."""


@dataclass(frozen=True)
class LayoutChoice:
    """The best layout that a model can compute.

    Attributes:
        layout: the layout.
        reason: why it is not a better one, in a few words that follow "since"; `None` for `SEGMENTS`.
    """

    layout: Layout
    reason: str | None = None


def find_layout(
    model: nn.Module,
    device: torch.device | None = None,
    *,
    may_segment: bool = True,
) -> LayoutChoice:
    """Finds the best layout that a model can compute, and leaves the model with the attention that it needs.

    The config of the model must allow a layout, see `modeling.prefix.why_not`. Then hidden states of completions of
    three random prompts are computed in it and in plain rows. They must agree to 0.1 percent of the largest in fp32,
    and to 5 percent in bf16 or 4 bits.

    Only a model with sdpa attention is set to attention by segments. Without a plan, it computes what it computed
    before.

    Args:
        model: a causal LM or sequence-classification model, also inside DDP or PEFT.
        device: device of training; `None` means the current device of the model.
        may_segment: whether attention by segments is tried.
    """
    problem = why_own_rows(extract_model_from_parallel(model)) or why_not(model, device)
    if problem is not None:
        return LayoutChoice(Layout.PLAIN, problem)

    try:
        plain = _hidden_states(model, Layout.PLAIN)
    except _REFUSALS as error:
        return LayoutChoice(Layout.PLAIN, f"it fails with plain rows in a test: {first_line(error)}")
    reason = "attention by segments was not asked for"
    if may_segment:
        reason = _why_no_segments(model, plain)
        if reason is None:
            return LayoutChoice(Layout.SEGMENTS)
    problem = _difference(model, Layout.MASK, plain)
    if problem is None:
        return LayoutChoice(Layout.MASK, reason)
    return LayoutChoice(Layout.PLAIN, problem)


def _why_no_segments(model: nn.Module, plain: Tensor) -> str | None:
    """Sets the model to attention by segments. If it does not work, it is set back, and the reason is returned."""
    base = bare_model(model)
    attention = base.config.get_text_config()._attn_implementation
    if attention not in ("sdpa", SEGMENTS):
        return f"its attention is {attention}, not sdpa"
    before = _attention_of(base)
    try:
        problem = _set_attention(base)
    except _REFUSALS as error:
        problem = f"its attention cannot be exchanged: {first_line(error)}"
    for layout in (Layout.PLAIN, Layout.SEGMENTS):  # some models compute something else where it is not called sdpa
        problem = problem or _difference(model, layout, plain)
    if problem is not None:
        for config, name in before:
            config._attn_implementation_internal = name
    return problem


def _attention_of(base: PreTrainedModel) -> list[tuple[PreTrainedConfig, str]]:
    """The attention of all configs in a model, as that of a vision tower may differ."""
    configs = {id(base.config): base.config}
    for module in base.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    return [(config, config._attn_implementation) for config in configs.values()]


def _set_attention(base: PreTrainedModel) -> str | None:
    text = base.config.get_text_config()
    wanted: str | dict[str, str] = SEGMENTS
    if text is not base.config:
        wanted = {name: SEGMENTS for name in base.config.sub_configs if getattr(base.config, name) is text}
    with _quiet():
        base.set_attn_implementation(wanted)
    if text._attn_implementation == SEGMENTS:
        return None
    return "its attention cannot be exchanged"


def _difference(model: nn.Module, layout: Layout, plain: Tensor) -> str | None:
    """What is wrong with the hidden states in a layout, compared with those of plain rows."""
    try:
        states = _hidden_states(model, layout)
    except _REFUSALS as error:
        return f"it does not accept the layout: {first_line(error)}"
    # The first parameter of a quantized model may be packed bytes, so take the dtype of a floating-point one.
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    is_quantized = getattr(bare_model(model), "is_quantized", False)
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) and not is_quantized else 0.05
    difference = float((states - plain).abs().max())
    # Written so that NaN is a difference.
    if difference <= tolerance * float(plain.abs().max()):
        return None
    return f"its hidden states differ from those of plain rows by {difference:.2g} in a test"


def _hidden_states(model: nn.Module, layout: Layout) -> Tensor:
    """The last hidden states of all tokens of the completions of the test, (N, H) fp32."""
    config = bare_model(model).config.get_text_config()
    device = next(model.parameters()).device
    batch = _probe_batch(layout, min(config.vocab_size, 1000))
    inputs = {name: values.to(device) for name, values in batch.items()}
    wanted = inputs.pop("wanted")
    with probe_config(config), probing(model), captured_hidden_states(model) as captured:
        if layout != Layout.PLAIN:
            inputs = model_inputs(model, inputs, layout)
        model(**inputs, use_cache=False)
    return captured[0].flatten(0, 1)[wanted].float()


def _probe_batch(layout: Layout, vocabulary: int) -> dict[str, Tensor]:
    """The batch of the test. `wanted` are the tokens of completions, as indices of the flattened batch."""
    generator = torch.Generator().manual_seed(0)
    plain: list[list[Tensor]] = []
    # The first prompt has a row of its own, and the others share one, which is shorter and therefore padded.
    shared: list[dict[str, list[Tensor]]] = [defaultdict(list), defaultdict(list)]
    wanted: list[tuple[int, int, int]] = []  # row of a completion, its first column and its length
    for number, (n_prompt, lengths) in enumerate(_PROBE_LENGTHS):
        row = min(number, 1)
        prompt = torch.randint(vocabulary, (n_prompt,), generator=generator)
        owner = 10 * number
        _append(shared[row], prompt, owner, owner, 0)
        for place, length in enumerate(lengths, 1):
            completion = torch.randint(vocabulary, (length,), generator=generator)
            if layout == Layout.PLAIN:
                wanted.append((len(plain), n_prompt, length))
            else:
                wanted.append((row, sum(map(len, shared[row]["input_ids"])), length))
            plain.append([prompt, completion])
            _append(shared[row], completion, owner + place, owner, n_prompt)

    if layout == Layout.PLAIN:
        sequences = [torch.cat(parts) for parts in plain]
        batch = {
            "input_ids": pad_sequence(sequences, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True),
        }
    else:
        batch = {}
        for name in ("input_ids", "segments", "owners", "positions"):
            padding = -1 if name in ("segments", "owners") else 0
            rows = [torch.cat(columns[name]) for columns in shared]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    width = batch["input_ids"].shape[1]
    batch["wanted"] = torch.cat([row * width + torch.arange(first, first + length) for row, first, length in wanted])
    return batch


def _append(row: dict[str, list[Tensor]], ids: Tensor, segment: int, owner: int, first_position: int) -> None:
    row["input_ids"].append(ids)
    row["segments"].append(torch.full_like(ids, segment))
    row["owners"].append(torch.full_like(ids, owner))
    row["positions"].append(torch.arange(first_position, first_position + len(ids)))


@contextmanager
def probe_config(config: Any) -> Iterator[None]:
    """Inside the context, sets what a forward pass of the test needs in the model's text config."""
    lacks_pad_token = not hasattr(config, "pad_token_id")  # CodeGen
    pad_token_id = getattr(config, "pad_token_id", None)
    if pad_token_id is None:  # Transformers refuses batches without one
        config.pad_token_id = 0
    window = getattr(config, "sliding_window", None)
    if window:
        config.sliding_window = min(window, 3)  # small enough to have an effect on such short texts
    try:
        yield
    finally:
        config.pad_token_id = pad_token_id
        if lacks_pad_token:
            del config.pad_token_id
        if window:
            config.sliding_window = window


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the context, Transformers does not warn: of a model whose attention cannot be set, a reason says so."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)

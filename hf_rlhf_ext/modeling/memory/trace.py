"""Runs a step of training on a model without data, and notes what is in memory at the peak of each segment."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..adapters import bare_model
from .fake_model import fake_mode, without_fakes
from .live_bytes import LiveBytes, state_tensors

WEIGHTS = "base weights"
ADAPTERS = "adapters and heads"
GRADIENTS = "gradients"
LOGITS = "logits"
ACTIVATIONS = "activations"
TEMPORARY = "temporary"

_OF_ADAPTERS = ("lora_", "modules_to_save", "_head.", "score.", "trainable_tokens")
_FIRST, _LAST, _MIDDLE = "first layer", "last layer", "layers between"
"""Ends of the names of segments: which layer a backward pass is in."""

_ROUND_TO_INT8 = "bitsandbytes::int8_vectorwise_quant"

_OF_EACH_LAYER = ("KV cache", "merged copy")
"""What each layer leaves behind in a pass without gradients."""

Peaks = dict[str, dict[str, int]]
"""For each segment, bytes by use at its peak."""


@dataclass(frozen=True)
class DepthTrace:
    """What was found with a number of layers.

    Attributes:
        phases: for each phase, the peaks of its segments.
        resident: bytes by use between the phases.
        trained: number of weights of each trained tensor, and bytes of one of them.
    """

    phases: dict[str, Peaks]
    resident: dict[str, int]
    trained: list[tuple[int, int]]

    @classmethod
    def of(cls, trace: "Trace", resident: dict[str, int], trained: list[tuple[int, int]]) -> "DepthTrace":
        """What a trace found. Names of segments are `phase: segment`; others are left out."""
        phases: dict[str, Peaks] = {}
        for name, parts in trace.peaks.items():
            phase, has_name, segment = name.partition(": ")
            if has_name:
                phases.setdefault(phase, {})[segment] = parts
        return cls(phases, resident, trained)


class Trace(LiveBytes):
    """`LiveBytes` of a run without data. What the result of an operator would be, where code asks, is assumed."""

    def __init__(self):
        super().__init__()
        self._n_selected: int | None = None

    @contextmanager
    def selecting(self, n: int) -> Iterator[None]:
        """Inside the context, a mask without data selects n entries."""
        before = self._n_selected
        self._n_selected = n
        try:
            yield
        finally:
            self._n_selected = before

    def _run(self, func: Any, args: tuple, kwargs: Any) -> Any:
        if func is torch.ops.aten.index.Tensor and _is_mask(args[1][0]):
            return args[0].new_empty(self._n_selected, *args[0].shape[args[1][0].dim() :])
        if func is torch.ops.aten._index_put_impl_.default and _is_mask(args[1][0]):
            return args[0]  # the gradient of such a selection
        if func is torch.ops.aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        if func.name() == _ROUND_TO_INT8:
            return _rounded(args[0])
        if func is torch.ops.aten.nonzero.default:
            return _all_true(args[0])
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0  # of masks: not everything is True, so that there is padding
        return super()._run(func, args, kwargs)


def _rounded(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a layer in 8 bits, the scales of their rows, and the columns with outliers: without data, none."""
    scales = inputs.new_empty(inputs.numel() // inputs.shape[-1], dtype=torch.float32)
    return inputs.new_empty(inputs.shape, dtype=torch.int8), scales, inputs.new_empty(0, dtype=torch.int64)


def _is_mask(index: Tensor | None) -> bool:
    return isinstance(index, FakeTensor) and index.dtype == torch.bool


def _all_true(mask: Tensor) -> Tensor:
    """The indices of the True entries of a mask. Without data, all are."""
    if not isinstance(mask, FakeTensor):
        with without_fakes():
            return mask.nonzero()
    return torch.empty((mask.numel(), mask.dim()), dtype=torch.int64, device=mask.device)


@contextmanager
def tracing(mode: Any = None) -> Iterator[Trace]:
    """Inside the context, new tensors have no data, and their bytes are counted by the trace that is yielded."""
    with mode or fake_mode(), Trace() as trace:
        yield trace


def track_weights(trace: Trace, model: nn.Module, *, base: str = WEIGHTS) -> None:
    """Counts the weights of a model: those of adapters and heads, and all others as `base`."""
    for name, tensor in state_tensors(model):
        is_adapter = any(part in f"{name}." for part in _OF_ADAPTERS) and "lm_head." not in f"{name}."
        trace.track([tensor], ADAPTERS if is_adapter else base)
    watch_gradients(trace, model)


def watch_gradients(trace: Trace, model: nn.Module) -> None:
    """Counts the gradients of trainable parameters as such, once they are kept."""

    def kept(parameter: Tensor) -> None:
        trace.relabel(parameter.grad, GRADIENTS)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(kept)


def resident_bytes(trace: Trace) -> dict[str, int]:
    """Bytes by use that are in memory before the first pass."""
    return {use: n_bytes for use, n_bytes in trace.by_use.items() if n_bytes}


def fill_gradients(trace: Trace, model: nn.Module) -> None:
    """Gives all trained parameters a gradient, as a step of several micro-batches has from the second one on."""
    with trace.using(GRADIENTS):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)


def trained_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """For each trained tensor of a model, the number of its weights and the bytes of one of them."""
    return [(p.numel(), p.element_size()) for p in model.parameters() if p.requires_grad]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a model, also inside PEFT: its longest list of modules."""
    lists = [module for module in bare_model(model).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


@contextmanager
def segments_of_backward(trace: Trace, model: nn.Module, name: str) -> Iterator[None]:
    """Inside the context, the backward pass is split into segments: in the last layer, in the first one, and below.

    In between, memory goes up or down from layer to layer in equal steps, so that the peak is at one of the ends.
    """
    layers = decoder_layers(model)
    handles = [layers[0].register_forward_pre_hook(_mark_input(trace, f"{name}, below"))]
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(_mark_output(trace, f"{name}, {_place(index, len(layers))}")))
    # What follows the layers is about logits, until the gradient of their output is there.
    handles.append(layers[-1].register_forward_hook(lambda *_: trace.set_default(LOGITS)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(index: int, n_layers: int) -> str:
    if index == n_layers - 1:
        return _LAST
    return _FIRST if index == 0 else _MIDDLE


def _mark_output(trace: Trace, segment: str) -> Callable[..., None]:
    """A hook after the forward pass of a layer: where its output gets its gradient, the segment begins."""

    def begin(gradient: Tensor) -> None:
        trace.set_default(ACTIVATIONS)
        trace.begin(segment)

    def mark(layer: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(begin)

    return mark


def _mark_input(trace: Trace, segment: str) -> Callable[..., None]:
    """A hook before the forward pass of a layer: where its input gets its gradient, the segment begins."""

    def mark(layer: nn.Module, args: tuple) -> None:
        trace.set_default(ACTIVATIONS)
        if args and args[0].requires_grad:
            args[0].register_hook(lambda gradient: trace.begin(segment))

    return mark


def at_depth(fewer: DepthTrace, more: DepthTrace, depths: tuple[int, int], depth: int) -> DepthTrace:
    """What a model with `depth` layers needs, from two shallow ones: a straight line for each use of each segment.

    Args:
        fewer: what was found with the smaller number of layers. Phases without gradients may be missing: there, what a
            layer leaves behind is its cache and the copy of its weights.
        more: what was found with the larger number of layers.
        depths: these numbers.
        depth: the number of layers of the model.
    """
    steps = (depth - depths[1]) / (depths[1] - depths[0])
    resident = _line(fewer.resident, more.resident, steps)
    phases: dict[str, Peaks] = {}
    for phase, segments in more.phases.items():
        if phase in fewer.phases:
            phases[phase] = {}
            for segment, parts in segments.items():
                if not segment.endswith(_MIDDLE) and segment in fewer.phases[phase]:
                    phases[phase][segment] = _line(fewer.phases[phase][segment], parts, steps)
        else:
            phases[phase] = {name: _inference(parts, resident, depth / depths[1]) for name, parts in segments.items()}
    of_a_layer = Counter(more.trained) - Counter(fewer.trained)
    trained = list(more.trained)
    for size, times in of_a_layer.items():
        trained += [size] * round(times * steps)
    return DepthTrace(phases, resident, trained)


def _line(shallow: dict[str, int], deep: dict[str, int], steps: float) -> dict[str, int]:
    """Bytes by use, `steps` further on the line from a shallow model to a deeper one."""
    found = {}
    for use in {*shallow, *deep}:
        first, last = shallow.get(use, 0), deep.get(use, 0)
        found[use] = max(0, round(last + steps * (last - first)))
    return found


def _inference(parts: dict[str, int], resident: dict[str, int], times: float) -> dict[str, int]:
    """Bytes by use of a pass without gradients in a model that is `times` as deep."""
    found = {}
    for use, n_bytes in parts.items():
        if use in resident:
            found[use] = resident[use]
        else:
            found[use] = round(times * n_bytes) if use in _OF_EACH_LAYER else n_bytes
    return found


def highest(peaks: Peaks) -> dict[str, int]:
    """The segment in which the most is in memory: its bytes by use."""
    return max(peaks.values(), key=lambda parts: sum(parts.values()))

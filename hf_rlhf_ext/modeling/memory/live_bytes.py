"""Counts the bytes of live tensors, in a real run and in one that is only traced with tensors without data."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "activations"
"""Use of a tensor that was created outside of every `using`."""

_GEMM_4BIT = "bitsandbytes::gemm_4bit"
_GEMM_8BIT = "bitsandbytes::int8_mixed_scaled_mm"


class LiveBytes(TorchDispatchMode):
    """Inside the context, counts the bytes of all storages that operators of PyTorch create, until they are freed.

    Tensors of any kind are counted: real ones, and those without data, such as fake tensors. Memory that a kernel
    needs inside is not seen. Only the thread that enters the context is counted, with its backward passes on a CPU.

    Attributes:
        current: bytes that are live now.
        peak: the most bytes that were live at one time.
        by_use: bytes that are live now, by use, see `using`.
        peaks: for each segment, see `begin`, the bytes by use at the time when most were live.
    """

    def __init__(self):
        super().__init__()
        self.current = 0
        self.peak = 0
        self.by_use: dict[str, int] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self._sizes: dict[int, int] = {}
        self._uses: dict[int, str] = {}
        self._watchers: dict[int, weakref.ref] = {}
        self._use: str | None = None
        self._default = OTHER
        self._segment = "start"
        self._segment_peak: dict[str, int] = {}

    # ---- What is counted ----

    def track(self, tensors: Iterable[Tensor], use: str) -> None:
        """Counts tensors that exist already, such as the weights of a model. Those that are known get the use."""
        for tensor in tensors:
            self._count(tensor, use)
            self.relabel(tensor, use)

    def relabel(self, tensor: Tensor, use: str) -> None:
        """Changes what a counted tensor is used for, as a gradient is an ordinary result until it is kept."""
        key = _storage(tensor)._cdata
        if key in self._sizes and self._uses[key] != use:
            size = self._sizes[key]
            self.by_use[self._uses[key]] -= size
            self.by_use[use] = self.by_use.get(use, 0) + size
            self._uses[key] = use

    def set_default(self, use: str) -> None:
        """Sets what tensors are counted for from now on where no `using` decides."""
        self._default = use

    @contextmanager
    def using(self, use: str) -> Iterator[None]:
        """Inside the context, new tensors are counted for this use. The innermost context decides."""
        before = self._use
        self._use = use
        try:
            yield
        finally:
            self._use = before

    def begin(self, segment: str) -> None:
        """Begins a segment of the run, which has a peak of its own. A segment may have several parts."""
        self._segment = segment
        self._note_peak()

    def _count(self, tensor: Tensor, use: str) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self._uses[key] = use
        self._watchers[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.current += size
        self.by_use[use] = self.by_use.get(use, 0) + size
        self._note_peak()

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.by_use[self._uses.pop(key)] -= size
        self.current -= size
        del self._watchers[key]

    def _note_peak(self) -> None:
        self.peak = max(self.peak, self.current)
        if self.current > self._segment_peak.get(self._segment, -1):
            self._segment_peak[self._segment] = self.current
            self.peaks[self._segment] = dict(self.by_use)

    # ---- The operators ----

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check costs time at each operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self._run(func, args, kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value, self._use or self._default)
        return result

    def _run(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Runs an operator. Those of bitsandbytes are run in steps, as their largest tensor is inside."""
        steps = {_GEMM_4BIT: _gemm_4bit, _GEMM_8BIT: _gemm_8bit}.get(func.name())
        if steps is not None:
            with self:
                return steps(*args, **kwargs)
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _gemm_4bit(
    inputs: Tensor,
    packed: Tensor,
    shape: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """A linear layer in 4 bits as bitsandbytes computes it on devices without a kernel: with the whole weight."""
    operators = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = operators.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    weight = operators.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, inputs.dtype)
    return nn.functional.linear(inputs, weight, bias)


def _gemm_8bit(
    inputs: Tensor,
    rounded: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    outliers: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear layer in 8 bits as bitsandbytes computes it: products in int32, and exact ones of outlier columns."""
    operators = torch.ops.bitsandbytes
    products = operators.int8_linear_matmul(rounded, weight)
    output = operators.int8_mm_dequant(products, row_scales, column_scales, dtype=inputs.dtype, bias=bias)
    if outliers is None or not outliers.numel():
        return output, inputs.new_empty(0)
    columns = operators.int8_vectorwise_dequant(weight[:, outliers].contiguous(), column_scales).to(inputs.dtype)
    exact = inputs[:, outliers].contiguous()
    return output.addmm(exact, columns.t()), exact


def state_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all parameters and buffers, with the statistics of quantized weights.

    Args:
        module: the model; a tensor that occurs several times is given several times.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        yield name, tensor
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            for value in vars(state).values():
                if isinstance(value, Tensor):
                    yield name, value
            state = state.state2
    for name, submodule in module.named_modules():  # of LLM.int8
        state = getattr(submodule, "state", None)
        for attribute in ("CB", "SCB"):
            value = getattr(state, attribute, None)
            if isinstance(value, Tensor):
                yield f"{name}.{attribute}", value

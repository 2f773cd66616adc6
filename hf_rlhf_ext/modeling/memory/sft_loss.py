"""What TRL's loss of supervised fine-tuning holds at once on a GPU, where Triton works on tiles of logits in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ... import compat


@contextmanager
def tiles_of(device: str) -> Iterator[None]:
    """Inside the context, TRL's fused output head holds what it does on a device, though its tensors are on the CPU.

    On a CPU, operators of PyTorch make several copies of a tile in fp32. On a GPU, a kernel reads the tile and writes
    its gradient in place, products are added up in place, and only tokens with a label are computed.

    Args:
        device: `cuda`, for which Triton is assumed to be there, or `cpu`.
    """
    if device == "cpu":
        yield
        return
    replaced = [
        (compat.chunked_logprob, "_forward_tile", _in_place),
        (compat.chunked_logprob, "_backward_tile", _in_place),
        (compat.chunked_logprob, "_addmm_fp32", _in_place),
        (compat.trainer_utils, "_use_triton", lambda device: True),  # which only chooses the tokens there
    ]
    before = [getattr(module, name) for module, name, _ in replaced]
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(replaced, before, strict=True):
            setattr(module, name, function)


def _in_place(*args: Any, **kwargs: Any) -> None:
    """Stands for a kernel that needs no memory of its own. There is no data, so that nothing is computed."""

"""Weights in shards: with FSDP2, a weight is a `DTensor`, of which each process has a part (its shard).

Files hold whole weights. Reading and writing goes through these functions, which change nothing for other weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # exists only where PyTorch was built with `distributed`

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes. Every process must call it for the same tensors in one order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state dict as whole tensors. Every process must call it."""
    return {name: whole(value) for name, value in state.items()}


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this process, which may be empty; the tensor itself if it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def as_shard(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the form of another one: as its shard of this process, if that one is sharded."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole value, so each cuts its own part: no process sends anything.
    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def takes_whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside the context, `load_state_dict` of a sharded model and of its modules takes whole tensors too.

    Args:
        model: the model. One that is not sharded is not changed.
    """

    def shard_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            value = state_dict.get(f"{prefix}{name}")
            # A value of another shape is left to the message of `load_state_dict`.
            if value is not None and value.shape == parameter.shape:
                state_dict[f"{prefix}{name}"] = as_shard(value, parameter)

    handles = []
    for module in model.modules():
        if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            handles.append(module.register_load_state_dict_pre_hook(shard_values))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

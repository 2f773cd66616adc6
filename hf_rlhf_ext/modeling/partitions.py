"""Whole weights where DeepSpeed ZeRO-3 would partition a model while it is loaded.

A partitioned weight has no elements until a forward pass gathers it. Heads, checks and test passes before training need
whole weights, so a model is loaded whole here, and DeepSpeed partitions it when training starts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.integrations import deepspeed


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside the context, Transformers loads models whole, also if the options ask for ZeRO-3."""
    # The only switch is whether Transformers knows the configuration of DeepSpeed.
    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known


def make_whole(model: nn.Module) -> None:
    """Replaces the weights of a model that was partitioned when it was loaded by whole ones on the CPU, in place.

    Every process must call it. A model that is not partitioned is not changed.
    """
    replaced: dict[int, nn.Parameter] = {}  # a tied weight is one parameter in several modules
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_partitioned(parameter):
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = _whole_copy(parameter)
                setattr(module, name, replaced[id(parameter)])


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has partitioned a weight."""
    return hasattr(parameter, "ds_shape")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a weight, also of a partitioned one, whose own shape is that of an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _whole_copy(parameter: nn.Parameter) -> nn.Parameter:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        data = parameter.data.detach().cpu().clone()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)

"""What on a model belongs to which adapter, and what an earlier trainer left on it."""

import copy
import re
from collections.abc import Collection, Mapping
from types import MethodType

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import UserError

_ROLE_MARK = "_attached_by_hf_rlhf_ext"
"""Attribute of heads and models that `AdapterStack` adds to a model as modules."""


_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")
"""Parts of names that PEFT puts around layers of the base."""


def plain_name(name: str) -> str:
    """The name of a weight of the base as it is without PEFT's wrappers around its layer."""
    return _WRAPPERS.sub("", name)


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's own classes, not one of the base model."""
    # FSDP2 gives the modules that it shards a class of its own, derived from theirs.
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def adapter_prefixes(model: PeftModel, adapter: str) -> tuple[str, ...]:
    """Beginnings of the names of all parameters and buffers of one adapter.

    PEFT's modules hold the weights of each adapter under its name, in containers such as `lora_A`. Only these are
    searched, as the name of an adapter may occur elsewhere too: an adapter may be called `layers`, or `0`.

    Args:
        model: model with adapters.
        adapter: name of the adapter.

    Returns:
        Names such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default`, without duplicates.
    """
    prefixes = []
    for path, module in model.named_modules(remove_duplicate=False):
        if not is_of_peft(module):
            continue
        for name, container in module.named_children():
            holds_adapters = isinstance(container, nn.ModuleDict | nn.ParameterDict) or is_of_peft(container)
            if holds_adapters and hasattr(container, "keys") and adapter in container.keys():
                prefixes.append(f"{path}.{name}.{adapter}".removeprefix("."))
    return tuple(prefixes)


def is_below(name: str, prefixes: Collection[str]) -> bool:
    """Whether a parameter is one of these entries or inside one of them, which may be a few levels down."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in prefixes for end in range(1, len(parts) + 1))


def adapter_parameters(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter by name, in the order in which they are registered."""
    prefixes = set(adapter_prefixes(model, adapter))
    parameters = {}
    for name, parameter in model.named_parameters():
        if is_below(name, prefixes):
            parameters[name] = parameter
    return parameters


def free_adapter_name(model: PeftModel, wanted: str) -> str:
    """Returns `wanted`, with a number if the model already has an adapter of that name."""
    name = wanted
    number = 1
    while name in model.peft_config:
        number += 1
        name = f"{wanted}_{number}"
    return name


def freeze_other_adapters(model: PeftModel, adapter: str) -> None:
    """Freezes all adapters but one, such as those of an earlier trainer, so that no optimizer trains them."""
    kept = {id(parameter) for parameter in adapter_parameters(model, adapter).values()}
    for other in model.peft_config:
        if other == adapter:
            continue
        for parameter in adapter_parameters(model, other).values():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)


def mark_as_attached(module: nn.Module) -> nn.Module:
    """Marks a head or model that becomes a module of the base as ours; returns it."""
    setattr(module, _ROLE_MARK, True)
    return module


def is_attached(module: nn.Module) -> bool:
    """Whether a module is a head or model of ours, also in a copy of the model that it was attached to."""
    return getattr(module, _ROLE_MARK, False)


def remove_earlier_roles(model: nn.Module) -> None:
    """Removes heads and models that an earlier `AdapterStack` added to the model as modules.

    Otherwise they would be copied with the model, trained and saved. The earlier trainer keeps them as objects.
    """
    parents = [model]
    if isinstance(model, PeftModel):
        parents.append(model.get_base_model())
    for parent in parents:
        for name, child in list(parent.named_children()):
            if is_attached(child):
                delattr(parent, name)


def independent_copy(model: nn.Module) -> nn.Module:
    """Copies a model so that the copy computes with its own weights.

    TRL's trainers leave a method `forward` on the model that they trained, which calls the original model, and
    Accelerate may wrap it. In a plain copy, it would still call the original, so a copy has the `forward` of its class.

    Args:
        model: the model. It is not changed.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        # Hooks of Accelerate, which move weights between devices, are no methods, and stay.
        if isinstance(module.__dict__.get("forward"), MethodType):
            del module.__dict__["forward"]
    return copied


def refuse_adapted_base(option: str, model: nn.Module) -> None:
    """Raises `UserError` if layers of a base model are wrapped by PEFT already, as a new adapter would start from them.

    PEFT changes a base in place, so that this is a model that was given to an earlier trainer with `peft_config`.

    Args:
        option: name of the argument, for the message.
        model: the model; a `PeftModel` is not refused.
    """
    if isinstance(model, PeftModel):
        return
    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules()):
        raise UserError(
            f"{option}: the layers of this {type(model).__name__} have adapters already, from an earlier trainer or "
            "get_peft_model: load the model again, or pass that trainer's model (a PeftModel) without peft_config."
        )


def forget_earlier_trainer(model: nn.Module) -> None:
    """Makes a model that an earlier trainer has trained ready for another one, with its weights as they are now.

    Heads and models that the earlier trainer attached are removed, and its other adapters are frozen.

    Args:
        model: a `PeftModel`, whose active adapter is trained further, or a base model.

    Raises:
        UserError: if it is a base model whose layers have adapters.
    """
    remove_earlier_roles(model)
    refuse_adapted_base("model", model)
    if isinstance(model, PeftModel):
        freeze_other_adapters(model, model.active_adapter)


def adapter_state(model: PeftModel, adapter: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of one adapter under the names of its file, without embeddings of the base.

    PEFT leaves out weights whose names contain the name of another adapter (PEFT 0.21: with a second adapter `0`, an
    adapter is saved without its layer 0). Here, PEFT gets the weights of this adapter only.

    Args:
        model: model with adapters.
        adapter: name of the adapter.
        state_dict: the weights of the model by name, where they are gathered from several devices.
    """
    if state_dict is None:
        state_dict = model.state_dict()
    others = [name for name in model.peft_config if name != adapter]
    prefixes = set()
    for other in others:
        prefixes.update(adapter_prefixes(model, other))
    own = {}
    for name, value in state_dict.items():
        if not is_below(name, prefixes):
            own[name] = value
    all_configs = dict(model.peft_config)
    active = model.active_adapter
    model.active_adapter = adapter  # PEFT reads the configuration of the active adapter
    for other in others:
        del model.peft_config[other]
    try:
        state = get_peft_model_state_dict(model, own, adapter_name=adapter, save_embedding_layers=False)
    finally:
        model.active_adapter = active
        model.peft_config.clear()
        model.peft_config.update(all_configs)  # in their order
    # The positions of SHiRA are in plain dicts. PEFT returns those of all adapters that it knows of.
    positions_of_others = tuple(f".shira_indices.{other}" for other in others)
    return {name: value for name, value in state.items() if not name.endswith(positions_of_others)}

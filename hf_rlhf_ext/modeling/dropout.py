"""Turning dropout off everywhere in a model, also where the model calls dropout as a function."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..compat import disable_dropout_in_model

_NAMED = ("drop", "jitter")
"""Parts of the names of probabilities, such as `attention_dropout`, `resid_pdrop`, `layerdrop` and `jitter_noise`."""

_PROBABILITIES_OF_DROPOUT_CLASSES = ("p", "prob", "rate")
"""Names of the probability in classes whose own name says that they are dropout, such as PEFT's for BOFT."""


def disable_dropout(model: nn.Module) -> None:
    """Turns dropout off: two forward passes in training mode give the same result afterward.

    TRL's `disable_dropout_in_model` handles modules of the class `nn.Dropout`. Many models call dropout as a function
    instead, with a probability that is an attribute of a layer (`attention_dropout` of Llama) or is read from the
    config in the forward pass (Falcon, GPT-J). Skipped layers (`layerdrop`), noise of MoE routers and the dropout of
    adapters count too.

    The config of the model does not change, so that a saved model keeps its probabilities.

    Args:
        model: any model, also inside PEFT. It is changed in place.
    """
    disable_dropout_in_model(model)
    for module in model.modules():
        for _, holder, name in _probabilities_of(module):
            _set(holder, name, 0.0)

    # A config is shared by all layers and is saved with the model: layers that read it get a copy without dropout.
    copies: dict[int, Any] = {}
    for module in model.modules():
        if _reads_dropout_of_config(module):
            config = module.config
            if id(config) not in copies:
                copies[id(config)] = _without_dropout(config)
            module.config = copies[id(config)]


def has_dropout(model: nn.Module) -> bool:
    """Whether a probability of dropout is above 0 anywhere in the model, as `disable_dropout` finds them."""
    for module in model.modules():
        for value, _, _ in _probabilities_of(module):
            if value > 0:
                return True
        if _reads_dropout_of_config(module) and bool(_named_probabilities(vars(module.config))):
            return True
    return False


def _probabilities_of(module: nn.Module) -> Iterator[tuple[float, Any, str]]:
    """The probabilities above 0 that a module itself holds: each with the object that holds it, and its name there."""
    attributes = vars(module)
    for name in _named_probabilities(attributes):
        yield attributes[name], module, name
    # PEFT's LoHa and LoKr have a dict with the probability of each adapter.
    for name, value in attributes.items():
        if isinstance(value, dict) and not name.startswith("_") and _is_named(name):
            for key, probability in value.items():
                if _is_probability(probability):
                    yield probability, value, key
    if "drop" in type(module).__name__.lower():
        for name in _PROBABILITIES_OF_DROPOUT_CLASSES:
            if _is_probability(attributes.get(name)):
                yield attributes[name], module, name


def _set(holder: Any, name: str, value: float) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def _named_probabilities(attributes: dict[str, Any]) -> list[str]:
    """Names of the attributes that are probabilities of dropout above 0."""
    return [name for name, value in attributes.items() if _is_named(name) and _is_probability(value)]


def _is_named(name: str) -> bool:
    return any(part in name for part in _NAMED)


def _is_probability(value: Any) -> bool:
    # Neither a bool (`drop_mask`) nor an int (a number of layers): the probabilities of configs are floats.
    return type(value) is float and 0 < value <= 1


def _without_dropout(config: Any) -> Any:
    """A copy of a config in which the probabilities of dropout are 0."""
    changed = copy.copy(config)
    for name in _named_probabilities(vars(config)):
        setattr(changed, name, 0.0)
    return changed


def _reads_dropout_of_config(module: nn.Module) -> bool:
    """Whether a module reads a probability of dropout from its config after it was built.

    A model with a head is left out, as its config is the one that is saved.
    """
    if not hasattr(module, "config"):
        return False
    if isinstance(module, PreTrainedModel) and module.base_model is not module:
        return False
    names = _named_probabilities(vars(module.config))
    return any(name in _names_read_by(type(module)) for name in names)


def _names_read_by(kind: type[nn.Module]) -> set[str]:
    """Names in the code of the methods of a class that read `config`, except those that build the module."""
    names: set[str] = set()
    for parent in kind.__mro__:
        if parent in (nn.Module, PreTrainedModel, object):
            continue
        for method in vars(parent).values():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if code is None or code.co_name == "__init__" or "config" not in code.co_names:
                continue
            names.update(code.co_names)
    return names

"""How a new adapter starts: whether it computes something, and whether it changed the base."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError, first_line
from .adapter_kinds import base_change, is_plain_lora
from .adapters import active_adapter, copy_adapter
from .probing import mean_difference, probe_logprobs
from .quantization import CALIBRATED_METHODS, quantization_kind, quantization_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewAdapter:
    """A model with an adapter that was just attached.

    Attributes:
        model: the model with the adapter.
        is_neutral: whether it computes the same as without the adapter.
        base_was_changed: whether the base computes something else than before.
        keeps_function: whether the adapter and the base together compute what the base alone did before.
    """

    model: PeftModel
    is_neutral: bool = True
    base_was_changed: bool = False
    keeps_function: bool = True


@contextmanager
def attached_or_refused(option: str, model: nn.Module | str, config: PeftConfig | None) -> Iterator[None]:
    """Inside the context, an adapter is attached. PEFT's exceptions for one that does not fit become a `UserError`.

    A name in its configuration that no module of the model has is logged as a warning.

    Args:
        option: name of the argument with the configuration, for messages.
        model: the base; or its name, where it is loaded inside the context.
        config: configuration of the adapter; `None` without one. `all-linear` becomes names where PEFT finds no layer.
    """
    if isinstance(model, nn.Module):
        _name_calibrated_layers(model, config)
    try:
        yield
    except UserError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not any(frame.name == "get_peft_model" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # from something else inside the context
        reason = first_line(error)
        kind = config.peft_type.value
        layers = ""
        if "target" in reason.lower():  # the target modules, in one of PEFT's wordings
            layers = _layers_of(model)
        name = model if isinstance(model, str) else type(model).__name__
        raise UserError(
            f"{option}: PEFT cannot attach this adapter of type {kind} to {name}: {reason}: change the configuration."
            f"{layers}"
        ) from error
    if isinstance(model, nn.Module):
        warn_of_unmatched_names(option, model, config)


def _name_calibrated_layers(model: nn.Module, config: PeftConfig | None) -> None:
    """Replaces `all-linear` by the names of the linear layers of GPTQ and AWQ, which PEFT 0.21 does not take for such.

    In place, as PEFT does with `all-linear` itself.
    """
    if getattr(config, "target_modules", None) != "all-linear":
        return
    if quantization_kind(quantization_record(model)) in CALIBRATED_METHODS:
        layers = [path for path, module in model.named_modules() if hasattr(module, "in_features")]
        of_head = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        config.target_modules = {path.rpartition(".")[2] for path in layers if path not in of_head}


def warn_of_unmatched_names(option: str, model: nn.Module, config: PeftConfig | None) -> None:
    """Logs a warning if the configuration of a new adapter names modules that the model does not have.

    PEFT refuses target modules only if none of them is there, and modules to save not at all.

    Args:
        option: name of the argument with the configuration, for the message.
        model: the model, with or without its adapter.
        config: configuration of the adapter, or `None`.
    """
    # PEFT trains a copy of a module to save, and keeps the original in it. "all-linear" names layers of both.
    paths = [f".{path}".replace(".original_module", "") for path, _ in model.named_modules()]
    for field in ("target_modules", "modules_to_save"):
        names = getattr(config, field, None)
        if not isinstance(names, list | tuple | set):  # a regular expression, or "all-linear"
            continue
        # PEFT itself names both heads for sequence classification, of which a model has one.
        lacking = sorted(set(names) - {"classifier", "score"})
        lacking = [name for name in lacking if not any(path.endswith(f".{name}") for path in paths)]
        if lacking:
            logger.warning(
                "%s: %s %s no module of this model, so nothing is trained there: correct the name or leave it out.",
                option,
                f"{field} {', '.join(map(repr, lacking))}",
                "names" if len(lacking) == 1 else "name",
            )


def _layers_of(model: nn.Module | str) -> str:
    """A sentence with the names of the linear layers; empty if the model is only known by name."""
    if isinstance(model, str):
        return ""
    return f" This model has layers named {', '.join(_layer_names(model))}."


def _layer_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers, without duplicates."""
    names = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear | Conv1D) and name not in names:
            names.append(name)
    return names[:12]


def attach_new_adapter(option: str, model: nn.Module, config: PeftConfig) -> NewAdapter:
    """Attaches a new adapter and finds out how it starts. Kinds that are known to start as nothing are not measured.

    Args:
        option: name of the argument with the configuration, for messages.
        model: the base, a causal LM.
        config: configuration of the adapter.

    Raises:
        UserError: if PEFT cannot attach the adapter to this base.
    """
    is_known = is_plain_lora(config) or config.is_prompt_learning
    before = None if is_known else probe_logprobs(model)
    with attached_or_refused(option, model, config):
        with_adapter = get_peft_model(model, config)
    if before is None:
        return NewAdapter(with_adapter)
    started = probe_logprobs(with_adapter)
    with active_adapter(with_adapter, None):
        base_alone = probe_logprobs(with_adapter)
    changes_base = base_change(config) is not None  # in bf16, a change may be lost in the rounding
    return NewAdapter(
        with_adapter,
        is_neutral=not changes_base and mean_difference(started, base_alone) <= _same_weights_limit(model),
        base_was_changed=changes_base or mean_difference(base_alone, before) > _same_weights_limit(model),
        keeps_function=mean_difference(started, before) <= _rounded_weights_limit(model),
    )


def attach_copy(model: PeftModel, source: str, target: str) -> None:
    """Adds a frozen copy of an adapter, and checks that it computes the same, and that the original still does.

    Args:
        model: model with adapters, a causal LM.
        source: name of the adapter to copy.
        target: name of the copy.

    Raises:
        UserError: if PEFT cannot hold a copy of this adapter on the same base.
    """
    if is_plain_lora(model.peft_config[source]):
        copy_adapter(model, source, target)
        return
    with active_adapter(model, source):
        before = probe_logprobs(model)
    copy_adapter(model, source, target)
    for name in (source, target):
        with active_adapter(model, name):
            difference = mean_difference(probe_logprobs(model), before)
        if difference > _rounded_weights_limit(model):
            kind = model.peft_config[source].peft_type.value
            raise UserError(
                f"PEFT cannot hold a copy of an adapter of type {kind} on the same base, which the reference and the "
                f"critic need (log-probabilities differ by {difference:.2g} nats): merge it into the base, or "
                "use LoRA."
            )


def _same_weights_limit(model: nn.Module) -> float:
    """The mean difference of log-probabilities where weights are equal, in nats: a rotation by nothing rounds too."""
    return 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-3


def _rounded_weights_limit(model: nn.Module) -> float:
    """The same where a part was taken out of the weights and added again."""
    return 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2

"""What kinds of PEFT adapters do to a base that several roles share.

Most adapters leave the base alone: without the adapter it computes as before, and a second adapter does not disturb the
first. The functions here find the others by their configuration and their layers. `adapter_start` measures the rest.
"""

import copy
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import UserError

logger = logging.getLogger(__name__)

_REPEATABLE = ("pissa", "olora", "loftq")
"""Initializations that change the base, and do so in the same way whenever the adapter is loaded."""

_RANDOM_OR_PREPARED = ("pissa_niter", "corda", "lora_ga")
"""Initializations that change the base by random numbers, or by statistics that a saved adapter does not hold."""

_NEUTRAL_START = (True, "gaussian", "eva", "mica")
"""Initializations of LoRA with which a new adapter computes nothing, to the bit, and the base stays as it is."""

_MIXING_LAYERS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Linear4bit", "Linear8bitLt")
"""Layers of LoRA that know PEFT's batches with several adapters. Others, such as `ParamWrapper`, do not."""


_NEED_MORE_INPUTS = {
    PeftType.POLY: "needs the id of a task with every input",
    PeftType.MULTITASK_PROMPT_TUNING: "needs the id of a task with every input",
    PeftType.XLORA: "mixes adapters by a forward pass of its own",
}

_ONE_ADAPTER_ONLY = {
    PeftType.ADAPTION_PROMPT: "does not keep its weights apart by adapter",
    PeftType.SHADOW: "computes with a second stream of hidden states",
    PeftType.OSF: "decomposes the weights of the base again for every further adapter",
}


def task_name(config: PeftConfig) -> str:
    """The task of an adapter's configuration in one word, such as `"SEQ_CLS"`; `"None"` without one."""
    return str(getattr(config.task_type, "value", config.task_type))


def unsupported_kind(config: PeftConfig, *, shares_base: bool) -> str | None:
    """Why a kind of adapter cannot be trained, in a few words; `None` if it can.

    Args:
        config: the configuration of an adapter.
        shares_base: whether other adapters will be on the same base.
    """
    kinds = _NEED_MORE_INPUTS
    if shares_base:
        kinds = _NEED_MORE_INPUTS | _ONE_ADAPTER_ONLY
    if config.peft_type not in kinds:
        return None
    return f"adapters of type {config.peft_type.value} are not supported, as this kind {kinds[config.peft_type]}"


def why_own_rows(model: nn.Module) -> str | None:
    """Why the adapters of a model need each sequence in a row of its own, in a few words; `None` if they do not.

    A test with a new adapter would not see it, as it computes nothing yet.

    Args:
        model: any model; one without PEFT has no adapters.
    """
    if not isinstance(model, PeftModel):
        return None
    if model.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before every row"
    if any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values()):
        return "its adapter (aLoRA) begins at a place that it looks for in every row"
    return None


def warn_of_fixed_ranks(option: str, config: PeftConfig) -> None:
    """Logs a warning that AdaLoRA does not adapt its ranks.

    Args:
        option: name of the argument that the adapter comes from.
        config: its configuration.
    """
    if config.peft_type == PeftType.ADALORA:
        logger.warning(
            "%s: AdaLoRA is trained with its initial ranks (init_r=%s), as nothing calls update_and_allocate: use LoRA "
            "for a fixed rank.",
            option,
            config.init_r,
        )


def base_change(config: PeftConfig) -> str | None:
    """Which option makes PEFT change weights of the base when it attaches the adapter; `None` if none does.

    Args:
        config: the configuration of an adapter.
    """
    if getattr(config, "kasa_config", None) is not None:
        return "kasa_config"
    if getattr(config, "layer_replication", None):
        return "layer_replication"
    start = _start_of(config)
    if start.startswith((*_REPEATABLE, *_RANDOM_OR_PREPARED)):
        return f"init_lora_weights={config.init_lora_weights!r}"
    return None


def refuse_replicated_kinds(option: str, config: PeftConfig, model: nn.Module) -> None:
    """Refuses to replicate layers of a model that lists the kind of each layer, as PEFT does not extend this list.

    Args:
        option: name of the argument that the adapter comes from, for the message.
        config: configuration of a new adapter.
        model: its base.

    Raises:
        UserError: for such a model, with `layer_replication`.
    """
    if getattr(config, "layer_replication", None) and getattr(model.config.get_text_config(), "layer_types", None):
        raise UserError(
            f"{option}: layer_replication does not work with {type(model).__name__}, as its config lists the kind of "
            "each layer (layer_types): leave it out, or use a model such as Llama or Mistral."
        )


def _start_of(config: PeftConfig) -> str:
    """The initialization of LoRA in lower case; empty for other kinds."""
    start = getattr(config, "init_lora_weights", None)
    return start.lower() if isinstance(start, str) else ""


def is_repeatable(config: PeftConfig) -> bool:
    """Whether a saved adapter that changes its base does so again, in the same way, when it is loaded.

    PiSSA by a random projection, CorDA and LoRA-GA do not: the adapter would be loaded on another base.

    Args:
        config: the configuration of an adapter.
    """
    return not _start_of(config).startswith(_RANDOM_OR_PREPARED)


def is_encoded_prompt(config: PeftConfig) -> bool:
    """Whether layers compute the virtual tokens of an adapter. A saved adapter has the tokens, but not these layers.

    Args:
        config: the configuration of an adapter.
    """
    return config.peft_type == PeftType.P_TUNING or bool(getattr(config, "prefix_projection", False))


def refuse_lost_start(folder: str | Path, config: PeftConfig, *, is_trainable: bool) -> None:
    """Refuses to load an adapter whose folder lacks something that it was trained with.

    Args:
        folder: folder or Hub id of the adapter, for the message.
        config: its configuration.
        is_trainable: whether it is loaded to be trained further.

    Raises:
        UserError: for such an adapter.
    """
    if not is_repeatable(config):
        raise UserError(
            f"{folder}: it was saved with {base_change(config)}, which changes the base in a way that is not repeated "
            "when it is loaded: save it with PEFT's path_initial_model_for_weight_conversion."
        )
    if is_trainable and is_encoded_prompt(config):
        raise UserError(
            f"{folder}: the encoder of its virtual tokens ({config.peft_type.value}) is not saved with it, so that "
            "they cannot be trained further: resume from a checkpoint of that run, or use LoRA."
        )


def trained_biases(config: PeftConfig) -> str | None:
    """Which option makes PEFT train biases of the base; `None` if none does.

    Args:
        config: the configuration of an adapter.
    """
    bias = getattr(config, "bias", "none")
    return f"bias={bias!r}" if isinstance(bias, str) and bias != "none" else None


def sharing_problem(config: PeftConfig) -> str | None:
    """Why an adapter cannot be attached to a base that others use, in a few words; `None` if it can.

    Args:
        config: the configuration of an adapter.
    """
    change = base_change(config)
    if change is not None:
        return f"{change} changes the weights of the base"
    biases = trained_biases(config)
    if biases is not None:
        return f"{biases} trains biases of the base"
    if config.peft_type == PeftType.OSF:
        return f"OSF {_ONE_ADAPTER_ONLY[PeftType.OSF]}"
    return None


def base_sharing_problem(config: PeftConfig, present: Iterable[PeftConfig]) -> str | None:
    """Why an adapter cannot be attached beside others, in a few words; `None` if it can.

    Args:
        config: the configuration of the adapter.
        present: the configurations of the adapters that the base has.
    """
    for adapter in (config, *present):
        problem = sharing_problem(adapter)
        if problem is not None:
            return problem
        if _target_parameters(adapter) != _target_parameters(config):
            return "PEFT holds an adapter with target_parameters only beside adapters with the same target_parameters"
    return None


def _target_parameters(config: PeftConfig) -> set[str]:
    return set(getattr(config, "target_parameters", None) or ())


def is_plain_lora(config: PeftConfig) -> bool:
    """Whether an adapter starts as nothing and can be copied, known without a measurement.

    Args:
        config: the configuration of an adapter.
    """
    if type(config) is not LoraConfig or sharing_problem(config) is not None:
        return False
    return config.init_lora_weights in _NEUTRAL_START and set(lora_variants(config)) <= {"use_dora"}


def lora_variants(config: LoraConfig) -> list[str]:
    """Names of the options in use that make the layers of LoRA compute otherwise, as PEFT marks them.

    Args:
        config: a configuration of LoRA.
    """
    names = []
    for option in dataclasses.fields(config):
        if option.metadata.get("is_lora_variant") and getattr(config, option.name):
            names.append(option.name)
    return names


def config_of_copy(config: PeftConfig) -> PeftConfig:
    """A configuration for a copy of an adapter on the same base, which must not change the base a second time.

    The weights are copied afterward, so that the initialization does not matter.

    Args:
        config: the configuration of the adapter to copy.
    """
    changed = copy.deepcopy(config)
    if _start_of(config).startswith((*_REPEATABLE, *_RANDOM_OR_PREPARED)):
        changed.init_lora_weights = True
    _untie_layers(changed)
    return changed


def _untie_layers(config: PeftConfig) -> None:
    """Makes LoRA on tied layers (`ensure_weight_tying`) an adapter on each of them, in place.

    PEFT ties the layers of the first adapter of a model only. A file has the weights of both layers.
    """
    tied = getattr(config, "target_modules_to_tie", None)
    if not tied:
        return
    if isinstance(config.target_modules, str):
        config.target_modules = "|".join([f"(?:{config.target_modules})", *map(re.escape, sorted(tied))])
    else:
        config.target_modules = set(config.target_modules) | set(tied)
    config.target_modules_to_tie = None
    config.ensure_weight_tying = False


def sampled_weights(config: PeftConfig) -> str | None:
    """What makes an adapter draw its weights at random in every forward pass of training; `None` if nothing does.

    Args:
        config: the configuration of an adapter.
    """
    if config.peft_type == PeftType.PVERA:
        return "PVeRA"
    if getattr(config, "monteclora_config", None) is not None:
        return "monteclora_config"
    return None


def trained_base_weights(model: PeftModel) -> list[str]:
    """Names of trainable weights that belong to the base, such as its biases with `bias="all"`.

    Args:
        model: model with an adapter, before further roles are attached.
    """
    wrapped: set[int] = set()  # weights of adapters, and weights that PEFT copies for them
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base_weights = {id(parameter) for parameter in module.get_base_layer().parameters()}
            wrapped.update(id(parameter) for parameter in module.parameters() if id(parameter) not in base_weights)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped.update(id(parameter) for parameter in module.parameters())
    names = []
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.requires_grad and id(parameter) not in wrapped and "adaption_" not in name:
            names.append(name)
    return names


# ---- Merging ----


def merging_layers(model: PeftModel) -> list[BaseTunerLayer]:
    """The layers that merging the active adapter changes.

    Args:
        model: model with adapters.
    """
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer) and hasattr(module, "merge")]


def shared_weight(model: nn.Module, layers: list[BaseTunerLayer]) -> str | None:
    """Name of a weight of these layers that another module uses too; `None` without one.

    Merging into it would change both modules: the input embeddings with a tied output head, or a replicated layer.

    Args:
        model: model with adapters.
        layers: layers that would be merged.
    """
    users = Counter()
    for module in model.modules():
        users.update(id(parameter) for parameter in module.parameters(recurse=False))
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    for layer in layers:
        if not any(name in _adapters_of(layer) for name in layer.active_adapters):
            continue
        for parameter in layer.get_base_layer().parameters(recurse=False):
            if users[id(parameter)] > 1:
                return names[id(parameter)]
    return None


def _adapters_of(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that have weights in a layer."""
    adapters: set[str] = set()
    for name in layer.adapter_layer_names:
        held = getattr(layer, name, None)
        if isinstance(held, nn.ModuleDict | nn.ParameterDict):
            adapters.update(held.keys())
    return adapters


# ---- Batches with several adapters ----


def can_mix(model: PeftModel) -> bool:
    """Whether PEFT can compute a batch whose rows have different adapters, with the same result as one by one.

    Args:
        model: model with adapters.
    """
    for config in model.peft_config.values():
        if type(config) is not LoraConfig or lora_variants(config):
            return False
        # PEFT's classes for these two do not take part, or are called outside the model.
        if config.modules_to_save or config.trainable_token_indices or config.target_parameters:
            return False
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not _mixes(module):
            return False
    return True


def _mixes(layer: BaseTunerLayer) -> bool:
    return isinstance(layer, lora.LoraLayer) and type(layer).__name__ in _MIXING_LAYERS


# ---- Saving an adapter whose base was changed ----


def without_start(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an ordinary LoRA of twice the rank, for the base as it was before the adapter was attached.

    An initialization such as PiSSA takes B₀A₀ out of the base. The adapter BA on the changed base is the adapter
    BA − B₀A₀ on the original base, which any program can load.

    Args:
        state: weights of the adapter, with the names of PEFT.
        start: weights of the adapter as initialized, A₀ and B₀, with the same names.

    Returns:
        The weights to save, with `config_without_start`.
    """
    saved = {}
    for key, value in state.items():
        half = _half_of(key)
        if half is None:
            saved[key] = value
            continue
        rank_dimension, sign = half
        saved[key] = torch.cat([value, sign * start[key].to(value)], dim=rank_dimension)
    return saved


def config_without_start(config: LoraConfig) -> LoraConfig:
    """The configuration of the weights of `without_start`.

    Args:
        config: the configuration of the adapter.
    """
    doubled = config_of_copy(config)
    doubled.r = 2 * config.r
    doubled.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    # The factor of an update is alpha / r, or alpha / √r with rsLoRA. It stays the same.
    factor = 2**0.5 if config.use_rslora else 2
    doubled.lora_alpha = factor * config.lora_alpha
    doubled.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    doubled.corda_config = None
    doubled.lora_ga_config = None
    return doubled


def split_start(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inverse of `without_start`.

    Args:
        weights: saved weights of twice the rank.

    Returns:
        The weights of the adapter, and A₀ and B₀.
    """
    state = {}
    start = {}
    for key, value in weights.items():
        half = _half_of(key)
        if half is None:
            state[key] = value
            continue
        rank_dimension, sign = half
        own, subtracted = value.chunk(2, dim=rank_dimension)
        state[key] = own.contiguous()
        start[key] = sign * subtracted
    return state, start


def _half_of(key: str) -> tuple[int, int] | None:
    """Dimension of the rank, and the sign of the subtracted half; `None` if the weight is no matrix of LoRA."""
    if "lora_A" in key or "lora_embedding_A" in key:
        return 0, 1
    if "lora_B" in key or "lora_embedding_B" in key:
        return 1, -1
    return None

"""Merging of an adapter into the weights of its base."""

import logging

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError, first_line
from .embeddings import plain_layer

logger = logging.getLogger(__name__)

_COMPUTES_WITH_THE_INPUT = {
    "ADAPTION_PROMPT": "adds virtual tokens to the attention",
    "LILY": "chooses its weights by the input",
    "SHADOW": "computes with a second stream of hidden states",
    "XLORA": "mixes adapters by the input",
}
"""Types of adapters that no weights of the base can replace, with the reason."""


_PEFT_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def merge_problem(config: PeftConfig) -> str | None:
    """Why an adapter cannot be merged, as far as its configuration tells; `None` if that is not known to fail.

    Args:
        config: the configuration of the adapter.

    Returns:
        Words for a message, such as "adapters of type CPT have no weights to merge".
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        return f"adapters of type {kind} have no weights to merge"
    if kind in _COMPUTES_WITH_THE_INPUT:
        return f"adapters of type {kind} cannot be merged, as this kind {_COMPUTES_WITH_THE_INPUT[kind]}"
    if getattr(config, "alora_invocation_tokens", None):
        return "aLoRA (alora_invocation_tokens) cannot be merged, as it changes the tokens after its invocation only"
    if getattr(config, "arrow_config", None) is not None:
        return "Arrow (arrow_config) cannot be merged, as it mixes adapters by the input"
    return None


def merge_into_base(model: PeftModel, option: str, instead: str) -> PreTrainedModel:
    """Merges the active adapter into its base, whose weights are changed in place. `model` is used up.

    Args:
        model: model with an adapter.
        option: name of the option or function that needs the merge, for messages.
        instead: what to do with an adapter that cannot be merged, for messages.

    Returns:
        The model of the base, without PEFT.

    Raises:
        UserError: if the adapter has no weights to merge, or if PEFT cannot merge adapters of this kind.
    """
    kind = model.active_peft_config.peft_type.value
    problem = merge_problem(model.active_peft_config)
    if problem is not None:
        raise UserError(f"{option}: {problem}: {instead}.")
    if untie_adapted_embeddings(model):
        logger.warning(
            "%s: the adapter changes one of two tied embeddings: the merged model has tie_word_embeddings=False and "
            "stores both.",
            option,
        )
    if getattr(model.active_peft_config, "layer_replication", None):
        own_weights_of_replicated_layers(model)
    try:
        _merge_inner_wrappers(model)
        merged = model.merge_and_unload()
    except Exception as error:  # each kind of adapter refuses in its own way
        raise UserError(
            f"{option}: this adapter of type {kind} cannot be merged ({first_line(error)}): {instead}."
        ) from error
    left = [name for name, module in merged.named_modules() if isinstance(module, _PEFT_LAYERS)]
    if left:
        raise UserError(f"{option}: PEFT left a part of this adapter of type {kind} in {left[0]} unmerged: {instead}.")
    record_tying(merged)
    return merged


def _merge_inner_wrappers(model: PeftModel) -> None:
    """Merges trained tokens inside layers that the adapter targets too, which PEFT would leave there.

    PEFT wraps a tied output head like this if `trainable_token_indices` and `target_modules` both change it.
    """
    for module in list(model.modules()):
        inner = getattr(module, "base_layer", None)
        if isinstance(module, BaseTunerLayer) and isinstance(inner, AuxiliaryTrainingWrapper):
            options = {"merge": True, "safe_merge": False, "adapter_names": None}
            module.base_layer = inner.unload_and_optionally_merge_module(**options)


def untie_adapted_embeddings(model: PeftModel) -> bool:
    """Gives the output head a weight of its own if it is tied to the input embeddings and an adapter changes either.

    Without this, merging the adapter would change both, so that the merged model would be another one.

    Args:
        model: model with an adapter that will be merged. It computes the same afterward.

    Returns:
        Whether the embeddings were untied.
    """
    base = model.get_base_model()
    outputs = base.get_output_embeddings()
    if outputs is None:
        return False
    inputs = base.get_input_embeddings()
    plain_outputs = plain_layer(outputs)
    if plain_layer(inputs).weight is not plain_outputs.weight:
        return False
    if plain_layer(inputs) is inputs and plain_outputs is outputs:
        return False  # the adapter is elsewhere
    tied = plain_outputs.weight
    plain_outputs.weight = nn.Parameter(tied.detach().clone(), requires_grad=False)
    _set_tied(base, False)
    return True


def own_weights_of_replicated_layers(model: PeftModel) -> None:
    """Gives every copy of a replicated layer weights of its own, as its part of the adapter is merged into them.

    Args:
        model: model with an adapter whose configuration has `layer_replication`. It computes the same afterward.
    """
    base = model.get_base_model()
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    tied = {id(weight) for layer in embeddings if layer is not None for weight in layer.parameters()}
    seen: set[int] = set()
    for module in base.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen and id(weight) not in tied:
                copied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                module.register_parameter(name, copied)
            seen.add(id(weight))


def record_tying(model: PreTrainedModel) -> None:
    """Sets `tie_word_embeddings` of the configuration to what the weights are, as a saved model is loaded by it.

    Args:
        model: the merged model.
    """
    outputs = model.get_output_embeddings()
    if outputs is not None:
        _set_tied(model, outputs.weight is model.get_input_embeddings().weight)


def _set_tied(model: PreTrainedModel, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = tied

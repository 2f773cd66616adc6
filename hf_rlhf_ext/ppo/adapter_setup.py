"""The adapter that PPO trains: which kinds can share their base with other roles, and what the reference is."""

import logging

from peft import PeftConfig, PeftModel, PeftType
from torch import nn

from ..errors import UserError
from ..modeling.adapter_kinds import (
    base_change,
    is_repeatable,
    sampled_weights,
    trained_base_weights,
    trained_biases,
    unsupported_kind,
    warn_of_fixed_ranks,
)
from ..modeling.adapter_start import NewAdapter, attach_new_adapter
from ..modeling.stack import AdapterStack

logger = logging.getLogger(__name__)


def check_adapter(option: str, config: PeftConfig) -> None:
    """Refuses kinds of adapters that PPO cannot train beside a reference and a critic on the same base.

    Args:
        option: name of the argument that the adapter comes from, for the message.
        config: its configuration.

    Raises:
        UserError: for such a kind.
    """
    problem = unsupported_kind(config, shares_base=True)
    if problem is not None:
        raise UserError(f"{option}: {problem}: use LoRA.")
    sampled = sampled_weights(config)
    if sampled is not None:
        raise UserError(
            f"{option}: {sampled} draws weights at random in training, so that the ratio of PPO is not 1 on a new "
            "rollout: use LoRA."
        )
    biases = trained_biases(config)
    if biases is not None:
        raise UserError(
            f"{option}: {biases} trains biases of the base, which the reference and the critic share: pass bias='none'."
        )
    if base_change(config) == "layer_replication":
        raise UserError(
            f"{option}: layer_replication is not supported in PPO, as every further adapter would replicate the layers "
            "again: leave it out."
        )
    warn_of_fixed_ranks(option, config)


def refuse_trained_base(option: str, model: PeftModel) -> None:
    """Raises `UserError` if weights of the base are trainable beside the adapter."""
    names = trained_base_weights(model)
    if names:
        raise UserError(
            f"{option}: {len(names)} weights of the base are trainable beside the adapter, first {names[0]!r}, but the "
            "reference and the critic share the base: freeze them, or name their modules in modules_to_save."
        )


def refuse_unrepeatable(option: str, config: PeftConfig) -> None:
    """Raises `UserError` if a saved adapter of this kind would be loaded on another base than it was trained on."""
    if not is_repeatable(config):
        raise UserError(
            f"{option}: {base_change(config)} changes the base in a way that is not repeated when the saved adapter is "
            "loaded: pass the base and peft_config= instead of a PeftModel, or use init_lora_weights='pissa'."
        )


def stack_with_new_adapter(model: nn.Module, config: PeftConfig) -> AdapterStack:
    """Attaches a new adapter; the reference is the policy as it starts.

    That is the base without an adapter if the new adapter computes nothing yet, else a frozen copy of the new adapter.
    An initialization that takes the adapter out of the base (PiSSA, OLoRA, CorDA, LoRA-GA) is undone in what is saved.

    Args:
        model: the base.
        config: configuration of the adapter.

    Raises:
        UserError: if a saved adapter of this kind could not be loaded again, or if PEFT cannot copy it.
    """
    new = attach_new_adapter("peft_config", model, config)
    refuse_trained_base("peft_config", new.model)
    stack = AdapterStack(new.model)
    if config.is_prompt_learning:
        logger.warning(
            "peft_config: %s changes the model from the start, while the reference is the base without it: the KL does "
            "not start at 0.",
            config.peft_type.value,
        )
    if new.is_neutral and not new.base_was_changed:
        stack.attach("reference")
        return stack
    logger.warning(
        "peft_config: %s: the reference is a frozen copy of the adapter as initialized.",
        base_change(config) or "the adapter computes something from the start",
    )
    stack.attach("reference", "policy")
    if _can_be_undone(new, config):
        stack.start = stack.roles["reference"].adapter
    else:
        refuse_unrepeatable("peft_config", config)
    return stack


def _can_be_undone(new: NewAdapter, config: PeftConfig) -> bool:
    """Whether the base lost exactly what the adapter computes at the start."""
    is_low_rank = config.peft_type == PeftType.LORA and not config.use_dora and config.kasa_config is None
    is_quantized = getattr(new.model.get_base_model(), "is_quantized", False)  # what was taken out was rounded again
    return is_low_rank and not is_quantized and new.base_was_changed and new.keeps_function

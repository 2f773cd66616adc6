"""Activation checkpointing, a default of the trainers, is turned off where a model or an adapter cannot do it."""

import copy
import logging
from typing import TypeVar

from peft import PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import TrainingArguments

from ..errors import UserError
from ..modeling.adapters import bare_model

logger = logging.getLogger(__name__)

Options = TypeVar("Options", bound=TrainingArguments)

_IN_THE_CACHE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
"""Adapters whose virtual tokens are keys and values in the cache, which checkpointed layers do not read."""


def with_possible_checkpointing(args: Options, model: nn.Module, peft_config: PeftConfig | None) -> Options:
    """Returns the options, or a copy without activation checkpointing, with a warning, if it is not possible.

    It saves memory, and does not change what is learned. A model on which it was turned on before is changed too.

    Args:
        args: options of the run.
        model: the model to train, also inside PEFT.
        peft_config: configuration of a new adapter; `None` without one.

    Raises:
        UserError: if the option and its old name `gradient_checkpointing` have different values.
    """
    if bool(args.activation_checkpointing) != bool(args.gradient_checkpointing):
        # They are the same after `__post_init__`: one was set later, and Trainer reads the new name only.
        raise UserError(
            f"activation_checkpointing is {args.activation_checkpointing}, but gradient_checkpointing, its old name, "
            f"was set to {args.gradient_checkpointing}: pass activation_checkpointing when you make the config."
        )
    config = peft_config
    if config is None and isinstance(model, PeftModel):
        config = model.active_peft_config
    base = bare_model(model)
    reason = None
    if config is not None and config.peft_type in _IN_THE_CACHE:
        reason = f"adapters of type {config.peft_type.value} put their virtual tokens into the cache"
        if getattr(base, "is_activation_checkpointing", False):
            base.activation_checkpointing_disable()
    elif not getattr(base, "supports_gradient_checkpointing", True):
        reason = f"{type(base).__name__} does not support it"
    if reason is None or not args.activation_checkpointing:
        return args
    logger.warning("activation_checkpointing is off, as %s: a batch needs more memory.", reason)
    changed = copy.copy(args)
    changed.activation_checkpointing = False
    changed.gradient_checkpointing = False  # the old name, which TRL reads
    return changed

"""`optim_args`: Transformers ignores entries that an optimizer does not read, and passes some on as text."""

import copy
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..errors import UserError, first_line

_ERRORS = (ImportError, ValueError, TypeError, AttributeError, RuntimeError)


def check_optim_args(args: TrainingArguments, model: nn.Module) -> None:
    """Refuses entries of `optim_args` that the optimizer does not read, or cannot use.

    Args:
        args: the options, whose `optim` gives an optimizer without `optim_args`.
        model: a stand-in for the model, as small as can be.

    Raises:
        UserError: for the first such entry.
    """
    if not args.optim_args:
        return
    shown = f"optim_args={args.optim_args!r} with optim={args.optim.value!r}"
    if not isinstance(args.optim_args, str):
        raise UserError(f"optim_args must be text such as 'momentum=0.9,nesterov=true', got {args.optim_args!r}.")
    entries = args.optim_args.replace(" ", "").split(",")
    for entry in entries:
        if entry.count("=") != 1:
            raise UserError(f"{shown}: {entry!r} is not of the form name=value: correct it, or leave it out.")
    unread = [name for name in (entry.partition("=")[0] for entry in entries) if not _is_read(args, name, model)]
    if unread:
        raise UserError(f"{shown}: this optimizer does not read {', '.join(unread)}: leave it out.")
    try:
        optimizer_class, options = _made_with(args, args.optim_args, model)
        # A factory, such as that of Dion, needs more than parameters.
        if isinstance(optimizer_class, type) and "params" not in options:
            optimizer_class(model.parameters(), **options)
    except TypeError:
        raise UserError(
            f"{shown}: Transformers passes it on as text, which this optimizer does not take: leave it out."
        ) from None
    except _ERRORS as error:
        raise UserError(f"{shown}: {first_line(error)}: correct it, or leave it out.") from None


def _is_read(args: TrainingArguments, name: str, model: nn.Module) -> bool:
    """Whether a senseless value of an entry is an error, or changes what the optimizer is made with."""
    try:
        return _made_with(args, f"{name}=senseless", model) != _made_with(args, None, model)
    except _ERRORS:
        return True


def _made_with(args: TrainingArguments, optim_args: str | None, model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The class of the optimizer and its arguments."""
    changed = copy.copy(args)
    changed.optim_args = optim_args
    return Trainer.get_optimizer_cls_and_kwargs(changed, model)

"""Checks of the arguments that both trainers take, before models are loaded and data are read."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from ..checkpointing import require_writable
from ..errors import UserError
from ..modeling.loading import warn_of_emulated_bf16
from .best_model import check_early_stopping, check_metric_set
from .optimizers import check_own_optimizer, require_optimizer


def check_arguments(
    args: TrainingArguments,
    eval_dataset: Any,
    callbacks: Sequence[Any] | None,
    optimizers: Any = (None, None),
    optimizer_cls_and_kwargs: Any = None,
) -> None:
    """Checks that a trainer can save, that its optimizer can be made, and that there is a metric where one is needed.

    Args:
        args: options of the run.
        eval_dataset: the argument of the trainer.
        callbacks: the argument of the trainer.
        optimizers: the argument of the trainer.
        optimizer_cls_and_kwargs: the argument of the trainer.

    Raises:
        UserError: if `output_dir` is not writable, or if optimizer, evaluation, best model or early stopping cannot
            work.
    """
    if args.should_save:
        require_writable(args.output_dir)
    check_own_optimizer(optimizers, optimizer_cls_and_kwargs)
    require_optimizer(args)
    _require_eval_dataset(args, eval_dataset)
    check_metric_set(args, eval_dataset)
    check_early_stopping(args, callbacks)
    warn_of_emulated_bf16(args)


def _require_eval_dataset(args: TrainingArguments, eval_dataset: Any) -> None:
    strategy = args.eval_strategy.value
    if strategy != "no" and eval_dataset is None:
        raise UserError(f"eval_strategy={strategy!r} needs eval_dataset: pass it, or set eval_strategy='no'.")

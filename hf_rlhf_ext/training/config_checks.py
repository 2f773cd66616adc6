"""The checks that all configurations of trainers share, around `TrainingArguments.__post_init__`."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from transformers import TrainingArguments

from ..compat import resolve_renamed_options
from ..modeling.loading import card_lacks_bf16
from .auto_batch import check_engine_of_auto_batch
from .best_model import complete_best_metric
from .engines import Engine, asked_engine, check_asked_engine, check_launched
from .optimizers import check_optimizer_names, check_optimizer_options
from .option_values import check_option_values
from .refused_options import in_one_line


@contextmanager
def checked_options(
    args: TrainingArguments,
    *,
    trainer: str,
    engines: Collection[Engine],
    best_metric: str,
    remedies: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[None]:
    """Checks options before and after `super().__post_init__()`, which is called inside the context.

    Args:
        args: the configuration.
        trainer: name of the trainer.
        engines: engines that it supports.
        best_metric: the metric that decides on the best model if the user names none.
        remedies: see `check_option_values`.

    Raises:
        UserError: if an option is outside of its range, if an optimizer or a schedule cannot work, or if the trainer
            does not support the engine.
    """
    # `TrainingArguments` reads some of these values, and would fail in words of its own.
    check_option_values(args, remedies)
    check_asked_engine(args, trainer, engines)
    check_engine_of_auto_batch(args, asked_engine(args))
    check_optimizer_names(args)
    resolve_renamed_options(args)
    complete_best_metric(args, default=best_metric)
    if args.bf16 is None and not args.fp16 and not args.use_cpu and card_lacks_bf16():
        args.fp16 = True  # TRL's default is bf16, which such a card emulates
    with in_one_line():
        yield
        check_launched(args)
    check_optimizer_options(args)

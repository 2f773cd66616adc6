"""Options of `transformers.TrainingArguments` that both trainers refuse, and how."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields

from transformers import TrainingArguments

from ..errors import UserError

# Reasons and remedies of options that both trainers refuse.
AUTO_BATCH_SIZE = (
    "after an out-of-memory error, Trainer would start again on weights that are already trained: set auto_batch, "
    "which repeats only what did not fit, or max_tokens_per_batch, which limits memory and leaves the loss as it is"
)
TOKEN_COUNT = "batches here are not those that Trainer counts: read the metric {} in the log instead"
LENGTH_COLUMN = "rows are measured after tokenization: leave it out"
COMPILE = "the trainer reads inner layers of the model, which compilation may skip: leave it out"
FULL_EVAL = "Trainer would round the weights themselves: leave it out, evaluation has the precision of training"
PARALLELISM = "no tensor, context or sequence parallelism is supported: leave it out"

FOR_SCRIPTS = {
    "do_eval": "for scripts: Trainer does not read it",
    "do_predict": "for scripts: Trainer does not read it",
    "do_train": "for scripts: Trainer does not read it",
    "local_rank": "for launchers: Trainer does not read it",
}
"""Options that no trainer reads, each with the reason."""
LOADED_MODEL = "the command loads the model: see --dtype, --attn_implementation and --load_in_4bit"


@contextmanager
def in_one_line() -> Iterator[None]:
    """Inside the context, what `TrainingArguments` refuses becomes a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, OSError, NotImplementedError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{text}: change this option.") from error


def refuse_options(args: TrainingArguments, refused: Mapping[str, str], trainer: str) -> None:
    """Refuses options that are set to something else than their default.

    Args:
        args: options of the run.
        refused: names of options, each with the reason and the remedy.
        trainer: what does not support them, for the message.

    Raises:
        UserError: for the first such option.
    """
    defaults = {}
    for option in fields(args):
        defaults[option.name] = option.default if option.default_factory is MISSING else option.default_factory()
    for name, reason in refused.items():
        value = getattr(args, name)
        if value != defaults[name]:
            shown = textwrap.shorten(repr(value), 60, placeholder="...")
            raise UserError(f"{name}={shown} is not supported by {trainer}: {reason}.")


def refuse_separate_counts(args: TrainingArguments) -> None:
    """Refuses `average_tokens_across_devices=False` in a run of several processes; alone, it makes no difference.

    Call it after `TrainingArguments.__post_init__`.
    """
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise UserError(
            "average_tokens_across_devices=False is not supported with several processes: the loss always counts the "
            "rows of all of them: leave it true."
        )

"""Gives a trainer the table of `notebook.py` where a notebook is running, without importing IPython elsewhere."""

import sys
from collections.abc import Sequence

from transformers import Trainer

from .table import Column


def show_table(trainer: Trainer, columns: Sequence[Column]) -> None:
    """In a notebook, gives the trainer a table with these columns in place of the one that `Trainer` has added.

    Elsewhere, and with `disable_tqdm`, `Trainer` adds none, and nothing changes.

    Args:
        trainer: a trainer at the end of its constructor.
        columns: the columns of the table.
    """
    default = sys.modules.get("transformers.utils.notebook")  # imported by `Trainer` where a notebook is running
    if default is None:
        return
    callbacks = trainer.callback_handler.callbacks
    for index, callback in enumerate(callbacks):
        if type(callback) is default.NotebookProgressCallback:
            from .notebook import NotebookTable  # imports IPython

            callbacks[index] = NotebookTable(columns)
            return


def has_table(trainer: Trainer) -> bool:
    """Whether the trainer shows its metrics as a table in a notebook."""
    module = sys.modules.get(f"{__package__}.notebook")
    return module is not None and any(
        isinstance(callback, module.NotebookTable) for callback in trainer.callback_handler.callbacks
    )

"""Checkpoints of a PPO run on disk: which are complete, and which are kept."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .reference_file import needed_reference, remove_references


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def mark_incomplete(folder: Path) -> None:
    """Marks a checkpoint that is about to be overwritten as incomplete, by removing the file that is written last."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)


def is_usable(folder: Path) -> bool:
    """Whether a guard can go back to this checkpoint."""
    return (folder / TRAINER_STATE_NAME).is_file()


@contextmanager
def without_rotation(args: TrainingArguments) -> Iterator[None]:
    """Inside the context, `Trainer` removes no old checkpoint, as it does not know which one a guard may need."""
    limit = args.save_total_limit
    args.save_total_limit = None
    try:
        yield
    finally:
        args.save_total_limit = limit


def rotate(output_dir: Path, limit: int | None, keep: set[str | None]) -> None:
    """Removes the oldest checkpoints until `limit` are left, except those whose names are in `keep`.

    A reference that only removed checkpoints need is removed too.
    """
    if limit is None or limit <= 0:
        return
    folders = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    removable = [folder for folder in folders if folder.name not in keep]
    excess = max(0, len(folders) - limit)
    references = {needed_reference(folder) for folder in removable[:excess]}
    for folder in removable[:excess]:
        shutil.rmtree(folder, ignore_errors=True)
    remove_references(output_dir, references)


def register_callbacks(state: TrainerState, callbacks: Iterable[TrainerCallback]) -> None:
    """Adds callbacks to a resumed state that were not in its checkpoint.

    Transformers 5.23 raises a `KeyError` at the next save if a callback with a state was added after the checkpoint.
    """
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

"""Which checkpoints of a PPO run stay on disk."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def mark_incomplete(folder: Path) -> None:
    """Makes a checkpoint that is about to be written again count as incomplete: its last file goes first."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)


def is_usable(folder: Path) -> bool:
    """Whether a guard can go back to this checkpoint."""
    return (folder / TRAINER_STATE_NAME).is_file()


@contextmanager
def without_rotation(args: TrainingArguments) -> Iterator[None]:
    """Trainer removes no old checkpoint inside: it does not know which one a guard may go back to."""
    limit = args.save_total_limit
    args.save_total_limit = None
    try:
        yield
    finally:
        args.save_total_limit = limit


def rotate(output_dir: Path, limit: int | None, keep: set[str | None]) -> None:
    """Removes the oldest checkpoints until `limit` are left, but none whose name is in `keep`."""
    if limit is None or limit <= 0:
        return
    folders = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    removable = [folder for folder in folders if folder.name not in keep]
    excess = max(0, len(folders) - limit)
    for folder in removable[:excess]:
        shutil.rmtree(folder, ignore_errors=True)


def register_callbacks(state: TrainerState, callbacks: Iterable[TrainerCallback]) -> None:
    """Makes room in a resumed state for callbacks that the checkpoint did not have.

    Trainer (5.23) looks each one up when it saves, and fails where a callback was added after the checkpoint.
    """
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

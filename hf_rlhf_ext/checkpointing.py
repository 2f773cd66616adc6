"""Finds the checkpoint to resume from. Incomplete checkpoints are skipped or refused."""

import json
import re
from pathlib import Path

from .errors import UserError

_STATE_FILE = "trainer_state.json"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Returns the newest complete `checkpoint-N` in `output_dir`, or `None` if there is none."""
    folder_of_step = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        # Folders renamed by hand, such as `checkpoint-100-old`, are skipped.
        named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if named:
            folder_of_step[int(named[1])] = folder
    for step in sorted(folder_of_step, reverse=True):
        if is_complete(folder_of_step[step]):
            return str(folder_of_step[step])
    return None


def is_complete(checkpoint: str | Path) -> bool:
    """Returns whether the checkpoint was saved completely.

    `trainer_state.json` is the last file that `Trainer` writes. If it is missing or cut off, the run was killed during
    the save.
    """
    try:
        json.loads((Path(checkpoint) / _STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """Returns the checkpoint that `Trainer.train` should resume from.

    Args:
        resume_from_checkpoint: a checkpoint folder, or `True` for the last complete checkpoint in `output_dir`. `None`
            or `False` starts from the beginning. The texts `"true"` and `"false"` mean the same as the bools.
        output_dir: folder of the run.

    Returns:
        The checkpoint folder, or `None` to start from the beginning.

    Raises:
        UserError: if the checkpoint does not exist or is incomplete, or if `output_dir` has no complete checkpoint.
    """
    # A config file and the command line pass true and false as text.
    asked = str(resume_from_checkpoint).lower()
    if not resume_from_checkpoint or asked == "false":
        return None

    if asked == "true":
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None:
            raise UserError(
                f"resume_from_checkpoint: no complete checkpoint in {output_dir}: start without it, or name a "
                "checkpoint."
            )
        return checkpoint

    if not Path(resume_from_checkpoint).is_dir():
        raise UserError(
            f"resume_from_checkpoint: no folder {resume_from_checkpoint}: give the folder of a checkpoint, or true for "
            "the last complete one."
        )
    if not is_complete(resume_from_checkpoint):
        raise UserError(
            f"resume_from_checkpoint: {resume_from_checkpoint} is incomplete ({_STATE_FILE} is missing or cut off): "
            "give another checkpoint, or true for the last complete one."
        )
    return str(resume_from_checkpoint)

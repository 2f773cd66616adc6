"""Which checkpoint to resume from: only a complete one."""

import json
import re
from pathlib import Path

from .errors import UserError

_STATE_FILE = "trainer_state.json"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` that is complete, or None."""
    folder_of_step = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        # Left out: a folder that was set aside by hand, such as `checkpoint-100-old`.
        named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if named:
            folder_of_step[int(named[1])] = folder
    for step in sorted(folder_of_step, reverse=True):
        if is_complete(folder_of_step[step]):
            return str(folder_of_step[step])
    return None


def is_complete(checkpoint: str | Path) -> bool:
    """Whether the checkpoint was saved completely.

    `trainer_state.json` is the last file that Trainer writes. Where it is missing or cut off, the run was killed in the
    middle of a save, and the checkpoint before it is the one to use.
    """
    try:
        json.loads((Path(checkpoint) / _STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """What `Trainer.train` should resume from; `True` means the last complete checkpoint in `output_dir`.

    Raises:
        UserError: a checkpoint that does not exist or is incomplete, or none in `output_dir`.
    """
    # A config file and the command line give true and false as text.
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
        raise UserError(f"resume_from_checkpoint: no folder {resume_from_checkpoint}: give a checkpoint, or true.")
    if not is_complete(resume_from_checkpoint):
        raise UserError(
            f"resume_from_checkpoint: {resume_from_checkpoint} is incomplete ({_STATE_FILE} is missing or cut off): "
            "give another checkpoint, or true for the last complete one."
        )
    return str(resume_from_checkpoint)

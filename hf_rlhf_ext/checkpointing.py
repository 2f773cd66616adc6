"""Which checkpoint to resume from: only one that was written to its end."""

import json
import re
from pathlib import Path

from .errors import UserError


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` that is whole, or None.

    `trainer_state.json` is the last file that Trainer writes: where it is missing or cut off, the run was killed in the
    middle of a save, and the checkpoint before it is the one to take.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_complete(folder):
            return str(folder)
    return None


def is_complete(checkpoint: str | Path) -> bool:
    """Whether the checkpoint was written to its end."""
    try:
        json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """What `Trainer.train` should resume from; `True` takes the last complete checkpoint in `output_dir`."""
    if not resume_from_checkpoint or str(resume_from_checkpoint).lower() == "false":
        return None
    if str(resume_from_checkpoint).lower() != "true":
        if not Path(resume_from_checkpoint).is_dir():
            raise UserError(f"resume_from_checkpoint: no folder {resume_from_checkpoint}: give a checkpoint, or true.")
        if not is_complete(resume_from_checkpoint):
            raise UserError(
                f"resume_from_checkpoint: {resume_from_checkpoint} was not written to its end (no whole "
                "trainer_state.json): give another checkpoint, or true for the last whole one."
            )
        return str(resume_from_checkpoint)
    found = last_complete_checkpoint(output_dir)
    if found is None:
        raise UserError(
            f"resume_from_checkpoint: no complete checkpoint in {output_dir}: start without it, or name a checkpoint."
        )
    return found

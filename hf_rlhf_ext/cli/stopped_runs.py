"""What the folder of a stopped run holds, and how the same command goes on with it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpointing import last_complete_checkpoint
from ..errors import UserError
from .run_record import LOCAL, difference

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
STATE_FILES = (".safetensors", ".bin", ".pt", ".distcp")
"""Endings of files with weights or states. A checkpoint without any has nothing to lose."""


@dataclass(frozen=True)
class StoppedRun:
    """A stopped run that goes on."""

    line: str
    checkpoint: str | None = None
    useless: tuple[Path, ...] = ()
    """What is deleted: nothing but the log and empty checkpoints of a run that starts from the beginning."""


def how_it_goes_on(folder: Path, record: Mapping[str, Any], now: Mapping[str, Any], *, has_parts: bool) -> StoppedRun:
    """How the unfinished run in a folder goes on.

    Raises:
        UserError: it has other options, or weights but no checkpoint to go on from.
    """
    differing = difference(record["options"], now)
    checkpoint = last_complete_checkpoint(folder)
    if differing:
        # Only this command can go on with other values.
        go_on = "--resume_from_checkpoint true to go on with those of now, " if checkpoint or has_parts else ""
        raise UserError(
            f"{folder} is not empty: it holds a run that was stopped, with other options ({differing}): pass {go_on}"
            "--overwrite true to start again, or another --output_dir"
        )
    if has_parts:
        return StoppedRun(f"Going on with the stopped run in {folder}: finished members are kept.")
    if checkpoint is None:
        return _start_again(folder)
    name = Path(checkpoint).name
    if not _has_optimizer(Path(checkpoint)):
        raise UserError(
            f"{folder} is not empty: {name} of its stopped run has no optimizer state (save_only_model): pass "
            "--resume_from_checkpoint true to go on with a new optimizer, or --overwrite true to start again"
        )
    return StoppedRun(f"Going on from {name} of the stopped run in {folder}.", checkpoint)


def _start_again(folder: Path) -> StoppedRun:
    """A run without a complete checkpoint starts from the beginning, unless weights would be lost by it.

    Raises:
        UserError: there are weights: of a run that trained to its end, or of a checkpoint that was saved in part.
    """
    begun = [item for item in sorted(folder.glob("checkpoint-*")) if re.fullmatch(r"checkpoint-\d+", item.name)]
    for place in (folder, *begun):
        # A checkpoint of several processes has its weights in sub-folders.
        is_begun = place != folder
        if has_weights(place) or (is_begun and any(part.suffix in STATE_FILES for part in place.rglob("*"))):
            where = f" in {place.name}" if is_begun else ""
            raise UserError(
                f"{folder} is not empty: it holds a stopped run with weights{where}, but no complete checkpoint to go "
                "on from: pass --overwrite true to start again, or another --output_dir"
            )
    log = [path for path in (folder / "log.jsonl",) if path.exists()]
    return StoppedRun(
        f"The run in {folder} was stopped before its first checkpoint: it starts from the beginning.",
        useless=(*log, *begun),
    )


def _has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has the state of the optimizer, also of FSDP and DeepSpeed."""
    return any(list(checkpoint.glob(pattern)) for pattern in ("optimizer*", "global_step*"))


def has_weights(folder: Path) -> bool:
    """Whether a folder has the weights of a model or of an adapter."""
    return any(list(folder.glob(pattern)) for pattern in WEIGHTS)


def refuse_deleting_inputs(folder: Path, options: tuple[Any, ...]) -> None:
    """Raises `UserError` if the folder that is about to be emptied holds a file or model that the run needs."""
    for part in options:
        for option in LOCAL:
            value = getattr(part, option, None)
            for name in value if isinstance(value, list) else [value]:
                if not isinstance(name, str) or not Path(name).expanduser().exists():
                    continue
                if Path(name).expanduser().resolve().is_relative_to(folder.resolve()):
                    raise UserError(
                        f"{option}: {name} is in the output_dir {folder}, which --overwrite true would delete: pass "
                        "another --output_dir."
                    )

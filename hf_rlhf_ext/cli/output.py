"""What a recipe shows and where it writes: a folder made safely, never emptied unless we made it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compat import versions
from ..errors import UserError

MARKER = "hf_rlhf_ext.json"
"""File in every folder that `prepare_output_dir` made: only those are ever overwritten."""


def prepare_output_dir(output_dir: str | Path, *, resume: bool | str | None, overwrite: bool) -> None:
    """Makes `output_dir` and leaves a marker file (versions, no paths) in it, or refuses in one line.

    A folder with anything but the marker in it is refused unless `resume` (it is left as it is) or `overwrite` (it is
    emptied, but only if it carries the marker: never delete what we did not make). Call it on every process: only the
    one of rank 0 does anything.
    """
    if os.environ.get("RANK", "0") != "0":  # set by torchrun and accelerate
        return
    folder = Path(output_dir)
    # The command line passes text on: `--resume_from_checkpoint false` arrives as "false".
    resume = bool(resume) and str(resume).lower() != "false"
    if resume and overwrite:
        raise UserError("resume and overwrite contradict each other: pass one of them")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: pass another --output_dir")

    content = _content(folder)
    if content and resume:
        return  # no marker: someone else may have made it
    if content and not overwrite:
        raise UserError(
            f"{folder} is not empty: pass --resume_from_checkpoint true to go on, or --overwrite true to start afresh"
        )
    if content and not (folder / MARKER).is_file():
        raise UserError(f"{folder} was not made by hf_rlhf_ext (no {MARKER}): remove it yourself, or pass another one")

    # The marker stays until the end, so that an interrupted removal can be repeated.
    for item in content:
        _remove(item)
    folder.mkdir(parents=True, exist_ok=True)
    marker = {"made_by": "hf_rlhf_ext", "versions": versions()}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def _content(folder: Path) -> list[Path]:
    """What is in the folder beside the marker."""
    if not folder.exists():
        return []
    return [item for item in folder.iterdir() if item.name != MARKER]


def _remove(item: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link (and not what it points to)."""
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink()


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Prints one metric a line; numbers with three decimals."""
    for name, value in metrics.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        print(f"{name:>22}: {shown}")

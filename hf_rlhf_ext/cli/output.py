"""Makes the output folder of a recipe, without deleting what a recipe did not make, and prints metrics."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpointing import require_writable
from ..compat import versions
from ..errors import UserError
from . import processes

MARKER = "hf_rlhf_ext.json"
"""File in every folder that `prepare_output_dir` made. Only these folders are ever emptied."""


def prepare_output_dir(output_dir: str | Path, *, resume: bool | str | None, overwrite: bool) -> None:
    """Makes `output_dir` with a marker file in it, which holds versions and no paths.

    Call it on every process: only the process of rank 0 does anything.

    Args:
        output_dir: the folder. With other files than the marker in it, one of the next two options is needed.
        resume: keep the files as they are.
        overwrite: delete the files (checkpoints, weights, `log.jsonl`, the report), if the folder has the marker.

    Raises:
        UserError: the folder is not empty and neither option is set, both are set, the folder has no marker, or it
            cannot be made or written.
    """
    if not processes.is_first():
        return
    require_writable(output_dir)
    folder = Path(output_dir)
    # The command line passes text on: `--resume_from_checkpoint false` arrives as "false".
    resume = bool(resume) and str(resume).lower() != "false"
    if resume and overwrite:
        raise UserError("resume_from_checkpoint and overwrite contradict each other: pass one of them")
    content = _content(folder)
    if content and resume:
        return  # no marker: someone else may have made it
    if content and not overwrite:
        raise UserError(
            f"{folder} is not empty: pass --resume_from_checkpoint true to continue, or --overwrite true to start again"
        )
    if content and not (folder / MARKER).is_file():
        raise UserError(
            f"{folder} was not made by hf_rlhf_ext (no {MARKER}): delete it yourself, or pass another --output_dir"
        )

    # The marker is kept, so that an interrupted deletion can be repeated.
    for item in content:
        remove(item)
    folder.mkdir(parents=True, exist_ok=True)
    marker = {"made_by": "hf_rlhf_ext", "versions": versions()}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def is_empty(folder: Path) -> bool:
    """Whether a folder has nothing but the marker, or does not exist."""
    return not _content(folder)


def refuse_used_folder(folder: Path, run: str) -> None:
    """Raises `UserError` if a folder without a run of stages has other files than the marker.

    Args:
        folder: the output folder, without the manifest of such a run.
        run: what it should hold, for the message, such as `pipeline`.
    """
    if folder.is_dir() and _content(folder):
        raise UserError(f"output_dir: {folder} is not empty and holds no {run}: pass another --output_dir.")


def _content(folder: Path) -> list[Path]:
    """What is in the folder, without the marker."""
    if not folder.exists():
        return []
    return [item for item in folder.iterdir() if item.name != MARKER]


def remove(item: Path) -> None:
    """Deletes a file, a folder with its contents, or a link (not what it points to)."""
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink()


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Prints one metric per line, numbers with three decimals."""
    for name, value in metrics.items():
        print(f"{name:>22}: {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):  # an interval, or names
        return ", ".join(_shown(item) for item in value) or "none"
    return str(value)

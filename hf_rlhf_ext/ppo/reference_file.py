"""The frozen reference of a PPO run on disk: written once per run, beside the checkpoints that need it.

`output_dir/ppo_reference/<digest>/` holds it, and the state of every checkpoint names its digest. Runs that start from
other weights have other digests, so that none overwrites the reference of an earlier run whose checkpoints are still
there.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpointing import PPO_STATE_FILE
from ..errors import UserError
from ..modeling.adapters import adapter_tensors
from ..modeling.shards import whole
from ..modeling.stack import ADAPTER_NAMES, AdapterStack
from .ranks import Ranks

REFERENCES = "ppo_reference"
"""Folder of the references, beside the checkpoints. Names that begin with `ppo_` are never pushed to the Hub."""
IN_CHECKPOINT = ADAPTER_NAMES["reference"]
"""Folder of the reference in checkpoints of earlier versions."""

_CONTENT = "content.json"
"""File beside the weights: their digest, and the size and SHA-256 of each file."""
_DIGITS = 16
"""Digits of the digest in the name of a folder."""


def digest_of(stack: AdapterStack) -> str | None:
    """SHA-256 of the weights of the reference: their names, dtypes, shapes and bytes.

    Args:
        stack: stack with the role reference.

    Returns:
        The digest; `None` if the reference is the base without an adapter, which needs no file.
    """
    digest = hashlib.sha256()
    is_empty = True
    for name, value in _weights(stack):
        is_empty = False
        value = whole(value).detach().cpu().contiguous()  # where it is in shards, every process gathers it
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return None if is_empty else digest.hexdigest()


def _weights(stack: AdapterStack) -> Iterator[tuple[str, Tensor]]:
    role = stack.roles["reference"]
    weights: Mapping[str, Tensor] = {}
    if role.model is not None:
        weights = role.model.state_dict()
    elif role.adapter is not None:
        weights = adapter_tensors(stack.model, role.adapter, start=stack.start)
    yield from sorted(weights.items())


def record_of(digest: str | None) -> dict[str, str] | None:
    """What the state of a checkpoint says about the reference."""
    return None if digest is None else {"digest": digest, "folder": folder_of(Path(), digest).as_posix()}


def recorded_digest(state: Mapping[str, Any]) -> str | None:
    """The digest of the reference in the state of a checkpoint; `None` if the reference needs no file."""
    record = state.get("reference")
    return None if record is None else record["digest"]


def folder_of(run: Path, digest: str) -> Path:
    """The folder of a reference in the folder of a run."""
    return run / REFERENCES / digest[:_DIGITS]


def save_reference(
    stack: AdapterStack, checkpoint: Path, digest: str | None, ranks: Ranks, *, writes: bool
) -> str | None:
    """Writes the reference beside a checkpoint that is being saved, unless it is there. Every process calls it.

    Args:
        stack: stack with the role reference.
        checkpoint: folder of the checkpoint.
        digest: digest of the reference if it is known.
        ranks: the processes.
        writes: whether this process writes files.

    Returns:
        The digest; `None` if the reference is the base without an adapter.
    """
    if writes:
        shutil.rmtree(checkpoint / IN_CHECKPOINT, ignore_errors=True)  # of an earlier version, which is overwritten
    digest = digest or digest_of(stack)
    if digest is None:
        return None
    folder = folder_of(checkpoint.parent, digest)
    is_missing = writes and damage(folder, digest) is not None
    (missing,) = ranks.sum_of(is_missing)  # all processes must agree where weights in shards are gathered
    if missing and writes:
        _write(stack, folder, digest)
    elif missing:
        stack.save("reference", folder, writes=False)  # sends its part, if the weights are in shards
    return digest


def _write(stack: AdapterStack, folder: Path, digest: str) -> None:
    # A name that no checkpoint asks for, until everything is written.
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
    try:
        stack.save("reference", scratch)
        files = {}
        for path in sorted(scratch.iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        (scratch / _CONTENT).write_text(json.dumps({"digest": digest, "files": files}, indent=2) + "\n")
    except BaseException:  # a full disk: the earlier checkpoints may need the space that it takes
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)  # damaged
    scratch.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:  # may not fit into memory
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, digest: str, *, reads_all: bool = False) -> str | None:
    """Why the folder of a reference is not usable, in words; `None` if it is.

    Args:
        folder: folder of a reference.
        digest: digest that it should have.
        reads_all: whether to read all files, not only their sizes.
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    try:
        content = json.loads((folder / _CONTENT).read_text())
        if content["digest"] != digest:
            return f"{folder} is of another reference"
        files = content["files"].items()
    except (OSError, ValueError, KeyError):
        return f"{folder / _CONTENT} is missing or damaged"
    for name, file in files:
        path = folder / name
        is_whole = path.is_file() and path.stat().st_size == file["bytes"]
        if not is_whole or (reads_all and _sha256(path) != file["sha256"]):
            return f"{path} is missing or damaged"
    return None


def load_reference(stack: AdapterStack, checkpoint: Path, state: Mapping[str, Any], output_dir: Path) -> None:
    """Makes the reference of a resumed run that of its checkpoint.

    Nothing is read if the reference that was built from the given model has the digest of the checkpoint.

    Args:
        stack: stack with the role reference.
        checkpoint: folder of the checkpoint.
        state: content of its state file.
        output_dir: folder of the resumed run, where the reference is looked for if it is not beside the checkpoint.

    Raises:
        UserError: if the reference is neither the given one, nor found in a folder.
    """
    if "reference" not in state:  # a checkpoint of an earlier version
        stack.load("reference", checkpoint / IN_CHECKPOINT)
        return
    digest = recorded_digest(state)
    own = digest_of(stack)
    if own == digest:
        return
    if own is None or digest is None:
        kinds = ("a frozen copy of the first weights", "the base without an adapter")
        was, now = kinds if own is None else reversed(kinds)
        raise UserError(
            f"resume_from_checkpoint: the reference of {checkpoint} is {was}, and with this model it is {now}: give "
            "the model that the run began with, and peft_config if it was given then."
        )
    problems = []
    for run in dict.fromkeys((checkpoint.absolute().parent, output_dir.absolute())):
        folder = folder_of(run, digest)
        problem = damage(folder, digest, reads_all=True)
        if problem is None:
            stack.load("reference", folder)
            return
        problems.append(problem)
    raise UserError(
        f"resume_from_checkpoint: the reference of {checkpoint} cannot be read ({', and '.join(problems)}), and "
        "model is not the one that the run began with: give that model, or copy the run's folder "
        f"{record_of(digest)['folder']} beside the checkpoint."
    )


def needed_reference(checkpoint: Path) -> str | None:
    """The digest of the reference that a checkpoint needs; `None` if it needs none, or cannot be read."""
    try:
        return recorded_digest(json.loads((checkpoint / PPO_STATE_FILE).read_text()))
    except (OSError, ValueError):
        return None


def remove_references(output_dir: Path, digests: set[str | None]) -> None:
    """Removes references that the checkpoints in `output_dir` no longer need.

    Args:
        output_dir: folder of the run.
        digests: references of checkpoints that were removed or overwritten. Others stay, as a copied checkpoint may
            need them.
    """
    if digests <= {None}:
        return
    needed = {needed_reference(folder) for folder in output_dir.glob("checkpoint-*")}
    for digest in digests - needed - {None}:
        shutil.rmtree(folder_of(output_dir, digest), ignore_errors=True)

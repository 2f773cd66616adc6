"""Finds the checkpoint to resume from. Incomplete checkpoints are skipped or refused."""

import json
import re
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import UserError

PPO_STATE_FILE = "ppo_state.json"
"""File in every checkpoint of `PPOTrainer`, and of no other trainer."""

_STATE_FILE = "trainer_state.json"
_ADAPTER_CONFIG = "adapter_config.json"
_HEADS = {"score", "classifier"}
"""Names of the score head of a reward model."""
_HEAD_OF_CRITIC = {
    "head": "value_head.safetensors",
    "adapter": "value/value_head.safetensors",
    "model": "value/value_head.safetensors",
}
"""Kind of critic of PPO -> the file of its value head. The kind `none` has no files."""
_RECORDS = ("*config.json", "*.index.json", PPO_STATE_FILE)
"""Files of a checkpoint that are needed to read the weights, and the state of PPO."""
_PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "*.bin")
"""Files of a checkpoint that PyTorch writes, as zip archives whose directory comes last."""


def require_writable(output_dir: str | Path) -> None:
    """Makes the folder of a run, before anything is loaded.

    Raises:
        UserError: the folder cannot be made, or nothing can be written there.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a part of the path is a file"
        raise UserError(f"output_dir: {folder} cannot be written ({reason}): choose another folder.") from error


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
    the save. Other files are cut off if the disk was full, or if the folder was copied only in part.
    """
    return broken_file(checkpoint) is None


def broken_file(checkpoint: str | Path) -> str | None:
    """Returns the name of the first file of a checkpoint that is missing or cut off, or `None`. Reads no weights."""
    folder = Path(checkpoint)
    try:
        json.loads((folder / _STATE_FILE).read_text())
    except (OSError, ValueError):
        return _STATE_FILE
    broken = _cut_off_file(folder)
    if broken is not None:
        return broken
    for part in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        lost = _lost_weights(part)
        if lost is not None:
            return str((part / lost).relative_to(folder))
    lost = _lost_file_of_ppo(folder)
    if lost is None and _lacks_head(folder):
        return "the score head"
    return lost


def _cut_off_file(folder: Path) -> str | None:
    """The first file in the folder of a checkpoint that is there and cannot be read; `None` if all can be."""
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # reads the header, which has the size of the file
                pass
        except (OSError, SafetensorError):
            return str(path.relative_to(folder))
    for pattern in _RECORDS:
        for path in sorted(folder.rglob(pattern)):
            try:
                json.loads(path.read_text())
            except (OSError, ValueError):
                return str(path.relative_to(folder))
    for pattern in _PICKLES:
        for path in sorted(folder.glob(pattern)):
            # TrainingArguments are not read when a run resumes.
            if path.name != "training_args.bin" and not zipfile.is_zipfile(path):
                return path.name
    return None


def _lost_weights(folder: Path) -> str | None:
    """The first file of weights that is missing in the folder of a model or of an adapter; `None` if none is."""
    if (folder / _ADAPTER_CONFIG).is_file():
        patterns = ("adapter_model.*",)
        expected = "adapter_model.safetensors"
    else:
        patterns = ("model*.safetensors", "pytorch_model*", "global_step*")  # the last two also of FSDP and DeepSpeed
        expected = "model.safetensors" if (folder / "config.json").is_file() else None
    if expected is not None and not any(list(folder.glob(pattern)) for pattern in patterns):
        return expected
    for index in sorted(folder.glob("*.index.json")):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        for name in sorted(shards):
            if not (folder / name).is_file():
                return name
    for config, weights in ((_ADAPTER_CONFIG, "adapter_model.safetensors"), ("config.json", "model.safetensors")):
        if (folder / weights).is_file() and not (folder / config).is_file():
            return config
    return None


def _lost_file_of_ppo(folder: Path) -> str | None:
    """The first file that is missing in a checkpoint of `PPOTrainer`; `None` if none is, or for other trainers."""
    path = folder / PPO_STATE_FILE
    if not path.is_file():
        return None
    state = json.loads(path.read_text())
    expected = [_HEAD_OF_CRITIC[state["critic"]]] if state["critic"] in _HEAD_OF_CRITIC else []
    expected += state.get("files", ())  # version 0.1.0 did not list them
    for name in expected:
        if not (folder / name).is_file():
            return name
    return None


def _lacks_head(folder: Path) -> bool:
    """Whether the weights of a reward model, a whole one or an adapter, are there without its score head."""
    if (folder / _ADAPTER_CONFIG).is_file():
        config = json.loads((folder / _ADAPTER_CONFIG).read_text())
        names = _weight_names(folder / "adapter_model.safetensors")
        has_head = bool(_HEADS & set(config.get("modules_to_save") or ()))
    elif (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        names = _weight_names(folder / "model.safetensors")
        has_head = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    else:
        return False
    return has_head and bool(names) and not any(_HEADS & set(name.split(".")) for name in names)


def _weight_names(path: Path) -> list[str]:
    """The names of the weights in a file, or in several with an index; empty if they are not safetensors."""
    index = path.with_name(f"{path.name}.index.json")
    if index.is_file():
        return list(json.loads(index.read_text())["weight_map"])
    if not path.is_file():
        return []
    with safe_open(path, framework="pt") as weights:
        return list(weights.keys())


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
    broken = broken_file(resume_from_checkpoint)
    if broken is not None:
        raise UserError(
            f"resume_from_checkpoint: {resume_from_checkpoint} is incomplete ({broken} is missing or cut off): "
            "give another checkpoint, or true for the last complete one."
        )
    return str(resume_from_checkpoint)

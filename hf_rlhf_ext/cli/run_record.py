"""The record of a run in the marker of its folder: with which options it runs, and whether it has finished."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..hub.privacy import strip_local_paths
from .output import MARKER

MAY_DIFFER = (
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "verbose",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "push_to_hub",
    "push_to_hub_token",
    "restore_callback_states_from_checkpoint",
    "save_on_each_node",
    "save_only_model",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "save_safetensors",
    "skip_memory_metrics",
    "warn_every",
    "num_completions_to_print",
    "per_device_eval_batch_size",
    "local_rank",
    "lora_task_type",
)
"""Options that do not change what is trained, so that a run may go on with other values."""

MAY_DIFFER_BEGINNINGS = ("hub_", "log_", "logging_", "trackio_", "dataloader_num_", "dataloader_p", "ddp_")

LOCAL = (
    "dataset_name",
    "ptx_dataset",
    "mix",
    "model_name_or_path",
    "reward_model",
    "eval_reward_model",
    "value_model",
)
"""Options that may name a local file or folder. Its content is compared, so that it may be moved or named otherwise."""

DATA_FILES = (".json", ".jsonl", ".csv", ".tsv", ".xlsx", ".parquet", ".arrow", ".txt", ".gz")
MODEL_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "member-*/*.safetensors")
"""What a folder of a model is compared by: its checkpoints are in sub-folders, and may be deleted."""
LARGEST_DIGEST = 256 * 2**20
"""Bytes of data up to which its content is compared; of more data, the sizes of the files are."""


def compared_options(recipe: str, options: tuple[Any, ...], n_processes: int) -> dict[str, Any]:
    """What must be the same for a stopped run to go on by itself, as JSON values without local paths."""
    compared: dict[str, Any] = {"command": recipe, "num_processes": n_processes}
    for part in options:
        for name, value in _values(part).items():
            if name in LOCAL:
                compared[name] = [_content(item) for item in value] if isinstance(value, list) else _content(value)
            elif name not in MAY_DIFFER and not name.startswith(MAY_DIFFER_BEGINNINGS):
                compared[name] = _plain(value)
    return compared


def _content(name: Any) -> Any:
    """A local file or folder by its name and its content; anything else as it is."""
    digest = digest_of_files(name) if isinstance(name, str) else None
    if digest is None:
        return _plain(name)
    return f"{strip_local_paths(Path(name).expanduser().resolve().name)} (content {digest})"


def _values(options: Any) -> dict[str, Any]:
    if isinstance(options, TrainingArguments):
        return options.to_dict()
    if is_dataclass(options):
        return {field.name: getattr(options, field.name) for field in fields(options)}
    return dict(options)


def _plain(value: Any) -> Any:
    """A value as JSON; a text with a local path is shortened, with digits that tell it from others."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str | Path):
        text = str(value)
        if strip_local_paths(text) == text:
            return text
        # Only the last part, as what is shown of the others depends on the working folder.
        return f"{strip_local_paths(Path(text).name)}#{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return type(value).__name__


def digest_of_files(name: str) -> str | None:
    """12 digits over the content of a local file, a folder of data or a model; None for a name on the Hub."""
    path = Path(name).expanduser()
    digest = hashlib.sha256()
    try:
        files = _compared_files(path)
        is_small = sum(part.stat().st_size for part in files) <= LARGEST_DIGEST
        for part in files:
            digest.update(f"{part.name} {part.stat().st_size}\n".encode())
            if is_small:
                digest.update(part.read_bytes())
    except OSError:  # what reads them says why
        return None
    return digest.hexdigest()[:12] if files else None


def _compared_files(path: Path) -> list[Path]:
    """The files of a model or of data, in a fixed order; none if there is no such path."""
    if path.is_file():
        return [path]
    is_model = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    if is_model or (path / "ensemble.json").is_file():
        found = {part for pattern in MODEL_FILES for part in path.glob(pattern)}
        # The marker and the report change when a run is resumed.
        return sorted(part for part in found if part.name not in (MARKER, "report.json", "trainer_state.json"))
    # `datasets` writes caches beside the rows of a saved dataset.
    found = {part for part in path.rglob("*") if part.suffix in DATA_FILES and not part.name.startswith("cache-")}
    return sorted(part for part in found if part.is_file())


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in a folder; None if there is none."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")).get("run")
    except (OSError, ValueError, AttributeError):
        return None


def write_record(folder: Path, options: Mapping[str, Any], *, finished: bool, stop: str | None = None) -> None:
    """Writes the record into the marker of a folder; nothing in a folder without a marker, which is not ours.

    Args:
        stop: name of a checkpoint that was only saved because the run was stopped. It is added to the earlier ones.
    """
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    stops = [*(marker.get("run") or {}).get("stops", []), *([] if stop is None else [stop])]
    marker["run"] = {"finished": finished, "options": dict(options), "stops": stops}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)  # never half a file


def difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options that differ, as `seed: 0 then, 1 now`; empty if none does.

    An option that only one of them has is one of another version of a library, at its default.
    """
    changed = []
    for name in sorted(earlier.keys() & now.keys()):
        before, after = earlier[name], now[name]
        if before != after:
            changed.append(f"{name}: {before} then, {after} now")
    return "; ".join(changed)

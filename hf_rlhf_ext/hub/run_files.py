"""Selects the files of a run to push, without pickles, files that only a resumed run needs, and local names."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..errors import UserError, first_line
from .card import EMBEDDED_BASES, card_from_report
from .report import REPORT_FILE, RunReport
from .scan import PICKLES

LEFT_OUT = (
    *PICKLES,
    "checkpoint-*",
    "events.out.tfevents*",  # contains the host name
    "runs",
    "wandb",
    "trackio",
    "merged",
    "ref",  # reference model of PPO: a copy of the initial adapter
    "ppo_*",
    "heldout.jsonl",  # the user's own rows
    "trained_prompts.txt",  # digests of them
)
"""Names of files and folders that are never pushed: pickles, rows, and files that only a resumed run needs."""
PUSHED_FILE = "pushed.json"
"""File that `push_run` writes in the folder. It names the repository, for the cards of models made from this one."""
_OF_THIS_MACHINE = (".*", "_*", "*.tmp", "*.lock", "hf_rlhf_ext.json", "log.jsonl", "trainer_state.json", PUSHED_FILE)
"""Names of files and folders that are of no use on other machines."""

_CONFIGS = ("config.json", "reward_normalization.json")
"""Suffixes of files that name the base and may contain local paths."""
_LOCAL_MARKS = ("is_local", "local_files_only", "_commit_hash")
_BASE_KEYS = ("base_model_name_or_path", "base_model", "name_or_path", "_name_or_path")
_WEIGHTS = (".safetensors", "ensemble.json")
"""Suffixes of files that every run has: weights, or the file that lists the members of an ensemble."""
_EMPTY_CARD = "<!-- Provide"
"""Text in PEFT's default card, which has no content and names local folders."""


def run_files(
    folder: Path,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> dict[str, Path | bytes]:
    """Selects the files of a run to push.

    Args:
        folder: Folder of the run.
        repo_id: Hub id of the repository, for the code snippet in the card.
        base_model: Hub id of the base, if the run used a local folder.
        license: License of the model; the default is the license in the base's card on the Hub.
        token: Access token to read the base's card.

    Returns:
        Name in the repository -> path of the file, or its content if that is changed.

    Raises:
        UserError: There are no weights, the base is only local, a JSON file is broken, or the card cannot be made.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or _is_left_out(name):
            continue
        if path.name.endswith(_CONFIGS):
            files[name.as_posix()] = _public_config(path, base_model)
        else:
            files[name.as_posix()] = path
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise UserError(f"push: {folder} holds no weights (*.safetensors): give the output_dir of a finished run.")
    readme = folder / "README.md"
    if readme.is_file() and _EMPTY_CARD in readme.read_text(encoding="utf-8"):
        files.pop("README.md", None)
    # Render the card again, since the id of the repository and the license of the base are only known now.
    if REPORT_FILE in files:
        card = _card(folder, repo_id, base_model, license, token)
        if card is not None:
            files["README.md"] = card.encode()
    return files


def content_digest(path: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> str:
    """Returns 16 digits of a SHA-256 over a file, or over a folder's files with these suffixes, except checkpoints."""
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
        return digest.hexdigest()[:16]
    for part in sorted(path.rglob("*")):
        if part.suffix not in suffixes:
            continue
        if _is_of_a_checkpoint(part.relative_to(path)):
            continue
        with part.open("rb") as file:  # weights may not fit into memory
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _is_of_a_checkpoint(name: Path) -> bool:
    """True for a file in a checkpoint or a hidden folder, which training may still change."""
    return any(part.startswith(("checkpoint-", ".")) for part in name.parts)


def _is_left_out(name: Path) -> bool:
    """True if a file, or a folder that contains it, is not pushed."""
    for part in name.parts:
        for pattern in LEFT_OUT + _OF_THIS_MACHINE:
            if fnmatch(part, pattern):
                return True
    return False


def _card(
    folder: Path,
    repo_id: str | None,
    base_model: str | None,
    license: str | None,
    token: str | None,
) -> str | None:
    """Renders the card from the report in the folder, with the options of this push. None if the report has no card."""
    path = folder / REPORT_FILE
    _read_object(path)  # raises if the file is not a JSON object
    changes: dict[str, Any] = {"repo_id": repo_id}
    if base_model is not None:
        changes["base_model"] = base_model
    try:
        report = RunReport.load(folder)
        if report.card is None:
            return None
        if license is None:
            license = _license_of(base_model or report.card.base_model, token)
        report.license = license
        return card_from_report(report, **changes)
    except Exception as error:  # a report from another version, or edited by hand
        raise UserError(f"push: cannot make a card from {path}: {first_line(error)}: fix or remove it.") from error


def _public_config(path: Path, base_model: str | None) -> bytes:
    """Returns the content of a configuration without local paths, and with the Hub id of the base."""
    config = _read_object(path)
    for mark in _LOCAL_MARKS:
        config.pop(mark, None)
    for key in _BASE_KEYS:
        name = config.get(key)
        if not isinstance(name, str):
            continue
        if name in EMBEDDED_BASES:  # only this library knows this name
            config[key] = EMBEDDED_BASES[name]
        elif _is_local(name):
            if base_model is None and key == "base_model_name_or_path":  # without it nobody can load the adapter
                raise UserError(
                    f"push: {path.name} names a local base, {name}, which others do not have: push the base first, "
                    "then give its Hub id with --base_model (base_model= in Python)."
                )
            config[key] = base_model
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _is_local(name: str) -> bool:
    """True if the name of a base is a path, even if the path does not exist now."""
    if name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        return True
    return Path(name).expanduser().exists()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"push: {path} is not valid JSON ({first_line(error)}): fix or remove it.") from error
    if not isinstance(content, dict):
        raise UserError(f"push: {path} is not a JSON object: fix or remove it.")
    return content


def _license_of(base_model: str, token: str | None) -> str | None:
    """Returns the license in the card of the base, which the model inherits. None if the card cannot be read."""
    if base_model in EMBEDDED_BASES or base_model in EMBEDDED_BASES.values():
        return "apache-2.0"
    try:
        return ModelCard.load(base_model, token=token, ignore_metadata_errors=True).data.license
    except Exception:  # no network, no repository, no card
        return None

"""What is pushed of a run's folder: neither pickles nor what only a resumed run needs, nor marks of this machine."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..errors import UserError
from .card import EMBEDDED_BASES, card_from_report
from .client import first_line
from .report import REPORT_FILE, RunReport
from .scan import PICKLES

LEFT_OUT = (
    *PICKLES,
    "checkpoint-*",
    "events.out.tfevents*",  # names the host
    "runs",
    "wandb",
    "trackio",
    "merged",
    "ref",  # PPO's reference: a copy of the adapter that it started from
    "ppo_*",
)
"""Names of files and folders that are never pushed: pickles and what only a resumed run needs."""
PUSHED_FILE = "pushed.json"
"""What `push_run` leaves in the folder: where it went, for the cards of what is made from it."""
_OF_THIS_MACHINE = (".*", "_*", "*.tmp", "*.lock", "hf_rlhf_ext.json", "trainer_state.json", PUSHED_FILE)
"""Names of what is of no use elsewhere."""

_CONFIGS = ("config.json", "reward_normalization.json")
"""Endings of files that name the base and may carry marks of this machine."""
_LOCAL_MARKS = ("is_local", "local_files_only", "_commit_hash")
_BASE_KEYS = ("base_model_name_or_path", "base_model", "name_or_path", "_name_or_path")
_WEIGHTS = (".safetensors", "ensemble.json")
"""Endings of what makes a folder a run's: weights, or the file that names an ensemble's members."""
_EMPTY_CARD = "<!-- Provide"
"""In PEFT's card, an empty form that names local folders."""


def run_files(
    folder: Path,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> dict[str, Path | bytes]:
    """What is pushed of a run's folder: name in the repository, and content where it differs from the file's.

    Args:
        repo_id: for the card's snippet.
        base_model: Hub id of the base, where the run had it in a local folder.
        license: of the model; default is what the base's card on the Hub says.

    Raises:
        UserError: no weights, a base that nobody else has, a broken JSON file, a report that gives no card.
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
    # The card is made anew: only now is it known what the repository is called and what the base's license is.
    if REPORT_FILE in files:
        card = _card(folder, repo_id, base_model, license, token)
        if card is not None:
            files["README.md"] = card.encode()
    return files


def content_digest(path: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> str:
    """Beginning of a sha256 over a file, or over a folder's files of such names, but for checkpoints."""
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
        return digest.hexdigest()[:16]
    for part in sorted(path.rglob("*")):
        if part.suffix not in suffixes:
            continue
        if _is_of_a_checkpoint(part.relative_to(path)):
            continue
        with part.open("rb") as file:  # weights may be larger than the memory
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _is_of_a_checkpoint(name: Path) -> bool:
    """Whether a file is in a checkpoint or a hidden folder, which training may still change."""
    return any(part.startswith(("checkpoint-", ".")) for part in name.parts)


def _is_left_out(name: Path) -> bool:
    """Whether a file, or a folder that it is in, is one that stays here."""
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
    """The card that the folder's report gives, with the options of this push; None where the report has none."""
    path = folder / REPORT_FILE
    _read_object(path)  # refuses what is no report at all
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
    except Exception as error:  # a report of another version, or one that somebody wrote
        raise UserError(f"push: no card can be made of {path}: {first_line(error)}.") from error


def _public_config(path: Path, base_model: str | None) -> bytes:
    """A configuration without marks of the machine it was saved on, its base under the name that others know."""
    config = _read_object(path)
    for mark in _LOCAL_MARKS:
        config.pop(mark, None)
    for key in _BASE_KEYS:
        name = config.get(key)
        if not isinstance(name, str):
            continue
        if name in EMBEDDED_BASES:  # a name that only this library knows
            config[key] = EMBEDDED_BASES[name]
        elif _is_local(name):
            if base_model is None and key == "base_model_name_or_path":  # without it nobody can load the adapter
                raise UserError(
                    f"push: {path.name} names a local base, {name}, which nobody else has: push that first, then give "
                    "its Hub id with --base_model (base_model= in Python)."
                )
            config[key] = base_model
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _is_local(name: str) -> bool:
    """Whether a base's name is a path, even one that is not here now, as no id on the Hub is."""
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
    """What the card of the base says, which a derivative inherits; None where there is no such card to be read."""
    if base_model in EMBEDDED_BASES or base_model in EMBEDDED_BASES.values():
        return "apache-2.0"
    try:
        return ModelCard.load(base_model, token=token, ignore_metadata_errors=True).data.license
    except Exception:  # no network, no repository, no card
        return None

"""Selects the files of a run to push, without pickles, files that only a resumed run needs, and local names."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError, first_line
from ..modeling.tokenizer_files import TOKENIZER_FILES
from .base_tokenizer import files_of_base_tokenizer
from .card import EMBEDDED_BASES, card_from_report
from .cards.foreign_cards import is_filled_form, is_form
from .hub_names import is_local, public_base
from .licenses import license_of_base
from .report import REPORT_FILE, CardOptions, RunReport
from .reports.folder_report import report_of_folder
from .scan import PICKLES

LEFT_OUT = (
    *PICKLES,
    "checkpoint-*",
    "events.out.tfevents*",  # contains the host name
    "runs",
    "wandb",
    "trackio",
    "merged",
    "ref",  # reference model of PPO in checkpoints of earlier versions
    "ppo_*",  # state, rollout and reference of PPO
    "global_step*",  # states of DeepSpeed, with the next two
    "latest",
    "zero_to_fp32.py",
    "*.distcp",  # states of FSDP in shards
    "emissions.csv",  # codecarbon's, with the place of the machine
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
_MODELS = ("adapter_model", "pytorch_model", "model")
"""Names of files of weights, without the suffix."""
_HEADER = re.compile(r"\A---[ \t]*\n.*?\n---[ \t]*(\n|\Z)", re.DOTALL)
"""The YAML header of a card."""
_ADAPTER = "adapter_config.json"


def run_files(
    folder: Path,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    *,
    report: RunReport | None = None,
    **changes: Any,
) -> dict[str, Path | bytes]:
    """Selects the files of a run to push.

    A model that was saved without a tokenizer gets that of its base, which is logged.

    Args:
        folder: Folder of the run.
        repo_id: Hub id of the repository, for the code snippet in the card.
        base_model: Hub id of the base, if the run used a local folder.
        license: License of the model; the default is that in the report, or else in the base's card on the Hub.
        token: Access token to read the base's card.
        revision: Branch of the repository, for the code snippet in the card.
        report: What the card is made from if the folder has neither `report.json` nor a card; None means no card then.
        changes: Options of the card (`CardOptions`) that override those in the report.

    Returns:
        Name in the repository -> path of the file, or its content if that is changed.

    Raises:
        UserError: There are no weights or no tokenizer, the base is only local or another one than `base_model`, a JSON
            file is broken, or the card cannot be made.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or _is_left_out(name):
            continue
        if path.name.endswith(_CONFIGS):
            files[name.as_posix()] = _public_config(path, _read_object(path), base_model)
        else:
            files[name.as_posix()] = path
    if not any(name.endswith(_WEIGHTS) for name in files):
        _refuse_without_weights(folder)
    readme = folder / "README.md"
    if readme.is_file() and _is_form(readme, also_filled=report is not None):
        files.pop("README.md", None)
    if REPORT_FILE in files:
        report = _report_in(folder, base_model)
        files[REPORT_FILE] = _report_file(folder, report)
    has_own_card = REPORT_FILE not in files and "README.md" in files
    files |= _tokenizer_files(folder, files, report, base_model, token)
    # Render the card again, since the id of the repository and the license of the base are only known now.
    if report is not None and report.card is not None and not has_own_card:
        changes |= {"repo_id": repo_id, "revision": revision}
        files["README.md"] = _card(folder, report, license, token, changes).encode()
    return files


def _refuse_without_weights(folder: Path) -> NoReturn:
    pickles = sorted(path.name for path in folder.iterdir() if path.stem in _MODELS and _is_left_out(Path(path.name)))
    if pickles:
        raise UserError(
            f"push: the weights in {folder} are a pickle ({pickles[0]}), which can run code where it is loaded: load "
            "the model, and save it with save_pretrained, which writes *.safetensors."
        )
    raise UserError(f"push: {folder} holds no weights (*.safetensors): give the output_dir of a finished run.")


def content_digest(path: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> str:
    """Returns 16 digits of a SHA-256 over a file, or over a folder's files with these suffixes, without checkpoints."""
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


def _is_form(readme: Path, *, also_filled: bool) -> bool:
    """True for a card that nobody wrote, such as PEFT's empty form, which names local folders.

    Args:
        readme: The card.
        also_filled: Whether a form with lines of its owner is one too, since they go into a card that is made.
    """
    body = _HEADER.sub("", readme.read_text(encoding="utf-8", errors="replace"), count=1)
    return is_form(body) or (also_filled and is_filled_form(body))


def _is_of_a_checkpoint(name: Path) -> bool:
    """True for a file that is no part of the model: in a checkpoint, of PPO's reference, or in a hidden folder."""
    return any(part.startswith(("checkpoint-", "ppo_reference", ".")) for part in name.parts)


def _is_left_out(name: Path) -> bool:
    """True if a file, or a folder that contains it, is not pushed."""
    for part in name.parts:
        for pattern in LEFT_OUT + _OF_THIS_MACHINE:
            if fnmatch(part, pattern):
                return True
    return False


def _report_in(folder: Path, base_model: str | None) -> RunReport:
    """Reads `report.json`. Its card names `base_model`, or else the base under which others find it."""
    path = folder / REPORT_FILE
    _read_object(path)  # raises if the file is not a JSON object
    with _card_or_refused(path):
        report = RunReport.load(folder)
        if report.card is not None:
            report.card.base_model = base_model or _base_of_card(folder, report.card)
            _fill_in(report.card, folder)
    return report


def _fill_in(card: CardOptions, folder: Path) -> None:
    """Adds what the files of an adapter record and its report does not say, as reports of earlier versions."""
    found = report_of_folder(folder, with_adapter=card.adapter is None)
    if found is None or not card.relation == found.card.relation == "adapter":
        return
    names = ["adapter", "prompt_form"]
    if found.card.base_model == card.base_model:
        names.append("base_revision")
    if card.base_dtype is None:
        names += ["base_dtype", "load_in_4bit", "quantization"]
    for name in names:
        setattr(card, name, getattr(card, name) or getattr(found.card, name))


def _base_of_card(folder: Path, card: CardOptions) -> str | None:
    if card.base_model in EMBEDDED_BASES:
        return card.base_model
    recorded = public_base(card.base_model)
    if recorded is None and (folder / _ADAPTER).is_file():
        recorded = public_base(_read_object(folder / _ADAPTER).get("base_model_name_or_path"))
    return recorded


def _report_file(folder: Path, report: RunReport) -> Path | bytes:
    """`report.json` as it is, or with the base that the card names now if that is another one."""
    path = folder / REPORT_FILE
    content = _read_object(path)
    if report.card is None or content["card"].get("base_model") == report.card.base_model:
        return path
    content["card"]["base_model"] = report.card.base_model
    return (json.dumps(content, indent=2) + "\n").encode()


def _card(folder: Path, report: RunReport, license: str | None, token: str | None, changes: dict[str, Any]) -> str:
    """Renders the card of a report with the options of this push. `changes` are options of the card."""
    path = folder / REPORT_FILE
    with _card_or_refused(path if path.is_file() else folder):
        if license is not None:
            report.license = license
        elif report.license is None:
            found = license_of_base(report.card.base_model, token)
            if found is not None:
                report.license = found.id
                changes = {"license_name": found.name, "license_link": found.link} | changes
        return card_from_report(report, **changes)


@contextmanager
def _card_or_refused(path: Path) -> Iterator[None]:
    """Inside the context, every error is one line: a report may be from another version, or edited by hand."""
    try:
        yield
    except Exception as error:
        raise UserError(f"push: cannot make a card from {path}: {first_line(error)}: fix or remove it.") from error


def _tokenizer_files(
    folder: Path,
    files: Mapping[str, Path | bytes],
    report: RunReport | None,
    base_model: str | None,
    token: str | None,
) -> dict[str, bytes]:
    """Files of the base's tokenizer for an adapter or a whole model without one; empty if it has one."""
    is_model = _ADAPTER in files or "config.json" in files
    if not is_model or any(name in files for name in TOKENIZER_FILES):
        return {}
    base, revision = base_model, None
    if _ADAPTER in files:
        recorded = _read_object(folder / _ADAPTER)
        base = recorded.get("base_model_name_or_path")
        revision = recorded.get("revision")
        if base is None or (base_model is not None and is_local(base) and not Path(base).is_dir()):
            base, revision = base_model, None
    elif base is None and report is not None and report.card is not None:
        base, revision = report.card.base_model, report.card.base_revision
    found = files_of_base_tokenizer(folder, base, revision, token)
    if "tokenizer_config.json" in found:
        config = json.loads(found["tokenizer_config.json"])
        found["tokenizer_config.json"] = _public_config(folder / "tokenizer_config.json", config, base_model)
    return found


def _public_config(path: Path, config: dict[str, Any], base_model: str | None) -> bytes:
    """Returns the content of a configuration without local paths, and with the Hub id of the base."""
    for mark in _LOCAL_MARKS:
        config.pop(mark, None)
    for key in _BASE_KEYS:
        name = config.get(key)
        if not isinstance(name, str):
            continue
        is_base_of_adapter = key == "base_model_name_or_path"
        if name in EMBEDDED_BASES:  # only this library knows this name
            config[key] = EMBEDDED_BASES[name]
        elif is_local(name):
            if base_model is None and is_base_of_adapter:  # without it nobody can load the adapter
                raise UserError(
                    f"push: {path.name} names a local base, {name}, which others do not have: push the base first, "
                    "then give its Hub id with --base_model (base_model= in Python)."
                )
            config[key] = base_model
        if is_base_of_adapter and base_model not in (None, config[key]):
            raise UserError(
                f"push: {path.name} names the base {config[key]}, and --base_model is {base_model}: leave it out "
                "(base_model= or finetuned_from= in Python), as it is for a local base."
            )
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"push: {path} is not valid JSON ({first_line(error)}): fix or remove it.") from error
    if not isinstance(content, dict):
        raise UserError(f"push: {path} is not a JSON object: fix or remove it.")
    return content

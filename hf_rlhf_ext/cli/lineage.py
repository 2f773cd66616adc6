"""What a model was made from, for reports and cards: ids and revisions on the Hub, names and sha256 of local files."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..hub.push import PUSHED_FILE, content_digest
from .options import DataArguments

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".arrow")
"""Endings of the files in the digest of a local dataset."""
WEIGHT_SUFFIXES = (".safetensors",)


def public_name(model_name_or_path: str) -> str:
    """The name of a model in a card: its id on the Hub, or the last component of a local path."""
    path = Path(model_name_or_path).expanduser()
    if path.exists():
        return path.resolve().name
    return model_name_or_path


def hub_dataset(data: DataArguments) -> dict[str, Any]:
    """The card's entries for a dataset on the Hub: its id, and its commit if it is found. Empty for a local one."""
    if Path(data.dataset_name).expanduser().exists():
        return {}
    try:
        commit = HfApi().dataset_info(data.dataset_name, revision=data.dataset_revision, timeout=10).sha
    except Exception:  # no network, no access, or offline: the card is written without it
        commit = None
    return {"datasets": [data.dataset_name], "dataset_revision": commit}


def lineage_of(name: str, revision: str | None = None, *, dataset: bool = False, rows: int | None = None) -> str:
    """The name of a model or dataset in a card: an id on the Hub with its revision, or a local name with a sha256.

    A local folder that was pushed has the name of its repository.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return _hub_name(name, revision, dataset=dataset)

    # Two runs may have the same folder name: the digest distinguishes them.
    digest = content_digest(path, DATA_SUFFIXES if dataset else WEIGHT_SUFFIXES)
    pushed_to = _pushed_to(path, digest)
    if pushed_to is not None:
        return pushed_to
    counted = ""
    if rows is not None:
        counted = f", {rows} rows"
    return f"local {path.resolve().name} (sha256 {digest}{counted})"


def _hub_name(name: str, revision: str | None, *, dataset: bool) -> str:
    if dataset:
        name = f"datasets/{name}"
    if revision:
        name = f"{name}@{revision}"
    return name


def _pushed_to(folder: Path, digest: str) -> str | None:
    """Repository and commit of a folder that was pushed; None if it was not, or was trained further since then."""
    record = folder / PUSHED_FILE
    if not record.is_file():
        return None
    # The push recorded a digest. If it differs, the weights have changed since then.
    pushed = json.loads(record.read_text(encoding="utf-8"))
    if pushed.get("weights") != digest:
        return None
    return f"{pushed['repo_id']}@{pushed['commit']}"

"""What a report says that a model was made from: ids and revisions on the Hub; of local files a name and a sha256."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..hub.push import PUSHED_FILE, content_digest
from .options import DataArguments

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".arrow")
"""Files that the digest of a local data set is made of."""
WEIGHT_SUFFIXES = (".safetensors",)


def public_name(model_name_or_path: str) -> str:
    """What a card may call a model: its id on the Hub, of a local folder or file only the last component."""
    path = Path(model_name_or_path).expanduser()
    if path.exists():
        return path.resolve().name
    return model_name_or_path


def hub_dataset(data: DataArguments) -> dict[str, Any]:
    """What a card says of a data set on the Hub: its id, and its commit if the Hub tells; nothing of a local one."""
    if Path(data.dataset_name).expanduser().exists():
        return {}
    try:
        commit = HfApi().dataset_info(data.dataset_name, revision=data.dataset_revision, timeout=10).sha
    except Exception:  # no network, no right, offline: a card can do without
        commit = None
    return {"datasets": [data.dataset_name], "dataset_revision": commit}


def lineage_of(name: str, revision: str | None = None, *, dataset: bool = False, rows: int | None = None) -> str:
    """What a card says that a model was made from: an id on the Hub with its revision, or a local name and a sha256.

    A local folder that was pushed is named by where it went.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return _hub_name(name, revision, dataset=dataset)

    # Names of local folders say little, and two runs may share one: the digest tells them apart.
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
    """Repository and commit of a folder that was pushed and not trained on since then."""
    record = folder / PUSHED_FILE
    if not record.is_file():
        return None
    # The digest was recorded at the push: another one means that the folder was trained on since.
    pushed = json.loads(record.read_text(encoding="utf-8"))
    if pushed.get("weights") != digest:
        return None
    return f"{pushed['repo_id']}@{pushed['commit']}"

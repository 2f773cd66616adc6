"""What a model was made from, for reports and cards: ids and revisions on the Hub, names and sha256 of local files."""

import json
import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..hub.push import PUSHED_FILE, content_digest
from ..modeling.source import public_name
from .options import DataArguments

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".arrow")
"""Endings of the files in the digest of a local dataset."""
WEIGHT_SUFFIXES = (".safetensors",)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_dataset(data: DataArguments) -> dict[str, Any]:
    """The card's entries for a dataset on the Hub: its id, and its commit if it is found. Empty for a local one."""
    if Path(data.dataset_name).expanduser().exists():
        return {}
    return {"datasets": [data.dataset_name], "dataset_revision": _commit_of(data.dataset_name, data.dataset_revision)}


def _commit_of(dataset: str, revision: str | None) -> str | None:
    """The commit of a dataset on the Hub; None if it is not found."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except Exception:  # no network, no access, or offline: the card is written without it
        return None


def with_commit_read(dataset: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """What `hub_dataset` returned, with the commit of the rows if the trainer knows it: the Hub may have a newer one.

    Args:
        card: options of the card that the trainer knows.
    """
    for record in card.get("data", ()):
        if record.get("revision") and record.get("name") in dataset.get("datasets", ()):
            return {**dataset, "dataset_revision": record["revision"]}
    return dict(dataset)


def data_records(
    data: DataArguments,
    role: str,
    train: Sized,
    heldout: Sized,
    dataset: Mapping[str, Any],
    *,
    known: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """What the rows of training and of evaluation are, as `CardOptions.data` has it.

    Args:
        role: what the rows are: "demonstrations", "comparisons" or "prompts".
        train: the rows that are trained on.
        heldout: the rows that are held out; may be empty.
        dataset: what `hub_dataset` returned.
        known: options of the card that the trainer knows. Its rows for other purposes, such as PPO-ptx, are kept.
    """
    commit = dataset.get("dataset_revision")
    records = [_data_record(data, role, data.dataset_train_split, len(train), commit)]
    if len(heldout):
        split = data.dataset_test_split or data.dataset_train_split  # without a test split, rows of the same one
        records.append(_data_record(data, "evaluation", split, len(heldout), commit))
    others = [record for record in (known or {}).get("data", ()) if record["role"] not in (role, "evaluation")]
    return records + others


def _data_record(data: DataArguments, role: str, split: str, rows: int, commit: str | None) -> dict[str, Any]:
    path = Path(data.dataset_name).expanduser()
    record: dict[str, Any] = {"role": role, "rows": rows}
    if not path.exists():
        record |= {"name": data.dataset_name, "revision": commit, "config": data.dataset_config, "split": split}
    else:
        record |= {"name": public_name(path), "sha256": content_digest(path, DATA_SUFFIXES)}
        if path.is_dir():  # a single file has no splits
            record["split"] = split
    return {name: value for name, value in record.items() if value is not None}


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
    return f"local {public_name(path)} (sha256 {digest}{counted})"


def base_lineage(card: Mapping[str, Any], name: str, revision: str | None) -> dict[str, str]:
    """The entry of a base that is not on the Hub, of which a card has no id; empty for others."""
    return {} if card.get("base_model") else {"base model": lineage_of(name, revision)}


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

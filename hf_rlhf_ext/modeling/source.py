"""Where a model in memory was loaded from, for the reports of what is trained on it."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

_SOURCE = "_loaded_from"
_REVISION = "_loaded_revision"
_COMMIT = "_loaded_commit"
"""Attributes of a model in memory."""


def public_name(folder_or_repo: str | Path) -> str:
    """The name of a model or dataset in reports and cards: its id on the Hub, or the last component of a local path."""
    path = Path(folder_or_repo).expanduser()
    return path.resolve().name if path.exists() else str(folder_or_repo)


def remember_source(model: nn.Module, folder_or_repo: str | Path, revision: str | None = None) -> None:
    """Keeps the name of the folder or repository that a policy was loaded from. Of a path, only the last part is kept.

    Args:
        model: The policy.
        folder_or_repo: Local folder or Hub id of a model or an adapter.
        revision: Branch, tag or commit on the Hub.
    """
    name = public_name(folder_or_repo)
    is_local = Path(folder_or_repo).expanduser().exists()
    setattr(model, _SOURCE, name if revision is None or is_local else f"{name}@{revision}")


def source_of(model: nn.Module) -> str | None:
    """What `remember_source` kept; `None` without it."""
    return _own(model, _SOURCE)


def remember_revision(base: nn.Module, name: str, revision: str | None = None) -> None:
    """Keeps the revision of a base that was loaded from the Hub, and its commit, which Transformers forgets.

    Args:
        base: The model.
        name: What it was loaded from: a folder or a Hub id.
        revision: Branch, tag or commit that was asked for.
    """
    setattr(base, _REVISION, revision)
    if Path(name).expanduser().exists():
        return
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # an embedded model
        return
    if isinstance(file, str):
        setattr(base, _COMMIT, Path(file).parent.name)  # …/snapshots/COMMIT/config.json


def revision_of(base: nn.Module) -> str | None:
    """The commit that `remember_revision` kept, or the revision that was asked for; `None` if nothing is known."""
    # Transformers up to 5.22 keeps the commit in the configuration.
    return _own(base, _COMMIT) or _own(base, _REVISION) or getattr(base.config, "_commit_hash", None)


def requested_revision_of(base: nn.Module) -> str | None:
    """The revision that was asked for when the base was loaded; `None` for the newest, and if it is not known."""
    return _own(base, _REVISION)


def _own(model: nn.Module, name: str) -> Any:
    """An attribute of the model itself. A `PeftModel` would pass on those of its base."""
    return vars(model).get(name)

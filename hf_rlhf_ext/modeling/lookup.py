"""What a model's folder or repository holds, without its weights: the base of an adapter, and a tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers.utils import cached_file

from ..errors import UserError, first_line
from .families import loading_problem
from .locations import EMBEDDED_MODEL, LOCAL_PREFIXES, is_only_known_here
from .tokenizer_files import TOKENIZER_FILES


@contextmanager
def found_or_refused(option: str, name: str) -> Iterator[None]:
    """Inside the context, turns exceptions of Transformers and the Hub into a `UserError`.

    Args:
        option: name of the option, for the message.
        name: the folder or Hub id that is loaded.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        reason = first_line(error)
        problem = "cannot be loaded"
        if not Path(name).expanduser().exists():
            problem = "is no folder here, and as a Hub id it cannot be loaded"
        if "couldn't connect" in reason.lower():
            reason += ": check the connection, or give the folder of a model"
        raise UserError(f"{option}: {name} {problem}: {reason}") from error
    except UserError:
        raise
    except (ImportError, KeyError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{option}: {name} {loading_problem(error)}") from error


def adapter_base(folder_or_repo: str, revision: str | None = None) -> str | None:
    """Returns the base model that an adapter names in `adapter_config.json`; `None` if this is not an adapter."""
    return base_and_revision(folder_or_repo, revision)[0]


def base_and_revision(folder_or_repo: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """Returns the base model that an adapter names, and its revision.

    Args:
        folder_or_repo: local folder or Hub id.
        revision: branch, tag or commit of `folder_or_repo`.

    Returns:
        The name of the base, `None` if this is not an adapter, and the revision of the base, `None` for the newest.

    Raises:
        UserError: if the configuration of the adapter is damaged.
    """
    if folder_or_repo == EMBEDDED_MODEL or folder_or_repo.endswith(".gguf"):
        return None, None
    path = _adapter_config_path(folder_or_repo, revision)
    if path is None or not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: it is no JSON ({first_line(error)}): copy the model again.") from error
    return config.get("base_model_name_or_path"), config.get("revision")


def _adapter_config_path(folder_or_repo: str, revision: str | None) -> Path | None:
    """The path of an adapter's configuration; `None` if the repository has none or cannot be reached."""
    folder = Path(folder_or_repo).expanduser()
    if folder.is_dir() or folder_or_repo.startswith(LOCAL_PREFIXES):
        return folder / "adapter_config.json"
    return _file_on_hub(folder_or_repo, "adapter_config.json", revision)


def _file_on_hub(repo_id: str, name: str, revision: str | None, *, option: str = "model_name_or_path") -> Path | None:
    """The path of a file of a repository in the cache; `None` if the repository lacks it or cannot be reached."""
    with found_or_refused(option, repo_id):
        path = cached_file(
            repo_id,
            name,
            revision=revision,
            # Without these two options, a whole model or a Hub that cannot be reached would raise an error here.
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if path is None else Path(path)


def tokenizer_source(folder_or_repo: str, revision: str | None = None) -> tuple[str, str | None]:
    """Where the tokenizer of a model is: with the model, or with the base of an adapter that was saved without one.

    Args:
        folder_or_repo: local folder or Hub id of a model or of an adapter.
        revision: branch, tag or commit of `folder_or_repo`.

    Returns:
        The name of the model that has the tokenizer, and its revision.
    """
    if _has_one_of(TOKENIZER_FILES[:1], folder_or_repo, revision):  # nearly always: the Hub is asked once
        return folder_or_repo, revision
    base_id, base_revision = base_and_revision(folder_or_repo, revision)
    if base_id is None or has_tokenizer(folder_or_repo, revision):
        return folder_or_repo, revision
    return base_id, base_revision


def has_tokenizer(folder_or_repo: str, revision: str | None = None) -> bool:
    """Whether a folder or a repository on the Hub has the files of a tokenizer; true for GGUF files, which contain it.

    Args:
        folder_or_repo: local folder or Hub id.
        revision: branch, tag or commit on the Hub.
    """
    return _has_one_of(TOKENIZER_FILES, folder_or_repo, revision)


def _has_one_of(names: tuple[str, ...], folder_or_repo: str, revision: str | None) -> bool:
    if is_only_known_here(folder_or_repo):
        return True
    folder = Path(folder_or_repo).expanduser()
    if folder.is_dir() or folder_or_repo.startswith(LOCAL_PREFIXES):
        return any((folder / name).is_file() for name in names)
    return any(_file_on_hub(folder_or_repo, name, revision, option="tokenizer") is not None for name in names)

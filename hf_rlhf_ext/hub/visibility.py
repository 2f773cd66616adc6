"""Says whether others can load what is pushed: a public model needs a base that others can read too."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from .card import EMBEDDED_BASES

_ADAPTER_CONFIG = "adapter_config.json"


def warn_private_base(
    base: str | None, private: bool | None, token: str | None = None, *, repo_id: str | None = None
) -> str | None:
    """Prints a line if a public adapter needs a base that others cannot read: private, missing or gated.

    Args:
        base: Hub id of the base. None, and embedded models, are not asked for.
        private: Whether the repository is private if it is created now; None means private.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        repo_id: Repository of the adapter, which may exist with another visibility.

    Returns:
        The line; None if there is nothing to say, or if the Hub cannot be asked.
    """
    if base is None or "/" not in base or base in EMBEDDED_BASES or base in EMBEDDED_BASES.values():
        return None
    if _is_private(repo_id, private, token):
        return None
    name = repo_id or "the model"
    state = base_state(base, token)
    if state is None:
        return None
    if state == "gated":
        line = f"note: {name} is public, and its base {base} is gated: others need access to {base} to load it."
    else:
        reason = {"private": f"its base {base} is private", "missing": f"its base {base} is not on the Hub"}[state]
        line = (
            f"warning: {name} is public, but {reason}, so others cannot load it: make the base public, or the model "
            "private."
        )
    print(line, file=sys.stderr)
    return line


def base_state(base: str, token: str | None = None) -> str | None:
    """Returns `private`, `missing` or `gated` for a base on the Hub, None if everybody can read it or nobody knows."""
    try:
        info = HfApi(token=False).model_info(base)
    except GatedRepoError:
        return "gated"
    except RepositoryNotFoundError:
        return _state_for_us(base, token)
    except HfHubHTTPError as error:  # a Hub that asks for a token where a repository is private
        status = getattr(error.response, "status_code", None)
        return _state_for_us(base, token) if status in (401, 403, 404) else None
    except Exception:  # no network
        return None
    return "gated" if info.gated else None


def bases_of_adapters(files: Mapping[str, Path | bytes]) -> list[str]:
    """Returns the bases that the adapter configurations in `files` name, in order and without repetitions."""
    names = []
    for name, content in files.items():
        if Path(name).name != _ADAPTER_CONFIG:
            continue
        encoded = content if isinstance(content, bytes) else content.read_bytes()
        base = json.loads(encoded).get("base_model_name_or_path")
        if isinstance(base, str):
            names.append(base)
    return list(dict.fromkeys(names))


def _state_for_us(base: str, token: str | None) -> str | None:
    """Tells a private repository, which the token can read, from one that does not exist."""
    try:
        HfApi(token=token).model_info(base)
    except RepositoryNotFoundError:
        return "missing"
    except Exception:
        return None
    return "private"


def _is_private(repo_id: str | None, private: bool | None, token: str | None) -> bool:
    """Whether a repository is private, or will be if it is created now."""
    if repo_id is not None:
        try:
            return bool(HfApi(token=token).model_info(repo_id).private)
        except Exception:  # it does not exist, or the Hub cannot be asked
            pass
    return private is not False

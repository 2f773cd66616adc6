"""Names of bases: which ones others find on the Hub, and which ones are folders and files of this machine."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import EMBEDDED_BASES


def is_local(name: str) -> bool:
    """True if the name of a base is a path, even if the path does not exist now."""
    if name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        return True
    return Path(name).expanduser().exists()


def public_base(name: str | None) -> str | None:
    """Returns the name under which others find a base on the Hub. None if there is none.

    Args:
        name: Name of a base as an adapter or a report records it, such as a Hub id, a path or an embedded model.
    """
    if name is None or name in EMBEDDED_BASES:
        return EMBEDDED_BASES.get(name)
    if is_local(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name

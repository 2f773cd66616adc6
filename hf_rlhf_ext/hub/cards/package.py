"""How to install this library and where its source is, from the metadata of the installed package."""

from functools import cache
from importlib.metadata import PackageNotFoundError, metadata

_DISTRIBUTION = "hf-rlhf-ext"
_LABELS = ("source", "repository", "source code", "github", "homepage")
"""Labels of the address of the repository among the project's addresses, in the order of preference."""


def install_line() -> str:
    """Returns the command that installs this library."""
    return f"pip install {_name()}"


@cache
def source_address() -> str | None:
    """Returns the address of the repository of this library. None if its metadata has none."""
    addresses = {}
    for entry in _entries("Project-URL"):
        label, _, address = entry.partition(",")
        addresses[label.strip().lower()] = address.strip()
    for label in _LABELS:
        if addresses.get(label):
            return addresses[label]
    home = _entries("Home-page")
    return home[0] if home else None


def linked_name() -> str:
    """Returns the name of this library in Markdown, with a link to its repository if that is known."""
    address = source_address()
    return "`hf_rlhf_ext`" if address is None else f"[`hf_rlhf_ext`]({address})"


def _name() -> str:
    names = _entries("Name")
    return names[0] if names else _DISTRIBUTION


def _entries(name: str) -> list[str]:
    try:
        return metadata(_DISTRIBUTION).get_all(name) or []
    except PackageNotFoundError:  # a source tree that is not installed
        return []

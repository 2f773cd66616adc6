"""Removes local paths, user and host names, and access tokens from text."""

import getpass
import os
import re
import socket
import tempfile
from pathlib import Path

from .scanning.rules import TOKENS

_URL = r"[a-zA-Z][\w+.-]*://"
# An absolute path (POSIX, ~, drive letter or UNC), or a path that leaves the working folder ("../"), but not the slash
# in "reward/nat" or the slashes of a URL.
_PATH = re.compile(
    rf"(?P<url>(?<!\w)(?!file:){_URL}\S*)"
    r"|(?:\bfile:/+|(?<![\w.:/\\<>~-])(?:~\w*/|/|(?:\.\./)+)(?=[\w.~])|(?<!\w)[A-Za-z]:[\\/]|(?<!\\)\\\\(?=\w))"
    r"(?P<path>[^\s'\",;:|)\]}<>]*)"
)
_MARKED_PATH = re.compile(r"<path>([^\s'\",;:|)\]}<>]*)")  # a known folder, already replaced, and the rest of the path
_ID = r"(?<![\w./~-])(?:datasets/)?{name}/[\w.-]+(?![\w.-]*/)"  # owner/name on the Hub; a path has more parts
_HUB_ID = re.compile(r"(?:datasets/)?([\w.-]+)/[\w.-]+(?:@.*)?")
_TOKEN = re.compile(r"\b(?:gh[oprsu]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,})")  # besides the scanner's formats

COMMON_NAMES = frozenset("root user users admin ubuntu runner model base data test main host app".split())
"""User and host names that reveal nothing, and that also occur in ordinary text and options."""


def strip_local_paths(text: str) -> str:
    """Returns `text` without local paths, user name, host name and access tokens.

    Paths inside the working folder become relative. Of other paths, only the last component is kept
    (`<path>/data.jsonl`), so that commands stay readable. URLs are kept, except for names and tokens in them. Ids on
    the Hub are kept, even if their owner has the same name as the user.
    """
    text = _without_tokens(text)
    text = _shorten_known_folders(text)
    text = _PATH.sub(_shorten, text)
    for name in machine_names():
        text = _without_name(text, name)
    return text


def hub_owners(*ids: str | None) -> set[str]:
    """Returns the owners, in lower case, of those `ids` that are ids on the Hub (`owner/name`, also `@revision`)."""
    owners = set()
    for name in ids:
        match = _HUB_ID.fullmatch(name or "")
        if match:
            owners.add(match[1].lower())
    return owners


def machine_names() -> list[str]:
    """Returns the host names (longest first) and the user name of this machine, without common names."""
    host = socket.gethostname()
    short_host = host.split(".")[0]
    hosts = sorted({host, short_host, _node()}, key=len, reverse=True)
    return [name for name in [*hosts, user_name()] if _tells_something(name)]


def _tells_something(name: str) -> bool:
    if len(name) <= 1 or name == "localhost":
        return False
    return name.lower() not in COMMON_NAMES


def user_name() -> str:
    """Returns the user name. It is empty if there is none, for example in a container with only a user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def _node() -> str:
    """Returns the host name known to the kernel, which may differ from that of the resolver."""
    return os.uname().nodename if hasattr(os, "uname") else ""


def _without_tokens(text: str) -> str:
    text = _TOKEN.sub("<token>", TOKENS.sub("<token>", text))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        secret = os.environ.get(name, "")
        if len(secret) >= 8:  # a shorter value may occur in ordinary text
            text = text.replace(secret, "<token>")
    return text


def _shorten_known_folders(text: str) -> str:
    """Replaces the working, home and temporary folders. Unlike the pattern for paths, this also handles spaces."""
    working_folder = str(Path.cwd())
    hidden = {str(Path.home()), tempfile.gettempdir()}
    for folder in sorted(
        {working_folder, *hidden}, key=len, reverse=True
    ):  # the working folder is often inside the home folder
        if len(folder) <= 3:  # never "/" or "C:\\"
            continue
        begin = rf"(?<![\w.]){re.escape(folder)}"
        placeholder = "<path>"
        if folder not in hidden:  # the working folder: paths inside it become relative
            text = re.sub(rf"{begin}[\\/](?=\w)", "", text)
            placeholder = "."
        text = re.sub(rf"{begin}(?![\w.-])", placeholder, text)
    return _MARKED_PATH.sub(lambda match: _placeholder(match[1]), text)


def _shorten(match: re.Match) -> str:
    """Returns the replacement for a match of `_PATH`. URLs are kept."""
    if match["url"]:
        return match[0]
    return _placeholder(match["path"])


def _placeholder(path: str) -> str:
    """Returns `<path>/` and the last component."""
    components = re.split(r"[\\/]", path.rstrip("\\/"))
    last = components[-1]
    return f"<path>/{last}" if last else "<path>"


def _without_name(text: str, name: str) -> str:
    """Removes a user or host name from `text`, except if it is the owner of an id on the Hub."""
    placeholder = "<user>" if name == user_name() else "<host>"
    escaped = re.escape(name)
    hub_id = _ID.format(name=escaped)
    named = rf"(?P<id>{hub_id})|(?<!\w){escaped}(?!\w)"

    def replacement(match: re.Match) -> str:
        if match["id"] is not None and _is_hub_id(match["id"]):
            return match[0]
        return match[0].replace(name, placeholder, 1)

    return re.sub(named, replacement, text)


def _is_hub_id(name: str) -> bool:
    """True if `owner/name` is an id on the Hub, not a local file or folder."""
    return not Path(name.removeprefix("datasets/")).exists()

"""Removes from a text what only the machine it was written on should know."""

import getpass
import os
import re
import socket
import tempfile
from pathlib import Path

_URL = r"[a-zA-Z][\w+.-]*://"
# An absolute path (POSIX, ~, drive letter or UNC) or one that climbs out of the working folder; not the slash of
# "reward/nat" nor those of a URL.
_PATH = re.compile(
    rf"(?P<url>(?<!\w)(?!file:){_URL}\S*)"
    r"|(?:\bfile:/+|(?<![\w.:/\\<>~-])(?:~\w*/|/|(?:\.\./)+)(?=[\w.~])|(?<!\w)[A-Za-z]:[\\/]|(?<!\\)\\\\(?=\w))"
    r"(?P<path>[^\s'\",;:|)\]}<>]*)"
)
_MARKED_PATH = re.compile(r"<path>([^\s'\",;:|)\]}<>]*)")  # a known folder, already replaced, and what follows it
_ID = r"(?<![\w./~-])(?:datasets/)?{name}/[\w.-]+(?![\w.-]*/)"  # owner/name on the Hub; a path has more parts
_HUB_ID = re.compile(r"(?:datasets/)?([\w.-]+)/[\w.-]+(?:@.*)?")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|hf_oauth_\S+|[sg]h[ps]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,})")

COMMON_NAMES = frozenset("root user users admin ubuntu runner model base data test main host app".split())
"""Names of users and hosts that tell nothing, and that ordinary text and options hold."""


def strip_local_paths(text: str) -> str:
    """Returns `text` without local paths, user name, host name or access tokens.

    Paths under the working folder become relative; of others the last component stays (`<path>/data.jsonl`), so that a
    command still reads as one. URLs stay, but for what they may carry of the rest; so do ids on the Hub, whose owner
    may be called as the user is.
    """
    text = _without_tokens(text)
    text = _shorten_known_folders(text)
    text = _PATH.sub(_shorten, text)
    for name in machine_names():
        text = _without_name(text, name)
    return text


def hub_owners(*ids: str | None) -> set[str]:
    """Owners of those that are ids on the Hub (`owner/name`, `datasets/owner/name@revision`), in lower case."""
    owners = set()
    for name in ids:
        match = _HUB_ID.fullmatch(name or "")
        if match:
            owners.add(match[1].lower())
    return owners


def machine_names() -> list[str]:
    """Host and user names of this machine that tell something; the long form of a host name first."""
    host = socket.gethostname()
    short_host = host.split(".")[0]
    hosts = sorted({host, short_host, _node()}, key=len, reverse=True)
    return [name for name in [*hosts, user_name()] if _tells_something(name)]


def _tells_something(name: str) -> bool:
    if len(name) <= 1 or name == "localhost":
        return False
    return name.lower() not in COMMON_NAMES


def user_name() -> str:
    """The user's name; empty where there is none, as for a container's bare user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def _node() -> str:
    """The host name as the kernel knows it, which a resolver may not."""
    return os.uname().nodename if hasattr(os, "uname") else ""


def _without_tokens(text: str) -> str:
    text = _TOKEN.sub("<token>", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        secret = os.environ.get(name, "")
        if len(secret) >= 8:  # a shorter one may stand in any text
            text = text.replace(secret, "<token>")
    return text


def _shorten_known_folders(text: str) -> str:
    """Replaces the folders whose names are known: they may hold spaces, where the pattern for paths would stop."""
    working_folder = str(Path.cwd())
    hidden = {str(Path.home()), tempfile.gettempdir()}
    for folder in sorted(
        {working_folder, *hidden}, key=len, reverse=True
    ):  # the working folder is often inside the home folder
        if len(folder) <= 3:  # never "/" or "C:\\"
            continue
        begin = rf"(?<![\w.]){re.escape(folder)}"
        placeholder = "<path>"
        if folder not in hidden:  # the working folder: what is below it becomes relative
            text = re.sub(rf"{begin}[\\/](?=\w)", "", text)
            placeholder = "."
        text = re.sub(rf"{begin}(?![\w.-])", placeholder, text)
    return _MARKED_PATH.sub(lambda match: _placeholder(match[1]), text)


def _shorten(match: re.Match) -> str:
    """Replacement for a match of `_PATH`: a URL stays."""
    if match["url"]:
        return match[0]
    return _placeholder(match["path"])


def _placeholder(path: str) -> str:
    """`<path>/` and the last component."""
    components = re.split(r"[\\/]", path.rstrip("\\/"))
    last = components[-1]
    return f"<path>/{last}" if last else "<path>"


def _without_name(text: str, name: str) -> str:
    """`text` without a user or host name, but where it is the owner of an id on the Hub."""
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
    """Whether `owner/name` is an id on the Hub: a file or folder of that name is here otherwise."""
    return not Path(name.removeprefix("datasets/")).exists()

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
_ID = r"(?<![\w./~-])(?:datasets/)?{name}/[\w.-]+(?![\w.-]*/)"  # owner/name on the Hub; a path has more parts
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|hf_oauth_\S+|[sg]h[ps]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,})")

COMMON_NAMES = frozenset("root user users admin ubuntu runner model base data test main host app".split())
"""Names of users and hosts that tell nothing, and that ordinary text and options hold."""


def strip_local_paths(text: str) -> str:
    """Returns `text` without local paths, user name, host name or access tokens.

    Paths under the working folder become relative; of others the last component stays (`<path>/data.jsonl`), so that a
    command still reads as one. URLs stay, but for what they may carry of the rest; so do ids on the Hub, whose owner
    may be called as the user is.
    """
    text = _TOKEN.sub("<token>", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(secret := os.environ.get(name, "")) >= 8:
            text = text.replace(secret, "<token>")
    text = _shorten_known_folders(text)
    text = _PATH.sub(_shorten, text)
    for name, placeholder in _names():
        known = rf"(?P<id>{_ID.format(name=re.escape(name))})|(?<!\w){re.escape(name)}(?!\w)"
        text = re.sub(known, lambda m, n=name, p=placeholder: m[0] if _is_id(m["id"]) else m[0].replace(n, p, 1), text)
    return text


def _is_id(found: str | None) -> bool:
    return found is not None and not Path(found.removeprefix("datasets/")).exists()


def hub_owners(*ids: str | None) -> set[str]:
    """Owners of those that are ids on the Hub (`owner/name`, `datasets/owner/name@revision`), in lower case."""
    found = (re.fullmatch(r"(?:datasets/)?([\w.-]+)/[\w.-]+(?:@.*)?", name or "") for name in ids)
    return {match[1].lower() for match in found if match}


def _shorten_known_folders(text: str) -> str:
    """Replaces the folders whose names are known: they may hold spaces, where the pattern for paths would stop."""
    folders = {str(Path.cwd()): ".", str(Path.home()): "<path>", tempfile.gettempdir(): "<path>"}
    for folder in sorted(folders, key=len, reverse=True):  # the working folder is often inside the home folder
        if len(folder) > 3:  # never "/" or "C:\\"
            if folders[folder] == ".":
                text = re.sub(rf"(?<![\w.]){re.escape(folder)}[\\/](?=\w)", "", text)
            text = re.sub(rf"(?<![\w.]){re.escape(folder)}(?![\w.-])", lambda _, f=folder: folders[f], text)
    return re.sub(r"<path>[^\s'\",;:|)\]}<>]*", lambda m: _placeholder(m[0].removeprefix("<path>")), text)


def _shorten(match: re.Match) -> str:
    return match[0] if match["url"] else _placeholder(match["path"])


def _placeholder(path: str) -> str:
    last = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return f"<path>/{last}" if last else "<path>"


def _names() -> list[tuple[str, str]]:
    """Host and user names with their placeholders; the long form of a host name first."""
    return [(name, "<user>" if name == user_name() else "<host>") for name in machine_names()]


def machine_names() -> list[str]:
    """Host and user names of this machine that tell something; the long form of a host name first."""
    hosts = {socket.gethostname(), socket.gethostname().split(".")[0], _node()}
    found = [*sorted(hosts, key=len, reverse=True), user_name()]
    return [name for name in found if len(name) > 1 and name != "localhost" and name.lower() not in COMMON_NAMES]


def user_name() -> str:
    """The user's name; empty where there is none, as for a container's bare user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def _node() -> str:
    """The host name as the kernel knows it, which a resolver may not."""
    return os.uname().nodename if hasattr(os, "uname") else ""

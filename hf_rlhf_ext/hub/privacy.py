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
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|hf_oauth_\S+|[sg]h[ps]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,})")


def strip_local_paths(text: str) -> str:
    """Returns `text` without local paths, user name, host name or access tokens.

    Paths under the working folder become relative; of others the last component stays (`<path>/data.jsonl`), so that a
    command still reads as one. URLs stay, but for what they may carry of the rest.
    """
    text = _TOKEN.sub("<token>", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(secret := os.environ.get(name, "")) >= 8:
            text = text.replace(secret, "<token>")
    text = _shorten_known_folders(text)
    text = _PATH.sub(_shorten, text)
    for name, placeholder in _names():
        text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", placeholder, text)
    return text


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
    """Host and user names of this machine; the long form of a host name first."""
    hosts = {socket.gethostname(), socket.gethostname().split(".")[0], _node()}
    found = [*sorted(hosts, key=len, reverse=True), user_name()]
    return [name for name in found if len(name) > 1 and name != "localhost"]


def user_name() -> str:
    """The user's name; empty where there is none, as for a container's bare user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def _node() -> str:
    """The host name as the kernel knows it, which a resolver may not."""
    return os.uname().nodename if hasattr(os, "uname") else ""

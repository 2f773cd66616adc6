"""Finds what must not be published: secrets, traces of the machine, e-mail addresses, and files that run code."""

import io
import json
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .privacy import machine_names, user_name

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill", "*.npy", "*.npz")
"""Endings of files that may run code when they are loaded, optimizer states and training arguments among them."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")  # they spell everything by chance
# What may be bytes, not text: pictures, and vocabularies of sentencepiece.
_BINARIES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".model")
_RUNS_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"}  # opcodes of pickles

# Kind of finding: what it looks like in one line of text.
_TOKENS = (
    r"\bhf_[A-Za-z0-9]{16,}|\bhf_oauth_\S{8,}|\bapi_org_\w{20,}|\bsk-[\w-]{20,}|\bgh[oprsu]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bxox[abeoprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\bnpm_[A-Za-z0-9]{30,}"
    r"|\bpypi-[\w-]{16,}|\bA(?:KIA|SIA)[A-Z0-9]{16}\b|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
)
_CREDENTIALS = (
    r"(?i)\bbearer\s+[\w.~+/-]{12,}|://[^\s/:@'\"]+:[^\s/@'\"]+@"
    r"|(?:aws_secret_access_key|api_?key|\bsecret|passw(?:or)?d|(?:access|auth|hub|hf|push_to_hub)_?token)"
    r"[\"']?\s*[:=]\s*[\"']?(?!null|none|true|false|<|\$|\{)[^\s\"',}{]{8,}"
)
_PATHS = (  # of two parts or more, or a home, a drive, a share; never a URL's rest, a closing tag, Reddit's /r/
    r"(?<![\w.:/\\<>~-])(?!/[ru]/)(?:/[\w.@-]+){2,}|(?<![\w.:/\\<>~-])/(?:root|home|tmp|mnt|data|scratch)\b"
    r"|(?<!\w)~\w*/\w|\bfile:/+\w|(?<!\w)[A-Za-z]:\\{1,2}(?:Users|Windows|home|(?![nrt])\w{2,}\\{1,2}\w)|(?<!\\)\\\\\w[\w.-]+\\\w"
)
_KINDS = {
    "token": _TOKENS,
    "private-key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "credential": _CREDENTIALS,
    "home": r"(?<![\w.])(?:/home/|/Users/|/root\b|[A-Za-z]:\\{1,2}Users\\{1,2})[\w.-]*",
    "email": r"(?<![\w.+/-])(?!git@|no-?reply@)[\w.+-]+@(?!example\.)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b",
    "address": r"(?<![\d.])(?:(?:10|127)\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2}(?![\d.])",
    "remote-code": r"(?i)trust_remote_code[\"']?\s*[:=]\s*[\"']?(?:true|1|yes|on)\b|[\"']?auto_map[\"']?\s*:"
    r"|--trust_remote_code\b(?![\s=]+[\"']?(?:false|f|no|n|off|0)\b)",
    "path": _PATHS,
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
_SECRET_KINDS = ("token", "private-key", "credential")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")


class Finding(NamedTuple):
    """Something that must not be published; `line` counts from 1, and is 0 for a file as a whole."""

    kind: str
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.file}:{self.line} ({self.text})"

    def allowed(self, allow: Iterable[str]) -> bool:
        """Whether `kind:file:line`, or `kind:file` for all of a file, is in `allow`."""
        return not {f"{self.kind}:{self.file}:{self.line}", f"{self.kind}:{self.file}"}.isdisjoint(allow)


def scan(files: Mapping[str, Path | bytes], allow: Iterable[str] = (), public: Iterable[str] = ()) -> list[Finding]:
    """All findings in `files` (name in the repository: content, or where it is), but for those in `allow`.

    `public` are names, in lower case, that may be published though user or host are called so: `hub_owners`.
    """
    allow = set(allow)
    found = [finding for name, content in sorted(files.items()) for finding in _scan_file(name, content, public)]
    return [finding for finding in found if not finding.allowed(allow)]


def scan_folder(folder: str | Path, allow: Iterable[str] = ()) -> list[Finding]:
    """`scan` over every file of a folder."""
    folder = Path(folder)
    return scan({str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() or p.is_symlink()}, allow)


def refuse_findings(findings: list[Finding]) -> None:
    """Raises `UserError`, in one line, if there is any finding."""
    if findings:
        shown = "; ".join(map(str, findings[:5])) + f"; and {len(findings) - 5} more" * (len(findings) > 5)
        first = findings[0]
        raise UserError(
            f"not pushed, this must not be published: {shown}. Remove it, or let one pass with "
            f"--allow {first.kind}:{first.file}:{first.line} (allow= in Python)."
        )


def scan_text(text: str, file: str, *, vocabulary: bool = False, public: Iterable[str] = ()) -> Iterator[Finding]:
    """Findings in text, line by line; in a vocabulary only what nobody would have there by chance."""
    kinds = {k: p for k, p in _PATTERNS.items() if not vocabulary or k == "token"}
    known = [*_machine_strings(names=not vocabulary, public=public)]
    json_like = file.endswith((".json", ".jsonl"))
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a row of JSON may hold U+2028
        if json_like:
            line = _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else " " if m[2] in "nrtbf" else m[2], line)
        spans: list[tuple[int, int]] = []
        matches = [(kind, m) for kind, string in known for m in string.finditer(line)]
        for kind, match in matches + [(kind, m) for kind, pattern in kinds.items() for m in pattern.finditer(line)]:
            if not any(start < match.end() and match.start() < end for start, end in spans):  # one finding a place
                spans.append(match.span())
                yield Finding(kind, file, number, _excerpt(kind, match[0]))


def _scan_file(name: str, content: Path | bytes, public: Iterable[str]) -> Iterator[Finding]:
    if isinstance(content, Path) and content.is_symlink():
        yield Finding("link", name, 0, "a link: what it points to may be anything")
        return
    for finding in scan_text(name, name, public=public):  # a file's name can tell as much as its content
        yield finding._replace(line=0)
    if name.endswith((".py", ".so", ".sh")):
        yield Finding("code", name, 0, "runs where it is trusted")
    if Path(name).match("events.out.tfevents*"):
        yield Finding("event-file", name, 0, "names the host it was written on")
    elif name.endswith(".safetensors"):
        yield from _scan_safetensors(name, content, public)
    elif any(Path(name).match(pattern) for pattern in PICKLES) or _is_pickle(data := _bytes(content)):
        yield Finding("pickle", name, 0, "may run code when it is loaded")
    elif (text := _text(data)) is not None:
        yield from scan_text(text, name, vocabulary=Path(name).name in _VOCABULARIES, public=public)
    elif name.lower().endswith(_BINARIES):
        text = data.decode("latin-1")
        yield from (Finding(k, name, 0, s.pattern) for k, s in _machine_strings(names=False) if s.search(text))
    else:
        yield Finding("binary", name, 0, "no UTF-8 text, weights or picture: what is in it cannot be seen")


def _scan_safetensors(name: str, content: Path | bytes, public: Iterable[str]) -> Iterator[Finding]:
    """Findings in the metadata; tensors are numbers."""
    try:
        (size,) = struct.unpack("<Q", _bytes(content, 8))
        metadata = json.loads(_bytes(content, 8 + size)[8:]).get("__metadata__", {})
    except (ValueError, struct.error, AttributeError):
        yield Finding("binary", name, 0, "no safetensors header that can be read")
    else:
        yield from scan_text(json.dumps(metadata, ensure_ascii=False), name, public=public)


def _bytes(content: Path | bytes, size: int = -1) -> bytes:
    if isinstance(content, bytes):
        return content if size < 0 else content[:size]
    with content.open("rb") as file:
        return file.read(size)


def _text(data: bytes) -> str | None:
    try:
        return data.decode() if b"\0" not in data else None
    except UnicodeDecodeError:
        return None


def _is_pickle(data: bytes) -> bool:
    """Whether `data` is a pickle that runs code, of any protocol, or an archive that holds one (torch.save's)."""
    if re.match(rb"\x80[\x02-\x05]", data):
        return True
    try:
        if zipfile.is_zipfile(stream := io.BytesIO(data)):
            return any(name.endswith(".pkl") for name in zipfile.ZipFile(stream).namelist())
        *found, (_, _, end) = pickletools.genops(data)
        whole = end == len(data.rstrip()) - 1  # words may be opcodes by chance, up to a full stop
        return whole and not _RUNS_CODE.isdisjoint(opcode.name for opcode, _, _ in found)
    except Exception:  # whatever the two make of what is none
        return False


def _machine_strings(*, names: bool, public: Iterable[str] = ()) -> Iterator[tuple[str, re.Pattern]]:
    """What only this machine can know: folders and secrets of the environment; user and host names with `names`."""
    for folder in {str(Path.home()), str(Path.cwd())}:
        if folder.count(os.sep) > 1:  # not "/root" or "/", which other words contain
            yield "home", re.compile(re.escape(folder))
    for name, value in os.environ.items():
        if re.search(r"(TOKEN|KEY|SECRET|PASSWORD)$", name) and len(value) >= 12:
            yield "token", re.compile(re.escape(value))
    for name in machine_names() if names else ():
        if name.lower() not in public:
            kind = "user" if name == user_name() else "host"
            yield kind, re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")


def _excerpt(kind: str, text: str) -> str:
    """The finding itself; of a secret only how it begins."""
    return f"{text[:6]}…" if kind in _SECRET_KINDS else text[:60]

"""Leak scanner: finds secrets, local paths and names, e-mail addresses, and files that run code, before a push."""

import io
import json
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .privacy import machine_names, user_name

PICKLES = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.pickle",
    "*.ckpt",
    "*.joblib",
    "*.dill",
    "*.npy",  # arrays of objects are pickles
    "*.npz",
)
"""Patterns of files that may run code when they are loaded, such as optimizer states and training arguments."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")  # may match most patterns by chance
# Files that may be binary: images, and vocabularies of sentencepiece.
_BINARIES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".model")
_RUNS_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"}  # pickle opcodes that run code

# Patterns of the findings in one line of text, by kind.
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
_PATHS = (  # two or more parts, a home, a drive or a share; not the rest of a URL, a closing tag or Reddit's /r/
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
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")  # escapes in JSON strings
_PICKLE_HEADER = re.compile(rb"\x80[\x02-\x05]")  # opcode PROTO, at the start of pickles with protocol 2 to 5
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
_SHORTEST_SECRET = 12  # characters; a shorter environment variable may occur in ordinary text


class Finding(NamedTuple):
    """A finding of the leak scanner.

    Attributes:
        kind: Kind of finding, such as `token`, `path` or `binary`.
        file: Name of the file in the repository.
        line: Line number, from 1. It is 0 for findings on a whole file.
        text: The text that was found; only the first characters of a secret.
    """

    kind: str
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.file}:{self.line} ({self.text})"

    def allowed(self, allow: Collection[str]) -> bool:
        """True if `allow` contains `kind:file:line`, or `kind:file` for the whole file."""
        of_file = f"{self.kind}:{self.file}"
        of_line = f"{of_file}:{self.line}"
        return of_file in allow or of_line in allow


Pattern = tuple[str, re.Pattern]
"""Kind of finding, and its pattern."""


class Match(NamedTuple):
    """Position of a finding in a line."""

    kind: str
    start: int
    end: int


Files = Mapping[str, Path | bytes]
"""Name in the repository -> content, or path of the file."""


def scan(
    files: Files,
    allow: Iterable[str] = (),
    public: Collection[str] = (),
) -> list[Finding]:
    """Scans files for leaks.

    Any file that is not text, safetensors or an image is reported as `binary`.

    Args:
        files: Name in the repository -> content, or path of the file.
        allow: Findings to accept, as `kind:file:line`, or `kind:file` for a whole file.
        public: Names, in lower case, that may be published even if the user or host has the same name.

    Returns:
        All findings, except those in `allow`.
    """
    allowed = set(allow)
    findings = []
    for name, content in sorted(files.items()):
        for finding in _scan_file(name, content, public):
            if not finding.allowed(allowed):
                findings.append(finding)
    return findings


def scan_folder(folder: str | Path, allow: Iterable[str] = ()) -> list[Finding]:
    """Scans every file of a folder, see `scan`."""
    folder = Path(folder)
    files: dict[str, Path | bytes] = {}
    for path in folder.rglob("*"):
        if path.is_file() or path.is_symlink():
            files[str(path.relative_to(folder))] = path
    return scan(files, allow)


def refuse_findings(findings: list[Finding]) -> None:
    """Raises `UserError` with a one-line message if there are findings."""
    if not findings:
        return
    listed = "; ".join(map(str, findings[:5]))
    more = len(findings) - 5
    if more > 0:
        listed += f"; and {more} more"
    first = findings[0]
    raise UserError(
        f"not pushed, this must not be published: {listed}. Remove it, or accept a finding with "
        f"--allow {first.kind}:{first.file}:{first.line} (allow= in Python)."
    )


# Text


def scan_text(text: str, file: str, *, vocabulary: bool = False, public: Collection[str] = ()) -> Iterator[Finding]:
    """Yields findings in text, line by line. In a vocabulary, only tokens and local folders are reported."""
    patterns = list(_machine_patterns(names=not vocabulary, public=public))
    for kind, pattern in _PATTERNS.items():
        if kind == "token" or not vocabulary:
            patterns.append((kind, pattern))
    is_json = file.endswith((".json", ".jsonl"))
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a row of JSON may contain U+2028
        if is_json:
            line = _ESCAPE.sub(_unescaped, line)
        for match in _matches(line, patterns):
            text_there = line[match.start : match.end]
            excerpt = _excerpt(match.kind, text_there)
            yield Finding(match.kind, file, number, excerpt)


def _matches(line: str, patterns: Iterable[Pattern]) -> Iterator[Match]:
    """Yields matches of the patterns. If several match at one place (a home is also a path), the first one counts."""
    taken: list[Match] = []
    for kind, pattern in patterns:
        for match in pattern.finditer(line):
            place = Match(kind, match.start(), match.end())
            if not any(_overlap(other, place) for other in taken):
                taken.append(place)
                yield place


def _overlap(a: Match, b: Match) -> bool:
    return a.start < b.end and b.start < a.end


def _unescaped(match: re.Match) -> str:
    """Returns the character of a JSON escape. White space becomes a blank."""
    code, character = match[1], match[2]
    if code:
        return chr(int(code, 16))
    return " " if character in "nrtbf" else character


def _machine_patterns(*, names: bool, public: Collection[str] = ()) -> Iterator[Pattern]:
    """Yields patterns for this machine: folders, secrets in environment variables and, with `names`, user and host."""
    for folder in {Path.home(), Path.cwd()}:
        name = str(folder)
        if name.count(os.sep) > 1:  # not "/root" or "/", which are part of other paths
            yield "home", re.compile(re.escape(name))
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            yield "token", re.compile(re.escape(value))
    if not names:
        return
    for name in machine_names():
        if name.lower() in public:
            continue
        kind = "user" if name == user_name() else "host"
        escaped = re.escape(name)
        yield kind, re.compile(rf"(?<![A-Za-z0-9]){escaped}(?![A-Za-z0-9])")


def _excerpt(kind: str, text: str) -> str:
    """Returns the text of a finding. Of a secret, only the first characters."""
    if kind in _SECRET_KINDS:
        return f"{text[:6]}…"
    return text[:60]


# Files


def _scan_file(name: str, content: Path | bytes, public: Collection[str]) -> Iterator[Finding]:
    if isinstance(content, Path) and content.is_symlink():
        yield Finding("link", name, 0, "a symbolic link: its target is not checked")
        return
    for finding in scan_text(name, name, public=public):  # file names can contain leaks too
        yield finding._replace(line=0)
    if name.endswith((".py", ".so", ".sh")):
        yield Finding("code", name, 0, "code that others may run")
    if Path(name).match("events.out.tfevents*"):
        yield Finding("event-file", name, 0, "contains the name of the host")
    elif name.endswith(".safetensors"):
        yield from _scan_safetensors(name, content, public)
    elif _has_ending(name, PICKLES):
        yield Finding("pickle", name, 0, "may run code when it is loaded")
    else:
        yield from _scan_content(name, _read_bytes(content), public)


def _has_ending(name: str, patterns: Iterable[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def _scan_content(name: str, content: bytes, public: Collection[str]) -> Iterator[Finding]:
    """Yields findings in a file whose type is determined by its content."""
    if _is_pickle(content):
        yield Finding("pickle", name, 0, "may run code when it is loaded")
        return
    text = _decoded(content)
    if text is not None:
        vocabulary = Path(name).name in _VOCABULARIES
        yield from scan_text(text, name, vocabulary=vocabulary, public=public)
    elif name.lower().endswith(_BINARIES):
        text = content.decode("latin-1")  # maps every byte to a character, so that metadata can be searched
        for kind, pattern in _machine_patterns(names=False):
            if pattern.search(text):
                yield Finding(kind, name, 0, pattern.pattern)
    else:
        yield Finding("binary", name, 0, "not UTF-8 text, safetensors or an image, so it cannot be checked")


def _scan_safetensors(name: str, content: Path | bytes, public: Collection[str]) -> Iterator[Finding]:
    """Yields findings in the metadata. The tensors are numbers, which need no scan."""
    try:
        (size,) = struct.unpack("<Q", _read_bytes(content, 8))
        beginning = _read_bytes(content, 8 + size)
        header = json.loads(beginning[8:])
        metadata = header.get("__metadata__", {})
    except (ValueError, struct.error, AttributeError):
        yield Finding("binary", name, 0, "has no valid safetensors header")
    else:
        text = json.dumps(metadata, ensure_ascii=False)
        yield from scan_text(text, name, public=public)


def _read_bytes(content: Path | bytes, size: int = -1) -> bytes:
    """Returns the first `size` bytes. -1 means all."""
    if isinstance(content, bytes):
        return content if size < 0 else content[:size]
    with content.open("rb") as file:
        return file.read(size)


def _decoded(content: bytes) -> str | None:
    """Decodes UTF-8 text. Returns None if the content is not UTF-8 text."""
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _is_pickle(content: bytes) -> bool:
    """True for a pickle that runs code, with any protocol, or an archive that contains one (written by torch.save)."""
    if _PICKLE_HEADER.match(content):
        return True
    try:
        stream = io.BytesIO(content)
        if zipfile.is_zipfile(stream):
            names = zipfile.ZipFile(stream).namelist()
            return any(name.endswith(".pkl") for name in names)
        return _runs_code(content)
    except Exception:  # zipfile and pickletools raise many kinds of errors for other content
        return False


def _runs_code(content: bytes) -> bool:
    """True if the whole content is a pickle (with protocol 0 or 1, which has no header) that calls something."""
    names = set()
    end = None
    for opcode, _, position in pickletools.genops(content):
        names.add(opcode.name)
        end = position
    # Text may look like opcodes by chance, up to a period, which ends a pickle.
    last = len(content.rstrip()) - 1
    return end == last and not _RUNS_CODE.isdisjoint(names)

"""Leak scanner: finds secrets, local paths and names, e-mail addresses, and files that run code, before a push."""

import json
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .cards.markdown import escape_markdown
from .scanning.findings import Finding, refuse_findings, with_origin
from .scanning.pickles import is_pickle
from .scanning.pictures import holds_archive, picture_texts, printable_texts
from .scanning.text import Match, as_finding, find_leaks, scan_text, strings_in, without_strings, without_texts
from .scanning.vocabularies import VOCABULARIES, only_lines, sentencepiece_texts, without_entries

__all__ = ["PICKLES", "Files", "Finding", "refuse_findings", "scan", "scan_folder", "scan_text", "with_origin"]

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

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_WRITTEN_BY_PEOPLE = ("*.jsonl", "samples.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Patterns of files with rows and samples, which people or models wrote, and of licenses, which name whom to ask."""
_REPORT = "report.json"
_CARD = "README.md"
_SHOWS_SAMPLES = (_REPORT, _CARD)
"""Files in which the samples of a report are shown."""
_UNKNOWN_CONTENT = "not UTF-8 text, safetensors, a picture or a vocabulary, so it cannot be checked"

Files = Mapping[str, Path | bytes]
"""Name in the repository -> content, or path of the file."""
Known = Callable[[], Collection[str]]
"""Returns texts that are public already, such as the templates of the base."""


class _Context(NamedTuple):
    """What all files of a scan share."""

    public: Collection[str]
    known: Collection[str]
    in_samples: Collection[tuple[str, str]]  # kind and text of what is only text, since it is in a sample


def scan(
    files: Files,
    allow: Iterable[str] = (),
    public: Collection[str] = (),
    known: Known | None = None,
) -> list[Finding]:
    """Scans files for leaks.

    Any file that is not text, safetensors, a picture or a vocabulary is reported as `binary`. In rows (`*.jsonl`) and
    samples, which people or models wrote, only tokens and traces of this machine are reported.

    Args:
        files: Name in the repository -> content, or path of the file.
        allow: Findings to accept, as `kind:file:line`, or `kind:file` for a whole file.
        public: Names, in lower case, that may be published even if the user or host has the same name.
        known: Returns texts that are public already, such as the templates of the base: they are no findings. It is
            only called if there are findings without it.

    Returns:
        All findings, except those in `allow`.
    """
    allowed = set(allow)
    context = _Context(public, (), _in_samples(files, public))
    findings = _scan_files(files, allowed, context)
    if findings and known is not None:
        concerned = {finding.file for finding in findings}
        files = {name: content for name, content in files.items() if name in concerned}
        findings = _scan_files(files, allowed, context._replace(known=known()))
    return findings


def scan_folder(folder: str | Path, allow: Iterable[str] = ()) -> list[Finding]:
    """Scans every file of a folder, see `scan`."""
    folder = Path(folder)
    files: dict[str, Path | bytes] = {}
    for path in folder.rglob("*"):
        if path.is_file() or path.is_symlink():
            files[str(path.relative_to(folder))] = path
    return scan(files, allow)


# Samples


def _in_samples(files: Files, public: Collection[str]) -> set[tuple[str, str]]:
    """Returns kind and text of what looks like a leak in the samples of the report, but is text that models wrote."""
    if _REPORT not in files:
        return set()
    try:
        report = json.loads(_read_bytes(files[_REPORT]))
    except (ValueError, OSError):
        return set()
    samples = list(strings_in(list(_samples(report))))
    text = "\n".join(samples)
    only_text: set[tuple[str, str]] = set()
    # As they stand in JSON, on one line, and in a card.
    for file, reading in (
        (_REPORT, text),
        (_REPORT, "\n".join(sample.replace("\n", " ") for sample in samples)),
        (_CARD, "\n".join(map(escape_markdown, samples))),
    ):
        only_text.update((match.kind, match.text) for match in find_leaks(reading, file, public=public))
    leaks = find_leaks(text, _REPORT, public=public, written_by_people=True)
    return only_text - {(match.kind, match.text) for match in leaks}


def _samples(value: Any) -> Iterator[Any]:
    """Yields the values of all keys `samples`."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name == "samples":
                yield part
            else:
                yield from _samples(part)
    elif isinstance(value, list):
        for part in value:
            yield from _samples(part)


# Files


def _scan_files(files: Files, allowed: set[str], context: _Context) -> list[Finding]:
    findings = []
    for name, content in sorted(files.items()):
        for finding in _scan_file(name, content, context):
            if not finding.allowed(allowed):
                findings.append(finding)
    return findings


def _scan_file(name: str, content: Path | bytes, context: _Context) -> Iterator[Finding]:
    if isinstance(content, Path) and content.is_symlink():
        yield Finding("link", name, 0, "a symbolic link: its target is not checked")
        return
    for finding in scan_text(name, name, public=context.public):  # file names can contain leaks too
        yield finding._replace(line=0)
    if name.endswith((".py", ".so", ".sh")):
        yield Finding("code", name, 0, "code that others may run")
    if Path(name).match("events.out.tfevents*"):
        yield Finding("event-file", name, 0, "contains the name of the host")
    elif name.endswith(".safetensors"):
        yield from _scan_safetensors(name, content, context)
    elif _matches(name, PICKLES):
        yield Finding("pickle", name, 0, "may run code when it is loaded")
    else:
        yield from _scan_content(name, _read_bytes(content), context)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def _scan_content(name: str, content: bytes, context: _Context) -> Iterator[Finding]:
    """Yields findings in a file whose type is determined by its content."""
    if is_pickle(content):
        yield Finding("pickle", name, 0, "may run code when it is loaded")
        return
    text = _decoded(content)
    if text is not None:
        for match in _leaks_in_file(name, text, context):
            yield as_finding(match, name)
        return
    if name.lower().endswith(_PICTURES) and not holds_archive(content):
        matches = _leaks_in_picture(content, context)
    elif name.endswith(".model"):
        matches = _leaks_in_sentencepiece(content, context)
    else:
        matches = None
    if matches is None:
        yield Finding("binary", name, 0, _UNKNOWN_CONTENT)
        return
    for match in dict.fromkeys(match._replace(line=0) for match in matches):
        yield as_finding(match, name)


def _leaks_in_file(name: str, text: str, context: _Context) -> Iterator[Match]:
    """Yields leaks in a text file."""
    if context.known:
        remove = without_strings if name.endswith(".json") else without_texts
        text = remove(text, context.known)
    base_name = Path(name).name
    if base_name in VOCABULARIES:
        yield from _leaks_in_vocabulary(base_name, text, context)
        return
    written = _matches(name, _WRITTEN_BY_PEOPLE)
    for match in find_leaks(text, name, public=context.public, written_by_people=written):
        if name in _SHOWS_SAMPLES and (match.kind, match.text) in context.in_samples:
            continue
        yield match


def _leaks_in_vocabulary(name: str, text: str, context: _Context) -> Iterator[Match]:
    """Yields tokens and local folders in the entries, and all leaks in what is no entry."""
    lines = {match.line for match in find_leaks(text, name, public=context.public)}
    if not lines:  # the usual case, in which nothing needs to be parsed
        return
    suspects = only_lines(text, lines)
    rest = without_entries(name, text, suspects)
    yield from dict.fromkeys(
        [
            *find_leaks(rest, name, public=context.public),
            *find_leaks(suspects, name, vocabulary=True),
        ]
    )


def _leaks_in_sentencepiece(content: bytes, context: _Context) -> list[Match] | None:
    """Returns leaks in a SentencePiece model, which may name the files that it was trained on. None for other files."""
    texts = sentencepiece_texts(content)
    if texts is None:
        return None
    pieces, others = texts
    in_pieces = find_leaks("\n".join(pieces), "", vocabulary=True)
    return [*in_pieces, *find_leaks("\n".join(others), "", public=context.public)]


def _leaks_in_picture(content: bytes, context: _Context) -> list[Match]:
    """Returns leaks in the texts of a picture, and secrets and homes in any run of printable characters."""
    texts = "\n".join(picture_texts(content))
    matches = list(find_leaks(texts, "", public=context.public))
    found = {match.text for match in matches}
    for match in find_leaks(printable_texts(content), "", public=context.public):
        # Pixels look like short paths and addresses by chance, but not like these.
        if match.kind in ("token", "private-key", "home") and match.text not in found:
            matches.append(match)
    return matches


def _scan_safetensors(name: str, content: Path | bytes, context: _Context) -> Iterator[Finding]:
    """Yields findings in the metadata. The tensors are numbers, which need no scan."""
    try:
        (size,) = struct.unpack("<Q", _read_bytes(content, 8))
        beginning = _read_bytes(content, 8 + size)
        header = json.loads(beginning[8:])
        metadata = header.get("__metadata__", {})
    except (ValueError, struct.error, AttributeError):
        yield Finding("binary", name, 0, "has no valid safetensors header")
    else:
        text = "\n".join(strings_in(metadata)) if isinstance(metadata, dict) else str(metadata)
        for finding in scan_text(text, name, public=context.public):
            yield finding._replace(line=0)


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

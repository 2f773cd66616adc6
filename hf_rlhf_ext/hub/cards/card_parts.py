"""Takes a card apart: the header, the generated part between its two marks, and what its owner wrote around it."""

import codecs
import hashlib
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from .fences import lines_with_fences
from .owner_header import HeaderRecord, header_yaml

BEGIN = (
    "<!-- hf_rlhf_ext: the generated part begins here. The next push replaces it; what you write above it stays. -->"
)
_BEGIN = re.compile(r"\s*<!-- hf_rlhf_ext: the generated part begins here\..*")
_END = re.compile(
    r"\s*<!-- hf_rlhf_ext: the generated part ends here\.(?:.*?; text (?P<text>\w*); header(?P<header>.*?) ?-->)?.*"
)
_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
_PEFT_VERSION = re.compile(r"\n*### Framework versions\n\n- PEFT [\w.+]+\s*\Z")
"""What PEFT adds to the end of a card when it saves an adapter in its folder."""


@dataclass(frozen=True)
class OwnedCard:
    """A card in the parts that were generated and those that its owner wrote.

    Attributes:
        header: The YAML header.
        header_text: The header as text, with the owner's comments. None if there is none, or it has to be written anew.
        before: The owner's text above the generated part; all text of a card without marks.
        part: The generated part. None if the card has no marks.
        after: The owner's text below the generated part.
        generated: Digest of the part as it was generated, which differs from that of `part` if the owner edited it.
        record: Digests of the header as it was generated.
        lost_mark: Whether one mark is there without the other, so that a part that was generated cannot be told from
            the owner's text.
    """

    header: dict[str, Any] = field(default_factory=dict)
    header_text: str | None = None
    before: str = ""
    part: str | None = None
    after: str = ""
    generated: str = ""
    record: HeaderRecord = field(default_factory=dict)
    lost_mark: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a card. A header that is not valid YAML is taken as part of the owner's text."""
        header, header_text, body = split_header(plain(text))
        lines = body.split("\n")
        marks = _marks(body)
        pairs = _pairs(lines, marks)
        not_owned = {mark.line for mark in marks if not mark.in_code}
        for begin, end in pairs[1:]:
            if _is_whole(lines, begin, end):  # pasted twice
                not_owned.update(range(begin.line, end.line + 1))

        def owned(first: int, last: int) -> str:
            kept = [lines[number] for number in range(first, last) if number not in not_owned]
            return "\n".join(kept).strip()

        if not pairs:
            text = _PEFT_VERSION.sub("", owned(0, len(lines)))
            return cls(header, header_text, before=text, lost_mark=bool(not_owned))
        begin, end = pairs[0]
        return cls(
            header,
            header_text,
            before=owned(0, begin.line if begin.is_there else begin.line + 1),
            part=_between(lines, begin, end),
            after=_PEFT_VERSION.sub("", owned(end.line + 1, len(lines))),
            generated=end.generated,
            record=end.record,
        )

    @property
    def is_edited(self) -> bool:
        """True if the owner edited the generated part. A part without text was cleared, to get a new one."""
        return bool(self.part) and digest(self.part) != self.generated

    @property
    def owner_text(self) -> str:
        """All text outside of the generated part."""
        return "\n\n".join(text for text in (self.before, self.after) if text)

    def to_text(self) -> str:
        header = self.header_text if self.header_text is not None else header_yaml(self.header)
        parts = [f"---\n{header.strip()}\n---"] if header.strip() else []
        parts.append(self.before)
        if self.part is not None:
            end = (
                f"<!-- hf_rlhf_ext: the generated part ends here. What you write below it stays; text {self.generated};"
            )
            end += f" header {_written_record(self.record)}".rstrip() + " -->"
            parts.append("\n".join(text for text in (BEGIN, self.part, end) if text))
        parts.append(self.after)
        return "\n\n".join(part for part in parts if part) + "\n"


def digest(text: str) -> str:
    """Returns 12 digits of the SHA-256 of a text, without space around it and at the ends of its lines."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def plain(text: str) -> str:
    """Returns a text without a byte order mark, with lines that end as on Linux."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def text_of(card: bytes | Path) -> str:
    """Reads a card. One that is not UTF-8 is read as Windows writes its texts, so that no character is lost."""
    content = card if isinstance(card, bytes) else card.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")


def split_header(text: str) -> tuple[dict[str, Any], str | None, str]:
    """Splits a card, with lines as of `plain`, into its header, the text of the header, and the body."""
    match = _HEADER.match(text)
    if match is None:
        return {}, None, text
    try:
        header = yaml.safe_load(match[1] or "")
    except yaml.YAMLError:
        return {}, None, text
    if header is None:
        return {}, None, text[match.end() :]
    if not isinstance(header, dict):
        return {}, None, text
    return header, match[1].strip("\n"), text[match.end() :]


# Marks


class _Mark(NamedTuple):
    """A mark in the body of a card: its line, and what the second mark of a pair tells."""

    line: int
    begins: bool
    in_code: bool = False
    generated: str = ""
    record: HeaderRecord = {}  # noqa: RUF012 (never changed)
    is_there: bool = True  # not the place of a mark that was deleted


_Pair = tuple[_Mark, _Mark]


def _marks(body: str) -> list[_Mark]:
    marks = []
    for number, (line, in_code) in enumerate(lines_with_fences(body)):
        if _BEGIN.match(line):
            marks.append(_Mark(number, True, in_code))
        end = _END.match(line)
        if end:
            marks.append(_Mark(number, False, in_code, end["text"] or "", _read_record(end["header"] or "")))
    return marks


def _pairs(lines: list[str], marks: list[_Mark]) -> list[_Pair]:
    """Returns the generated parts: those that nobody edited, else those whose marks are not shown in a code block."""
    pairs = [(begin, end) for begin, end in pairwise(marks) if begin.begins and not end.begins]
    whole = [pair for pair in pairs if _is_whole(lines, *pair)]
    shown = [pair for pair in pairs if not pair[0].in_code]
    if whole or shown:
        return whole or shown
    ends = [mark for mark in marks if not mark.begins and not mark.in_code]
    return [(_Mark(start, True, is_there=False), end) for end in ends for start in _starts(lines, end)]


def _starts(lines: list[str], end: _Mark) -> list[int]:
    """The line before a generated part whose first mark is gone, which its digest tells. Empty if it was edited."""
    for number in range(end.line - 1, -1, -1):
        if lines[number].strip() and digest("\n".join(lines[number : end.line])) == end.generated:
            return [number - 1]
    return []


def _between(lines: list[str], begin: _Mark, end: _Mark) -> str:
    return "\n".join(lines[begin.line + 1 : end.line]).strip()


def _is_whole(lines: list[str], begin: _Mark, end: _Mark) -> bool:
    """True if nobody edited the part."""
    return digest(_between(lines, begin, end)) == end.generated


def _read_record(text: str) -> HeaderRecord:
    record: HeaderRecord = {}
    for entry in text.split():
        name, _, digests = entry.partition("=")
        record[name] = [part for part in digests.split("+") if part]
    return record


def _written_record(record: HeaderRecord) -> str:
    return " ".join(f"{name}={'+'.join(digests)}" for name, digests in record.items())

"""Vocabularies: their entries may spell anything; what else their files hold is text like any other."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .text import strings_in, without_strings

_LINES = {
    "merges.txt": re.compile(r"\S+ \S+"),
    "vocab.txt": re.compile(r"\S+"),
    "tokenizer.model": re.compile(r"[A-Za-z0-9+/]+=* \d+"),  # of tiktoken: base64 and rank
}
"""File -> pattern of a line that is an entry."""
_ENTRIES_ONLY = ("vocab.json",)
VOCABULARIES = ("tokenizer.json", *_ENTRIES_ONLY, *_LINES)
"""Names of text files that hold a vocabulary."""


def only_lines(text: str, lines: Collection[int]) -> str:
    """Returns a text of which only these lines are left, counted from 1; the others are empty."""
    return "\n".join(line if number in lines else "" for number, line in enumerate(text.split("\n"), start=1))


def without_entries(name: str, text: str, part: str) -> str:
    """Returns a part of a file of `VOCABULARIES` without the entries. The lines stay where they are.

    Args:
        name: Name of the file.
        text: The whole text, which tells what is an entry.
        part: What is left of the text by `only_lines`.
    """
    name = Path(name).name
    if name in _LINES:
        entry = _LINES[name]
        return "\n".join("" if entry.fullmatch(line) else line for line in part.split("\n"))
    content = _parsed(text)
    if not isinstance(content, dict):
        return part
    return without_strings(part, _entries(name, content))


def other_strings(name: str, text: str) -> Iterator[str]:
    """Yields the strings of a JSON file that are no entries of a vocabulary."""
    content = _parsed(text)
    entries = _entries(Path(name).name, content) if isinstance(content, dict) else frozenset()
    for string in strings_in(content):
        if string not in entries:
            yield string


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _entries(name: str, content: dict[str, Any]) -> Collection[str]:
    if name in _ENTRIES_ONLY:
        return content.keys()
    if name != "tokenizer.json":
        return frozenset()
    model = content.get("model")
    if not isinstance(model, dict):
        return frozenset()
    entries: set[str] = set()
    entries.update(_vocabulary(model.get("vocab")))
    for merge in model.get("merges") or ():  # "a b" in older files, ["a", "b"] in newer ones
        entries.update([merge] if isinstance(merge, str) else merge)
    return entries


def _vocabulary(vocabulary: Any) -> Iterator[str]:
    """Yields the entries: keys with their ids, or, in a unigram model, pairs with their scores."""
    if isinstance(vocabulary, dict):
        yield from vocabulary
    elif isinstance(vocabulary, list):
        for entry in vocabulary:
            yield entry[0] if isinstance(entry, list) else entry


# SentencePiece


def sentencepiece_texts(content: bytes) -> tuple[list[str], list[str]] | None:
    """Returns the pieces and all other texts of a SentencePiece model, such as the files that it was trained on.

    Read as Protocol Buffers, of which it is one message: field 1 is a piece. None if the content is something else.
    """
    pieces: list[str] = []
    others: list[str] = []
    try:
        for number, value in _fields(content):
            if isinstance(value, bytes):
                (pieces if number == 1 else others).extend(_nested_texts(value))
    except (ValueError, IndexError):
        return None
    return (pieces, others) if pieces else None


def _nested_texts(message: bytes) -> list[str]:
    """Returns the texts in a message, also in messages inside it."""
    texts = []
    for _, value in _fields(message):
        if not isinstance(value, bytes):
            continue
        try:
            texts.append(value.decode())
        except UnicodeDecodeError:  # a message or a table
            try:
                texts += _nested_texts(value)
            except (ValueError, IndexError):
                continue
    return texts


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of the fields of a message, https://protobuf.dev/programming-guides/encoding/."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"no field of type {wire_type}")
        if position + size > len(message):
            raise ValueError("a field is longer than its message")
        if wire_type == 2:
            yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns the number at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("no number")

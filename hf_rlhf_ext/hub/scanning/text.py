"""Search for leaks in text: traces of this machine, tokens, and, unless people wrote it, paths and addresses."""

import html
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..privacy import machine_names, user_name
from .findings import SECRET_KINDS, Finding
from .providers import provider_tokens
from .rules import (
    CREDENTIALS,
    IDENTIFIER,
    LONG_WORD,
    PLACEHOLDER,
    PRIVATE_KEY,
    TOKEN_RULES,
    TRACES,
    URL_PASSWORD,
    Rule,
)

_JSON = (".json", ".jsonl", ".ipynb")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")  # escapes in JSON strings
_MARKDOWN_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+.!|~$<>-])")
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
_SHORTEST_SECRET = 12  # characters; a shorter environment variable may occur in ordinary text


class Match(NamedTuple):
    """A leak in a line of text."""

    kind: str
    line: int
    text: str
    rule: str


class _Place(NamedTuple):
    """A leak in one line: where it is, and the rule that found it."""

    start: int
    end: int
    kind: str
    rule: str


def scan_text(
    text: str,
    file: str,
    *,
    vocabulary: bool = False,
    public: Collection[str] = (),
    written_by_people: bool = False,
) -> Iterator[Finding]:
    """Yields findings in text, line by line.

    Args:
        text: The text.
        file: Name of the file. Escapes in JSON and Markdown are read as the characters that they stand for.
        vocabulary: Whether the lines are entries of a vocabulary. They may spell anything but tokens and the folders of
            this machine.
        public: Names, in lower case, that may be published even if the user or host has the same name.
        written_by_people: Whether people or models wrote the text, as in rows of data and samples. Paths, private
            addresses and words like "secret:" are text there: only tokens and traces of this machine are findings,
            and e-mail addresses that are whole values, such as the name of an annotator.
    """
    for match in find_leaks(text, file, vocabulary=vocabulary, public=public, written_by_people=written_by_people):
        yield as_finding(match, file)


def as_finding(match: Match, file: str) -> Finding:
    """Returns the finding of a match in a file. Of a secret, it has only the first characters."""
    excerpt = f"{match.text[:6]}…" if match.kind in SECRET_KINDS else match.text[:60]
    return Finding(match.kind, file, match.line, excerpt, match.rule)


def find_leaks(
    text: str,
    file: str,
    *,
    vocabulary: bool = False,
    public: Collection[str] = (),
    written_by_people: bool = False,
) -> Iterator[Match]:
    """Yields the matches of `scan_text`, with the whole text that was found."""
    rules = [*_machine_rules(names=not vocabulary, public=public), *_rules(vocabulary, written_by_people)]
    hints = tuple({hint for rule in rules for hint in rule.hints})
    readings = _json_readings if file.endswith(_JSON) else _markdown_readings if file.endswith(".md") else _as_is
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a row of JSON may contain U+2028
        if not line:
            continue
        matches: dict[Match, None] = {}  # without repetitions
        if written_by_people and "@" in line:
            for match in IDENTIFIER.pattern.finditer(line):  # before its quotes are unescaped
                matches[Match(IDENTIFIER.kind, number, match[0], "")] = None
        for reading in readings(line):
            lowered = reading.lower()
            # Most lines of large files end here: `map` is faster than a loop.
            if not any(map(lowered.__contains__, hints)) and not LONG_WORD.search(reading):
                continue
            for place in _places(reading, lowered, rules):
                matches[Match(place.kind, number, reading[place.start : place.end], place.rule)] = None
        yield from matches


def _rules(vocabulary: bool, written_by_people: bool) -> tuple[Rule, ...]:
    if vocabulary:
        return ()
    if written_by_people:
        return (PRIVATE_KEY, URL_PASSWORD)
    return (PRIVATE_KEY, *CREDENTIALS, *TRACES)


def _json_readings(line: str) -> tuple[str, ...]:
    """Returns the line with the characters that the escapes stand for."""
    return (_ESCAPE.sub(_unescaped, line),) if "\\" in line else (line,)


def _markdown_readings(line: str) -> tuple[str, ...]:
    """Returns the line, which may be code, and the line as it is shown."""
    if "\\" not in line and "&" not in line:
        return (line,)
    return line, html.unescape(_MARKDOWN_ESCAPE.sub(r"\1", line))


def _as_is(line: str) -> tuple[str, ...]:
    return (line,)


def _unescaped(match: re.Match) -> str:
    """Returns the character of a JSON escape. White space becomes a blank."""
    code, character = match[1], match[2]
    if code:
        return chr(int(code, 16))
    return " " if character in "nrtbf" else character


def _places(line: str, lowered: str, rules: Iterable[Rule]) -> Iterator[_Place]:
    """Yields the leaks of a line. If several are at one place (a home is also a path), the first one counts."""
    taken: list[_Place] = []
    for place in _all_places(line, lowered, rules):
        if not any(place.start < other.end and other.start < place.end for other in taken):
            taken.append(place)
            yield place


def _all_places(line: str, lowered: str, rules: Iterable[Rule]) -> Iterator[_Place]:
    """Tokens come first: a token is also part of an assignment or a path."""
    if LONG_WORD.search(line):
        yield from _tokens(line)
    for rule in rules:
        if not any(hint in lowered for hint in rule.hints):
            continue
        for match in rule.pattern.finditer(line):
            yield _Place(match.start(), match.end(), rule.kind, rule.name)


def _tokens(line: str) -> Iterator[_Place]:
    for rule in TOKEN_RULES:
        if not any(map(line.__contains__, rule.hints)):
            continue
        for match in rule.pattern.finditer(line):
            if not PLACEHOLDER.search(match[0]):
                yield _Place(match.start(), match.end(), rule.kind, rule.name)
    for token in provider_tokens(line):
        if not PLACEHOLDER.search(line[token.start : token.end]):
            yield _Place(token.start, token.end, "token", token.name)


def _machine_rules(*, names: bool, public: Collection[str] = ()) -> Iterator[Rule]:
    """Yields rules for this machine: folders, secrets in environment variables and, with `names`, user and host."""
    for folder in {Path.home(), Path.cwd()}:
        name = str(folder)
        if name.count(os.sep) > 1:  # not "/root" or "/", which are part of other paths
            yield _rule_for("home", name)
    for variable, value in os.environ.items():
        if _SECRET_NAME.search(variable) and len(value) >= _SHORTEST_SECRET:
            yield _rule_for("token", value, f"value of {variable}")
    if not names:
        return
    for name in machine_names():
        if name.lower() in public:
            continue
        kind = "user" if name == user_name() else "host"
        yield Rule(kind, re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"), (name.lower(),))


def _rule_for(kind: str, text: str, name: str = "") -> Rule:
    """Returns a rule that finds this text."""
    return Rule(kind, re.compile(re.escape(text)), (text.lower(),), name)


# Strings


_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')  # a string in JSON, which is in one line


def strings_in(value: object) -> Iterator[str]:
    """Yields all strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)


def without_strings(text: str, strings: Collection[str]) -> str:
    """Removes JSON strings with these values from the text of a JSON file. The lines stay where they are."""

    def replacement(match: re.Match) -> str:
        literal = match[1]
        if "\\" in literal:
            literal = _decoded(literal)
        return '""' if literal in strings else match[0]

    return _LITERAL.sub(replacement, text)


def without_texts(text: str, texts: Collection[str]) -> str:
    """Removes these texts from a text file, but not from longer words and paths. The lines stay where they are."""
    for known in texts:
        begin = r"(?<![\w./-])" if re.match(r"[\w./-]", known) else ""
        end = r"(?![\w./-])" if re.search(r"[\w./-]\Z", known) else ""
        text = re.sub(f"{begin}{re.escape(known)}{end}", "\n" * known.count("\n"), text)
    return text


def _decoded(literal: str) -> str:
    try:
        return json.loads(f'"{literal}"')
    except ValueError:  # not JSON after all
        return literal

"""Safe Markdown for cards: escapes model text and names, and loads the card templates."""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_LONGEST_CALL = 80
"""Longest call in code on one line, in characters: more would be cut off on the page."""


def escape_markdown(text: str) -> str:
    """Escapes a text so that it is shown literally, on one line, without markup, HTML, links, cells or headings."""
    text = text.replace("&", "&amp;")
    text = text.replace("<", "&lt;")
    text = text.replace(">", "&gt;")
    # "+" and "-" only need escapes where they could begin a list, not inside words.
    text = re.sub(r"[\\`*_{}\[\]()#!|~$]|(?<!\w)[+-]", r"\\\g<0>", text)
    return re.sub(r"\s*[\r\n\x0b\x0c\x85\u2028\u2029]+\s*", " ⏎ ", text.strip())


def linked(source: str) -> str:
    """Formats an id on the Hub (`owner/name`, `datasets/owner/name`, `…@revision`) as a link. Escapes other text."""
    match = re.fullmatch(r"((?:datasets/)?[\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not match or source.startswith("<"):
        return escape_markdown(source)
    name, revision = match.groups()
    url = f"https://huggingface.co/{name}"
    if revision:
        url += f"/tree/{revision}"
    return f"[{source}]({url})"


def fenced(text: str, language: str = "") -> str:
    """Formats a code block, with a fence longer than any fence inside."""
    runs = re.findall("`+", text)
    longest = max(map(len, runs), default=0)
    fence = "`" * max(3, longest + 1)
    content = text.rstrip()
    return f"{fence}{language}\n{content}\n{fence}"


def single_blank_lines(text: str) -> str:
    """Replaces several blank lines by one, outside of code blocks."""
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        ticks = re.match("`{3,}", line)
        if ticks and not fence:
            fence = ticks[0]
        elif fence and line == fence:
            fence = ""
        if line.strip() or fence or (lines and lines[-1].strip()):
            lines.append(line)
    return "\n".join(lines)


def code_span(text: str) -> str:
    """Formats a text as code within a sentence (not in a table), on one line, with as many backticks as it needs."""
    text = " ".join(text.split())
    if not text:
        return ""
    runs = re.findall("`+", text)
    longest = max(map(len, runs), default=0)
    if not longest:
        return f"`{text}`"
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"


def joined_words(words: Sequence[str]) -> str:
    """Joins words as in a sentence: "a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def format_duration(seconds: float) -> str:
    """Formats a duration in minutes or hours, such as "1.5 minutes"."""
    if seconds < 60:
        return "less than a minute"
    value, unit = (seconds / 3600, "hour") if seconds >= 3600 else (seconds / 60, "minute")
    number = f"{value:.1f}".removesuffix(".0")
    return f"{number} {unit}" if number == "1" else f"{number} {unit}s"


def format_interval(ci95: Sequence[float]) -> str:
    """Formats a confidence interval (low, high)."""
    low, high = ci95
    return f"{low:.3f} to {high:.3f}"


def python_literal(value: Any) -> str:
    """Formats a string as a Python literal. JSON strings are valid Python."""
    return json.dumps(value, ensure_ascii=False)


def python_call(function: str, arguments: Sequence[str]) -> str:
    """Formats a call as Python code, with an argument on each line if it would be long."""
    call = f"{function}({', '.join(arguments)})"
    if len(call) <= _LONGEST_CALL:
        return call
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"{function}(\n{lines})"


@cache
def template_environment() -> Environment:
    """Returns the environment with the templates of all cards."""
    environment = Environment(  # Markdown, not HTML: the filter `md` escapes values that are not trusted
        loader=PackageLoader("hf_rlhf_ext.hub.cards"),
        undefined=StrictUndefined,  # a misspelled name is an error, not an empty text
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["md"] = escape_markdown
    environment.filters["call"] = python_call
    environment.filters["code"] = code_span
    environment.filters["duration"] = format_duration
    environment.filters["interval"] = format_interval
    environment.filters["joined"] = joined_words
    environment.filters["linked"] = linked
    environment.filters["fenced"] = fenced
    environment.filters["quoted"] = python_literal
    return environment

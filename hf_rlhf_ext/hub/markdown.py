"""Safe Markdown for cards: escapes model text and names, and loads the card templates."""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


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


def format_interval(ci95: Sequence[float]) -> str:
    """Formats a confidence interval (low, high)."""
    low, high = ci95
    return f"{low:.3f} to {high:.3f}"


def python_literal(value: Any) -> str:
    """Formats a string as a Python literal. JSON strings are valid Python."""
    return json.dumps(value, ensure_ascii=False)


@cache
def template_environment() -> Environment:
    """Returns the environment with the templates of all cards."""
    environment = Environment(  # Markdown, not HTML: the filter `md` escapes values that are not trusted
        loader=PackageLoader("hf_rlhf_ext.hub"),
        undefined=StrictUndefined,  # a misspelled name is an error, not an empty text
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["md"] = escape_markdown
    environment.filters["interval"] = format_interval
    environment.filters["linked"] = linked
    environment.filters["fenced"] = fenced
    environment.filters["quoted"] = python_literal
    return environment

"""Markdown that model text and names cannot break, and the templates that cards are made of."""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def escape_markdown(text: str) -> str:
    """Model text that shows as it is: no markup, HTML, link, table cell or header of its own, on one line."""
    text = text.replace("&", "&amp;")
    text = text.replace("<", "&lt;")
    text = text.replace(">", "&gt;")
    # "+" and "-" only where they could begin a list; inside words they are hyphens.
    text = re.sub(r"[\\`*_{}\[\]()#!|~$]|(?<!\w)[+-]", r"\\\g<0>", text)
    return re.sub(r"\s*[\r\n\x0b\x0c\x85\u2028\u2029]+\s*", " ⏎ ", text.strip())


def linked(source: str) -> str:
    """An id on the Hub (`owner/name`, `datasets/owner/name`, with `@revision`) as a link; other text escaped."""
    match = re.fullmatch(r"((?:datasets/)?[\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not match or source.startswith("<"):
        return escape_markdown(source)
    name, revision = match.groups()
    url = f"https://huggingface.co/{name}"
    if revision:
        url += f"/tree/{revision}"
    return f"[{source}]({url})"


def fenced(text: str, language: str = "") -> str:
    """A block of code, with a fence longer than any inside."""
    runs = re.findall("`+", text)
    longest = max(map(len, runs), default=0)
    fence = "`" * max(3, longest + 1)
    content = text.rstrip()
    return f"{fence}{language}\n{content}\n{fence}"


def format_interval(ci95: Sequence[float]) -> str:
    """A confidence interval (low, high) as text."""
    low, high = ci95
    return f"{low:.3f} to {high:.3f}"


def python_literal(value: Any) -> str:
    """A string as Python source; JSON's form of it is one."""
    return json.dumps(value, ensure_ascii=False)


@cache
def template_environment() -> Environment:
    """The templates of all cards."""
    environment = Environment(  # markdown, not HTML: values are escaped by the `md` filter where a model wrote them
        loader=PackageLoader("hf_rlhf_ext.hub"),
        undefined=StrictUndefined,  # a misspelled name is an error, not an empty place
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

"""Code blocks of Markdown between fences: what stands in them is no heading, no comment and no paragraph of its own."""

import re
from collections.abc import Iterator

_OPENING = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_CLOSING = re.compile(r" {0,3}(`{3,}|~{3,})\s*$")


def lines_with_fences(text: str) -> Iterator[tuple[str, bool]]:
    """Yields each line of a text, and whether it is in a code block or is one of its fences."""
    fence = ""
    for line in text.split("\n"):
        if not fence:
            opening = _OPENING.match(line)
            fence = opening[1] if opening else ""
            yield line, bool(fence)
            continue
        yield line, True
        closing = _CLOSING.match(line)
        if closing and closing[1].startswith(fence):
            fence = ""


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of a text. A code block is one, or part of one, with the blank lines in it."""
    found: list[list[str]] = [[]]
    for line, is_code in lines_with_fences(text):
        if line.strip() or is_code:
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]

"""What `hf-rlhf chat` shows: blocks that grow in a terminal, or one plain line per answer in a pipe."""

import sys
import unicodedata
from typing import Protocol

from rich.console import Console
from rich.text import Text

_KEPT = "\n\t"
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
"""Marks that reverse the direction of the text after them."""


def printable(text: str) -> str:
    """The text with control characters as `\\x1b`, so that a model cannot control the terminal."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    category = unicodedata.category(character)
    if character in _KEPT:
        return character
    if category == "Cs":  # half of a surrogate pair, which UTF-8 cannot hold
        return "\ufffd"
    if category == "Cc" or character in _DIRECTIONS or character in "\u2028\u2029":
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character


class View(Protocol):
    """Shows the answers to a question, one after the other."""

    def begin(self, name: str) -> None:
        """An answer of this model begins."""
        ...

    def piece(self, text: str) -> None:
        """The next piece of the answer."""
        ...

    def end(self, name: str, text: str, reward: float | None, remark: str) -> None:
        """The answer has ended.

        Args:
            name: the model.
            text: the whole answer.
            reward: its reward; `None` without one.
            remark: what else is to be said, such as that it was cut; may be empty.
        """
        ...

    def note(self, text: str) -> None:
        """Something that is not an answer."""
        ...


class TerminalView:
    """Blocks with the name of the model, its answer as it grows, and the reward below it."""

    def __init__(self):
        self.console = Console(highlight=False)

    def begin(self, name: str) -> None:
        self.console.print(Text(printable(name), style="bold cyan"))

    def piece(self, text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    def end(self, name: str, text: str, reward: float | None, remark: str) -> None:
        if text and not text.endswith("\n"):
            print()
        parts = [] if reward is None else [f"reward {reward:+.2f}"]
        if remark:
            parts.append(remark)
        if parts:
            self.console.print(Text(f"  {', '.join(parts)}", style="dim"))
        print(flush=True)

    def note(self, text: str) -> None:
        self.console.print(Text(printable(text), style="dim"), soft_wrap=True)


class PlainView:
    """One answer after the other as `policy (reward +0.83): text`. Further lines of an answer are indented.

    Notes go to stderr, so that stdout has answers only.
    """

    def begin(self, name: str) -> None:
        """Nothing: the line is printed when its reward is known."""

    def piece(self, text: str) -> None:
        """Nothing."""

    def end(self, name: str, text: str, reward: float | None, remark: str) -> None:
        about = [] if reward is None else [f"reward {reward:+.2f}"]
        if remark:
            about.append(remark)
        head = f"{name} ({', '.join(about)})" if about else name
        lines = printable(text).strip().split("\n")
        print(f"{printable(head)}: " + "\n    ".join(lines), flush=True)

    def note(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

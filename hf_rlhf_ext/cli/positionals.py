"""Words of a command line that belong to no option, such as the folder in `hf-rlhf chat runs/mine --greedy true`."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_BOOLS = {"true", "false", "yes", "no", "t", "f", "y", "n", "1", "0"}
"""What Transformers' parser takes as the value of a flag."""


def split_positionals(types: Iterable[type], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the words that belong to no option.

    An option takes one word, a flag takes a word only if it is `true` or `false`, and an option with a list takes all
    words up to the next option. `--` is not supported.

    Args:
        types: dataclasses of the options.
        words: words of the command line.

    Returns:
        The words that belong to no option, and all other words.
    """
    kinds = {name: kind for dataclass_type in types for name, kind in _kinds(dataclass_type).items()}
    positionals: list[str] = []
    rest: list[str] = []
    kind = ""  # of the option whose value comes next
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            kind = "" if equals else kinds.get(name.replace("-", "_"), "value")
            rest.append(word)
        elif kind == "list":
            rest.append(word)
        elif kind == "value" or (kind == "flag" and word.lower() in _BOOLS):
            rest.append(word)
            kind = ""
        elif word in ("-h",):
            rest.append(word)
        else:
            positionals.append(word)
            kind = ""
    return positionals, rest


def _kinds(dataclass_type: type) -> dict[str, str]:
    """How many words each option takes: `flag`, `list` or `value`."""
    hints = get_type_hints(dataclass_type)
    return {field.name: _kind(hints[field.name]) for field in fields(dataclass_type)}


def _kind(hint: Any) -> str:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if bool in members:
        return "flag"
    if any(get_origin(member) is list for member in members):
        return "list"
    return "value"

"""What `--help` and `--help-all` print: the options that matter most, in groups, or all of them."""

import copy
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Action

HELP = ("-h", "--help")
HELP_ALL = ("--help-all", "--help_all")

VALUES = {"string_to_bool": "true|false", "int": "INTEGER", "float": "NUMBER", "str": "TEXT"}
"""What `--help` shows as the value of an option, by the name of the function that converts it."""
_MANY_CHOICES = 6
"""The short help shows more choices than this as NAME."""


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the default and the kind of value of every option, and keeps the line breaks of the description."""

    def _format_action_invocation(self, action: "Action") -> str:
        if action.option_strings[:1] == ["-h"]:
            return super()._format_action_invocation(action)
        # Names with hyphens work too, but would show every option twice.
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"

    def _get_default_metavar_for_optional(self, action: "Action") -> str:
        return VALUES.get(getattr(action.type, "__name__", ""), "VALUE")


def wants_help(words: Collection[str]) -> bool:
    """Whether the words of a command line ask for one of the helps."""
    return any(name in words for name in (*HELP, *HELP_ALL))


def help_text(
    parser: ArgumentParser, words: Collection[str], main_options: Mapping[str, Mapping[str, str]] | Sequence[str]
) -> str:
    """The help that the words of a command line ask for.

    Args:
        parser: the parser with all options.
        words: words of the command line.
        main_options: what `--help` shows, see `hf_rlhf_ext.cli.main_options`, or names alone; empty for all options.
    """
    if not main_options or any(name in words for name in HELP_ALL):
        return parser.format_help()
    if not isinstance(main_options, Mapping):
        main_options = {"options": dict.fromkeys(main_options, "")}
    actions = {action.dest: action for action in parser._actions if action.help != SUPPRESS}
    short = ArgumentParser(
        prog=parser.prog,
        usage=parser.usage,
        description=parser.description,
        epilog=parser.epilog,
        formatter_class=HelpFormatter,
        add_help=False,
    )
    shown = 0
    for title, texts in main_options.items():
        group = short.add_argument_group(title)
        for name, text in texts.items():
            group._group_actions.append(_shortened(actions[name], text))
            shown += 1
    others = len(actions) - shown - 1  # without --help itself
    if others:
        short.epilog = f"{parser.epilog or ''}\n\n--help-all shows the other {others} options.".strip()
    return short.format_help()


def _shortened(action: "Action", text: str) -> "Action":
    """A copy of an option with a short text, to which its default is added."""
    short = copy.copy(action)
    text = text or _first_sentence(action.help or "").replace("%%", "%")
    default = shown_value(action.default)
    if default is not None:
        text += f" (default: {default})"
    short.help = text.replace("%", "%%")
    short.default = SUPPRESS  # it would be added once more
    if action.choices is not None and len(list(action.choices)) > _MANY_CHOICES:
        short.metavar = "NAME"
    return short


def shown_value(value: Any) -> str | None:
    """A default as it is typed; None if there is none."""
    if value is None or value == [] or value == SUPPRESS:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(getattr(value, "value", value))


def _first_sentence(text: str) -> str:
    sentence, dot, _ = " ".join(text.split()).partition(". ")
    return sentence + dot.strip()

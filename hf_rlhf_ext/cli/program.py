"""The name of the running program: `hf-rlhf ppo` if the command started a recipe, otherwise the recipe's file name."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from ..hub.privacy import strip_local_paths

PROGRAM = "hf-rlhf"
LAUNCHED_WITH = "HF_RLHF_EXT_LAUNCHED_WITH"
"""Environment variable with the options that started several processes, for the command in the report."""

_command: str | None = None
"""The command that `cli.main` runs in this process. `runpy` sets `sys.argv[0]` to the recipe's path instead."""


_hidden_options: tuple[str, ...] = ()
"""Options whose values `command_line` leaves out."""


def set_command(name: str | None) -> None:
    """Sets the command of `hf-rlhf` that runs in this process; None if none does."""
    global _command  # a process runs one command
    _command = name


def set_subcommand(name: str) -> None:
    """Moves the first word of the command line into the program's name, as in `hf-rlhf collect serve`."""
    if _command is not None:
        set_command(f"{_command} {name}")
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]


def program_name() -> str:
    """The name that `--help` shows: `hf-rlhf ppo` or `ppo.py`."""
    if _command is not None:
        return f"{PROGRAM} {_command}"
    return Path(sys.argv[0]).name


def hide_values_of(*options: str) -> None:
    """Leaves the values of options out of `command_line`, such as names of people: cards and reports are published."""
    global _hidden_options  # a process runs one command
    _hidden_options = options


def _without_hidden_values(words: list[str]) -> list[str]:
    """The words of a command, with `...` for the values of hidden options."""
    kept = []
    is_hidden = False
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            is_hidden = option[2:] in _hidden_options
            if is_hidden:
                kept += [option, "..."]
                continue
        if not is_hidden:
            kept.append(word)
    return kept


def command_line() -> str:
    """The command that runs this again, without local paths and values of hidden options."""
    return strip_local_paths(shlex.join(_words_of_command(_without_hidden_values(sys.argv[1:]))))


def typed_command() -> list[str]:
    """The words of the command as it was typed, for the terminal only: they may have local paths."""
    return _words_of_command(sys.argv[1:])


def _words_of_command(options: list[str]) -> list[str]:
    if _command is None:
        return ["python", sys.argv[0], *options]
    # Launched processes do not see these options in `sys.argv`.
    launched_with = shlex.split(os.environ.get(LAUNCHED_WITH, ""))
    return [PROGRAM, *_command.split(), *launched_with, *options]


def how_to_run(command: str) -> str:
    """How to type a command of `hf-rlhf`, with the program's path if the shell would not find it."""
    # In a virtual environment that is not activated, the shell does not find the program.
    installed = Path(sys.executable).with_name(PROGRAM)
    if shutil.which(PROGRAM) or not installed.is_file():
        return f"{PROGRAM} {command}"
    if installed.is_relative_to(Path.cwd()):
        installed = installed.relative_to(Path.cwd())
    return f"{shlex.quote(str(installed))} {command}"

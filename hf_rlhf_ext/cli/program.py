"""What the running program is called: `hf-rlhf ppo` where the command started a recipe, else the recipe's file."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from ..hub.privacy import strip_local_paths

PROGRAM = "hf-rlhf"
LAUNCHED_WITH = "HF_RLHF_EXT_LAUNCHED_WITH"
"""Environment variable with the options that started several processes, for the command in their report."""

_command: str | None = None
"""The command that `cli.main` runs in this process. (`runpy` puts the recipe's path into `sys.argv[0]`.)"""


def set_command(name: str | None) -> None:
    """Says which command of `hf-rlhf` runs in this process; None: none does."""
    global _command  # one program, one command: there is nobody else to hand it to
    _command = name


def program_name() -> str:
    """For `--help`: `hf-rlhf ppo`, or `ppo.py`."""
    if _command is not None:
        return f"{PROGRAM} {_command}"
    return Path(sys.argv[0]).name


def command_line() -> str:
    """The command that runs this again, without local paths."""
    script, *options = sys.argv
    if _command is not None:
        # Every process was started without them, as `python -m hf_rlhf_ext ppo …`.
        launched_with = shlex.split(os.environ.get(LAUNCHED_WITH, ""))
        words = [PROGRAM, _command, *launched_with, *options]
    else:
        words = ["python", script, *options]
    return strip_local_paths(shlex.join(words))


def how_to_run(command: str) -> str:
    """What to type for a command of `hf-rlhf`, here and now: the program's path where a shell would not find it."""
    # In a virtual environment that is not activated, a shell does not find the program beside its Python.
    installed = Path(sys.executable).with_name(PROGRAM)
    if shutil.which(PROGRAM) or not installed.is_file():
        return f"{PROGRAM} {command}"
    if installed.is_relative_to(Path.cwd()):
        installed = installed.relative_to(Path.cwd())
    return f"{shlex.quote(str(installed))} {command}"

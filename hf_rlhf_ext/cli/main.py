"""The command `hf-rlhf`: one line a command in `COMMANDS`.

Recipes are run as files, not imported: this ring is below them. So `hf-rlhf ppo …` is `python recipes/ppo.py …`,
wherever the package is installed.
"""

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from ..compat import versions
from ..errors import UserError
from .launch import launch, take_launch_options
from .parsing import did_you_mean, run_recipe
from .program import PROGRAM, set_command
from .shipped import recipes_folder


@dataclass(frozen=True)
class Command:
    """A command, what the list says of it, and where it is: a recipe's file, or a module with `main(argv)`."""

    name: str
    help: str
    recipe: str | None = None
    module: str | None = None
    several_processes: bool = False


# A new command is one line here.
COMMANDS = (
    Command("quickstart", "the whole pipeline on a small model, as a demonstration", recipe="quickstart.py"),
    Command("sft", "supervised fine-tuning on demonstrations", recipe="sft.py", several_processes=True),
    Command("reward", "a reward model from comparisons", recipe="reward.py", several_processes=True),
    Command("ppo", "PPO towards a reward model or function", recipe="ppo.py", several_processes=True),
    Command("check-reward", "is a reward model ready for PPO?", recipe="check_reward.py"),
    Command("inspect-data", "what comparisons are worth, before training", recipe="inspect_data.py"),
    Command("merge", "an adapter and its base as one model", module="hf_rlhf_ext.hub.merge"),
    Command("push", "a finished run to the Hub, checked for what should stay private", module="hf_rlhf_ext.hub.push"),
    Command("env", "versions and devices, for a bug report", module="hf_rlhf_ext.cli.env"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `hf-rlhf` with the words of `argv` (None: of the command line)."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_recipe(partial(run_command, words))


def run_command(words: list[str]) -> None:
    """Runs one command, in this process or in several.

    Raises:
        UserError: an unknown command, or several processes where that makes no sense.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if words[0] == "--version":
        print(f"{PROGRAM} {versions().get('hf-rlhf-ext', 'not installed')}")
        return

    command = find_command(words[0])
    # Before the recipe sees them: its parser knows nothing of processes.
    options, rest = take_launch_options(words[1:])
    if options.asked_for and not command.several_processes:
        able = ", ".join(known.name for known in COMMANDS if known.several_processes)
        raise UserError(f"{options.words()[0]}: {PROGRAM} {command.name} runs in one process. It is for {able}.")
    # Several processes would print the help several times.
    wants_help = "-h" in rest or "--help" in rest
    if options.asked_for and not wants_help:
        launch(options, [command.name, *rest])
    else:
        run_here(command, rest)


def run_here(command: Command, argv: list[str]) -> None:
    """Runs a command in this process, as if it had been started with these words."""
    set_command(command.name)  # what `--help` shows, and what a report says
    sys.argv = [f"{PROGRAM} {command.name}", *argv]
    try:
        if command.recipe is not None:
            # As `python recipes/ppo.py` would: `__main__` is the recipe, whose dataclasses are looked up there.
            runpy.run_path(str(recipes_folder() / command.recipe), run_name="__main__")
        else:
            import_module(command.module).main(argv)
    finally:
        set_command(None)


def find_command(name: str) -> Command:
    for command in COMMANDS:
        if command.name == name:
            return command
    raise UserError(f"unknown command `{name}`{did_you_mean(name, [command.name for command in COMMANDS])}")


def overview() -> str:
    """What `hf-rlhf` alone prints."""
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "RLHF on one consumer GPU, as a thin extension of TRL.", ""]
    width = max(len(command.name) for command in COMMANDS)
    for command in COMMANDS:
        lines.append(f"  {command.name:<{width}}  {command.help}")
    lines += [
        "",
        f"{PROGRAM} COMMAND --help shows the options of a command. sft, reward and ppo also take --num_processes N and",
        "--accelerate_config FILE|NAME (multi_gpu; sft and reward also zero2, …), which start several processes.",
    ]
    return "\n".join(lines)

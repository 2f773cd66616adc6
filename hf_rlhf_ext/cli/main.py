"""The command `hf-rlhf`, with one line per command in `COMMANDS`.

Recipes are run as files, because this package must not import them. `hf-rlhf ppo …` does the same as
`python recipes/ppo.py …`, wherever the package is installed.
"""

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from ..compat import versions
from ..errors import UserError
from .help import HELP, HELP_ALL, wants_help
from .launch import launch, take_launch_options
from .parsing import did_you_mean, run_recipe
from .program import PROGRAM, set_command
from .shipped import recipes_folder


@dataclass(frozen=True)
class Command:
    """A command with its description, and what runs it: the file of a recipe, or a module with `main(argv)`."""

    name: str
    help: str
    recipe: str | None = None
    module: str | None = None
    several_processes: bool = False


# To add a command, add a line here.
COMMANDS = (
    Command("quickstart", "the whole pipeline on a small model", recipe="quickstart.py"),
    Command("init", "looks at your files, and writes a config for the pipeline", recipe="init.py"),
    Command("pipeline", "your own data to a policy: SFT, reward model, check and PPO", recipe="pipeline.py"),
    Command("plan", "the memory of a run, before anything is downloaded: will it fit?", recipe="plan.py"),
    Command("sft", "supervised fine-tuning on demonstrations", recipe="sft.py", several_processes=True),
    Command("reward", "training of a reward model on comparisons", recipe="reward.py", several_processes=True),
    Command("ppo", "PPO with a reward model or a reward function", recipe="ppo.py", several_processes=True),
    Command("rounds", "rounds of sampling, judging, reward model and PPO", recipe="rounds.py"),
    Command("compare", "PPO against SFT, best-of-n, DPO, GRPO and RLOO on the same labels", recipe="compare.py"),
    Command("check-reward", "a check of whether a reward model is ready for PPO", recipe="check_reward.py"),
    Command("bench-reward", "reward models on public benchmarks and your own comparisons", recipe="bench_reward.py"),
    Command("inspect-data", "a check of comparisons before training", recipe="inspect_data.py"),
    Command("collect", "people judge completions in a browser", recipe="collect.py"),
    Command("chat", "answers of base, SFT policy and policy to your questions, with rewards", recipe="chat.py"),
    Command("generate", "answers to the prompts of a file, with rewards, as rows", recipe="generate.py"),
    Command("best-of-n", "the best of n completions by reward: rows for SFT or DPO", recipe="best_of_n.py"),
    Command("merge", "an adapter and its base model as one model", module="hf_rlhf_ext.cli.merge"),
    Command("push", "a finished run to the Hub, after a check for private data", module="hf_rlhf_ext.hub.push"),
    Command("check-hub", "a push and a pull on the Hub, in private repositories", module="hf_rlhf_ext.hub.check"),
    Command("env", "versions and devices for a bug report", module="hf_rlhf_ext.cli.env"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `hf-rlhf` with the words of `argv`, or of the command line if it is None."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_recipe(partial(run_command, words))


def run_command(words: list[str]) -> None:
    """Runs one command, in this process or in several.

    Raises:
        UserError: the command is unknown, or does not support several processes.
    """
    if not words or words[0] in (*HELP, *HELP_ALL, "help"):
        print(overview())
        return
    if words[0] == "--version":
        print(f"{PROGRAM} {versions().get('hf-rlhf-ext', 'not installed')}")
        return

    command = find_command(words[0])
    # The recipe's parser does not know these options.
    options, rest = take_launch_options(words[1:])
    if options.asked_for and not command.several_processes:
        able = ", ".join(known.name for known in COMMANDS if known.several_processes)
        raise UserError(
            f"{options.words()[0]}: {PROGRAM} {command.name} runs in one process: use the option with {able}"
        )
    # Several processes would print the help several times.
    if options.asked_for and not wants_help(rest):
        launch(options, [command.name, *rest])
    else:
        run_here(command, rest)


def run_here(command: Command, argv: list[str]) -> None:
    """Runs a command in this process with the words of `argv`."""
    set_command(command.name)  # for `--help` and for the report
    sys.argv = [f"{PROGRAM} {command.name}", *argv]
    try:
        if command.recipe is not None:
            # As in `python recipes/ppo.py`, `__main__` is the recipe: its dataclasses are looked up there.
            runpy.run_path(str(recipes_folder() / command.recipe), run_name="__main__")
        else:
            # The help of these commands has all options.
            import_module(command.module).main(["--help" if word in HELP_ALL else word for word in argv])
    finally:
        set_command(None)


def find_command(name: str) -> Command:
    for command in COMMANDS:
        if command.name == name:
            return command
    raise UserError(f"unknown command `{name}`{did_you_mean(name, [command.name for command in COMMANDS])}")


def overview() -> str:
    """What `hf-rlhf` prints without a command."""
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "RLHF on one consumer GPU, as a thin extension of TRL.", ""]
    width = max(len(command.name) for command in COMMANDS)
    for command in COMMANDS:
        lines.append(f"  {command.name:<{width}}  {command.help}")
    lines += [
        "",
        f"{PROGRAM} COMMAND --help shows the options of a command that matter most, --help-all all of them.",
        "sft, reward and ppo also take --num_processes N and --accelerate_config FILE|NAME (ddp, fsdp2; sft and reward",
        "also zero2, zero3), which start several processes.",
    ]
    return "\n".join(lines)

# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[collect]==0.1.*"]
# ///
"""Lets people judge completions in a browser: samples them, serves the page, and exports the comparisons.

hf-rlhf collect demo
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import did_you_mean, parse_recipe, run_recipe

# isort: split
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from hf_rlhf_ext.cli.program import program_name, set_subcommand
from hf_rlhf_ext.errors import UserError

PARTS = "hf_rlhf_ext.recipes.collect_parts"


@dataclass(frozen=True)
class Subcommand:
    """A subcommand with its description, and its module, which has `ARGUMENTS`, dataclasses of options, and `run`."""

    name: str
    help: str
    module: str

    def load(self) -> ModuleType:
        """Its module. Imported late: some need torch, and the others start in a fraction of a second."""
        return import_module(f"{PARTS}.{self.module}")


SUBCOMMANDS = (
    Subcommand("demo", "the page with answers of the embedded model, to try it out", "demo"),
    Subcommand("sample", "completions to judge, from one or several policies", "sample"),
    Subcommand("serve", "the page on which people judge", "serve"),
    Subcommand("links", "people: list, add, new links, deactivate", "links"),
    Subcommand("export", "judgments as comparison rows and demonstrations", "export"),
    Subcommand("import", "comparisons that were judged elsewhere, into a store", "import_judged"),
    Subcommand("simulate", "simulated people who judge at a server, to try it out", "simulate"),
    Subcommand("space", "the files of a Hugging Face Space that serves the page", "space"),
)


def find_subcommand(name: str) -> Subcommand:
    """The subcommand of this name. Raises `UserError` with the most similar one if there is none."""
    for subcommand in SUBCOMMANDS:
        if subcommand.name == name:
            return subcommand
    known = [subcommand.name for subcommand in SUBCOMMANDS]
    raise UserError(f"collect: unknown subcommand `{name}`{did_you_mean(name, known)}")


def overview() -> str:
    """What `hf-rlhf collect` prints without a subcommand."""
    program = program_name()
    lines = [f"usage: {program} SUBCOMMAND [options]", "", "People judge completions in a browser.", ""]
    width = max(len(subcommand.name) for subcommand in SUBCOMMANDS)
    for subcommand in SUBCOMMANDS:
        lines.append(f"  {subcommand.name:<{width}}  {subcommand.help}")
    lines += ["", f"{program} SUBCOMMAND --help shows the options of a subcommand."]
    return "\n".join(lines)


def parse(words: Sequence[str]) -> tuple[ModuleType, tuple]:
    """The module of the subcommand that `words` begin with, and its options.

    Raises:
        UserError: there is no such subcommand, or an option is wrong.
    """
    subcommand = find_subcommand(words[0])
    module = subcommand.load()
    options = parse_recipe(module.ARGUMENTS, list(words[1:]), description=module.__doc__)
    return module, options


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "--help-all", "help"):
        print(overview())
        return
    set_subcommand(words[0])
    module, options = parse(words)
    module.run(*options)


if __name__ == "__main__":
    run_recipe(main)

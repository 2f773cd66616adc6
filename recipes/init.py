# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Looks at your files, says what each is and how it is read, and writes a commented config for `hf-rlhf pipeline`.

hf-rlhf init pairs.csv prompts.txt rewards.py

Demonstrations, comparisons and prompts are told apart by their columns, and the functions of a .py file are rewards. A
folder with several files works too. Without files, those of the current folder are looked at.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe

# isort: split
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.options import DataArguments
from hf_rlhf_ext.cli.positionals import split_positionals
from hf_rlhf_ext.cli.program import how_to_run
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.errors import UserError, first_line
from hf_rlhf_ext.recipes.init_parts.files import DATA, Found, expand, files_in, look_at, one_of_each
from hf_rlhf_ext.recipes.init_parts.machine import Base, choose_base

EXAMPLE = "demonstrations.jsonl, pairs.csv, prompts.txt or rewards.py"


@dataclass
class InitArguments:
    """The files to look at, and the config that is written."""

    files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files, folders or Hub ids of datasets; the word --files may be left out. If none is given, the "
            "files of the current folder."
        },
    )
    demonstrations: str | None = field(
        default=None, metadata={"help": "File that is read as demonstrations, whatever else it may be."}
    )
    comparisons: str | None = field(default=None, metadata={"help": "File that is read as comparisons."})
    prompts: str | None = field(default=None, metadata={"help": "File of which only the prompts are read."})
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which column has which role, for a file whose columns are not found by their names, as YAML text: "
            "'{prompt: query, answers: [a, b], verdict: label, verdict_is: 1 or 2}'."
        },
    )
    ignore: str | None = field(
        default=None, metadata={"help": "Columns that need not be read although they look as if they mattered, as a,b."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model. If `None`, one that fits this machine."}
    )
    output: str = field(default="pipeline.yaml", metadata={"help": "The config to write."})
    output_dir: str = field(default="runs/pipeline", metadata={"help": "Folder of the run, for the config."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the config if it exists."})

    def __post_init__(self):
        if Path(self.output).suffix not in (".yaml", ".yml"):
            raise UserError(f"output: {self.output} is no .yaml file: give the name of the config to write.")

    def wanted(self) -> list[tuple[str, str | None]]:
        """The files with the roles that the user said."""
        said = [(getattr(self, role), role) for role in DATA if getattr(self, role) is not None]
        named = {given for given, _ in said}
        return [*said, *((given, None) for given in expand(self.files) if given not in named)]

    def reading(self) -> dict[str, Any]:
        """The roles of columns, and the columns to ignore."""
        options = DataArguments(dataset_name="file", columns=self.columns, ignore=self.ignore)
        return {"columns": options.column_roles(), "ignore": options.ignored_columns()}


ARGUMENTS = (InitArguments,)


def parse(words: Sequence[str]) -> InitArguments:
    """The options of a command line, on which files may stand outside of options."""
    files, options = split_positionals(ARGUMENTS, words)
    (args,) = parse_recipe(ARGUMENTS, options, description=__doc__, main_options=main_options.INIT)
    args.files = [*files, *args.files]
    return args


def init(args: InitArguments) -> str:
    """Looks at the files, prints what they are, and writes the config. Returns its text.

    Raises:
        UserError: a file does not exist or cannot be read, it is not clear what it holds, two files have one role, or
            the config exists.
    """
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists: give another --output, or --overwrite true to replace it.")
    found = look_at_all(args)
    by_role = one_of_each(found)
    functions = [name for one in found for name in one.functions]

    base = choose_base() if args.model_name_or_path is None else Base(args.model_name_or_path, False, "you named it")
    print(f"base model: {base.name}: {base.reason}")

    # Imported late: it takes some seconds, and what the files are has been said by now.
    from hf_rlhf_ext.recipes.init_parts.config import Plan, config_text

    command = f"{how_to_run('pipeline')} --config {shlex.quote(str(output))}"
    typed = f"hf-rlhf pipeline --config {shlex.quote(str(output))}"
    text = config_text(Plan(by_role, functions, base, args.output_dir, typed))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({first_line(error)}): give another --output.") from error
    if not found:
        print(f"Wrote {output} with every file commented out: name yours in it, or run `hf-rlhf init` with {EXAMPLE}.")
        return text
    print(stages_in_words(by_role, functions))
    print(f"Wrote {output}. Look at it, then run:\n  {command}")
    return text


def look_at_all(args: InitArguments) -> list[Found]:
    """Looks at each file, and prints what it is. In the current folder, files that cannot be used are passed over."""
    wanted = args.wanted()
    scans_folder = not wanted
    if scans_folder:
        wanted = [(Path(name).name, None) for name in files_in(Path())]
        print(f"files of this folder: {', '.join(name for name, _ in wanted) or 'no data found'}")
    found = []
    for given, role in wanted:
        try:
            one = look_at(given, role, **args.reading())
        except UserError as error:
            if not scans_folder:
                raise
            print(f"{given}: not used: {error}")
            continue
        first, *more = one.lines
        print(f"{given}: {first}")
        for line in more:
            print(f"  {line}")
        found.append(one)
    if (args.columns or args.ignore) and not any(one.is_read_by_users_word for one in found):
        names = " and ".join(name for name in ("columns", "ignore") if getattr(args, name))
        raise UserError(f"{names}: no file has these columns: check their names.")
    return found


def stages_in_words(by_role: dict[str, Found], functions: Sequence[str]) -> str:
    """What the pipeline will do with these files."""
    stages = []
    if "demonstrations" in by_role and "sft_policy" not in by_role:
        stages.append("SFT")
    has_model = "comparisons" in by_role or "reward_model" in by_role
    if "comparisons" in by_role:
        stages += ["a check of the reward model"] if "reward_model" in by_role else ["a reward model", "a check of it"]
    if has_model or functions:
        rewards = ["the reward model"] * has_model + [name.rpartition(":")[2] for name in functions]
        start = "from the base" if not {"demonstrations", "sft_policy"} & by_role.keys() else "from the SFT policy"
        stages.append(f"PPO {start} with {' + '.join(rewards)}")
    elif stages:
        return f"The pipeline will run {', '.join(stages)}; PPO needs a reward: add comparisons or a reward function."
    else:
        return "Nothing to train on yet: add demonstrations, comparisons or a reward function."
    return f"The pipeline will run {', '.join(stages)}."


def main() -> None:
    args = parse(sys.argv[1:])
    with library_output(verbose=False):
        init(args)


if __name__ == "__main__":
    run_recipe(main)

# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Answers all prompts of a file with one or several models, and writes the answers with their rewards as rows.

hf-rlhf generate runs/mine --prompts prompts.txt --output answers.jsonl
hf-rlhf generate runs/sft runs/ppo --reward_model runs/reward --prompts prompts.jsonl --output answers.jsonl

Each row has prompt, model, completion, tokens (their number), stopped (whether the answer ended by itself), row (number
of the prompt in its file, from 0, without blank lines) and, with a reward model or --reward_funcs, reward. With
--reward_funcs, rewards has the score of each reward in that sum.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import run_recipe

# isort: split
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.options import DataArguments
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.chat_parts.batches import Job, answers_of, rewards_of
from hf_rlhf_ext.recipes.chat_parts.models import load_cast
from hf_rlhf_ext.recipes.chat_parts.options import AnswerArguments, CastArguments, parse_with_models
from hf_rlhf_ext.recipes.chat_parts.plan import make_plan
from hf_rlhf_ext.recipes.chat_parts.prompts import read_prompts
from hf_rlhf_ext.recipes.chat_parts.rewards import RewardSum, check_functions
from hf_rlhf_ext.recipes.collect_parts.options import check_at_least, check_file_exists, check_new_file


@dataclass
class GenerateArguments:
    """The prompts, and where the answers go."""

    _argument_group_name = "files"

    prompts: str | None = field(
        default=None, metadata={"help": "Prompts: a file (jsonl, csv, txt, …), a folder, or a Hub id."}
    )
    split: str = field(default="train", metadata={"help": "Split of the prompts."})
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which column has which role, as YAML or JSON text: '{prompt: question, system: instruction}'. If "
            "`None`, the column `prompt`."
        },
    )
    n_prompts: int | None = field(default=None, metadata={"help": "Number of prompts, from the first. `None`: all."})
    output: str = field(default="answers.jsonl", metadata={"help": "File for the answers, one JSON object a line."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the file of --output if it exists."})
    batch_size: int = field(default=16, metadata={"help": "Number of answers that are sampled together."})

    def __post_init__(self):
        if self.prompts is None:
            raise UserError("prompts is required: a file or a Hub id (--prompts prompts.txt).")
        check_at_least(self, n_prompts=1, batch_size=1)

    def check_files(self) -> None:
        """Checks both files now, so that nothing is sampled in vain."""
        check_file_exists(self.prompts, "prompts")
        check_new_file(self.output, "output", overwrite=self.overwrite, inputs={"prompts": self.prompts})

    def column_roles(self) -> dict[str, Any] | None:
        """The roles of the columns that `--columns` gives."""
        return DataArguments(dataset_name=self.prompts, columns=self.columns).column_roles()


ARGUMENTS = (CastArguments, GenerateArguments, AnswerArguments)


def parse(words: Sequence[str]) -> tuple[Any, ...]:
    """The options of a command line, on which models may stand outside of options."""
    return parse_with_models(ARGUMENTS, words, __doc__, main_options.GENERATE)


def generate(cast_args: CastArguments, args: GenerateArguments, options: AnswerArguments) -> list[dict[str, Any]]:
    """Answers the prompts with every model, and writes the answers. Returns their rows."""
    args.check_files()
    plan = make_plan(cast_args)
    rows = read_prompts(args.prompts, args.split, args.column_roles(), args.n_prompts)
    check_functions(plan.functions, list(rows[0].all_columns) if rows else [], where=args.prompts)
    for note in (*plan.notes, plan.note_on_length(options.max_new_tokens)):
        if note is not None:
            print(note)
    cast = load_cast(plan, cast_args)
    if isinstance(cast.scorer, RewardSum):
        print(cast.scorer.formula)
    system = plan.system if options.system is None else options.system
    if system:
        print(f"system text: {system}")
    note = cast.note_on_text_models(system)
    if note is not None and any(isinstance(row.prompt, str) for row in rows):
        print(note)
    answers: dict[int, list[dict[str, Any]]] = {row.number: [] for row in rows}
    for speaker in cast.speakers:
        jobs = [Job(speaker, row, system or None) for row in rows]
        sampled = answers_of(speaker, jobs, options, batch_size=args.batch_size)
        rewards = rewards_of(cast.scorer, jobs, sampled)
        for job, answer, reward in zip(jobs, sampled, rewards, strict=True):
            if answer is not None:
                answers[job.row.number].append(job.output_row(answer, reward))
    # All answers to a prompt are next to each other.
    written = [row for of_prompt in answers.values() for row in of_prompt]
    if not written:
        raise UserError(f"prompts: no prompt of {args.prompts} could be answered, see above.")
    write_rows(written, args.output)
    return written


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Prints the number of answers of each model, and their mean reward and length."""
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        parts = [f"{len(own)} answers"]
        rewards = [row["reward"] for row in own if row.get("reward") is not None]
        if rewards:
            parts.append(f"mean reward {fmean(rewards):+.2f}{_means_of_parts(own)}")
        parts.append(f"{fmean(row['tokens'] for row in own):.0f} tokens on average")
        print(f"{name}: {', '.join(parts)}")


def _means_of_parts(rows: list[dict[str, Any]]) -> str:
    """The mean score of each reward in a sum, in parentheses; empty for a reward model alone."""
    parts = [row["rewards"] for row in rows if row.get("rewards")]
    means = []
    for name in parts[0] if parts else ():
        scores = [part[name] for part in parts if part[name] is not None]
        if scores:
            means.append(f"{name} {fmean(scores):+.2f}")
    return f" ({', '.join(means)})" if means else ""


def main() -> None:
    cast_args, args, options = parse(sys.argv[1:])
    with library_output(verbose=False):
        rows = generate(cast_args, args, options)
    print_summary(rows)
    print(f"Answers: {args.output}")


if __name__ == "__main__":
    run_recipe(main)

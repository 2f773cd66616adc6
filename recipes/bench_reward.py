# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Measures reward models on public benchmarks and on your own comparisons, side by side.

hf-rlhf bench-reward --reward_model runs/reward --benchmark rm-bench judgebench my_pairs.jsonl
hf-rlhf bench-reward --reward_model runs/a runs/b --benchmark rm-bench=RM-Bench/data/total_dataset.json

Benchmarks: reward-bench, reward-bench-2, rm-bench, judgebench. A name alone loads the published rows from the Hub;
NAME=FILE reads a file or folder, without a network. The same command goes on where it stopped.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir, refuse_used_folder
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.cli.stopped_runs import refuse_deleting_inputs

# isort: split
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.first_checks import check_reward_folder
from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.options import DataArguments, check_at_least
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.bench_reward_parts.measuring import SCORES_FOLDER, Sizes, measure_models
from hf_rlhf_ext.recipes.bench_reward_parts.models import name_models
from hf_rlhf_ext.recipes.bench_reward_parts.report import make_report, print_tables, write_cards, write_report
from hf_rlhf_ext.recipes.bench_reward_parts.sources import BenchSource, read_benchmarks
from hf_rlhf_ext.study.reward_benchmarks.reward_bench import NAME as REWARD_BENCH


@dataclass
class BenchArguments:
    """The reward models, and the benchmarks that they are measured on."""

    _argument_group_name = "benchmarks"

    reward_model: list[str] | None = field(
        default=None,
        metadata={"help": "Folders or Hub ids of reward models or ensembles. NAME=MODEL gives one a name. Required."},
    )
    benchmark: list[str] | None = field(
        default=None,
        metadata={
            "help": "Any of reward-bench, reward-bench-2, rm-bench and judgebench, whose rows are loaded from the Hub; "
            "NAME=FILE, with a file or folder of published rows; or files, folders or Hub ids of your own comparisons, "
            "in any format that `hf-rlhf reward` reads. Required."
        },
    )
    prior_sets: bool = field(
        default=False,
        metadata={"help": "Add the four prior sets to reward-bench from the Hub, with weight 0.5 in its score."},
    )
    limit: int | None = field(
        default=None,
        metadata={"help": "Score a random sample of this many rows of each benchmark. If `None`, all rows."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sample and of the intervals."})
    output_dir: str = field(
        default="runs/bench-reward", metadata={"help": "Folder for report.json and the scores of all rows."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the scores of an earlier run in that folder."})
    write_card: bool = field(
        default=True,
        metadata={
            "help": "Write the results into report.json and the card of reward models that are local folders. Those of "
            "a sample are not written there."
        },
    )

    def __post_init__(self):
        if not self.reward_model:
            raise UserError("reward_model is required: a folder or a Hub id (--reward_model runs/reward).")
        if not self.benchmark:
            raise UserError(
                "benchmark is required: --benchmark reward-bench reward-bench-2 rm-bench judgebench, or a file."
            )
        check_at_least(self, limit=1, seed=0)
        if len(set(self.benchmark)) < len(self.benchmark):
            raise UserError("benchmark: the same benchmark is given twice: leave one out.")


@dataclass
class ComparisonFileArguments:
    """How your own comparisons are read. Public benchmarks do not use it."""

    _argument_group_name = "comparisons of your own"

    split: str | None = field(default=None, metadata={"help": "Split of the rows. If `None`, the only one."})
    dataset_format: str | None = field(
        default=None, metadata={"help": "Name of the data format. If `None`, it is detected from the rows."}
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which column has which role, as YAML or JSON text: '{prompt: query, answers: [a, b], verdict: "
            "label}'. If `None`, the roles are found by the names of the columns."
        },
    )
    category_column: str | None = field(
        default=None,
        metadata={"help": "Column by whose values accuracy is reported. If `None`, that of the format, or `category`."},
    )
    include_trained: bool = field(
        default=False,
        metadata={"help": "Score rows too whose prompts the reward model was trained on. If false, they are left out."},
    )

    def reading(self, name: str) -> dict[str, Any]:
        """Arguments of the reader of the comparisons in `name`."""
        columns = DataArguments(dataset_name=name, columns=self.columns).column_roles()
        return {
            "split": self.split,
            "format": self.dataset_format,
            "columns": columns,
            "category_column": self.category_column,
        }

    def given(self) -> list[str]:
        """Names of the options that are not at their default."""
        default = ComparisonFileArguments()
        return [name for name, value in vars(self).items() if value != getattr(default, name)]


@dataclass
class ComputingArguments:
    """How scores are computed. The scores are the same, up to rounding."""

    _argument_group_name = "computing"

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a prompt with its completion. Rows with more are left out and counted, never cut. If "
            "`None`, what the reward model supports."
        },
    )
    max_tokens_per_batch: int = field(
        default=8192, metadata={"help": "Tokens of a forward pass at most, with padding, which limits memory."}
    )
    batch_size: int = field(default=64, metadata={"help": "Sequences of a forward pass at most."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code of the reward model or its base. Only use it if you have read the code."},
    )

    def __post_init__(self):
        check_at_least(self, max_length=1, max_tokens_per_batch=1, batch_size=1)

    def sizes(self) -> Sizes:
        """The sizes of the forward passes."""
        return Sizes(self.max_length, self.max_tokens_per_batch, self.batch_size)


ARGUMENTS = (BenchArguments, ComparisonFileArguments, ComputingArguments)


def bench(args: BenchArguments, comparisons: ComparisonFileArguments, computing: ComputingArguments) -> dict[str, Any]:
    """Scores all benchmarks with all reward models, and returns the report, which it also writes."""
    started = time.monotonic()
    models = name_models(args.reward_model)
    for model in models:
        check_reward_folder(model.location)
    folder = Path(args.output_dir)
    goes_on = (folder / SCORES_FOLDER).is_dir() and not args.overwrite
    if args.overwrite:
        refuse_deleting_inputs(folder, (SimpleNamespace(reward_model=[model.location for model in models]),))
    elif not goes_on:  # such as the folder of the reward model itself, whose report.json would be lost
        refuse_used_folder(folder, "scores of bench-reward")
    sources = read_sources(args, comparisons)
    with only_process(folder):
        prepare_output_dir(folder, resume=goes_on, overwrite=args.overwrite)
        entries = measure_models(
            models,
            sources,
            folder=folder,
            sizes=computing.sizes(),
            seed=args.seed,
            include_trained=comparisons.include_trained,
            trust_remote_code=computing.trust_remote_code,
        )
        report = make_report(entries, seed=args.seed, limit=args.limit, seconds=time.monotonic() - started)
        write_report(report, folder)
        if args.write_card:
            write_cards(models, entries)
    return report


def read_sources(args: BenchArguments, comparisons: ComparisonFileArguments) -> list[BenchSource]:
    """Reads the rows of all benchmarks, before a model is loaded, and says which options are not used."""
    sources = read_benchmarks(
        args.benchmark, comparisons.reading, prior_sets=args.prior_sets, limit=args.limit, seed=args.seed
    )
    if args.prior_sets and REWARD_BENCH not in args.benchmark:
        print(f"not used without --benchmark {REWARD_BENCH}, from the Hub: prior_sets")
    unused = comparisons.given()
    if unused and all(source.benchmark is not None for source in sources):
        print(f"not used without comparisons of your own: {', '.join(unused)}")
    return sources


def main() -> None:
    args, comparisons, computing = parse_recipe(ARGUMENTS, description=__doc__, main_options=main_options.BENCH_REWARD)
    with library_output(verbose=False):
        report = bench(args, comparisons, computing)
    print_tables(report)
    print(f"Report: {args.output_dir}/report.json")


if __name__ == "__main__":
    run_recipe(main)

# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Checks the quality of comparisons before training: prints a table, and writes report.json and report.html.

hf-rlhf inspect-data --dataset_name preferences.jsonl --output_dir runs/inspect
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.compat import versions

# isort: split
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_rlhf_ext import load_comparisons, quality_report
from hf_rlhf_ext.cli.options import ComparisonArguments, DataArguments, check_at_least
from hf_rlhf_ext.cli.program import how_to_run
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.rows import refine, train_and_heldout
from hf_rlhf_ext.data.schema import LoadReport
from hf_rlhf_ext.quality.page import write_quality_page
from hf_rlhf_ext.quality.refine import weigh_by_reliability
from hf_rlhf_ext.quality.report import QualityReport


@dataclass
class InspectArguments:
    """The folder of the report."""

    output_dir: str = field(default="runs/inspect", metadata={"help": "Folder for report.json and report.html."})
    seed: int = field(default=0, metadata={"help": "Seed for the sample of rows whose languages are counted."})

    def __post_init__(self):
        check_at_least(self, seed=0)


ARGUMENTS = (DataArguments, ComparisonArguments, InspectArguments)


def inspect_data(data: DataArguments, comparisons: ComparisonArguments, args: InspectArguments) -> dict[str, Any]:
    """Reads and filters comparisons, and writes report.json and report.html. Returns the content of report.json."""
    prepare_output_dir(args.output_dir, resume=False, overwrite=data.overwrite)
    rows, load_report = read_split(data, data.dataset_train_split, comparisons.category_column)
    test = None
    if data.dataset_test_split:
        test, _ = read_split(data, data.dataset_test_split, comparisons.category_column)
    train, heldout = train_and_heldout(refine(rows, comparisons), data, test)
    report = quality_report(train, heldout, seed=args.seed, load_report=load_report)

    content = {
        "load": asdict(load_report),
        "metrics": report.metrics,
        "notes": report.notes,
        "verdict": report.verdict,
        "versions": versions(),
    }
    if report.metrics["annotators"]:
        _, content["reliability"] = weigh_by_reliability(train)
    folder = Path(args.output_dir)
    as_json = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(as_json + "\n", encoding="utf-8")
    write_quality_page(report, folder / "report.html", load_report)
    print_report(report)
    return content


def read_split(data: DataArguments, split: str, category_column: str | None = None) -> tuple[Dataset, LoadReport]:
    """Reads the comparisons of one split, and prints a summary."""
    rows, report = load_comparisons(data.dataset_name, split=split, category_column=category_column, **data.reading())
    print(report.summary())
    return rows, report


def print_report(report: QualityReport) -> None:
    table = Table("metric", "value", "what it means for training", title_justify="left")
    table.title = without_markup(report.verdict)
    for row in report.rows():
        table.add_row(*[without_markup(cell) for cell in row])
    Console().print(table)


def without_markup(cell: str) -> Text:
    """The cell as plain text: names from data must not be read as markup or as escape codes of the terminal."""
    printable = "".join(character if character.isprintable() else " " for character in cell)
    return Text(printable)


def main() -> None:
    data, comparisons, args = parse_recipe(ARGUMENTS, description=__doc__)
    with library_output(verbose=False):
        inspect_data(data, comparisons, args)
    print(f"Page: {args.output_dir}/report.html · metrics: {args.output_dir}/report.json. Next:")
    print(
        f"  {how_to_run('reward')} --config smollm2-135m/reward.yaml --dataset_name {data.dataset_name} "
        "--eval_rows 200 --output_dir runs/reward"
    )


if __name__ == "__main__":
    run_recipe(main)

# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[data]==0.1.*"]
# ///
"""What preference data are worth, before a GPU is rented: a table, report.json and a page to look at.

python recipes/inspect_data.py --dataset_name preferences.jsonl --output_dir runs/inspect
"""

# First: it hides what the libraries below say whenever they are imported.
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe
from hf_rlhf_ext.compat import versions

# isort: split
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_rlhf_ext import load_comparisons, quality_report
from hf_rlhf_ext.data.quality import QualityReport
from hf_rlhf_ext.data.quality_page import write_quality_page
from hf_rlhf_ext.data.refine import weigh_by_reliability
from hf_rlhf_ext.scripts import ComparisonArguments, DataArguments, refine, train_and_heldout


@dataclass
class InspectArguments:
    """Where the report goes."""

    output_dir: str = field(default="runs/inspect", metadata={"help": "Folder for report.json and report.html."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample of which languages are counted."})


ARGUMENTS = (DataArguments, ComparisonArguments, InspectArguments)


def inspect_data(data: DataArguments, options: ComparisonArguments, args: InspectArguments) -> dict[str, Any]:
    """Reads, refines as asked, measures, and writes report.json and report.html."""
    prepare_output_dir(args.output_dir, resume=False, overwrite=data.overwrite)
    read = data.reading()
    rows, load_report = load_comparisons(data.dataset_name, split=data.dataset_train_split, **read)
    print(load_report.summary())
    test = None
    if data.dataset_test_split:
        test, test_report = load_comparisons(data.dataset_name, split=data.dataset_test_split, **read)
        print(test_report.summary())
    rows = refine(rows, options)
    train, heldout = train_and_heldout(rows, data, test)
    known = {"source": load_report.source, "seed": args.seed, "order_known": load_report.order_known}
    report = quality_report(train, heldout, **known)
    folder = Path(args.output_dir)
    written = {"load": asdict(load_report), "figures": report.figures, "notes": report.notes}
    written |= {"verdict": report.verdict, "versions": versions()}
    if report.figures["annotators"]:
        written["reliability"] = weigh_by_reliability(train)[1]
    text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    write_quality_page(report, folder / "report.html", load_report)
    print_table(report)
    return written


def print_table(report: QualityReport) -> None:
    title = _plain(report.verdict)
    table = Table("figure", "value", "what it means for training", title=title, title_justify="left")
    for row in report.rows():
        table.add_row(*map(_plain, row))
    Console().print(table)


def _plain(text: str) -> Text:
    """Text as it is: names from data are no markup, and no escape codes for the terminal."""
    return Text("".join(c if c.isprintable() else " " for c in text))


def main() -> None:
    data, options, args = parse_recipe(ARGUMENTS, description=__doc__)
    inspect_data(data, options, args)
    print(f"Page: {args.output_dir}/report.html · figures: {args.output_dir}/report.json. Next: recipes/reward.py")


if __name__ == "__main__":
    run_recipe(main)

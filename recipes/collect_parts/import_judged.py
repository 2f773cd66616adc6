"""Adds comparisons that were judged elsewhere to a store, with every vote.

hf-rlhf collect import --store judgments.sqlite --judged comparisons.jsonl
"""

from dataclasses import dataclass, field
from typing import Any

from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import STORE_HELP, check_file_exists, print_next


@dataclass
class ImportArguments:
    """The rows and the store."""

    store: str | None = field(default=None, metadata={"help": STORE_HELP + " Made if it does not exist."})
    judged: str | None = field(
        default=None, metadata={"help": "Judged rows: a file or Hub id in any format of comparisons."}
    )
    split: str | None = field(default=None, metadata={"help": "Split of the rows, where there are several."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of rows on the Hub."})
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which column has which role, as YAML or JSON text or a .yaml file, for rows in no known format: "
            "'{prompt: query, answers: [a, b], verdict: label, verdict_is: 1 or 2}'."
        },
    )
    batch: str | None = field(default=None, metadata={"help": "Name of the tasks that are added. `None`: none."})

    def __post_init__(self):
        if self.store is None:
            raise UserError("store is required: a file, which is made if it does not exist (--store judgments.sqlite).")
        if self.judged is None:
            raise UserError("judged is required: a file of comparisons (--judged comparisons.jsonl).")


ARGUMENTS = (ImportArguments,)


def run(args: ImportArguments) -> None:
    """Adds the rows to the store, and prints what was added and what was not."""
    from hf_rlhf_ext.collect.export import import_judged  # takes a second, for which `--help` should not wait

    rows = read_judged(args)  # before the store is made, so that a wrong file leaves nothing behind
    with Store(args.store) as store, library_output(verbose=False):
        report = import_judged(store, rows, batch=args.batch)
        counts = store.counts()
    report.source = args.judged
    print(report.summary())
    print(f"{args.store}: {counts['tasks']} tasks, {counts['judgments']} judgments")
    print_next(["collect", "export", "--store", args.store, "--output", "all.jsonl"])


def read_judged(args: ImportArguments) -> list[dict[str, Any]]:
    """Reads the judged rows as comparison rows, and prints what the reader left out."""
    from hf_rlhf_ext import load_comparisons
    from hf_rlhf_ext.cli.options import DataArguments

    check_file_exists(args.judged, "judged")
    columns = DataArguments(dataset_name=args.judged, columns=args.columns).column_roles()
    with library_output(verbose=False):
        dataset, report = load_comparisons(args.judged, split=args.split, revision=args.revision, columns=columns)
    if report.dropped or report.flagged or report.unread:
        print(f"read {report.summary()}")
    return dataset.to_list()

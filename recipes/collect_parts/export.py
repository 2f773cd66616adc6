"""Writes the judgments of a store as comparison rows, which every command reads, and as demonstrations.

hf-rlhf collect export --store judgments.sqlite --output comparisons.jsonl
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli.program import how_to_run
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import STORE_HELP, check_new_file, existing_store, split_names_of


@dataclass
class ExportArguments:
    """What is exported, and where to."""

    store: str | None = field(default=None, metadata={"help": STORE_HELP + " It may be in use."})
    output: str | None = field(default=None, metadata={"help": "File for the comparison rows, such as rows.jsonl."})
    demonstrations: str | None = field(
        default=None, metadata={"help": "File for answers that people wrote, edited or rated. If `None`, none."}
    )
    batch: str | None = field(default=None, metadata={"help": "Only tasks of this batch. If `None`, all."})
    annotators: list[str] | None = field(
        default=None,
        metadata={"help": "Only judgments of these people, as `anna tom` or `anna,tom`. If `None`, everybody's."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace files that exist."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Data set on the Hub to push the comparison rows to, as owner/name."}
    )
    license: str | None = field(
        default=None, metadata={"help": "License of the judgments for --push_to_hub, such as cc-by-4.0."}
    )
    public: bool = field(default=False, metadata={"help": "Make a new data set on the Hub public."})
    keep_annotators: bool = field(
        default=False, metadata={"help": "Push the names of people. By default, they are numbered."}
    )
    allow: list[str] | None = field(
        default=None,
        metadata={"help": "Findings of the leak scan to accept, as they were reported, such as email:train:12."},
    )

    def __post_init__(self):
        if self.output is None and self.demonstrations is None:
            raise UserError("output is required: a file (--output comparisons.jsonl), or --demonstrations FILE.")
        if self.output is not None and self.output == self.demonstrations:
            raise UserError(f"demonstrations: {self.demonstrations} is also the file of --output: give another name.")
        if self.push_to_hub is not None and (self.output is None or self.license is None):
            raise UserError("push_to_hub pushes the rows of --output with their --license: pass both (cc-by-4.0, …).")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise UserError(f"push_to_hub: {self.push_to_hub!r} is no id of a data set: write it as owner/name.")
        if self.push_to_hub is None and (self.license or self.public or self.keep_annotators or self.allow):
            raise UserError("license, public, keep_annotators and allow are for --push_to_hub owner/name: add it.")
        split_names_of(self, "annotators")
        for option in ("output", "demonstrations"):
            check_output(self, option)


def check_output(args: ExportArguments, option: str) -> None:
    """Checks the file of `--output` or `--demonstrations`, if there is one."""
    path = getattr(args, option)
    if path is None:
        return
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{option}: {path} gets one JSON object a line: give it the ending .jsonl.")
    check_new_file(path, option, overwrite=args.overwrite, inputs={"store": args.store})


ARGUMENTS = (ExportArguments,)


def run(args: ExportArguments) -> None:
    """Writes the files, pushes the rows if that is wanted, and prints the next commands."""
    # Only here, and in the functions below: it takes a second to import, for which `--help` should not wait.
    from hf_rlhf_ext.collect.export import write_comparisons

    check_push(args)
    chosen: dict[str, Any] = {"batch": args.batch, "annotators": args.annotators or None}
    n_rows = 0
    with existing_store(args.store) as store:
        if args.output is not None:
            report = write_comparisons(store, args.output, **chosen)
            n_rows = report.kept
            print(report.summary())
            print(agreement(store, args.batch))
        n_demonstrations = export_demonstrations(store, args, chosen)
    if args.push_to_hub is not None:
        push(args)
    print_next_steps(args, n_rows, n_demonstrations)


def check_push(args: ExportArguments) -> None:
    """Refuses a name that no repository can have, before a file is written."""
    from hf_rlhf_ext.hub.refusals import check_before_training

    if args.push_to_hub is not None:
        check_before_training(args.push_to_hub, repo_type="dataset")


def export_demonstrations(store: Store, args: ExportArguments, chosen: dict[str, Any]) -> int:
    """Writes the demonstrations, if they are wanted, and returns their number."""
    from hf_rlhf_ext.collect.export import demonstrations, write_demonstrations

    if args.demonstrations is None:
        return 0
    # The comparisons are written already. A store without demonstrations must not end the command as an error.
    if args.output is not None and not demonstrations(store, **chosen):
        print(f"0 demonstrations, as nobody edited or rated an answer: {args.demonstrations} was not written")
        return 0
    n_rows = write_demonstrations(store, args.demonstrations, **chosen)
    print(f"{n_rows} demonstrations: {args.demonstrations}")
    return n_rows


def agreement(store: Store, batch: str | None) -> str:
    """One line on how far all people agree, on the tasks of a batch or on all."""
    from hf_rlhf_ext.collect.statistics import statistics

    measured = statistics(store, batch)
    parts = []
    for name, label in (("agreement", "agreement"), ("alpha", "Krippendorff's alpha"), ("kappa", "Cohen's kappa")):
        value = measured.get(name)
        if value is not None:
            parts.append(f"{label} {value:.3f}")
    if not parts:
        parts.append("agreement: not known, as no task was judged by two people (see --overlap_share of serve)")
    if measured.get("gold_accuracy") is not None:
        parts.append(f"gold questions answered right {measured['gold_accuracy']:.0%}")
    return "; ".join(parts)


def push(args: ExportArguments) -> None:
    """Pushes the rows to the Hub as a data set with a card."""
    from hf_rlhf_ext import load_comparisons, push_comparisons, quality_report

    with library_output(verbose=False):
        rows, report = load_comparisons(args.output)
        url = push_comparisons(
            rows,
            args.push_to_hub,
            licenses={"our annotators": args.license},
            report=report,
            quality=quality_report(rows),
            keep_annotators=args.keep_annotators,
            private=not args.public,
            allow=args.allow or (),
        )
    print(f"Pushed: {url}")


def print_next_steps(args: ExportArguments, n_rows: int, n_demonstrations: int) -> None:
    """Prints commands that use the files. A fifth of a small file is held out, and 20 rows of a larger one."""
    eval_rows = max(1, min(20, n_rows // 5))
    print("Next:")
    if args.output is not None:
        rows = shlex.quote(args.output)
        print(f"  {how_to_run('inspect-data')} --dataset_name {rows} --output_dir runs/inspect")
        print(
            f"  {how_to_run('reward')} --config smollm2-135m/reward.yaml --dataset_name {rows} --eval_rows {eval_rows} "
            "--output_dir runs/reward"
        )
    if n_demonstrations:
        rows = shlex.quote(args.demonstrations)
        print(
            f"  {how_to_run('sft')} --config smollm2-135m/sft.yaml --dataset_name {rows} --min_rating 5 "
            "--output_dir runs/sft"
        )

# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Was RL worth it? Trains PPO, SFT, best-of-n, DPO, GRPO and RLOO on the same labels, and compares their answers.

hf-rlhf compare --config smollm2-135m/compare.yaml

Finished stages are kept: the same command goes on where the run stopped, and systems or seeds may be added. A system
that fails is reported as failed, and the others go on.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir, refuse_used_folder
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe

# isort: split
from collections.abc import Mapping, Sequence
from typing import Any

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.options import ModelArguments, TerminalArguments
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.stages import has_manifest
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.compare_parts.options import CompareArguments
from hf_rlhf_ext.recipes.compare_parts.report import print_table, write_report
from hf_rlhf_ext.recipes.compare_parts.running import REPORT, CompareRun

ARGUMENTS = (CompareArguments, TerminalArguments, ModelArguments)


def run_compare(args: CompareArguments, model_args: ModelArguments, *, verbose: bool = False) -> dict[str, Any]:
    """Runs the stages that are not finished, and writes the report.

    Args:
        args: options of the comparison.
        model_args: the base, its precision, and the size of new adapters.
        verbose: whether to show all output of the trainers.

    Returns:
        The content of `report.json`.

    Raises:
        UserError: an option, a file or a judge is wrong, or no seed has an SFT policy to compare with.
    """
    folder = args.folder
    is_resumed = has_manifest(folder) and not args.overwrite
    if not (is_resumed or args.overwrite):
        refuse_used_folder(folder, "comparison")
    run = CompareRun(args, model_args, verbose=verbose)
    run.check()
    with only_process(folder):
        prepare_output_dir(folder, resume=is_resumed, overwrite=args.overwrite)
        stages = run.open_stages()
        try:
            results = [run.run_seed(seed) for seed in args.seeds]
        finally:
            run.progress.close()
        results = [result for result in results if result is not None]
        earlier = run.earlier_results()
        if earlier:
            seeds = ", ".join(str(result["seed"]) for result in earlier)
            print(f"the report has the results of seed {seeds} too, which earlier calls finished in this folder")
            results += earlier
        if not results:
            failed = stages.error_of(f"seed-{args.seeds[0]}/sft")
            raise UserError(f"systems: sft failed, with which all others are compared: {failed}")
        print("".join(f"{line}\n" for line in failed_judgments(results)), end="")
        stages.announce(REPORT, "report.json, compare.md, compare.html, plots and cards")
        return write_report(
            folder,
            results,
            settings=report_settings(args, model_args),
            equal_seconds=args.equal_seconds,
            statements=[statement.text for statement in run.independence],
        )


def failed_judgments(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each judge that failed on some answers or pairs of a seed."""
    lines = []
    for result in results:
        for judge, coverage in result["coverage"].items():
            if coverage["failed"]:
                asked = coverage["judged"] + coverage["failed"]
                reason = coverage.get("first_error") or "it gave no number"
                where = f"judges: {judge} failed on {coverage['failed']} of {asked} answers or pairs"
                lines.append(f"{where} (seed {result['seed']}; first: {reason})")
    return lines


def report_settings(args: CompareArguments, model_args: ModelArguments) -> dict[str, Any]:
    """The options that the report names: those that differ from their defaults, and the model."""
    names = [name for name in args.__dataclass_fields__ if name not in ("output_dir", "overwrite")]
    settings = {name: getattr(args, name) for name in names if args.is_changed(name) and getattr(args, name) != {}}
    return settings | {"model_name_or_path": model_args.model_name_or_path}


def main() -> None:
    args, terminal, model_args = parse_recipe(ARGUMENTS, description=__doc__, main_options=main_options.COMPARE)
    with library_output(verbose=terminal.verbose):
        report = run_compare(args, model_args, verbose=terminal.verbose)
    print_table(report)
    print(f"Report: {args.output_dir}/compare.html · compare.md · report.json")


if __name__ == "__main__":
    run_recipe(main)

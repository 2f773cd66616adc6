# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Checks whether a reward model is ready for PPO: accuracy, calibration and probes on held-out comparisons.

hf-rlhf check-reward --reward_model runs/reward --dataset_name heldout.jsonl --output_dir runs/check
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.compat import versions

# isort: split
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_rlhf_ext import UserError, load_comparisons
from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.first_checks import check_reward_folder
from hf_rlhf_ext.cli.options import ComparisonArguments, DataArguments, check_at_least
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.row_records import digest_of, trained_prompts, was_trained_on
from hf_rlhf_ext.cli.rows import refine, train_and_heldout
from hf_rlhf_ext.data.json_columns import RowsWithoutFill
from hf_rlhf_ext.metrics.plots import plot_judged
from hf_rlhf_ext.modeling.adapters import bare_model
from hf_rlhf_ext.modeling.heads import learned_positions
from hf_rlhf_ext.quality.reward_check import Fits, RewardCheck, check_reward, fitting, within
from hf_rlhf_ext.reward.ensemble import RewardEnsemble, load_reward

PRINTED = ("pairs", "accuracy", "longer_wins_baseline", "gain", "nll", "brier", "ece", "disagreement")
"""Metrics of the table, in this order."""


@dataclass
class CheckArguments:
    """The reward model or ensemble to check, and the folder of the report."""

    reward_model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the reward model."})
    output_dir: str = field(default="runs/check", metadata={"help": "Folder for report.json and evaluation.png."})
    batch_size: int = field(default=32, metadata={"help": "Sequences per forward pass."})
    include_trained: bool = field(
        default=False,
        metadata={"help": "Check rows too whose prompts the reward model was trained on. If false, they are left out."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code of the reward model or its base. Only use it if you have read the code."},
    )

    def __post_init__(self):
        if self.reward_model is None:
            raise UserError("reward_model is required: a folder or a Hub id (--reward_model runs/reward).")
        check_at_least(self, batch_size=1)


ARGUMENTS = (DataArguments, ComparisonArguments, CheckArguments)


def check(data: DataArguments, args: CheckArguments, comparisons: ComparisonArguments | None = None) -> RewardCheck:
    """Scores held-out comparisons, and writes report.json and evaluation.png."""
    check_reward_folder(args.reward_model)
    prepare_output_dir(args.output_dir, resume=False, overwrite=data.overwrite)
    rows = read_heldout(data, comparisons or ComparisonArguments())
    if not args.include_trained:
        rows = without_trained(rows, data, args.reward_model)
    scorer = load_reward(args.reward_model, batch_size=args.batch_size, trust_remote_code=args.trust_remote_code)
    first = scorer.members[0] if isinstance(scorer, RewardEnsemble) else scorer
    limit = learned_positions(bare_model(first.model))
    rows = fitting(rows, first.tokenizer, limit, first.asked)
    fits = within(first.tokenizer, limit, first.asked)
    if isinstance(scorer, RewardEnsemble):
        checked = check_ensemble(scorer, rows, fits)
        xlabel = "reward of the ensemble"
    else:
        checked = check_reward(scorer.raw, rows, fits=fits)
        xlabel = "raw score"

    folder = Path(args.output_dir)
    plot_judged(checked.judged, folder / "evaluation.png", bins=checked.reliability, xlabel=xlabel)
    content = {
        "metrics": checked.metrics,
        "groups": checked.groups,
        "probes": checked.probes,
        "left_out": checked.left_out,
        "reliability": checked.reliability,
        "rows": len(rows),
        "verdict": checked.verdict,
        "versions": versions(),
    }
    (folder / "report.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return checked


def read_heldout(data: DataArguments, comparisons: ComparisonArguments) -> Dataset:
    """Reads the rows of the check.

    With a test split, these are its rows. With `eval_rows`, they are the rows that recipes/reward.py holds out with the
    same options. Otherwise, they are all rows of the file.
    """
    if data.train_rows is not None and (data.dataset_test_split or not data.eval_rows):
        print("not used without --eval_rows, which are held out after them: train_rows")
    split = data.dataset_test_split or data.dataset_train_split
    rows, report = load_comparisons(
        data.dataset_name, split=split, category_column=comparisons.category_column, **data.reading()
    )
    print(report.summary())
    if data.dataset_test_split:  # recipes/reward.py does not filter a test split
        n_rows = data.eval_rows or len(rows)
        return rows.select(range(min(n_rows, len(rows))))
    rows = refine(rows, comparisons)
    if data.eval_rows:
        _, rows = train_and_heldout(rows, data)
    return rows


def without_trained(rows: Dataset, data: DataArguments, reward_model: str) -> Dataset:
    """The rows whose prompts the reward model was not trained on. All rows, with a warning, if there are none."""
    trained = trained_prompts(reward_model)
    if trained is None:
        if was_trained_on(reward_model, data):
            print(
                f"warning: the reward model was trained on {data.dataset_name}, and its folder does not say on which "
                "rows: check it on others (--dataset_name heldout.jsonl).",
                file=sys.stderr,
            )
        return rows
    is_new = [digest_of(row) not in trained for row in RowsWithoutFill(rows.select_columns(["prompt"]))]
    new = [number for number, answer in enumerate(is_new) if answer]
    n_trained = len(rows) - len(new)
    if not n_trained:
        return rows
    if not new:
        print(
            f"warning: the reward model was trained on all {len(rows)} prompts of {data.dataset_name}, so the check "
            "says nothing about new ones: hold some out (hf-rlhf reward --eval_rows), or pass another --dataset_name.",
            file=sys.stderr,
        )
        return rows
    print(
        f"{n_trained} of {len(rows)} prompts left out, as the reward model was trained on them; the other {len(new)} "
        "are checked (--include_trained true checks all)"
    )
    return rows.select(new)


def check_ensemble(ensemble: RewardEnsemble, rows: Dataset, fits: Fits) -> RewardCheck:
    """Checks the combined reward. The metrics include the members' mean disagreement on the rows."""
    disagreements: list[float] = []

    def combined_reward(prompts: list, completions: list, **columns: list) -> list[float]:
        return ensemble(prompts, completions, log_metric=lambda name, value: disagreements.append(value), **columns)

    checked = check_reward(ensemble.raw, rows, reward=combined_reward, fits=fits)
    # The rows are scored first and then the probes, so the first disagreement is that on the rows.
    checked.metrics["disagreement"] = disagreements[0]
    return checked


def print_check(checked: RewardCheck) -> None:
    table = Table("metric", "value", title=checked.verdict, title_justify="left")
    metrics = checked.metrics
    for name in PRINTED:
        value = metrics.get(name)
        if value is None:  # a single model has no disagreement
            continue
        shown = str(value) if isinstance(value, int) else f"{value:.3f}"
        table.add_row(name.replace("_", " "), shown)
    for name in ("accuracy", "gain"):
        if f"{name}_low" in metrics:  # a single prompt has no interval
            interval = f"{metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f}"
            table.add_row(f"{name}, 95 % interval", interval)
    for title, groups in checked.groups.items():
        for name, group in groups.items():
            label = escape(f"accuracy, {title.replace('_', ' ')} {name}")
            table.add_row(label, f"{group['accuracy']:.3f} on {group['n']}")
    for name, share in checked.probes.items():
        table.add_row(f"probe '{name}' beats the chosen answer", f"{share:.0%}")
    for name, count in checked.left_out.items():
        table.add_row(f"probe '{name}' is too long for the model", f"{count} prompts left out")
    Console().print(table)


def main() -> None:
    data, comparisons, args = parse_recipe(ARGUMENTS, description=__doc__, main_options=main_options.CHECK_REWARD)
    with library_output(verbose=False):
        checked = check(data, args, comparisons)
    print_check(checked)
    print(f"Report: {args.output_dir}/report.json · plots: {args.output_dir}/evaluation.png")


if __name__ == "__main__":
    run_recipe(main)

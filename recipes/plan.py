# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Plans the memory of a training run from the model's config.json, before anything is downloaded: will it fit?

hf-rlhf plan --config llama-3.2-3b/ppo.yaml --card 12GB
hf-rlhf plan --stage reward --card 8GB --prompt_tokens 300 --completion_tokens 200

It takes all options of the command that --stage names: hf-rlhf plan --stage ppo --help lists them. The exit status is 1
if the run does not fit.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.parsing import run_recipe

# isort: split
import sys
from collections.abc import Sequence
from typing import Any

import torch

from hf_rlhf_ext.cli.memory_table import card_bytes
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan
from hf_rlhf_ext.recipes.plan_parts import options
from hf_rlhf_ext.recipes.plan_parts.options import PlanArguments
from hf_rlhf_ext.recipes.plan_parts.planning import Plans
from hf_rlhf_ext.recipes.plan_parts.plot import plot_plan
from hf_rlhf_ext.recipes.plan_parts.report import as_dict, print_advice, print_answer, write_json, written
from hf_rlhf_ext.training.memory_line import device_memory

ARGUMENTS = (PlanArguments,)
"""The options without those of the stage."""


def parse(words: Sequence[str]) -> tuple[Any, ...]:
    """The options of the plan and of its stage, see `plan_parts.options.parse`."""
    return options.parse(words, description=__doc__)


def device_of(args: PlanArguments) -> tuple[str, int | None, str]:
    """The device that is planned for: `cuda` or `cpu`, its memory in bytes, and what to call it.

    With `--card auto` and without a GPU, the run is planned for a GPU of which nothing is known.
    """
    if args.card == "cpu":
        return "cpu", device_memory(torch.device("cpu")), "This machine"
    if args.card != "auto":
        return "cuda", card_bytes(args.card), f"Card of {args.card}"
    if not torch.cuda.is_available():
        return "cuda", None, ""
    return "cuda", device_memory(torch.device("cuda", 0)), torch.cuda.get_device_name(0)


def make_plan(args: PlanArguments, planned: options.Planned) -> tuple[MemoryPlan, bool]:
    """Plans the run, prints and writes the plan. Returns it, and whether it fits as far as that is known."""
    device, n_bytes, what = device_of(args)
    plans = Plans(
        planned,
        device,
        prompt_tokens=args.prompt_tokens,
        completion_tokens=args.completion_tokens,
        completions_per_prompt=args.completions_per_prompt,
    )
    plan = plans.plan()
    says = args.json != "-"
    if says:
        print_answer(plan, n_bytes=n_bytes, what=what)
    if args.plot is not None:
        with written("plot", args.plot):
            plot_plan(plan, args.plot, n_bytes=n_bytes)
    largest = plans.largest(n_bytes) if args.advice else {}
    changes = plans.suggestions(n_bytes) if args.advice else []
    if says:
        print_advice(largest, changes)
    if args.json is not None:
        write_json(as_dict(plan, n_bytes=n_bytes, largest=largest, changes=changes), args.json)
    return plan, n_bytes is None or plan.fits(n_bytes)


def main() -> None:
    args, planned = parse(sys.argv[1:])
    with library_output(verbose=False):
        _, fits = make_plan(args, planned)
    if not fits:
        raise SystemExit(1)


if __name__ == "__main__":
    run_recipe(main)

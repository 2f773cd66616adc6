"""What the memory of a run is expected to be, said before anything is loaded; a run that cannot fit is refused."""

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import UserError
from ..modeling.memory.advice import suggestions
from ..modeling.memory.plan import MemoryPlan, Suggestion
from ..modeling.memory.planner import plan_of, plan_request
from ..training.memory_line import GPUS, can_be_planned, device_memory, in_gb, memory_line
from . import processes
from .memory_table import print_plan
from .options import ModelArguments, TerminalArguments

SHORT = {"prompt_tokens": 32, "completion_tokens": 32}
"""Lengths of texts, for the question whether a run can fit at all."""


@dataclass
class StartArguments(TerminalArguments):
    """What a recipe shows while it runs, and what it checks at its start."""

    check_memory: str = field(
        default="refuse",
        metadata={
            "help": "Plan the memory before anything is loaded, and say it in one line. A run that cannot fit on the "
            "GPU is refused (`refuse`) or starts with a warning (`warn`; always so on a CPU). `off`: no plan.",
            "choices": ["refuse", "warn", "off"],
        },
    )


def check_memory(
    stage: str,
    args: TrainingArguments,
    model_args: ModelArguments,
    *,
    mode: str | None,
    device: torch.device | None = None,
    n_bytes: int | None = None,
    **plan_options: Any,
) -> MemoryPlan | None:
    """Prints what memory the run is expected to need, or refuses a run that cannot fit.

    A run cannot fit if it does not even with texts of few tokens. Where only texts of the assumed length do not fit, it
    starts with a warning. A model that cannot be planned starts without a line.

    Args:
        stage: `sft`, `reward` or `ppo`.
        args: options of the trainer.
        model_args: the model, its precision and its adapter.
        mode: `refuse`, `warn` or `off`, see `StartArguments`; `None` leaves the line to the trainer, which logs it.
        device: the device of the run; `None` means the one that `args` choose.
        n_bytes: its memory in bytes; `None` means what the system says.
        plan_options: further arguments of `plan_memory`, such as the reward model.

    Returns:
        The plan; None without one.

    Raises:
        UserError: the run cannot fit on the GPU.
    """
    if mode is None:
        return None
    args.memory_is_planned = True  # the trainer does not do it again
    if mode == "off" or not processes.is_first() or not can_be_planned(args):
        return None
    device = device_of(args) if device is None else device
    options = {"model_args": model_args, "device": _kind(device), **plan_options}
    name = model_args.model_name_or_path
    try:
        request = plan_request(name, stage, args, **options)
        plan = plan_of(request)
        n_bytes = device_memory(device) if n_bytes is None else n_bytes
    except Exception:  # an estimate must not stop a run: loading says what is wrong with a model
        return None
    print(memory_line(plan, n_bytes), flush=True)
    if n_bytes is None or plan.fits(n_bytes):
        return plan
    _say_what_does_not_fit(plan, n_bytes)
    may_warn = mode == "warn" or plan.device == "cpu" or getattr(args, "auto_batch", False)  # makes passes smaller
    if may_warn or plan_of(plan_request(name, stage, args, **options | SHORT)).fits(n_bytes):
        return plan
    raise UserError(refusal(plan, n_bytes, suggestions(request, n_bytes, plan)))


def device_of(args: TrainingArguments) -> torch.device:
    """The device that this process will use. Unlike `args.device`, asking for it connects no processes."""
    if args.use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))


def _kind(device: torch.device) -> str:
    """How the planner calls a device. Where a GPU shares the memory of the machine, the plan is that of a CPU."""
    return "cuda" if device.type in GPUS else "cpu"


def _say_what_does_not_fit(plan: MemoryPlan, n_bytes: int) -> None:
    print_plan(plan)
    for note in plan.notes:
        print(f"  {note}")
    where = "this machine" if plan.device == "cpu" else "the GPU"
    print(f"warning: {where} has {in_gb(n_bytes)}, and the plan needs {in_gb(plan.n_bytes)}.", file=sys.stderr)


def refusal(plan: MemoryPlan, n_bytes: int, changes: list[Suggestion]) -> str:
    """The line with which a run that cannot fit is refused: how much is too much, and what to change."""
    remedy = ", ".join(f"{change.option} (saves {in_gb(change.saves)})" for change in changes)
    return (
        f"memory: the run needs about {in_gb(plan.n_bytes)} at its peak ({plan.peak.name}), and the GPU has "
        f"{in_gb(n_bytes)}: {f'try {remedy}, or ' if remedy else ''}take a smaller model; --check_memory warn starts "
        "anyway."
    )

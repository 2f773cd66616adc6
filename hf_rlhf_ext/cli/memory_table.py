"""A memory plan as text: a table of its phases, which cards it fits, and what to change. GB are 10^9 bytes."""

import re
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from ..modeling.memory.plan import PART_NAMES, MemoryPlan, Suggestion
from ..training.memory_line import GB, in_gb

CARDS = (6, 8, 12, 16, 24)
"""Memory of common GPUs in GB. A card that is sold with 24 GB has up to 25.7 of them: the difference is left free for
the desktop and other programs."""

_UNITS = {"g": GB, "gb": GB, "gib": 2**30, "mb": 10**6, "mib": 2**20}
_TOO_MANY_GB = 1000  # no card has as many, so that a number without a unit means MB
_WIDTH = 100
"""Columns of the table where the output is no terminal."""


def card_bytes(text: str) -> int:
    """The memory that `--card` names, in bytes: `12GB`, `12` (GB), `12G` or `11.7GiB`.

    Raises:
        UserError: it is no size, or a large number without a unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB|G)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UserError(f"card: {text!r} is no size: give the memory of the GPU (--card 12GB), auto or cpu.")
    if found[2] is None and float(found[1]) >= _TOO_MANY_GB:
        raise UserError(f"card: {text!r} has no unit: give it, as in --card 12GB or --card {found[1]}MB.")
    return int(float(found[1]) * _UNITS[(found[2] or "GB").lower()])


def print_plan(plan: MemoryPlan, console: Console | None = None) -> None:
    """Prints the table of a plan: a column for each phase, a row for each use of memory, in GB."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    title = f"{plan.model}, {plan.stage} on {_device_name(plan.device)}: {in_gb(plan.n_bytes)} (table in GB)"
    console.print(escape(title), style="bold", highlight=False, soft_wrap=True)
    console.print(plan_table(plan))


def plan_table(plan: MemoryPlan) -> Table:
    """The table of `print_plan`. The phase with the peak is marked, and parts of no size are left out."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for phase in plan.phases:
        style = "bold" if phase is plan.peak else None
        table.add_column(phase.name.replace(" ", "\n"), justify="right", style=style, no_wrap=True)
    sizes = [{part.name: part.n_bytes for part in phase.parts} for phase in plan.phases]
    used = {name for of_phase in sizes for name, n_bytes in of_phase.items() if n_bytes}
    for name in [name for name in PART_NAMES if name in used] + sorted(used.difference(PART_NAMES)):
        table.add_row(name, *[_cell(of_phase.get(name, 0)) for of_phase in sizes])
    if plan.reserve:
        table.add_row("CUDA and fragments", *[_cell(plan.reserve)] * len(plan.phases))
    table.add_section()
    table.add_row("all", *[_cell(phase.n_bytes + plan.reserve) for phase in plan.phases])
    table.add_row("", *["▲ peak" if phase is plan.peak else "" for phase in plan.phases])
    return table


def _device_name(device: str) -> str:
    return "a CPU" if device == "cpu" else "a GPU"


def _cell(n_bytes: int) -> str:
    return f"{n_bytes / GB:.2f}" if n_bytes else "–"


def fit_line(plan: MemoryPlan, n_bytes: int, what: str) -> str:
    """Whether a plan fits a memory of `n_bytes` bytes, which `what` names, and by how much."""
    if plan.fits(n_bytes):
        return f"{what}: fits, with {in_gb(n_bytes - plan.n_bytes)} left."
    return f"{what}: does not fit: {in_gb(plan.n_bytes - n_bytes)} too much."


def cards_line(plan: MemoryPlan) -> str:
    """For each size of `CARDS`, whether the plan fits."""
    cells = [f"{card} GB {'yes' if plan.fits(card * GB) else 'no'}" for card in CARDS]
    return f"Fits a card of: {' · '.join(cells)}"


def largest_line(largest: Mapping[str, int]) -> str:
    """The largest batch and length that fit, each with the other options as they are."""
    if not all(largest.values()):
        return "Not even one row, or one token, fits."
    batch, length = largest["per_device_train_batch_size"], largest["length"]
    return f"Fits up to --per_device_train_batch_size {batch}, or up to {length} tokens of prompt and completion."


def suggestion_lines(suggestions: Sequence[Suggestion]) -> list[str]:
    """A line for each option that would save memory."""
    width = max((len(suggestion.option) for suggestion in suggestions), default=0)
    return [
        f"  {suggestion.option:<{width}}  saves {in_gb(suggestion.saves)}, costs {suggestion.costs}"
        for suggestion in suggestions
    ]

"""What `hf-rlhf plan` prints and writes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli.memory_table import CARDS, cards_line, fit_line, largest_line, print_plan, suggestion_lines
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Suggestion
from hf_rlhf_ext.training.memory_line import GB


def print_answer(plan: MemoryPlan, *, n_bytes: int | None, what: str) -> None:
    """Prints the table of a plan, and whether it fits.

    Args:
        plan: The plan.
        n_bytes: Memory of the device, in bytes. None if there is none.
        what: Name of the device.
    """
    print_plan(plan)
    if n_bytes is not None:
        print(fit_line(plan, n_bytes, what))
    if plan.device != "cpu":
        print(cards_line(plan))
    for note in plan.notes:
        print(f"Note: {note}")
    sys.stdout.flush()  # the advice takes a while


def print_advice(largest: dict[str, int], changes: list[Suggestion]) -> None:
    """Prints how large the run may be, and what to change.

    Args:
        largest: The largest batch and length that fit. Empty if nothing is known of the device.
        changes: Options that save memory.
    """
    if largest:
        print(largest_line(largest))
    if changes:
        print("To need less:")
        print(*suggestion_lines(changes), sep="\n")


def as_dict(
    plan: MemoryPlan, *, n_bytes: int | None, largest: dict[str, int], changes: list[Suggestion]
) -> dict[str, Any]:
    """The content of the JSON file; the arguments are those of `print_answer` and `print_advice`."""
    return plan.to_dict() | {
        "device_bytes": n_bytes,
        "fits": None if n_bytes is None else plan.fits(n_bytes),
        "fits_cards": {f"{card} GB": plan.fits(card * GB) for card in CARDS},
        "largest": largest,
        "suggestions": [{"option": change.option, "saves": change.saves, "costs": change.costs} for change in changes],
        "versions": versions(),
    }


def write_json(content: dict[str, Any], name: str) -> None:
    """Writes the JSON file, or prints it for the name `-`.

    Raises:
        UserError: It cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    if name == "-":
        print(text)
        return
    path = Path(name)
    with written("json", name):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def written(option: str, name: str) -> Iterator[None]:
    """Inside the context, a file that cannot be written is one line, such as on a full disk.

    Args:
        option: The option that names the file.
        name: The file.

    Raises:
        UserError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{option}: {name} cannot be written ({reason}): choose another folder.") from error

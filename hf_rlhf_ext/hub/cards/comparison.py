"""The comparison of systems on the card of a policy: the table and the verdict of `hf-rlhf compare`."""

from typing import NamedTuple

from ..privacy import strip_local_paths
from ..report import RunReport
from .markdown import code_span, escape_markdown


class ComparisonPart(NamedTuple):
    """The part of a card on a comparison.

    Attributes:
        intro: What was compared, and which row is this model.
        columns: Names of the columns.
        rows: Rows of the table: the system, and its numbers.
        note: What the numbers mean.
        verdict: The conclusion.
    """

    intro: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    verdict: str


def comparison_part(report: RunReport) -> ComparisonPart | None:
    """Returns the part on the comparison, in Markdown. None if `hf-rlhf compare` wrote none into the report."""
    entry = report.comparison
    if not entry:
        return None
    seeds = ", ".join(str(seed) for seed in entry["seeds"])
    intro = (
        f"This model is the system {code_span(entry['system'])} of seed {entry['seed']} in a comparison with "
        f"`hf-rlhf compare` (seeds {seeds}, {entry['n']} held-out prompts each). Numbers are of all seeds."
    )
    return ComparisonPart(
        intro=intro,
        columns=[_cell(name) for name in entry["columns"]],
        rows=[[_cell(cell) for cell in row] for row in entry["rows"]],
        note=escape_markdown(strip_local_paths(entry["note"])),
        verdict=escape_markdown(strip_local_paths(entry["verdict"])),
    )


def _cell(text: str) -> str:
    return escape_markdown(strip_local_paths(text))

"""The metrics of a run as a short table: which columns, which rows, and the table as HTML."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .bars import clock

MAX_ROWS = 100
"""Most rows of a table; the last ones are shown."""
LOGS_READ = 10 * MAX_ROWS
"""Logs of which a table is made, from the last one: it is made anew at each log, and a long run has many."""


class Column(NamedTuple):
    """A column: the logged name of its metric, and its heading with the unit."""

    metric: str
    heading: str


PPO_COLUMNS = (
    Column("objective/scores", "Reward"),
    Column("objective/kl", "KL (nats)"),
    Column("completions/mean_length", "Length (tokens)"),
    Column("objective/kl_coef", "KL coefficient"),
)
REWARD_MODEL_COLUMNS = (Column("loss", "Loss"), Column("accuracy", "Accuracy"))
SFT_COLUMNS = (Column("loss", "Loss"), Column("mean_token_accuracy", "Token accuracy"))

_REWARD_MEAN = re.compile(r"rewards/(.+)/mean")


@dataclass
class Table:
    """Headings and cells, as plain text; `left_out` is the number of earlier rows that are not shown."""

    headings: list[str]
    rows: list[list[str]]
    left_out: int = 0


def readable(value: float) -> str:
    """A number with three significant digits, without an exponent where it is not very small."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def table_of(
    logs: Sequence[dict[str, Any]], columns: Sequence[Column], seconds: dict[int, float] | None = None
) -> Table:
    """The table of a run: one row per step that was logged, with the metrics of training, then those of evaluations.

    Args:
        logs: `state.log_history`, each log with its `step`.
        columns: the columns, in their order. A log with several rewards has a column for each of them, too.
        seconds: time since the start of training, by step, in seconds. Steps of an earlier process have none.

    Returns:
        The table of the last `LOGS_READ` logs; columns without any value in them are left out.
    """
    by_step: dict[int, dict[str, str]] = {}
    headings_of_prefix: dict[str, dict[str, None]] = {}  # dicts, as sets have no order
    for log in logs[-LOGS_READ:]:
        prefix = evaluation_prefix(log)
        if prefix == "train":  # the summary at the end
            continue
        cells = _cells(log, columns, prefix)
        if not cells:
            continue
        by_step.setdefault(int(log.get("step", 0)), {}).update(cells)
        headings_of_prefix.setdefault(prefix, {}).update(dict.fromkeys(cells))

    headings = ["Step"]
    training = headings_of_prefix.pop("", {})
    for part in (training, *headings_of_prefix.values()):
        headings += part
    has_times = any(step in (seconds or {}) for step in by_step)
    if has_times:
        headings.append("Time")
    rows = []
    for step in sorted(by_step):
        cells = by_step[step] | {"Step": str(step)}
        if has_times and step in seconds:
            cells["Time"] = clock(seconds[step])
        rows.append([cells.get(heading, "") for heading in headings])
    n_earlier = len({int(log.get("step", 0)) for log in logs[:-LOGS_READ]} - by_step.keys())
    return Table(headings, rows[-MAX_ROWS:], left_out=n_earlier + max(0, len(rows) - MAX_ROWS))


def evaluation_prefix(log: dict[str, Any]) -> str:
    """The prefix of the names in a log: "eval", "eval_" and the name of the set, or "" for a log of training.

    Every evaluation logs how long it took, as `<prefix>_runtime`; "train" is the prefix of the summary at the end.
    """
    for name in log:
        if name.endswith("_runtime"):
            return name.removesuffix("_runtime")
    return ""


def _cells(log: dict[str, Any], columns: Sequence[Column], prefix: str) -> dict[str, str]:
    """The cells of a log, by heading."""
    metrics = {}
    for name, value in log.items():
        if prefix == "" or name.startswith(f"{prefix}_"):
            metrics[name.removeprefix(f"{prefix}_")] = value
    rewards = [found[1] for found in map(_REWARD_MEAN.fullmatch, metrics) if found]

    cells = {}
    for column in columns:
        if column.metric in metrics:
            cells[_heading(column.heading, prefix)] = _text(metrics, column.metric)
        if column.metric == "objective/scores" and len(rewards) > 1:
            for name in rewards:
                cells[_heading(name, prefix, is_name=True)] = _text(metrics, f"rewards/{name}/mean")
    return cells


def _heading(heading: str, prefix: str, *, is_name: bool = False) -> str:
    """The heading in the table, such as "Eval reward" or "Eval reward (hard)" for an evaluation set named hard."""
    if prefix == "":
        return heading
    if not is_name and heading[1:2].islower():  # not of "KL"
        heading = heading[0].lower() + heading[1:]
    if prefix != "eval" and not prefix.startswith("eval_"):
        return f"{prefix.capitalize()} {heading}"
    name = prefix.removeprefix("eval").removeprefix("_")
    return f"Eval {heading} [{name}]" if name else f"Eval {heading}"


def _text(metrics: dict[str, Any], name: str) -> str:
    """A value as text, with its interval if the log has one."""
    try:
        text = readable(metrics[name])
        if f"{name}_low" in metrics and f"{name}_high" in metrics:
            text += f" ({readable(metrics[f'{name}_low'])} to {readable(metrics[f'{name}_high'])})"
    except (TypeError, ValueError):
        return str(metrics[name])
    return text


def table_html(table: Table) -> str:
    """The table as HTML; all names and values are escaped."""
    lines = ['<table class="dataframe">', "<thead>", "<tr>"]
    lines += [f"<th>{html.escape(heading)}</th>" for heading in table.headings]
    lines += ["</tr>", "</thead>", "<tbody>"]
    for row in table.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    lines += ["</tbody>", "</table>"]
    if table.left_out:
        lines.append(f"<div>The {table.left_out} earlier logs are in <code>trainer.state.log_history</code>.</div>")
    return "\n".join(lines) + "\n"

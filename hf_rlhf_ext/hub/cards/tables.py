"""The measured numbers of a card as rows of tables, without a cell that has no counterpart."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..report import RunReport, Section
from ..reports.results import Result
from .markdown import escape_markdown, format_interval

_SECTIONS = {"policy": "ppo", "sft": "sft", "dpo": "dpo", "reward_model": "reward_model"}
"""Kind of model -> section of its training in a report."""
_INTERVAL = "95 % interval"


class Change(NamedTuple):
    """A number before and after training."""

    key: str
    name: str
    before: float
    after: float
    change: float
    ci95: tuple[float, float] | None
    n: int | None
    dataset: str | None


class Table(NamedTuple):
    """A table: names of the columns and rows of Markdown."""

    columns: list[str]
    rows: list[list[str]]


def section_of(kind: str, report: RunReport) -> Section:
    """Returns the section of the training that made a model of this kind, which is empty if it is not known."""
    name = _SECTIONS.get(kind)
    return Section() if name is None else getattr(report, name)


def result_tables(kind: str, report: RunReport, results: Sequence[Result]) -> list[Table]:
    """Returns the tables of the results: numbers before and after training, and the others.

    Args:
        kind: Kind of model.
        report: What was measured.
        results: The measured numbers.
    """
    changes, others = _split(kind, report, results)
    tables = []
    if changes:
        tables.append(_table_of_changes(changes))
    if others:
        tables.append(_table_of_values(others))
    return tables


def _split(kind: str, report: RunReport, results: Sequence[Result]) -> tuple[list[Change], list[Result]]:
    """Separates results that were measured before and after training from the others."""
    if kind not in ("policy", "dpo"):
        return [], list(results)
    section = section_of(kind, report)
    changes = []
    shown: set[tuple[str | None, str]] = set()
    for result in results:
        dataset = _dataset(result)
        sets = section.evaluation_sets or {}
        metrics: Mapping[str, Any] = sets.get(dataset, {}) if dataset is not None else section.metrics
        reward, _, when = result.key.rpartition("_")
        before = metrics.get(f"{reward}_before")
        if when != "after" or not isinstance(before, int | float):
            continue
        change = metrics.get(f"{reward}_gain", result.value - before)
        interval = metrics.get(f"{reward}_gain_ci95")
        changes.append(Change(result.key, result.name, before, result.value, change, interval, result.n, dataset))
        shown |= {(dataset, result.key), (dataset, f"{reward}_gain")}
    others = [result for result in results if (_dataset(result), result.key) not in shown]
    return changes, others


def _table_of_changes(changes: Sequence[Change]) -> Table:
    has_interval = any(change.ci95 for change in changes)
    rows = []
    for change in changes:
        digits = 1 if change.key.startswith("mean_length") else 3
        cells = [escape_markdown(change.name), f"{change.before:.{digits}f}", f"{change.after:.{digits}f}"]
        rows.append([*cells, _with_interval(f"{change.change:+.{digits}f}", change.ci95)])
    columns = ["measure", "before", "after", f"change ({_INTERVAL})" if has_interval else "change"]
    return _with_counts(Table(columns, rows), changes)


def _table_of_values(results: Sequence[Result]) -> Table:
    has_interval = any(result.ci95 for result in results)
    rows = []
    for result in results:
        digits = 1 if result.key.startswith("mean_length") else 3
        rows.append([escape_markdown(result.name), _with_interval(f"{result.value:.{digits}f}", result.ci95)])
    columns = ["measure", f"value ({_INTERVAL})" if has_interval else "value"]
    return _with_counts(Table(columns, rows), results)


def _with_counts(table: Table, measured: Sequence[Result | Change]) -> Table:
    """Adds the names of the evaluation sets and the numbers of samples: as a column where every row has one."""
    columns, rows = list(table.columns), [list(row) for row in table.rows]
    if all(entry.n for entry in measured):
        columns.append("n")
        for row, entry in zip(rows, measured, strict=True):
            row.append(str(entry.n))
    else:
        for row, entry in zip(rows, measured, strict=True):
            if entry.n:
                row[0] += f" (n = {entry.n})"
    if any(_dataset(entry) is not None for entry in measured):
        columns.insert(0, "evaluation set")
        for row, entry in zip(rows, measured, strict=True):
            row.insert(0, escape_markdown(_dataset(entry) or "all"))
    return Table(columns, rows)


def _with_interval(value: str, ci95: tuple[float, float] | None) -> str:
    return f"{value} ({format_interval(ci95)})" if ci95 else value


def _dataset(result: Result | Change) -> str | None:
    return getattr(result, "dataset", None)

"""The benchmarks of a reward model on its card: a table, what each was measured on, and entries of the model index."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from ..privacy import strip_local_paths
from ..report import RunReport
from .markdown import code_span, escape_markdown, format_interval


class BenchmarkPart(NamedTuple):
    """The part of a card on benchmarks.

    Attributes:
        rows: Rows of the table: benchmark, measure, value with interval, n.
        origins: A sentence for each benchmark: dataset, commit or digest, and how many rows were scored.
    """

    rows: list[list[str]]
    origins: list[str]


def benchmark_part(report: RunReport) -> BenchmarkPart | None:
    """Returns the part on benchmarks, in Markdown. None if `hf-rlhf bench-reward` wrote none into the report."""
    rows, origins = [], []
    for entry in report.benchmarks.values():
        title = escape_markdown(strip_local_paths(entry["title"]))
        for name, measure in entry["measures"].items():
            value = f"{measure['value']:.3f}"
            if measure.get("ci95"):
                value += f" ({format_interval(measure['ci95'])})"
            rows.append([title, escape_markdown(strip_local_paths(name)), value, str(measure["n"])])
        origins.append(f"**{title}**: {_origin(entry)}")
    return BenchmarkPart(rows, origins) if rows else None


def _origin(entry: Mapping[str, Any]) -> str:
    """What a benchmark was measured on."""
    dataset = code_span(strip_local_paths(entry["dataset"]))
    if entry.get("revision"):
        identity = f"commit {code_span(entry['revision'][:12])}"
    else:
        identity = f"SHA-256 of its rows {code_span(entry['sha256'][:16])}…"
    text = f"{dataset}, {identity}; {entry['scored']} of {entry['rows']} rows scored"
    if entry["left_out"]:
        reasons = [f"{count} {reason}" for reason, count in entry["left_out"].items()]
        text += f", without {', '.join(reasons)}"
    for note in entry.get("notes") or ():
        text += f"; {escape_markdown(strip_local_paths(note))}"
    if entry.get("aggregation"):
        text += f"; [aggregation]({entry['aggregation']})"
    return f"{text}."


def benchmark_results(report: RunReport, task_type: str | None) -> list[EvalResult]:
    """Returns the score of each benchmark for the model index."""
    results = []
    for key, entry in report.benchmarks.items():
        first = next(iter(entry["measures"].items()), None)
        if first is None or task_type is None:
            continue
        name, measure = first
        parts = [f"n = {measure['n']}"]
        if measure.get("ci95"):
            parts.append(f"95 % CI {format_interval(measure['ci95'])}")
        if entry["scored"] < entry["rows"]:
            parts.append(f"{entry['scored']} of {entry['rows']} rows")
        results.append(
            EvalResult(
                task_type=task_type,
                metric_type="accuracy" if name == "accuracy" else "score",
                metric_name=f"{strip_local_paths(name)} ({', '.join(parts)})",
                metric_value=round(measure["value"], 4),
                dataset_type=entry.get("hub_id") or "custom",
                dataset_name=strip_local_paths(entry["title"]),
                # Results of `custom` sets that differ in their names alone would become one entry.
                dataset_config=None if entry.get("hub_id") else strip_local_paths(key),
                dataset_revision=entry.get("revision"),
            )
        )
    return results

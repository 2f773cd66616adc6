"""The report of `hf-rlhf bench-reward`: tables on the terminal, report.json, and the cards of the reward models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_rlhf_ext.cli.program import command_line
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.hub.card import card_from_report, hardware
from hf_rlhf_ext.hub.cards.owner_text import save_card
from hf_rlhf_ext.hub.report import REPORT_FILE, RunReport
from hf_rlhf_ext.recipes.bench_reward_parts.models import Candidate

COMPLETE = "score"
"""Name of the score of a public benchmark of which all parts have rows."""
NOTHING: dict[str, Any] = {"measures": {}}

Entries = Mapping[str, Mapping[str, Any]]


def make_report(entries: Entries, *, seed: int, limit: int | None, seconds: float) -> dict[str, Any]:
    """The content of report.json.

    Args:
        entries: What `measure_models` returned.
        seed: Seed of the sample and of the intervals.
        limit: Number of rows of each sample. None means all rows.
        seconds: Duration of the run. Scores that an earlier run computed took none.
    """
    return {
        "reward_models": dict(entries),
        "limit": limit,
        "seed": seed,
        "seconds": round(seconds, 1),
        "hardware": hardware(),
        "versions": versions(),
        "command": command_line(),
    }


def write_report(report: Mapping[str, Any], folder: str | Path) -> None:
    """Writes `report.json`."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (Path(folder) / REPORT_FILE).write_text(text, encoding="utf-8")


# --- terminal ---------------------------------------------------------------------------------------------------------


def print_tables(report: Mapping[str, Any]) -> None:
    """Prints a table for each benchmark, with a column for each reward model."""
    models = report["reward_models"]
    keys = list(next(iter(models.values()))["benchmarks"])
    for key in keys:
        entries = {name: model["benchmarks"][key] for name, model in models.items()}
        print_benchmark(entries)


def print_benchmark(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the table of one benchmark, and what it was measured on."""
    first = next(iter(entries.values()))
    table = Table(title=f"{escape(first['title'])} (95 % interval)", title_justify="left")
    table.add_column("measure")
    table.add_column("n", justify="right")
    for name in entries:
        table.add_column(escape(name), justify="right")
    for measure in dict.fromkeys(name for entry in entries.values() for name in entry["measures"]):
        counts = {str(entry["measures"][measure]["n"]) for entry in entries.values() if measure in entry["measures"]}
        cells = [_cell(entry["measures"].get(measure)) for entry in entries.values()]
        table.add_row(escape(measure), " / ".join(sorted(counts)), *cells)
    if table.rows:
        Console().print(table)
    for name, entry in entries.items():
        print(f"{entry['title']}, {name}: {_said_of_rows(entry)}")
    for note in dict.fromkeys(note for entry in entries.values() for note in entry["notes"]):
        print(f"{first['title']}: {note}")


def _cell(measure: Mapping[str, Any] | None) -> str:
    if measure is None:
        return "–"
    text = f"{measure['value']:.3f}"
    if measure["ci95"]:
        low, high = measure["ci95"]
        text += f" ({low:.3f} to {high:.3f})"
    return text


def _said_of_rows(entry: Mapping[str, Any]) -> str:
    """How many rows were scored, and why others were not."""
    text = f"{entry['scored']} of {entry['rows']} rows scored"
    if entry["is_sample"]:
        text += f", which are a random sample of {entry['rows_of_dataset']}"
    reasons = [f"{count} {reason}" for reason, count in entry["left_out"].items()]
    return f"{text}; left out: {', '.join(reasons)}" if reasons else text


# --- cards ------------------------------------------------------------------------------------------------------------


def write_cards(models: Sequence[Candidate], entries: Entries) -> None:
    """Writes the results into the report and the card of each reward model, and says where that is not possible."""
    for model in models:
        measured = entries[model.name]["benchmarks"]
        whole = {key: _for_card(entry) for key, entry in measured.items() if entry["scored"] and not entry["is_sample"]}
        if not whole:
            print(f"{model.name}: not written to its card, as only all rows of a benchmark go there")
            continue
        if model.folder is None or not (model.folder / REPORT_FILE).is_file():
            print(f"{model.name}: not written to its card, as it is no local folder with a {REPORT_FILE}")
            continue
        add_to_card(model.folder, whole)


def _for_card(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the report of a reward model keeps of an entry."""
    left = ("details", "rows_of_dataset", "is_sample")
    return {name: value for name, value in entry.items() if name not in left}


def add_to_card(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds benchmarks to `report.json` of a reward model, and renders its card again. Others that it has stay."""
    path = folder / REPORT_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    known = content.get("benchmarks") or {}
    for key in [key for key in entries if COMPLETE in known.get(key, NOTHING)["measures"]]:
        if COMPLETE not in entries[key]["measures"]:
            print(f"{folder.name}: its card keeps its complete score of {key}, as parts of it have no rows now")
            entries = {other: entry for other, entry in entries.items() if other != key}
    content["benchmarks"] = known | dict(entries)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    card = card_from_report(RunReport.load(folder))
    if card is not None:
        save_card(folder / "README.md", card)

"""The tables of docs/results/compare.md, from docs/study/compare.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_rlhf_ext.recipes.compare_parts import tables

STUDY = Path(__file__).parents[1] / "docs" / "study"
NOT_YET = "*Not measured yet.*\n"
ALT = "Gold against KL to the SFT policy, per system, with intervals and snapshots"

Report = dict[str, Any]
Rows = tuple[tuple[str, ...], ...]


def report_of(world: str) -> Report | None:
    """The merged report of a world, or None while no seed of it has been run."""
    path = STUDY / "compare.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["worlds"].get(world)


def verdict(report: Report, world: str) -> str:
    """The headline as a quotation, and what systems without PPO reach. The tables have the intervals of all others."""
    headline, *_, without_ppo = report["verdict"].split("\n\n")
    seeds = ", ".join(map(str, report["seeds"]))
    n = f"Seeds {seeds}; {report['n']} held-out prompts, the same in each seed."
    whole = f"The whole verdict, with each interval, is `worlds.{world}.verdict` of `docs/study/compare.json`."
    return "\n\n".join([f"> {headline}", without_ppo, f"{n} {whole}"]) + "\n"


def plot(report: Report, world: str) -> str:
    return f"![{ALT}](../study/compare/{world}/gold_against_kl.png)\n"


def quality(report: Report, world: str) -> str:
    """Quality and cost of each system in one table."""
    kept = ("gold", "gain over sft", "win rate against sft", "length-controlled", "KL", "length")
    table = columns_of(tables.quality_table(report), kept)
    cost = {row[0]: row for row in columns_of(tables.cost_table(report), ("labels", "total training"))[1]}
    header = (*table[0], "labels", "training")
    rows = []
    for row in table[1]:
        name = row[0].split(" (failed")[0]
        rows.append((*row, *cost.get(name, ("", "", ""))[1:]))
    return markdown(header, tuple(rows))


def equal(report: Report, world: str) -> str:
    by_time = tables.equal_time_table(report)
    by_kl = tables.equal_kl_table(report)
    return f"{markdown(by_time.header, by_time.rows)}\n{markdown(by_kl.header, by_kl.rows)}"


def tax(report: Report, world: str) -> str:
    table = tables.alignment_tax_table(report)
    return markdown(table.header, table.rows)


def categories(report: Report, world: str) -> str:
    found = tables.category_tables(report)
    if not found:
        return NOT_YET
    header = tuple(name.replace("n = ", "") for name in found[0].header)
    rows = []
    for row in found[0].rows:
        rows.append((row[0], *(cell.split(" [")[0] for cell in row[1:])))  # intervals are in the JSON
    return markdown(header, tuple(rows))


def rules(report: Report, world: str) -> str:
    table = tables.rules_table(report)
    return markdown(table.header, table.rows)


def columns_of(table: tables.Table, kept: tuple[str, ...]) -> tuple[tuple[str, ...], Rows]:
    """The first column and those that are named, of a table."""
    places = [0, *(table.header.index(name) for name in kept)]
    header = tuple(table.header[place] for place in places)
    return header, tuple(tuple(row[place] for place in places) for row in table.rows)


def markdown(header: tuple[str, ...], rows: Rows) -> str:
    """A table; the first column is code, as it has the names of systems."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for first, *rest in rows:
        name, _, remark = first.partition(" (")
        lines.append([f"`{name}`" + (f" ({remark}" if remark else ""), *(cell.replace("|", "\\|") for cell in rest)])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


PARTS: dict[str, Callable[[Report, str], str]] = {
    "": quality,
    "_verdict": verdict,
    "_plot": plot,
    "_equal": equal,
    "_tax": tax,
}
OF_WORLD = {"smollm2": PARTS | {"_categories": categories}, "stories": PARTS | {"_rules": rules}}


def compare_tables() -> dict[str, Callable[[Path], str]]:
    """Name of the table -> function of the page that writes it."""
    found: dict[str, Callable[[Path], str]] = {}
    for world, parts in OF_WORLD.items():
        for ending, part in parts.items():
            found[f"compare_{world}{ending}"] = writer(world, part)
    return found


def writer(world: str, part: Callable[[Report, str], str]) -> Callable[[Path], str]:
    def write(page: Path) -> str:
        report = report_of(world)
        return NOT_YET if report is None else part(report, world)

    return write

"""The report of a comparison: report.json, compare.md, compare.html, plots, and a table in the card of each policy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from hf_rlhf_ext.cli.finish import recorded_report, write_report_and_card
from hf_rlhf_ext.cli.program import command_line
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.hub.report import hardware
from hf_rlhf_ext.metrics.compare_plots import (
    plot_calibration,
    plot_categories,
    plot_gold_against_kl,
    plot_gold_against_time,
    plot_win_rates,
)
from hf_rlhf_ext.recipes.compare_parts.evaluation import write_json
from hf_rlhf_ext.recipes.compare_parts.merging import merge
from hf_rlhf_ext.recipes.compare_parts.page import (
    Plot,
    ReportPage,
    ReportSection,
    markdown_table,
    paragraphs,
    write_html,
    write_markdown,
)
from hf_rlhf_ext.recipes.compare_parts.samples import side_by_side
from hf_rlhf_ext.recipes.compare_parts.tables import (
    Table,
    alignment_tax_table,
    category_tables,
    cost_table,
    count,
    equal_kl_table,
    equal_time_pairs_table,
    equal_time_table,
    judges_table,
    quality_table,
    rules_table,
    texts_table,
    working,
)
from hf_rlhf_ext.study.statistics import wilson_interval
from hf_rlhf_ext.study.verdict import write_verdict

REPORT = "report.json"
MARKDOWN = "compare.md"
PAGE = "compare.html"
KL_PLOT = "gold_against_kl.png"
TIME_PLOT = "gold_against_time.png"
WIN_RATE_PLOT = "win_rates.png"
CATEGORY_PLOT = "use_cases.png"
CALIBRATION_PLOT = "calibration.png"
TITLE = "Was RL worth it?"
CLOCK_NAMES = {"wall": "wall time", "cpu": "time of the process on all cores"}


def write_report(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    equal_seconds: float | None = None,
    statements: Sequence[str] = (),
    title: str = TITLE,
) -> dict[str, Any]:
    """Merges the results of the seeds, writes all files of the report, and returns the content of `report.json`.

    Args:
        folder: folder of the run, with `seed-N` for each seed.
        results: contents of `results.json` of each seed.
        settings: all options of the run.
        equal_seconds: training time of the table at equal time; None means that of the trained system with the least.
        statements: what is known of the independence of the judges from the training reward, in sentences.
        title: heading of the page.
    """
    results = sorted(results, key=lambda result: result["seed"])
    report = merge(results, equal_seconds=equal_seconds, command=command_line(), settings=settings)
    report["independence"] = list(statements)
    report["versions"] = versions()
    report["hardware"] = hardware()
    report["verdict"] = write_verdict(report) if report["judge"] else NO_JUDGE
    write_json(report, folder / REPORT)
    page = page_of(report, folder, title)
    write_markdown(page, folder / MARKDOWN)
    write_html(page, folder / PAGE)
    write_cards(report, folder)
    return report


NO_JUDGE = (
    "There is no verdict, since nobody judged the answers: add `judges` to the config file and run the same command "
    "again. The trained systems are kept."
)


# --- the page --------------------------------------------------------------------------------------------------------


def page_of(report: Mapping[str, Any], folder: Path, title: str) -> ReportPage:
    """The page of a report; draws its plots into the folder."""
    names = list(working(report))
    seeds = ", ".join(map(str, report["seeds"]))
    judges = ", ".join(with_coverage(name, counts) for name, counts in report["judges"].items()) or "nobody"
    lead = (
        f"{count(len(names), 'system')} answered the same {report['n']} held-out prompts, in "
        f"{count(len(report['seeds']), 'seed')} of training and sampling ({seeds}), with the same temperature, length "
        f"and stop rules. Judged by: {judges}."
    )
    first_seed = report["seeds"][0]
    return ReportPage(
        title=title,
        lead=lead,
        verdict=report["verdict"],
        warnings=warnings_of(report),
        sections=[section for section in sections_of(report, folder) if section.plots or section.tables],
        samples=side_by_side(folder, first_seed, names),
        samples_of=f"seed {first_seed}",
        provenance=provenance_of(report, folder),
        settings=yaml.safe_dump(json.loads(json.dumps(report["settings"], default=str)), sort_keys=False),
    )


def with_coverage(judge: str, counts: Mapping[str, Any]) -> str:
    """The name of a judge, with how much it judged if that is not all."""
    total = counts["judged"] + counts["failed"] + counts.get("not_asked", 0)
    if counts["judged"] == total:
        return judge
    not_asked = f", {counts['not_asked']:,} not asked" if counts.get("not_asked") else ""
    failed = f", {counts['failed']:,} without a judgment" if counts["failed"] else ""
    return f"{judge} ({counts['judged']:,} of {total:,} {counts.get('unit', 'cases')}{not_asked}{failed})"


def sections_of(report: Mapping[str, Any], folder: Path) -> list[ReportSection]:
    """The sections of the page in their order, some of them perhaps empty."""
    return [
        section("How good are the answers?", [kl_plot(report, folder)], [quality_table(report)]),
        section(
            "What does it cost?",
            [time_plot(report, folder)],
            [cost_table(report), equal_time_table(report), equal_time_pairs_table(report)],
        ),
        section("At equal KL", [], [equal_kl_table(report)]),
        section("Who beats whom?", [win_rate_plot(report, folder)], [judges_table(report)]),
        section("Use cases", [category_plot(report, folder)], category_tables(report)),
        section("Can the reward model be trusted?", [calibration_plot(report, folder)], [reward_model_table(report)]),
        section("Alignment tax", [], [alignment_tax_table(report)]),
        section("The answers as texts", [], [texts_table(report)]),
        section("How were the demonstrations chosen?", [], [rules_table(report)]),
    ]


def section(title: str, plots: Sequence[Plot | None], tables: Sequence[Table]) -> ReportSection:
    """A section without what is empty."""
    filled = [table.without_empty_columns() for table in tables if table.rows]
    # Where nothing was judged, only the names would be left.
    filled = [table for table in filled if len(table.header) > 1]
    return ReportSection(title, [plot for plot in plots if plot is not None], filled)


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What limits the conclusion, a sentence each."""
    lines = []
    for name, entry in report["systems"].items():
        seeds_of_error: dict[str, list[int]] = {}
        for seed, error in entry["errors"].items():
            seeds_of_error.setdefault(error, []).append(seed)
        for error, seeds in seeds_of_error.items():
            lines.append(f"{name} failed in seed {', '.join(map(str, seeds))}: {error}")
    left_out = report["leaks"].get("heldout_left_out", 0)
    if left_out:
        lines.append(f"{count(left_out, 'held-out prompt')} left out: the same or nearly the same is in training data.")
    for judge, counts in report["judges"].items():
        if counts["failed"]:
            total = counts["judged"] + counts["failed"]
            reason = f" ({counts['first_error']})" if counts.get("first_error") else ""
            lines.append(f"{judge} gave no judgment on {counts['failed']} of {total} cases{reason}; they are left out.")
    return lines


def provenance_of(report: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Where every number comes from: pairs of a label and a text."""
    seeds = ", ".join(map(str, report["seeds"]))
    entries = [
        ("Command", report["command"] or "started from Python"),
        ("Folder", folder.name),
        ("Seeds", seeds),
        ("Held-out prompts", f"{report['n']} per seed"),
        ("Numbers", f"{REPORT} (all seeds), seed-N/results.json (one value for each prompt of seed N)"),
        ("Answers", "seed-N/completions/<system>.jsonl; of snapshot k of training: <system>@k.jsonl"),
        ("Policies", "seed-N/systems/<system>, with its settings in system.json"),
        ("Clock", CLOCK_NAMES[report["clock"]]),
    ]
    entries += [("Independence", statement) for statement in report["independence"]]
    entries += [
        ("Hardware", report["hardware"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]
    return entries


def reward_model_table(report: Mapping[str, Any]) -> Table:
    """Accuracy of the reward model of each seed on comparisons that were held out."""
    rows = []
    for seed, measured in zip(report["seeds"], report["reward_model"], strict=True):
        if measured.get("accuracy") is not None:
            ends, decided = measured.get("accuracy_ci95"), measured.get("decided_pairs")
            if ends and ends[0] == ends[1] and decided:  # all pairs right or all wrong: a bootstrap has no width
                ends = wilson_interval(round(decided * measured["accuracy"]), decided)
            interval = "" if not ends else f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]"
            counts = [str(measured[name]) if measured.get(name) else "" for name in ("decided_pairs", "pairs")]
            rows.append((f"seed {seed}", f"{100 * measured['accuracy']:.0f} %{interval}", *counts))
    note = "Share of held-out comparisons whose preferred side gets the higher reward: 50 % is chance."
    header = ("reward model", "accuracy", "held-out pairs", "pairs in training")
    return Table("Accuracy of the reward model", note, header, tuple(rows))


# --- plots -----------------------------------------------------------------------------------------------------------


def points_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The systems with gold scores, as the plots take them."""
    points = []
    for name, entry in working(report).items():
        if entry["gold"] is None or entry["gold"]["mean"] is None:
            continue
        points.append(
            {
                "name": name,
                "kind": entry["kind"],
                "gold": entry["gold"],
                "kl": entry["kl"],
                "kl_ci95": entry["kl_ci95"],
                "seconds": entry["seconds"],
                "curves": [curve["points"] for curve in entry["curves"]],
                "is_reference": name == report["reference"],
            }
        )
    return points


def kl_plot(report: Mapping[str, Any], folder: Path) -> Plot | None:
    """Gold against KL."""
    points = points_of(report)
    if not points:
        return None
    path = plot_gold_against_kl(points, folder / KL_PLOT, gold=f"gold: {report['judge']}")
    return Plot(
        path,
        f"Gold against KL to {report['reference']}. A point is the end of a system, with 95 % intervals; thin lines "
        "are its snapshots during training, one line per seed; the dashed line joins best-of-n. A system that lies "
        "above another one at the same KL gets more for the same distance.",
    )


def time_plot(report: Mapping[str, Any], folder: Path) -> Plot | None:
    """Gold against training time."""
    points = points_of(report)
    if not points:
        return None
    clock = CLOCK_NAMES[report["clock"]]
    path = plot_gold_against_time(points, folder / TIME_PLOT, gold=f"gold: {report['judge']}", clock=clock)
    return Plot(path, "Gold against training time. Thin lines are snapshots during training, one line per seed.")


def win_rate_plot(report: Mapping[str, Any], folder: Path) -> Plot | None:
    """The matrix of win rates by the judge of the main table."""
    rates = report["win_rates"].get(report["judge"], {})
    names = [name for name in working(report) if any(name in pair.split("|") for pair in rates)]
    if not names:
        return None
    path = plot_win_rates(names, rates, folder / WIN_RATE_PLOT)
    return Plot(
        path,
        f"Win rate of the row against the column by {report['judge']}, in percent, with ties as one half. Bold: the "
        "95 % interval excludes 50 %.",
    )


def category_plot(report: Mapping[str, Any], folder: Path) -> Plot | None:
    """Gold by use case."""
    points = points_of(report)
    if not points or not report["categories"]:
        return None
    path = plot_categories(points, report["categories"], folder / CATEGORY_PLOT, gold=f"gold: {report['judge']}")
    return Plot(path, f"Gold of each system by use case. The dotted line is {report['reference']}.")


def calibration_plot(report: Mapping[str, Any], folder: Path) -> Plot | None:
    """How often the judge agrees with the reward model."""
    if not report["calibration"]:
        return None
    path = plot_calibration(report["calibration"], folder / CALIBRATION_PLOT, judge=report["judge"])
    return Plot(
        path,
        f"Pairs of an answer of a system and of {report['reference']}, by how sure the reward model is; a tie of the "
        "judge counts as one half. On the dashed "
        "line, the judge agrees as often as the reward model expects; at 50 %, its preference says nothing.",
    )


# --- cards -----------------------------------------------------------------------------------------------------------


def write_cards(report: Mapping[str, Any], folder: Path) -> None:
    """Adds the table and the verdict to report and card of every policy of the run that has a card."""
    for seed in report["seeds"]:
        for name in working(report):
            policy = folder / f"seed-{seed}" / "systems" / name / "policy"
            recorded = recorded_report(policy)
            card = recorded.get("card")
            if card is None:
                continue
            recorded["comparison"] = comparison_of(report, name, seed)
            write_report_and_card(policy, recorded, card)


def comparison_of(report: Mapping[str, Any], name: str, seed: int) -> dict[str, Any]:
    """What the card of a policy says of the comparison."""
    table = quality_table(report).without_empty_columns()
    return {
        "system": name,
        "seed": seed,
        "seeds": report["seeds"],
        "judge": report["judge"],
        "n": report["n"],
        "note": table.note,
        "columns": list(table.header),
        "rows": [list(row) for row in table.rows],
        "verdict": paragraphs(report["verdict"])[0],
    }


PRINTED = 3
"""Columns of the main table in the terminal beside gold: gain and win rate; the page has all."""


def print_table(report: Mapping[str, Any]) -> None:
    """Prints the first columns of the main table, KL and training time, and the verdict."""
    quality, cost = quality_table(report), cost_table(report)
    total = {row[0]: row[cost.header.index("total training")] for row in cost.rows}
    kl = quality.header.index("KL")
    rows = []
    for row in quality.rows:
        name = row[0].partition(" (failed")[0]
        rows.append((*row[: PRINTED + 1], row[kl], total.get(name, "")))
    header = (*quality.header[: PRINTED + 1], "KL", "total training")
    table = Table(quality.title, "", header, tuple(rows))
    console = Console(width=150)
    console.print(Markdown("\n".join(markdown_table(table))))
    console.print(paragraphs(report["verdict"])[0], markup=False, highlight=False)

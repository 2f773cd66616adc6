"""Tables of a comparison, for Markdown and HTML alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: its heading.
        note: what its columns mean, in a few sentences.
        header: names of the columns.
        rows: cells of the rows; the first cell of a row is its name.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> "Table":
        """The table without the columns that have no entry."""
        kept = [0] + [k for k in range(1, len(self.header)) if any(row[k] for row in self.rows)]
        rows = tuple(tuple(row[k] for k in kept) for row in self.rows)
        return Table(self.title, self.note, tuple(self.header[k] for k in kept), rows)


def all_tables(report: Report) -> list[Table]:
    """The tables of the report that have rows, the main one first."""
    tables = [
        quality_table(report),
        cost_table(report),
        judges_table(report),
        equal_time_table(report),
        equal_time_pairs_table(report),
        equal_kl_table(report),
        *category_tables(report),
        alignment_tax_table(report),
        texts_table(report),
        rules_table(report),
    ]
    return [table.without_empty_columns() for table in tables if table.rows]


def working(report: Report) -> dict[str, Mapping[str, Any]]:
    """The systems that worked in at least one seed."""
    return {name: entry for name, entry in report["systems"].items() if entry["status"] == "ok"}


def quality_table(report: Report) -> Table:
    """The main table: how good the answers of each system are."""
    reference = report["reference"]
    n_seeds = len(report["seeds"])
    intervals, wilson = "over prompts", "the 95 % interval of the wins among the decided pairs"
    if n_seeds > 1:
        intervals = "over seeds and prompts (of a system that worked in one seed, over prompts)"
        wilson += ", as if those of several seeds were independent, so that it is too narrow"
    note = (
        f"One answer to each of {report['n']} held-out prompts in {count(n_seeds, 'seed')}. Gold is the score by "
        f"{report['judge']}, which no training saw. In brackets: 95 % intervals {intervals}. A win rate counts a "
        f"tie as one half; W–T–L are wins, ties and losses against {reference}, and Wilson is {wilson}. "
        "A win rate on less than half of the prompts has their number n. "
        "Length-controlled: the win rate at equal length. The rating is of Bradley and Terry in Elo points, with "
        f"{reference} at 0. KL is to {reference}, in nats per answer; length is in tokens. Of best-of-n, "
        "gold is the mean over all choices of n among its samples, and the rest is of one answer."
    )
    header = (
        "system",
        "gold",
        f"gain over {reference}",
        f"win rate against {reference}",
        "W–T–L",
        "Wilson",
        "length-controlled",
        "rating",
        "KL",
        "length",
    )
    rows = [quality_row(name, entry, reference, len(header)) for name, entry in report["systems"].items()]
    return Table("How good are the answers?", note, header, tuple(rows))


def quality_row(name: str, entry: Mapping[str, Any], reference: str, width: int) -> tuple[str, ...]:
    """The row of a system; of a failed one, its reason."""
    if entry["status"] != "ok":
        return (name, f"failed: {entry['error']}", *[""] * (width - 2))
    rate = entry.get(f"win_rate_vs_{reference}")
    counts = wilson = ""
    if rate is not None:
        counts = f"{rate['wins']}–{rate['ties']}–{rate['losses']}"
        wilson = between([100 * end if end is not None else None for end in rate["wilson95"]], digits=0, unit=" %")
    return (
        with_failures(name, entry),
        with_interval(entry.get("gold")),
        with_interval(entry.get("gold_gain"), signed=True),
        rate_cell(rate, entry["n"]),
        counts,
        wilson,
        percent(entry.get("length_controlled")),
        "0" if name == reference else with_interval(entry.get("rating"), digits=0, signed=True),
        "0" if name == reference else with_interval({"mean": entry["kl"], "ci95": entry["kl_ci95"]}),
        f"{entry['length']['mean']:.1f}",
    )


def with_failures(name: str, entry: Mapping[str, Any]) -> str:
    """The name of a system, with the seeds in which it failed."""
    if not entry["errors"]:
        return name
    seeds = ", ".join(str(seed) for seed in entry["errors"])
    return f"{name} (failed in seed {seeds})"


def cost_table(report: Report) -> Table:
    """What each system costs: labels, time of training, completions."""
    clock = {"wall": "Wall time", "cpu": "Time of the process on all cores"}[report["clock"]]
    note = (
        f"{clock}, mean over seeds, without evaluation and saving. The total has everything that a system builds on, "
        "such as SFT and reward model. Labels are what people would have to give."
    )
    header = ("system", "labels", "own training", "total training", "completions in training", "completions per answer")
    rows = []
    for name, entry in working(report).items():
        labels = ", ".join(f"{value:,} {kind}" for kind, value in entry["labels"].items() if value)
        rows.append(
            (
                name,
                labels or "none",
                duration(entry["own_seconds"]),
                duration(entry["seconds"]),
                f"{entry['completions']:,}",
                f"{entry['best_of']}",
            )
        )
    return Table("What does it cost?", note, header, tuple(rows))


def judges_table(report: Report) -> Table:
    """The gold of every judge, if there are several."""
    judges = list(report["judges"])
    note = "The score of each judge has its own unit. A judge that only compares two answers gives no score."
    if len(judges) < 2:
        return Table("What do the other judges say?", note, ("system", *judges), ())
    reference = report["reference"]
    header = ["system"]
    for judge in judges:
        header += [f"score by {judge}", f"win rate against {reference} by {judge}"]
    rows = []
    for name, entry in working(report).items():
        row = [name]
        for judge in judges:
            rate = report["win_rates"].get(judge, {}).get(f"{name}|{reference}")
            row += [with_interval(entry["gold_of_judges"].get(judge)), rate_cell(rate, entry["n"])]
        rows.append(tuple(row))
    return Table("What do the other judges say?", note, tuple(header), tuple(rows))


def equal_time_table(report: Report) -> Table:
    """What each system had reached within the same training time."""
    found = report["equal_time"] or {"seconds": 0.0, "systems": {}}
    note = (
        f"What {duration(found['seconds'])} of training buys, with everything that a system builds on. Of a system "
        f"that trained longer, the last snapshot within this time counts (`snapshot_seconds`). {LATER}"
    )
    header = ("system", "gold", f"gain over {report['reference']}", "KL", "training used", "measured")
    rows = []
    for name, entry in found["systems"].items():
        if entry["gold"] is None:
            rows.append((name, "", "", "", "", entry["why"] or "no score"))
            continue
        steps = [step for step in entry["steps"] if step is not None]
        measured = f"at step {', '.join(map(str, steps))}" if steps else "at its end"
        if entry["steps"] and not any(step != 0 for step in entry["steps"]):
            measured = f"at its start, still {report['reference']}"
        gain = with_interval(entry["gain"], signed=True)
        row = (name, with_interval(entry["gold"]), gain, f"{entry['kl']:.2f}", duration(entry["seconds"]), measured)
        rows.append(row)
    return Table("At equal training time", note, header, tuple(rows))


LATER = "Best-of-n samples n times for each answer later, which is no training time."
OF_PAIRS = (
    "More than 0 means that the first is better. Detectable is the smallest true difference that these data would have "
    "found with a chance of 80 %."
)


def equal_kl_table(report: Report) -> Table:
    """Pairs of systems at the same distance from the reference."""
    note = (
        f"Gold of the first system minus gold of the second, where both are equally far from {report['reference']}. "
        "Gold between two snapshots is interpolated. " + OF_PAIRS
    )
    return pairs_table(report, "equal_kl", "At equal KL", note)


def equal_time_pairs_table(report: Report) -> Table:
    """Pairs of systems after the same training time."""
    note = (
        "Gold of the first system minus gold of the second after the same training time: the smaller total of the two, "
        "if equal_seconds sets no other. A system that trained longer counts with its last snapshot within this time; "
        "without one (`snapshot_seconds`), there is no claim. "
        f"{LATER} {OF_PAIRS}"
    )
    return pairs_table(report, "equal_time", "Pair by pair at equal training time", note)


def pairs_table(report: Report, at: str, title: str, note: str) -> Table:
    """The comparisons of pairs at equal KL or at equal time."""
    rows = []
    for entry in report["comparisons"]:
        if entry["at"] != at:
            continue
        if entry["gain"] is None:
            rows.append((entry["first"], entry["second"], "", f"none: {entry['reason']}", ""))
            continue
        where = ""
        if at == "equal_kl" and entry["kl"] is not None:
            where = f"{entry['kl']:.2f} nats"
        elif at == "equal_time" and entry["seconds"] is not None:
            where = duration(entry["seconds"])
        detectable = "" if entry["detectable"] is None else f"{entry['detectable']:.2f}"
        rows.append((entry["first"], entry["second"], where, with_interval(entry["gain"], signed=True), detectable))
    header = ("first", "second", "at", "difference in gold", "detectable")
    return Table(title, note, header, tuple(rows))


def category_tables(report: Report) -> list[Table]:
    """Gold and win rate of each system by use case."""
    categories = report["categories"]
    if not categories:
        return []
    reference = report["reference"]
    header = ("system", *(f"{name} (n = {entry['n']})" for name, entry in categories.items()))
    gold, rates = [], []
    for name, system in working(report).items():
        of_system = [entry["systems"].get(name, {}) for entry in categories.values()]
        gold.append((name, *(with_interval(entry.get("gold")) for entry in of_system)))
        n_prompts = [entry["n"] * len(system["seeds"]) for entry in categories.values()]
        cells = [rate_cell(entry.get("win_rate"), n) for entry, n in zip(of_system, n_prompts, strict=True)]
        rates.append((name, *cells))
    note = f"Gold by {report['judge']}; n is the number of prompts of a use case."
    of_rates = f"Win rate against {reference}, with ties as one half."
    tables = [Table("Use cases: gold", note, header, tuple(gold))]
    tables.append(Table(f"Use cases: win rate against {reference}", of_rates, header, tuple(rates)))
    return tables


def alignment_tax_table(report: Report) -> Table:
    """Perplexity on plain text, and exact match, of every policy."""
    note = (
        "What training costs elsewhere. Perplexity on held-out plain text: lower is better. Exact match: share of "
        "short questions whose greedy answer begins with the right word; in brackets, Wilson's 95 % interval over the "
        "questions. Best-of-n changes no weights, so it has none."
    )
    rows = []
    for name, entry in working(report).items():
        tax = entry["alignment_tax"]
        if not tax:
            continue
        of_text = tax.get("perplexity", {})
        nats = "" if "nats_per_token" not in of_text else f"{of_text['nats_per_token']:.3f}"
        perplexity = "" if "perplexity" not in of_text else f"{of_text['perplexity']:.2f}"
        match = tax.get("exact_match")
        accuracy = count_right = ""
        if match and match["accuracy"] is not None:
            low, high = match["wilson95"]
            accuracy = f"{100 * match['accuracy']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
            count_right = f"{match['right']} of {match['n']}"
        rows.append((name, perplexity, nats, accuracy, count_right))
    header = ("system", "perplexity", "nats per token", "exact match", "right")
    return Table("Alignment tax", note, header, tuple(rows))


def texts_table(report: Report) -> Table:
    """Variety, repetition and refusals of the answers."""
    note = (
        "Distinct-2: number of different word pairs divided by the number of words, higher is more varied. Repetition: "
        "share of 4-word sequences that repeat an earlier one of the same answer, mean over answers. "
        "Refusals: share of answers that decline."
    )
    rows = []
    for name, entry in working(report).items():
        texts = entry["texts"]
        rows.append(
            (
                name,
                f"{texts['distinct_2']:.2f}",
                f"{100 * texts['repetition']:.1f} %",
                f"{100 * texts['refusal_rate']:.1f} %",
                "" if entry["proxy"] is None else with_interval(entry["proxy"]),
            )
        )
    header = ("system", "distinct-2", "repetition", "refusals", "proxy (reward of training)")
    return Table("The answers as texts", note, header, tuple(rows))


def rules_table(report: Report) -> Table:
    """Where the demonstrations of each system come from, and how they were chosen."""
    rows = [(name, entry["rule"]) for name, entry in working(report).items() if entry.get("rule")]
    note = "A style copies shape, size and selection of a published data set, not its rows."
    return Table("How were the demonstrations chosen?", note, ("system", "source and rule"), tuple(rows))


# --- cells -----------------------------------------------------------------------------------------------------------


def with_interval(value: Mapping[str, Any] | None, *, digits: int = 2, signed: bool = False) -> str:
    """A mean with its interval, such as `0.52 [0.43, 0.60]`; empty without a value."""
    if value is None or value["mean"] is None:
        return ""
    spec = f"{'+' if signed else ''}.{digits}f"
    interval = between(value.get("ci95"), digits=digits, signed=signed)
    return f"{value['mean']:{spec}} {interval}".strip()


def between(ends: Sequence[float | None] | None, *, digits: int, signed: bool = False, unit: str = "") -> str:
    """An interval, such as `[0.43, 0.60]`; empty if it is not known."""
    if ends is None or None in ends:
        return ""
    spec = f"{'+' if signed else ''}.{digits}f"
    low, high = ends
    return f"[{low:{spec}}, {high:{spec}}]{unit}"


def percent(value: Mapping[str, Any] | None) -> str:
    """A share with its interval in percent, such as `61 % [55, 67]`."""
    if value is None or value["mean"] is None:
        return ""
    ends = [None if end is None else 100 * end for end in value.get("ci95") or ()]
    return f"{100 * value['mean']:.0f} % {between(ends or None, digits=0)}".strip()


def rate_cell(rate: Mapping[str, Any] | None, n_prompts: int) -> str:
    """A win rate, with its number of prompts where that is under half of those that were answered."""
    cell = percent(rate)
    if not cell:
        return ""
    n_judged = rate["wins"] + rate["ties"] + rate["losses"]
    return f"{cell} (n = {n_judged})" if 2 * n_judged < n_prompts else cell


def duration(seconds: float) -> str:
    """A time such as `2.5 s`, `40 s`, `12.5 min` or `2.1 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds else "0"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(n: int, noun: str) -> str:
    """A number with its noun, such as `1 seed` or `3 seeds`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

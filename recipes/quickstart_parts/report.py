"""The quickstart's results: the table at its end, samples to read, and a check that the report is complete."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_rlhf_ext.hub.cards.markdown import escape_markdown

CATEGORIES = (  # InstructGPT's table 1; written here again, so that the check does not depend on what it checks
    "generation",
    "open QA",
    "brainstorming",
    "chat",
    "rewrite",
    "summarization",
    "classification",
    "other",
    "closed QA",
    "extract",
)
# Section of report.json: keys that must be numbers. "" is the report itself.
NUMBERS = {
    "": ("seed", "peak_memory_gb"),
    "reward_model": ("pairs", "heldout_pairs", "accuracy", "nll", "longer_wins_baseline", "annotator_ceiling"),
    "ppo": (
        "updates",
        "gold_before",
        "gold_after",
        "gold_gain",
        "proxy_before",
        "proxy_after",
        "kl",
        "mean_length_before",
        "mean_length_after",
        "kl_coef",
    ),
}
GOLD_NUMBERS = ("before", "after", "gain")
HABIT_NUMBERS = ("distinct_2", "repetition_4", "most_frequent_share", "stock_share", "prompt_similarity")
GOLDS = {"on_topic": "on topic and kind", "sentiment": "sentiment alone"}
"""The gold rewards of a run: one judges, the other is only measured."""
INTERVALS = {"reward_model": "accuracy_ci95", "ppo": "gold_gain_ci95"}
FILES = ("frontier.png", "policy/README.md", "reward_model/README.md", "samples.md")
MIN_SAMPLES = 5
MAX_NOTE = 45
"""Most characters of a note in the table that quotes the policy, so that it stays in one line."""


def check_report(folder: str | Path) -> list[str]:
    """Problems of a finished run's folder, one line each: a missing key or file, or a number that is not finite.

    The list is empty if `report.json` and the files beside it are complete. A gain is not required.
    """
    folder = Path(folder)
    problems = []
    for name in FILES:
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            problems.append(f"{name} is missing or empty: run the quickstart again")
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [*problems, "report.json is missing: run the quickstart again"]
    except ValueError as error:
        return [*problems, f"report.json is not JSON: {error}"]
    if not isinstance(report, dict):
        return [*problems, f"report.json holds a {type(report).__name__}, not an object"]

    # All checks run, so that all problems of a broken run are reported.
    for check in (_check_numbers, _check_intervals, _check_run, _check_categories, _check_golds, _check_habits):
        problems += check(report)
    problems += _check_finite(report, "report")
    return problems


def _check_numbers(report: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in NUMBERS.items():
        values = _section(report, section) if section else report
        for key in keys:
            name = f"{section}.{key}" if section else key
            yield from _check_number(values, key, name)


def _check_number(values: Mapping[str, Any], key: str, name: str) -> Iterator[str]:
    value = values.get(key)
    if not _is_number(value):
        yield f"report: `{name}` is {value!r}, not a number"


def _check_intervals(report: Mapping[str, Any]) -> Iterator[str]:
    for section, key in INTERVALS.items():
        interval = _section(report, section).get(key)
        if not isinstance(interval, list) or len(interval) != 2 or not all(_is_number(bound) for bound in interval):
            yield f"report: `{section}.{key}` is {interval!r}, not [low, high]"
            continue
        low, high = interval
        if math.inf > low > high:  # `_check_finite` reports an infinite bound
            yield f"report: `{section}.{key}` is {interval}, with low above high"


def _check_run(report: Mapping[str, Any]) -> Iterator[str]:
    """Checks the command, the versions, and the seconds of each stage."""
    for key in ("size", "command", "gold_reward"):
        if not isinstance(report.get(key), str) or not report[key]:
            yield f"report: `{key}` is {report.get(key)!r}, not text"
    for key in ("seconds", "versions"):
        if not _section(report, key):
            yield f"report: `{key}` is missing or empty"
    seconds = _section(report, "seconds")
    for stage in seconds:
        yield from _check_number(seconds, stage, f"seconds.{stage}")


def _check_categories(report: Mapping[str, Any]) -> Iterator[str]:
    categories = _section(report, "categories")
    for name in CATEGORIES:
        row = _section(categories, name)
        for key in ("n", "gold_before", "gold_after"):
            yield from _check_number(row, key, f"categories.{name}.{key}")
        if row.get("n") == 0:
            yield f"report: `categories.{name}.n` is 0, so its means say nothing"


def _check_golds(report: Mapping[str, Any]) -> Iterator[str]:
    """Checks both gold rewards. Folders of versions that had only the sentiment do not have this section."""
    if "golds" not in report and report.get("gold_reward") == "vader":
        return
    golds = _section(report, "golds")
    for name in GOLDS:
        row = _section(golds, name)
        for key in GOLD_NUMBERS:
            yield from _check_number(row, key, f"golds.{name}.{key}")


def _check_habits(report: Mapping[str, Any]) -> Iterator[str]:
    """Checks what the policy repeats, before and after PPO. The same folders do not have this section."""
    if "habits" not in report and report.get("gold_reward") == "vader":
        return
    habits = _section(report, "habits")
    for end in ("before", "after"):
        row = _section(habits, end)
        for key in HABIT_NUMBERS:
            yield from _check_number(row, key, f"habits.{end}.{key}")
        if not isinstance(row.get("most_frequent_sentence"), str):
            yield f"report: `habits.{end}.most_frequent_sentence` is not text"


def _check_finite(value: Any, where: str) -> Iterator[str]:
    """Checks every number of the report: a broken stage gives NaN."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _check_finite(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _check_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, not a finite number"


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object at `key`, or an empty one."""
    section = values.get(key)
    if not isinstance(section, dict):
        return {}
    return section


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # `_check_finite` checks whether it is finite


def print_results(report: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Prints the results in one short table: the reward model with its baselines, and what PPO changed."""
    table = Table(title=f"Quickstart, seed {report['seed']}, size {report['size']}", title_justify="left")
    table.add_column("what")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("note")
    _add_reward_model(table, report["reward_model"])
    n_prompts = sum(row["n"] for row in report["categories"].values())
    _add_ppo(table, report["ppo"], n_prompts)
    _add_other_gold(table, report)
    _add_habits(table, report.get("habits"))
    table.add_section()
    _add_cost(table, report)
    if console is None:
        # Where the output is captured, rich would use 80 columns and break most notes into two lines.
        console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)


def _add_reward_model(table: Table, model: Mapping[str, Any]) -> None:
    low, high = model["accuracy_ci95"]
    longer, ceiling = model["longer_wins_baseline"], model["annotator_ceiling"]
    baselines = f"longer wins {longer:.3f} · annotator's ceiling {ceiling:.3f}"
    interval = f"95 % CI {low:.3f} to {high:.3f} · {model['heldout_pairs']} held-out pairs"
    table.add_row("reward model accuracy", "", f"{model['accuracy']:.3f}", f"{baselines}\n{interval}")


def _add_ppo(table: Table, ppo: Mapping[str, Any], n_prompts: int) -> None:
    low, high = ppo["gold_gain_ci95"]
    gain = f"gain {ppo['gold_gain']:+.3f} · CI {low:+.3f} to {high:+.3f} · {n_prompts} prompts"
    table.add_row("gold reward", *_both_ends(ppo, "gold", ".3f"), gain)
    table.add_row("proxy reward", *_both_ends(ppo, "proxy", ".3f"), "what PPO maximized")
    kl_note = f"per completion, after {ppo['updates']} updates at β = {ppo['kl_coef']:.3g}"
    table.add_row("KL to the SFT policy, nats", "0.0", f"{ppo['kl']:.1f}", kl_note)
    table.add_row("mean length, tokens", *_both_ends(ppo, "mean_length", ".1f"), "of a completion")


def _add_other_gold(table: Table, report: Mapping[str, Any]) -> None:
    """The gold reward that the annotator did not judge by."""
    if "golds" not in report:
        return
    judged_by = "sentiment" if report.get("gold_reward") == "vader" else "on_topic"
    for name, in_words in GOLDS.items():
        if name != judged_by:
            gold = report["golds"][name]
            before, after = format(gold["before"], ".3f"), format(gold["after"], ".3f")
            table.add_row(f"  {in_words}", before, after, "another gold reward, not judged by")


def _add_habits(table: Table, habits: Mapping[str, Any] | None) -> None:
    if habits is None:
        return
    before, after = (format(habits[end]["stock_share"], ".0%") for end in ("before", "after"))
    often = f"said most: {habits['after']['most_frequent_sentence']}"
    table.add_row("answers with stock phrases", before, after, often[:MAX_NOTE])


def _add_cost(table: Table, report: Mapping[str, Any]) -> None:
    seconds = report["seconds"]
    slowest = max(seconds, key=seconds.get)
    table.add_row("seconds", "", f"{sum(seconds.values()):.0f}", f"longest stage: {slowest}, {seconds[slowest]:.0f}")
    table.add_row("peak memory, GB", "", f"{report['peak_memory_gb']:.2f}", "largest process")


def _both_ends(section: Mapping[str, float], name: str, spec: str) -> tuple[str, str]:
    return format(section[f"{name}_before"], spec), format(section[f"{name}_after"], spec)


def write_samples(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes completions before and after PPO as Markdown that shows exactly what the model wrote.

    Args:
        rows: `prompt`, `before` and `after` as text; optional are `category`, `gold_before` and `gold_after`.

    Raises:
        ValueError: there are fewer than five rows, which is too few to judge a policy by.
    """
    if len(rows) < MIN_SAMPLES:
        raise ValueError(f"write_samples: {len(rows)} rows, at least {MIN_SAMPLES} are needed.")
    lines = ["# Completions before and after PPO", "", "Held-out prompts, drawn by the seed, not chosen.", ""]
    for row in rows:
        # The model's text may contain markup, which must be shown and not rendered.
        heading = f"**{escape_markdown(row['prompt'])}**"
        if row.get("category"):
            heading += f" ({escape_markdown(row['category'])})"
        lines += [heading, ""]
        for end in ("before", "after"):
            label = end
            if f"gold_{end}" in row:
                label += f", gold {row[f'gold_{end}']:+.2f}"
            lines.append(f"- {label}: {escape_markdown(row[end]) or '(empty)'}")
        lines.append("")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def results_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of several runs for the README, with one row per seed."""
    header = [
        "seed",
        "reward model accuracy (95 % CI)",
        "longer wins",
        "ceiling",
        "gold before → after",
        "gain (95 % CI)",
        "stock phrases before → after",
        "KL, nats",
        "tokens before → after",
        "minutes",
        "peak GB",
    ]
    rows = [header, ["---"] * len(header)]
    for report in reports:
        rows.append(_results_row(report))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _results_row(report: Mapping[str, Any]) -> list[str]:
    model = report["reward_model"]
    ppo = report["ppo"]
    accuracy_low, accuracy_high = model["accuracy_ci95"]
    gain_low, gain_high = ppo["gold_gain_ci95"]
    return [
        str(report["seed"]),
        f"{model['accuracy']:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f})",
        f"{model['longer_wins_baseline']:.3f}",
        f"{model['annotator_ceiling']:.3f}",
        " → ".join(_both_ends(ppo, "gold", ".3f")),
        f"{ppo['gold_gain']:+.3f} ({gain_low:+.3f} to {gain_high:+.3f})",
        _stock_phrases(report),
        f"{ppo['kl']:.1f}",
        " → ".join(_both_ends(ppo, "mean_length", ".1f")),
        f"{sum(report['seconds'].values()) / 60:.1f}",
        f"{report['peak_memory_gb']:.2f}",
    ]


def _stock_phrases(report: Mapping[str, Any]) -> str:
    """Shares of completions with a stock phrase; a dash if the run was made before they were measured."""
    habits = report.get("habits")
    if habits is None:
        return "–"
    return " → ".join(format(habits[end]["stock_share"], ".0%") for end in ("before", "after"))


def main(arguments: Sequence[str]) -> int:
    """`FOLDER` checks a run and prints what is missing. `--table REPORT.json …` prints the README's table."""
    if arguments and arguments[0] == "--table":
        reports = [json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments[1:]]
        print(results_table(reports))
        return 0
    folder = arguments[0] if arguments else "runs/quickstart"
    problems = check_report(folder)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    print("complete")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

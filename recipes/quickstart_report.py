"""What the quickstart leaves behind: the table at its end, samples to read, and a check that nothing is missing."""

import json
import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_rlhf_ext.hub.card import escape_markdown

CATEGORIES = (  # InstructGPT's table 1, spelt out here so that the check does not depend on what it checks
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
INTERVALS = {"reward_model": "accuracy_ci95", "ppo": "gold_gain_ci95"}
FILES = ("frontier.png", "policy/README.md", "reward_model/README.md", "samples.md")
MIN_SAMPLES = 5


def check_report(folder: str | Path) -> list[str]:
    """Problems of a finished run's folder, one line each: a missing key or file, or a number that is not finite.

    An empty list means that `report.json` and the files beside it are complete. No gain is asked for.
    """
    folder = Path(folder)
    problems = [
        f"{name} is missing or empty: run the quickstart again"
        for name in FILES
        if not (folder / name).is_file() or not (folder / name).stat().st_size
    ]
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [*problems, "report.json is missing: run the quickstart again"]
    except ValueError as error:
        return [*problems, f"report.json is not JSON: {error}"]
    if not isinstance(report, dict):
        return [*problems, f"report.json holds a {type(report).__name__}, not an object"]
    return problems + list(_check_keys(report)) + list(_check_finite(report, "report"))


def _check_keys(report: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in NUMBERS.items():
        values = report if not section else _section(report, section)
        for key in keys:
            if not _is_number(values.get(key)):
                yield f"report: `{f'{section}.' * bool(section)}{key}` is {values.get(key)!r}, not a number"
    for section, key in INTERVALS.items():
        interval = _section(report, section).get(key)
        if not (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))):
            yield f"report: `{section}.{key}` is {interval!r}, not [low, high]"
        elif math.inf > interval[0] > interval[1]:
            yield f"report: `{section}.{key}` is {interval}, with low above high"
    for key in ("size", "command"):
        if not isinstance(report.get(key), str) or not report[key]:
            yield f"report: `{key}` is {report.get(key)!r}, not text"
    for key in ("seconds", "versions"):
        if not _section(report, key):
            yield f"report: `{key}` is missing or empty"
    for stage, value in _section(report, "seconds").items():
        if not _is_number(value):
            yield f"report: `seconds.{stage}` is {value!r}, not a number"
    categories = _section(report, "categories")
    for name in CATEGORIES:
        row = _section(categories, name)
        for key in ("n", "gold_before", "gold_after"):
            if not _is_number(row.get(key)):
                yield f"report: `categories.{name}.{key}` is {row.get(key)!r}, not a number"
        if row.get("n") == 0:
            yield f"report: `categories.{name}.n` is 0, so its means say nothing"


def _check_finite(value: Any, where: str) -> Iterator[str]:
    """Every number of the report, also those that nobody asked for: NaN is how a broken stage shows."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _check_finite(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _check_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, not a finite number"


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # finite or not: `_check_finite` tells


def print_table(report: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Prints the run in one short table: the reward model against its baselines, and what PPO changed."""
    model, ppo = report["reward_model"], report["ppo"]
    table = Table(title=f"Quickstart, seed {report['seed']}, size {report['size']}", title_justify="left")
    for name, justify in (("what", "left"), ("before", "right"), ("after", "right"), ("note", "left")):
        table.add_column(name, justify=justify)
    low, high = model["accuracy_ci95"]
    baselines = (
        f"longer wins {model['longer_wins_baseline']:.3f} · annotator's ceiling {model['annotator_ceiling']:.3f}"
    )
    interval = f"95 % CI {low:.3f} to {high:.3f} · {model['heldout_pairs']} held-out pairs"
    table.add_row("reward model accuracy", "", f"{model['accuracy']:.3f}", f"{baselines}\n{interval}")
    low, high = ppo["gold_gain_ci95"]
    gain = f"gain {ppo['gold_gain']:+.3f} · 95 % CI {low:+.3f} to {high:+.3f}"
    n_prompts = sum(row["n"] for row in report["categories"].values())
    table.add_row("gold reward", *_pair(ppo, "gold", ".3f"), f"{gain}\n{n_prompts} held-out prompts")
    table.add_row("proxy reward", *_pair(ppo, "proxy", ".3f"), "what PPO maximised")
    kl_note = f"per completion, after {ppo['updates']} updates at β = {ppo['kl_coef']:.3g}"
    table.add_row("KL to the SFT policy, nats", "0.0", f"{ppo['kl']:.1f}", kl_note)
    table.add_row("mean length, tokens", *_pair(ppo, "mean_length", ".1f"), "of a completion")
    table.add_section()
    slowest = max(report["seconds"], key=report["seconds"].__getitem__)
    total = sum(report["seconds"].values())
    table.add_row("seconds", "", f"{total:.0f}", f"longest stage: {slowest}, {report['seconds'][slowest]:.0f}")
    table.add_row("peak memory, GB", "", f"{report['peak_memory_gb']:.2f}", "largest resident size of a process")
    (console or Console()).print(table)


def _pair(section: Mapping[str, float], name: str, spec: str) -> tuple[str, str]:
    return format(section[f"{name}_before"], spec), format(section[f"{name}_after"], spec)


def write_samples(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes completions before and after PPO as markdown that shows exactly what the model wrote.

    Rows hold `prompt`, `before`, `after` (text), and optionally `category`, `gold_before`, `gold_after`. Raises
    `ValueError` for fewer than five rows: one can be chosen to please, five are harder to choose.
    """
    if len(rows) < MIN_SAMPLES:
        raise ValueError(f"write_samples: {len(rows)} rows, at least {MIN_SAMPLES} are needed.")
    lines = ["# Completions before and after PPO", "", "Held-out prompts, drawn by the seed, not chosen.", ""]
    for row in rows:
        category = f" ({escape_markdown(row['category'])})" if row.get("category") else ""
        lines += [f"**{escape_markdown(row['prompt'])}**{category}", ""]
        for key in ("before", "after"):
            gold = f", gold {row[f'gold_{key}']:+.2f}" if f"gold_{key}" in row else ""
            lines.append(f"- {key}{gold}: {escape_markdown(row[key]) or '(empty)'}")
        lines.append("")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def peak_memory_gb() -> float:
    """Largest resident size, in 10^9 bytes, that this process or a child it has waited for reached.

    A maximum over processes, not a sum. From getrusage(2), whose `ru_maxrss` is in kilobytes on Linux and in bytes on
    macOS.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usages) * unit / 1e9


def results_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of several runs, one row a seed, for the README."""
    columns = ["seed", "reward model accuracy (95 % CI)", "longer wins", "ceiling", "gold before → after"]
    columns += ["gain (95 % CI)", "KL, nats", "tokens before → after", "minutes", "peak GB"]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for report in reports:
        model, ppo = report["reward_model"], report["ppo"]
        cells = [
            str(report["seed"]),
            "{:.3f} ({:.3f} to {:.3f})".format(model["accuracy"], *model["accuracy_ci95"]),
            f"{model['longer_wins_baseline']:.3f}",
            f"{model['annotator_ceiling']:.3f}",
            " → ".join(_pair(ppo, "gold", ".3f")),
            "{:+.3f} ({:+.3f} to {:+.3f})".format(ppo["gold_gain"], *ppo["gold_gain_ci95"]),
            f"{ppo['kl']:.1f}",
            " → ".join(_pair(ppo, "mean_length", ".1f")),
            f"{sum(report['seconds'].values()) / 60:.1f}",
            f"{report['peak_memory_gb']:.2f}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str]) -> int:
    """`FOLDER` checks a run and says what is missing; `--table REPORT.json …` prints the README's table."""
    if arguments[:1] == ["--table"]:
        print(results_table([json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments[1:]]))
        return 0
    found = check_report(arguments[0] if arguments else "runs/quickstart")
    print("\n".join(found) or "complete", file=sys.stderr if found else sys.stdout)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tables of docs/results/overoptimization.md, from docs/study/overoptimization.json."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STUDY = Path(__file__).parents[1] / "docs" / "study" / "overoptimization.json"
NOT_YET = "*Not measured yet.*\n"
ALT = "Gold and proxy reward against the square root of KL, for best-of-n and PPO"

Study = dict[str, Any]
Entry = dict[str, Any]
Markdown = Callable[..., str]


def finding(study: Study, markdown: Markdown) -> str:
    """What the intervals say, in sentences."""
    return f"{falls(study, 'ppo', 'PPO')}\n\n{falls(study, 'best_of_n', 'best-of-n')}{unfinished(study)}\n"


def falls(study: Study, method: str, title: str) -> str:
    entries = study[method]
    fallen = [entry for entry in entries if entry["fall"]["ci95"][0] > 0]
    reach = f"up to {max(entry['fit']['largest_kl'] for entry in entries):.1f} nats"
    if not fallen:
        return (
            f"**{capital(title)}** shows no fall of gold that differs from zero, in none of {len(entries)} settings, "
            f"{reach}."
        )
    told = [entry for entry in fallen if entry["fit"]["peaks_before_last"]]
    lines = [
        f"**{capital(title)}**: gold falls after its highest point in {len(fallen)} of {len(entries)} settings (the "
        f"interval of the fall is above zero), {reach}: {names(fallen)}."
    ]
    if told:
        lines.append(f"The interval of the fitted peak's KL excludes the last point with {names(told)}.")
    untold = [entry for entry in fallen if entry not in told]
    if untold:
        lines.append(f"With {names(untold)}, gold falls, but three seeds do not tell the fitted peak from the end.")
    return " ".join(lines)


def unfinished(study: Study) -> str:
    if not study["missing"]:
        return ""
    return f"\n\nNot run yet, and left out of the means: {'; '.join(study['missing'])}."


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def names(entries: Sequence[Entry]) -> str:
    parts = [f"{entry['pairs']:,} pairs and {entry['flips']:.0%} flipped" for entry in entries]
    return "; ".join(parts)


def ppo(study: Study, markdown: Markdown) -> str:
    last = study["settings"]["end_points"]
    return curves(study, "ppo", markdown, last)


def best_of_n(study: Study, markdown: Markdown) -> str:
    return curves(study, "best_of_n", markdown, 1)


def curves(study: Study, method: str, markdown: Markdown, last: int) -> str:
    accuracies = {(entry["pairs"], entry["flips"]): entry["accuracy"] for entry in study["best_of_n"]}
    rows = []
    for entry in study[method]:
        golds = [point["gold"]["mean"] for point in entry["points"]]
        end = sum(golds[-last:]) / last
        fit = entry["fit"]
        rows.append(
            [
                f"{entry['pairs']:,}",
                f"{entry['flips']:.0%}",
                f"{accuracies[entry['pairs'], entry['flips']]:.3f}",
                f"{golds[0]:.2f} → {max(golds):.2f} → {end:.2f}".replace("-", "−"),
                with_interval(entry["fall"], 2),
                with_interval(fit["alpha"], 2),
                with_interval(fit["beta"], 2),
                with_interval(fit["peak_kl"], 1),
                f"{fit['last_kl']:.1f}",
            ]
        )
    header = ("pairs", "flipped", "accuracy", "gold: start → highest → end", "fall", "α", "β", "KL of the peak, nats")
    return markdown((*header, "KL at the end"), rows, "r" * (len(header) + 1))


def with_interval(value: dict[str, Any], digits: int) -> str:
    """A mean with its interval. None is beyond what the points can say anything about."""
    mean, low, high = (beyond(number, digits) for number in (value["mean"], *value["ci95"]))
    return f"{mean} ({low} to {high})"


def beyond(number: float | None, digits: int) -> str:
    return "∞" if number is None else f"{number:.{digits}f}".replace("-", "−")


GUARDS = {
    "end": "none, until the end",
    "max_kl": "`max_kl` = {} nats",
    "best_proxy": "best training reward on held-out prompts (`load_best_model_at_end`)",
    "early_stopping": "early stopping on the same",
    "early_stopping_heldout_model": "early stopping on another reward model",
    "warning": "health warning of over-optimization, with the other reward model in `eval_reward_funcs`",
    "disagreement": "disagreement of both reward models",
}


def stops(study: Study, markdown: Markdown) -> str:
    rows = []
    for entry in study["stops"]:
        name, _, limit = entry["guard"].partition("=")
        rows.append(
            [
                GUARDS[name].format(limit),
                f"{entry['stopped']} of {entry['runs']}",
                f"{entry['rollouts']:.0f}",
                f"{entry['kl']:.1f}",
                with_interval(entry["gain_over_start"], 2),
                with_interval(entry["gain_over_end"], 2),
                f"{entry['below_best']:.2f}",
            ]
        )
    header = ("guard", "stops", "rollouts", "KL, nats", "gold over the start", "gold over the end", "below the best")
    return markdown(header, rows, "lrrrrrr")


def stories(study: Study, markdown: Markdown) -> str:
    """Stories of one held-out prompt of the first seed, for the fewest flipped and for the most flipped judgments."""
    rows = []
    for entry in study["ppo"]:
        for example in entry["examples"]:
            rows.append(
                [
                    f"{entry['pairs']:,}, {entry['flips']:.0%}",
                    example["at"],
                    f"{example['kl']:.1f}",
                    f"{example['gold']:.2f}".replace("-", "−"),
                    example["story"].replace("\n", " ").replace("|", "\\|"),
                ]
            )
    return markdown(("pairs, flipped", "at", "KL", "mean gold", "a story"), rows, "llrrl")


def plot(study: Study, markdown: Markdown) -> str:
    return f"![{ALT}](../study/overoptimization.png)\n"


def cost(study: Study, markdown: Markdown) -> str:
    return f"The runs took {study['cpu_seconds'] / 60:.0f} CPU minutes in all, on one core each.\n"


def overoptimization_tables(markdown: Markdown) -> dict[str, Callable[[Path], str]]:
    """Functions of tables by name, for `benchmarks/tables.py`.

    Args:
        markdown: function that makes a Markdown table of header, rows and alignment.
    """
    made = (finding, ppo, best_of_n, stops, stories, plot, cost)
    return {f"overoptimization_{make.__name__}": table_function(make, markdown) for make in made}


def table_function(make: Callable[[Study, Markdown], str], markdown: Markdown) -> Callable[[Path], str]:
    def table(page: Path) -> str:
        if not STUDY.is_file():
            return NOT_YET
        return make(json.loads(STUDY.read_text(encoding="utf-8")), markdown)

    return table

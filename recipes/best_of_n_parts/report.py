"""The report of `hf-rlhf best-of-n`: reward, gold reward and KL for every n."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hf_rlhf_ext.study.best_of_n import BestOfN, expected_best, expected_kl, kl_estimate, kl_of_best_of_n
from hf_rlhf_ext.study.statistics import mean_interval, paired_gain

Scores = Sequence[Sequence[float | None]]


def sizes_of(n: int) -> list[int]:
    """The numbers of completions in the table: powers of two up to n, and n."""
    sizes = [2**power for power in range(n.bit_length()) if 2**power < n]
    return [*sizes, n]


def report_of(result: BestOfN, gold: Scores | None) -> dict[str, Any]:
    """What the samples say, for JSON.

    Args:
        result: the samples.
        gold: [prompts][n] gold reward of each completion; `None` without one.
    """
    tokens = [len(ids) for ids in result.winner_ids]
    stopped = [of_prompt[best] for of_prompt, best in zip(result.stopped, result.best, strict=True)]
    report: dict[str, Any] = {
        "n": result.n,
        "prompts": len(result.rows),
        "dropped": [{"row": entry.row, "reason": entry.reason} for entry in result.dropped],
        "completions": len(result.rows) * result.n,
        "unscored": result.unscored,
        "reward_problems": result.reward_problems[:3],
        "winners": {"tokens": fmean(tokens), "stopped": fmean(stopped)},
        "by_n": by_n(result.rewards, gold),
        "every_n": every_n(result.rewards, gold),
    }
    if result.winner_logprobs is not None:
        report["kl_estimate"] = kl_estimate(result.winner_logprobs, result.n)
    if gold is not None:
        report["gold_missing"] = sum(value is None for row in gold for value in row)
    return report


def by_n(rewards: Scores, gold: Scores | None) -> list[dict[str, Any]]:
    """Means with 95 % intervals over prompts, for the n of the table; gains are over one completion, paired."""
    measured = {"reward": rewards} | ({} if gold is None else {"gold": gold})
    n = len(rewards[0])
    kl = expected_kl(rewards, sizes_of(n))
    best = {name: expected_best(rewards, values, sizes_of(n)) for name, values in measured.items()}
    entries = []
    for place, size in enumerate(sizes_of(n)):
        entry: dict[str, Any] = {"n": size, "kl": float(np.nanmean(kl[:, place])), "kl_bound": kl_of_best_of_n(size)}
        for name, values in best.items():
            entry[name] = mean_interval(values[:, place]).as_dict()
            entry[f"{name}_gain"] = paired_gain(values[:, 0], values[:, place]).as_dict()
        entries.append(entry)
    return entries


def every_n(rewards: Scores, gold: Scores | None) -> dict[str, list[float | None]]:
    """Means over prompts for n = 1 … N, without intervals."""
    n = len(rewards[0])
    columns: dict[str, list[float | None]] = {
        "kl": _means(expected_kl(rewards)),
        "kl_bound": [kl_of_best_of_n(size) for size in range(1, n + 1)],
        "reward": _means(expected_best(rewards)),
    }
    if gold is not None:
        columns["gold"] = _means(expected_best(rewards, gold))
    return columns


def _means(values: np.ndarray) -> list[float | None]:
    has_values = ~np.isnan(values).all(axis=0)
    return [float(np.nanmean(values[:, place])) if has_values[place] else None for place in range(values.shape[1])]


def print_report(report: dict[str, Any]) -> None:
    """Prints one row per n, and what was dropped."""
    names = [name for name in ("reward", "gold") if name in report["by_n"][0]]
    table = Table("n", "KL", "bound", title="the best of n: means over prompts, 95 % intervals", title_justify="left")
    for name in (*names, f"gain in {names[-1]}"):
        table.add_column(name)
    for entry in report["by_n"]:
        cells = [str(entry["n"]), f"{entry['kl']:.2f}", f"{entry['kl_bound']:.2f}"]
        cells += [_shown(entry[name]) for name in names]
        gain = "" if entry["n"] == 1 else _shown(entry[f"{names[-1]}_gain"], sign="+")
        table.add_row(*cells, gain)
    Console().print(table)
    print("KL in nats, of best-of-n to the policy as it was sampled from; log n - (n - 1)/n is its bound")
    for line in lines_of(report):
        print(line)


def lines_of(report: dict[str, Any]) -> list[str]:
    """What was dropped or left out, one line each."""
    lines = []
    reasons: dict[str, list[int]] = {}
    for entry in report["dropped"]:
        reasons.setdefault(entry["reason"], []).append(entry["row"])
    for reason, rows in reasons.items():
        shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        lines.append(f"{len(rows)} prompts dropped (rows {shown}): {reason}")
    if report["unscored"]:
        lines.append(f"{report['unscored']} completions without a reward, which cannot win")
    if report["reward_problems"]:
        lines.append(f"the first of them: {report['reward_problems'][0]}")
    if report.get("gold_missing"):
        lines.append(f"{report['gold_missing']} completions without a gold reward, which its means leave out")
    pairs = report.get("comparisons", {})
    for name, reason in (
        ("same_text", "best and worst completion have the same text"),
        ("same_reward", "best and worst completion have the same reward"),
        ("empty", "the best or the worst completion is empty"),
    ):
        if pairs.get(name):
            lines.append(f"comparisons: {pairs[name]} prompts left out: {reason}")
    empty = report["prompts"] - report.get("demonstrations", report["prompts"])
    if empty:
        lines.append(f"demonstrations: {empty} prompts left out: the best completion is empty")
    return lines


def _shown(interval: dict[str, Any], sign: str = "") -> str:
    if interval["mean"] is None:
        return "–"
    low, high = interval["ci95"]
    mean = f"{interval['mean']:{sign}.2f}"
    return mean if low is None else f"{mean} [{low:{sign}.2f}, {high:{sign}.2f}]"

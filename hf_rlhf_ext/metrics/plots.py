"""Plots of a run, drawn without pyplot: no global state, no display, the same picture on every machine."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .preference import JudgedPairs, longer_wins_baseline, reliability_bins

# Okabe & Ito's palette: told apart with any common colour blindness; the markers differ too, for grey print.
GOLD_COLOUR, PROXY_COLOUR, INK, GRID = "#D55E00", "#0072B2", "#333333", "#DDDDDD"
LABEL_SIZE, TICK_SIZE = 11, 9.5
MAX_GROUPS = 20  # bars that one panel can hold


def plot_frontier(points: Sequence[Mapping[str, float]], path: str | Path, *, title: str = "Reward against KL") -> Path:
    """Draws gold and proxy reward against KL, one point an update in the order of updates, and writes a PNG.

    `points` are dicts of `update`, `kl` (nats per completion), `gold`, `proxy`, and optionally `gold_ci`: the
    half-width of gold's interval, or its (low, high). Two panels over one KL axis, since the rewards' units differ: a
    proxy that still rises where gold no longer does is over-optimised (Gao et al. 2022, arXiv:2210.10760). Raises
    `ValueError` for no points, a missing key or a number that is not finite.
    """
    points = sorted(points, key=lambda point: point.get("update", 0))
    _check(points)
    figure = Figure(figsize=(8, 6.4), dpi=160, layout="constrained")  # 1,280 x 1,024 pixels
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw(upper, points, "gold", GOLD_COLOUR, "o-")
    _draw(lower, points, "proxy", PROXY_COLOUR, "s-")
    _draw_intervals(upper, points)
    _set_limits(upper, lower, points)
    upper.set_title(title, fontsize=LABEL_SIZE + 2, color=INK, loc="left", pad=10)
    upper.set_ylabel("gold reward", fontsize=LABEL_SIZE, color=GOLD_COLOUR)
    lower.set_ylabel("proxy reward (reward model)", fontsize=LABEL_SIZE, color=PROXY_COLOUR)
    lower.set_xlabel("KL(policy || reference), nats per completion", fontsize=LABEL_SIZE, color=INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})  # same bytes for the same points
    return path


def _check(points: Sequence[Mapping[str, float]]) -> None:
    if not points:
        raise ValueError("plot_frontier: no points to draw; pass at least the start of the run.")
    for position, point in enumerate(points):
        for key in ("update", "kl", "gold", "proxy"):
            if key not in point:
                raise ValueError(f"plot_frontier: point {position} has no `{key}`; it has {sorted(point)}.")
        values = {key: point[key] for key in ("update", "kl", "gold", "proxy")}
        values |= dict(zip(("gold_ci low", "gold_ci high"), _interval(point), strict=True))
        for key, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"plot_frontier: `{key}` of update {point['update']} is {value}, not a finite number.")


_PPO_PANELS = (
    ("reward of a completion", ("objective/scores", "objective/rlhf_reward", "eval_objective/scores")),
    ("KL to the reference, nats a completion", ("objective/kl", "eval_objective/kl", "eval_objective/kl_exact")),
    ("entropy, nats a completion", ("objective/entropy",)),
    ("tokens a completion", ("completions/mean_length", "eval_completions/mean_length")),
    ("explained variance of values; clipped tokens", ("val/explained_variance", "policy/clipfrac_avg")),
    ("β, reward a nat", ("objective/kl_coef",)),
)


def plot_ppo_run(log_history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """Draws a `PPOTrainer`'s `state.log_history` over optimizer steps as a PNG: rewards, KL, entropy, critic, β.

    Raises `ValueError` for a history without any of these figures.
    """
    names = {name for _, names in _PPO_PANELS for name in names}
    if not any(name in row for row in log_history for name in names):
        raise ValueError("log_history has no figures of a PPO run.")
    figure = Figure(figsize=(11, 8.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(3, 2).flatten(), _PPO_PANELS, strict=True):
        for name, colour, marker in zip(names, (PROXY_COLOUR, INK, GOLD_COLOUR), ("", "", "o"), strict=False):
            points = [(row["step"], row[name]) for row in log_history if name in row]
            if points:
                style = {"marker": marker or ("o" if len(points) == 1 else ""), "markersize": 4}
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=name, **style)
        axes.set_title(title, fontsize=LABEL_SIZE, color=INK, loc="left")
        axes.grid(color=GRID, linewidth=0.7)
        axes.tick_params(labelsize=TICK_SIZE, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=TICK_SIZE, labelcolor=INK)
    figure.supxlabel("optimizer steps", fontsize=LABEL_SIZE, color=INK)
    figure.savefig(path)
    return Path(path)


def _interval(point: Mapping) -> tuple[float, float]:
    """Gold's interval as (low, high); without one, gold itself twice."""
    ci = point.get("gold_ci")
    if ci is None:
        return point["gold"], point["gold"]
    if isinstance(ci, Sequence):
        return ci[0], ci[1]
    return point["gold"] - ci, point["gold"] + ci


def _draw(axes: Axes, points: Sequence[Mapping[str, float]], key: str, colour: str, style: str) -> None:
    kl, values = [point["kl"] for point in points], [point[key] for point in points]
    axes.plot(kl, values, style, color=colour, linewidth=1.6, markersize=6, markeredgecolor="white", zorder=3)
    ends = [("start", points[0], -1)] + [("end", points[-1], 1)] * (len(points) > 1)
    for name, point, side in ends:  # beside the ends, where the margin is: a label never hides a point of a usual run
        axes.annotate(
            f"{name}, update {point['update']:g}\n{point[key]:.2f} at {point['kl']:.1f} nats",
            (point["kl"], point[key]),
            xytext=(12 * side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=TICK_SIZE,
            color=INK,
            zorder=2,
        )
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TICK_SIZE, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GRID)


def _draw_intervals(axes: Axes, points: Sequence[Mapping[str, float]]) -> None:
    """Error bars, not a band: updates need not come in the order of their KL."""
    with_ci = [point for point in points if point.get("gold_ci") is not None]
    if not with_ci:
        return
    bounds = [_interval(point) for point in with_ci]
    below = [max(0.0, point["gold"] - low) for point, (low, _) in zip(with_ci, bounds, strict=True)]
    above = [max(0.0, high - point["gold"]) for point, (_, high) in zip(with_ci, bounds, strict=True)]
    kl, gold = [point["kl"] for point in with_ci], [point["gold"] for point in with_ci]
    bars = axes.errorbar(kl, gold, [below, above], fmt="none", ecolor=GOLD_COLOUR, alpha=0.4, capsize=3, zorder=1)
    axes.legend([bars], ["95 % interval"], loc="lower right", frameon=False, fontsize=TICK_SIZE, labelcolor=INK)


def _set_limits(upper: Axes, lower: Axes, points: Sequence[Mapping[str, float]]) -> None:
    """Room for the labels of both ends, and no axis that blows a rounding error up to full height."""
    low, high = min(point["kl"] for point in points), max(point["kl"] for point in points)
    width = max(high - low, 0.1)
    lower.set_xlim(low - 0.27 * width, high + 0.27 * width)
    lower.set_xticks([tick for tick in lower.get_xticks() if low - 0.05 * width <= tick <= high + 0.27 * width])
    for axes in (upper, lower):
        bottom, top = axes.get_ylim()
        padding = max(0.08 * (top - bottom), (0.2 - (top - bottom)) / 2)
        axes.set_ylim(bottom - padding, top + padding)


def histogram_png(edges: Sequence[float], counts: Sequence[int], xlabel: str) -> bytes:
    """A small histogram as the bytes of a PNG: `counts` (N) of the bins between `edges` (N + 1)."""
    figure = Figure(figsize=(5, 2.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color=PROXY_COLOUR)
    if min(edges) < 0 < max(edges):
        axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel(xlabel, fontsize=LABEL_SIZE, color=INK)
    axes.tick_params(labelsize=TICK_SIZE, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    target = BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def plot_judged(
    judged: JudgedPairs,
    path: str | Path,
    *,
    bins: Sequence[Mapping[str, float]] | None = None,
    xlabel: str = "raw score",
) -> Path:
    """A PNG of an evaluation: reliability, scores of chosen and rejected sides, and accuracy by group.

    `bins` are those of `reliability_bins` where the scores of `judged` are no log-odds (an ensemble's rewards, which
    `xlabel` then names).
    """
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flatten()
    _draw_reliability(panels[0], reliability_bins(judged.deltas, judged.targets) if bins is None else bins)
    _draw_scores(panels[1], judged, xlabel)
    groups = judged.groups()
    _draw_groups(panels[2], {name: groups[name] for name in ("length_gap", "margin") if name in groups}, judged)
    _draw_groups(panels[3], {name: groups[name] for name in ("category",) if name in groups}, judged)
    for axes in panels:
        axes.tick_params(labelsize=TICK_SIZE, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _draw_reliability(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    """On the diagonal, chances are what the model says."""
    axes.plot([0.5, 1], [0.5, 1], color=GRID, linewidth=2)
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color=PROXY_COLOUR)
    for entry in bins:
        place = (entry["confidence"], entry["accuracy"])
        axes.annotate(f"{entry['n']}", place, xytext=(4, -11), textcoords="offset points", fontsize=TICK_SIZE - 1)
    axes.set_xlabel("confidence, σ(|Δ|)", fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel("share of wins of the higher score", fontsize=LABEL_SIZE, color=INK)


def _draw_scores(axes: Axes, judged: JudgedPairs, xlabel: str) -> None:
    finite = {name: scores[np.isfinite(scores)] for name, scores in judged.sides.items()}  # some, of a diverged run
    edges = np.histogram_bin_edges(np.concatenate([*finite.values()]), bins=24)
    for name, colour in (("rejected", GOLD_COLOUR), ("chosen", PROXY_COLOUR)):
        axes.hist(finite[name], edges, histtype="stepfilled", color=colour, alpha=0.45, label=name)
    axes.legend(frameon=False, fontsize=TICK_SIZE)
    axes.set_xlabel(xlabel, fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel("completions", fontsize=LABEL_SIZE, color=INK)


def _draw_groups(axes: Axes, groups: Mapping[str, Mapping[str, Mapping[str, float]]], judged: JudgedPairs) -> None:
    named = [(f"{title.replace('_', ' ')} {name}", f) for title, one in groups.items() for name, f in one.items()]
    if not named:
        axes.axis("off")
        return
    named = named[:MAX_GROUPS][::-1]
    labels = [f"{name} ({found['n']})".replace("$", r"\$") for name, found in named]  # no formulas
    axes.barh(labels, [found["accuracy"] for _, found in named], color=PROXY_COLOUR)
    longer = longer_wins_baseline(judged.length_deltas, judged.targets)
    axes.axvline(longer, color=GOLD_COLOUR, linewidth=1.5, label=f"longer wins, {longer:.2f}")
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=TICK_SIZE, loc="lower right")
    axes.set_xlabel("accuracy (pairs in brackets)", fontsize=LABEL_SIZE, color=INK)

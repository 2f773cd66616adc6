"""Plot of a study of over-optimization: gold and proxy reward against √KL."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from .plots import GOLD_COLOR, GRID, INK, LABEL_SIZE, PROXY_COLOR, TICK_SIZE, _new_figure, _plain_axes, _save_png

METHODS = {"best_of_n": "best-of-n", "ppo": "PPO"}
_FLIP_STYLES = (("o", "-"), ("s", "--"))
_SIZE_COLORS = ("#56B4E9", PROXY_COLOR, "#000000", "#CC79A7", GOLD_COLOR)
"""From few comparisons to many."""


def plot_overoptimization(summary: Mapping, path: str | Path) -> Path:
    """Draws gold and proxy reward against √KL as a PNG: best-of-n at the left, PPO at the right, gold above.

    The points are means over seeds, with 95 % intervals of gold. Thin lines are the fits of gold, and a vertical line
    with a band is the peak of a fit with its interval, where that ends before the last point.

    Args:
        summary: Dict with `best_of_n` and `ppo`, which are lists with one dict per reward model: `pairs`, `flips`,
            `points` (dicts with `kl`, `gold` as dict of `mean` and `ci95`, `proxy`), and `fit` as
            `FittedCurves.as_dict` returns it.
        path: File to write. Missing folders are created.

    Returns:
        The path of the plot.

    Raises:
        ValueError: There are no points.
    """
    if not any(summary.get(method) for method in METHODS):
        raise ValueError("plot_overoptimization: no points to draw: pass at least one reward model.")
    entries = [entry for method in METHODS for entry in summary.get(method, ())]
    sizes = sorted({entry["pairs"] for entry in entries})
    levels = sorted({entry["flips"] for entry in entries})
    figure = _new_figure(11, 8.5, dpi=130)
    panels = figure.subplots(2, len(METHODS), sharex="col", sharey="row")
    for column, (method, title) in enumerate(METHODS.items()):
        for entry in summary.get(method, ()):
            color = _SIZE_COLORS[min(sizes.index(entry["pairs"]), len(_SIZE_COLORS) - 1)]
            marker, line = _FLIP_STYLES[min(levels.index(entry["flips"]), len(_FLIP_STYLES) - 1)]
            label = f"{entry['pairs']:,} pairs, {entry['flips']:.0%} flipped"
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.1}
            _draw_points(panels[0, column], entry["points"], style, label)
            _draw_fit(panels[0, column], entry, color, line)
            distances = _distances(entry["points"])
            panels[1, column].plot(distances, [point["proxy"] for point in entry["points"]], label=label, **style)
        panels[0, column].set_title(title, fontsize=LABEL_SIZE + 2, color=INK, loc="left")
        panels[1, column].set_xlabel("√KL(policy ‖ reference), √nats per completion", fontsize=LABEL_SIZE, color=INK)
    panels[0, 0].set_ylabel("gold reward", fontsize=LABEL_SIZE, color=INK)
    panels[1, 0].set_ylabel("proxy reward (reward model)", fontsize=LABEL_SIZE, color=INK)
    # One entry per reward model, although both methods have it.
    handles = {}
    for axes in panels[1]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    panels[1, 0].legend(handles.values(), handles, frameon=False, fontsize=TICK_SIZE, labelcolor=INK)
    for axes in panels.flatten():
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        _plain_axes(axes)
    return _save_png(figure, path)


def _distances(points: Sequence[Mapping]) -> list[float]:
    return [math.sqrt(max(point["kl"], 0.0)) for point in points]


def _draw_points(axes: Axes, points: Sequence[Mapping], style: Mapping, label: str) -> None:
    means = [point["gold"]["mean"] for point in points]
    distances = []
    for point, mean in zip(points, means, strict=True):
        low, high = point["gold"]["ci95"]
        # A single prompt has no interval. Matplotlib expects distances from the point.
        distances.append((0.0, 0.0) if low is None else (max(0.0, mean - low), max(0.0, high - mean)))
    at = _distances(points)
    axes.errorbar(at, means, np.transpose(distances), elinewidth=0.5, label=label, **style | {"linestyle": "none"})


def _draw_fit(axes: Axes, entry: Mapping, color: str, line: str) -> None:
    fit = entry["fit"]
    largest = max(_distances(entry["points"]))
    d = np.linspace(1e-6, largest, 200)
    curved = d if fit["form"] == "best_of_n" else np.log(d)
    gold = fit["start"] + d * (fit["alpha"]["mean"] - fit["beta"]["mean"] * curved)
    axes.plot(d, gold, color=color, linestyle=line, linewidth=1.4, zorder=2)
    peak = fit["peak_kl"]["mean"]
    if peak is not None and fit["peaks_before_last"]:
        height = np.interp(math.sqrt(peak), d, gold)
        low, high = (math.sqrt(end) for end in fit["peak_kl"]["ci95"])
        axes.plot([low, high], [height, height], color=color, linewidth=4, alpha=0.35, zorder=1)
        axes.plot([math.sqrt(peak)], [height], marker="D", markersize=7, color=color, markeredgecolor="white", zorder=4)

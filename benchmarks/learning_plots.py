"""Plots of `learning_study.py`: gold reward against KL and against time, with intervals over seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learning_grid import FINAL
from matplotlib.axes import Axes

from hf_rlhf_ext.metrics.plots import (
    GOLD_COLOR,
    GRID,
    INK,
    LABEL_SIZE,
    PROXY_COLOR,
    TICK_SIZE,
    _new_figure,
    _plain_axes,
    _save_png,
)

TITLES = {"stories": "stories260K", "smollm2": "SmolLM2-135M"}
_COLORS = (GOLD_COLOR, PROXY_COLOR, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*X"


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Writes a PNG for each world that has runs: `<folder>/<world>.png`."""
    for world, entry in summary["worlds"].items():
        plot_world(entry, TITLES[world], folder / f"{world}.png")


def plot_world(world: Mapping[str, Any], title: str, path: Path) -> Path:
    """Draws the compared settings: gold against KL at the left, against CPU minutes at the right."""
    figure = _new_figure(11, 5, dpi=130)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, entry) in enumerate(drawn(world).items()):
        style = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
        style |= {"linestyle": "--" if entry["kind"] != "ppo" else "-"}
        for axes, key in ((left, "kl"), (right, "minutes")):
            draw_curve(axes, entry["points"], key, name.removeprefix(FINAL), style)
    left.set_title(title, fontsize=LABEL_SIZE + 2, color=INK, loc="left")
    left.set_ylabel("gold reward", fontsize=LABEL_SIZE, color=INK)
    left.set_xlabel("KL(policy ‖ start), nats per completion", fontsize=LABEL_SIZE, color=INK)
    right.set_xlabel("CPU minutes of training", fontsize=LABEL_SIZE, color=INK)
    right.legend(frameon=False, fontsize=TICK_SIZE, labelcolor=INK, loc="lower right")
    for axes in (left, right):
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        _plain_axes(axes)
    return _save_png(figure, path)


def drawn(world: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The settings of the comparison; of a world without one yet, those with runs of full length."""
    settings = world["settings"]
    if "compared" in world:
        return {name: settings[name] for name in world["compared"]["settings"]}
    full = {name: entry for name, entry in settings.items() if entry["rollouts"] is None}
    return full or {name: settings[name] for name in list(settings)[: len(_COLORS)]}


def draw_curve(axes: Axes, points: list[Mapping[str, Any]], key: str, label: str, style: Mapping[str, Any]) -> None:
    """A line through the means over seeds, with intervals of the gold reward."""
    means = [point["gold"]["mean"] for point in points]
    below, above = [], []
    for point, mean in zip(points, means, strict=True):
        low, high = point["gold"]["ci95"]
        # A single seed has no interval. Matplotlib expects distances from the point.
        below.append(0.0 if low is None else max(0.0, mean - low))
        above.append(0.0 if high is None else max(0.0, high - mean))
    at = [point[key] for point in points]
    axes.errorbar(at, means, [below, above], label=label, markersize=4, linewidth=1.2, elinewidth=0.5, **style)

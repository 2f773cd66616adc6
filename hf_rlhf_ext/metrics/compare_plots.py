"""Plots of a comparison of systems: gold against KL and against time, win rates, use cases, calibration.

One color per kind of system (Okabe and Ito's palette, which is safe for color blindness), one marker per system of a
kind, and each system's name beside its point.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from .plots import GRID, INK, LABEL_SIZE, TICK_SIZE, _new_figure, _plain_axes, _save_png

COLORS = {
    "base": "#7A7A7A",
    "sft": "#000000",
    "best_of_n": "#0072B2",
    "rejection_sampling": "#56B4E9",
    "dpo": "#E69F00",
    "grpo": "#009E73",
    "rloo": "#CC79A7",
    "ppo": "#D55E00",
}
"""Color of each kind of system."""
OTHER_COLOR = "#8B6A3E"
MARKERS = "osD^vP*Xhp<>8"
WIN_COLORS = "PuOr_r"
MAX_CATEGORIES = 9
"""Panels that one plot of use cases can hold."""
GAP = 0.052
"""Smallest distance between two names beside a plot, as a share of its height."""

Point = Mapping[str, Any]


def plot_gold_against_kl(points: Sequence[Point], path: str | Path, *, gold: str = "gold reward") -> Path:
    """Draws gold against KL(system ‖ reference) as a PNG: the end of each system, and its way there.

    The axis of KL is in nats at distances of √KL, along which the gold of best-of-n and RL is close to a parabola (Gao
    et al. 2022, arXiv:2210.10760).

    Args:
        points: one mapping per system, with `name`, `kind`, `gold` (`mean` and `ci95`), `kl` (nats per completion),
            perhaps `kl_ci95`, and perhaps `curves`: lists of mappings with `kl` and `gold`, one list per seed.
        path: File to write. Missing folders are created.
        gold: Name of the judge's score.

    Raises:
        ValueError: There are no points.
    """
    figure = _new_figure(10.5, 6.4, dpi=130)
    axes = figure.subplots()
    axes.set_xscale("function", functions=(_signed_root, _signed_square))
    _draw_systems(axes, points, "kl")
    _draw_best_of_n_curve(axes, points)
    axes.set_title(
        "Quality against distance from the SFT policy: up is better, left is closer",
        loc="left",
        fontsize=LABEL_SIZE + 1,
    )
    axes.set_xlabel("KL to the SFT policy, nats per completion (axis spaced by √KL)", fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel(f"{gold} (95 % intervals)", fontsize=LABEL_SIZE, color=INK)
    largest = max(point["kl"] for point in points)
    axes.set_xlim(min(0.0, *(point["kl"] for point in points)) - 0.002 * largest, 1.12 * max(largest, 0.05))
    axes.set_xticks(_root_ticks(max(largest, 0.05)))
    _name_beside(axes, points, "kl")
    return _save_png(figure, path)


def plot_gold_against_time(
    points: Sequence[Point], path: str | Path, *, gold: str = "gold reward", clock: str = "wall time"
) -> Path:
    """Draws gold against the training time of each system, with all that it builds on, as a PNG.

    Args:
        points: as in `plot_gold_against_kl`, with `seconds` in place of `kl`.
        path: File to write. Missing folders are created.
        gold: Name of the judge's score.
        clock: Which time it is.

    Raises:
        ValueError: There are no points.
    """
    figure = _new_figure(10.5, 6.4, dpi=130)
    axes = figure.subplots()
    unit, divisor = _unit_of_time(max((point["seconds"] for point in points), default=0.0))
    scaled = [_scaled(point, divisor) for point in points]
    _draw_systems(axes, scaled, "time")
    axes.set_title("Quality against training time: up is better, left is cheaper", loc="left", fontsize=LABEL_SIZE + 1)
    axes.set_xlabel(
        f"{clock} of training in {unit}, with SFT and reward model where the system builds on them",
        fontsize=LABEL_SIZE,
        color=INK,
    )
    axes.set_ylabel(f"{gold} (95 % intervals)", fontsize=LABEL_SIZE, color=INK)
    largest = max(point["time"] for point in scaled)
    axes.set_xlim(-0.03 * max(largest, 1e-9), 1.08 * max(largest, 1e-9))
    _name_beside(axes, scaled, "time")
    return _save_png(figure, path)


def _scaled(point: Point, divisor: float) -> dict[str, Any]:
    curves = []
    for curve in point.get("curves", ()):
        curves.append([{"time": step["seconds"] / divisor, "gold": step["gold"]} for step in curve])
    return {**point, "time": point["seconds"] / divisor, "curves": curves}


def _unit_of_time(seconds: float) -> tuple[str, float]:
    return ("minutes", 60.0) if seconds >= 120 else ("seconds", 1.0)


def _signed_root(values: Any) -> Any:
    values = np.asarray(values, float)
    return np.sign(values) * np.sqrt(np.abs(values))  # an estimate of KL near zero may be negative


def _signed_square(values: Any) -> Any:
    values = np.asarray(values, float)
    return np.sign(values) * values**2


def _root_ticks(largest: float) -> list[float]:
    """Round numbers from 0 whose roots are about equally far from each other."""
    ticks = [0.0]
    for share in (0.04, 0.16, 0.36, 0.64, 1.0):
        value = share * largest
        digit = 10 ** math.floor(math.log10(value))
        rounded = round(value / digit) * digit
        if rounded > ticks[-1]:
            ticks.append(rounded)
    return ticks


def system_styles(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Color and marker of each system: a color per kind, and the next marker for each further system of a kind."""
    seen: dict[str, int] = {}
    styles = []
    for point in points:
        kind = point["kind"]
        number = seen.get(kind, 0)
        seen[kind] = number + 1
        styles.append((COLORS.get(kind, OTHER_COLOR), MARKERS[number % len(MARKERS)]))
    return styles


def _draw_systems(axes: Axes, points: Sequence[Point], x: str) -> None:
    """Draws the end of each system with its intervals, and a thin line per seed through its snapshots."""
    if not points:
        raise ValueError("no system has gold scores: there is nothing to draw.")
    for point, (color, marker) in zip(points, system_styles(points), strict=True):
        for curve in point.get("curves", ()):
            known = [step for step in curve if step.get("gold") is not None and step.get(x) is not None]
            if len(known) > 1:
                axes.plot(
                    [step[x] for step in known],
                    [step["gold"] for step in known],
                    color=color,
                    linewidth=1.1,
                    alpha=0.45,
                    marker=".",
                    markersize=4,
                    zorder=2,
                )
        gold_mean, across = point["gold"]["mean"], point.get(f"{x}_ci95")
        style = {"color": color, "markersize": 8, "capsize": 3, "zorder": 4, "markeredgecolor": "white"}
        axes.errorbar(
            [point[x]],
            [gold_mean],
            yerr=_distances(gold_mean, point["gold"]["ci95"]),
            xerr=_distances(point[x], across),
            fmt=marker,
            elinewidth=1.3,
            **style,
        )
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(y=0.08)
    _plain_axes(axes)


def _distances(mean: float, interval: Sequence[float | None] | None) -> list[list[float]] | None:
    """Distances of the ends of an interval from the mean, as matplotlib expects them; None without an interval."""
    if interval is None or None in interval:
        return None
    low, high = interval
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]


def _draw_best_of_n_curve(axes: Axes, points: Sequence[Point]) -> None:
    """Joins the systems of best-of-n by a dashed line, from the fewest samples to the most."""
    chosen = sorted((point for point in points if point["kind"] == "best_of_n"), key=lambda point: point["kl"])
    if len(chosen) > 1:
        axes.plot(
            [point["kl"] for point in chosen],
            [point["gold"]["mean"] for point in chosen],
            color=COLORS["best_of_n"],
            linestyle="--",
            linewidth=1.2,
            zorder=2,
        )


def _name_beside(axes: Axes, points: Sequence[Point], x: str) -> None:
    """Writes the names in a column at the right, in the order of the heights, each joined with its point."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = []
    for point, (color, _) in zip(points, system_styles(points), strict=True):
        _, height = to_axes.transform((max(point[x], 0.0), point["gold"]["mean"]))
        placed.append((float(height), point, color))
    placed.sort(key=lambda entry: entry[0])
    heights = _spread([height for height, _, _ in placed], GAP)
    for height, (_, point, color) in zip(heights, placed, strict=True):
        axes.annotate(
            f"{_plain(point['name'])}  {point['gold']['mean']:.2f}",
            (point[x], point["gold"]["mean"]),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=TICK_SIZE + 0.5,
            color=INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.9, "linestyle": ":", "shrinkB": 5},
            zorder=1,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves sorted heights apart to at least `gap`, as near as possible to where they were, within 0 … 1.

    Heights that would overlap become a group with equal gaps around their mean; groups that touch become one.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _top(groups[-2], gap) + gap:
            last = groups.pop()
            groups[-1] += last
    spread = []
    for group in groups:
        spread += [_bottom(group, gap) + gap * position for position in range(len(group))]
    return spread


def _bottom(group: Sequence[float], gap: float) -> float:
    """Height of the lowest name of a group."""
    half = gap * (len(group) - 1) / 2
    middle = sum(group) / len(group)
    return min(max(middle, half), max(half, 1 - half)) - half


def _top(group: Sequence[float], gap: float) -> float:
    """Height of the highest name of a group."""
    return _bottom(group, gap) + gap * (len(group) - 1)


def _plain(name: str) -> str:
    return str(name).replace("$", r"\$")  # between two dollar signs, matplotlib reads a formula


# --- win rates --------------------------------------------------------------------------------------------------------


def plot_win_rates(names: Sequence[str], rates: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Draws the win rate of each system (row) against each other one (column) as a PNG.

    Numbers are percent, with ties as one half; bold where the 95 % interval excludes 50 %.

    Args:
        names: the systems, in the order of the rows and columns.
        rates: by "a|b", the win rate of a as a mapping of `mean` and `ci95`.
        path: File to write. Missing folders are created.

    Raises:
        ValueError: There are no systems.
    """
    if not names:
        raise ValueError("no system was compared: there is nothing to draw.")
    cells = 0.6 * max(4, len(names))  # inches
    longest = max(len(name) for name in names)
    figure = _new_figure(cells + 1.9 + 0.08 * longest, cells + 0.7 + 0.06 * longest, dpi=130)
    axes = figure.subplots()
    table = np.full((len(names), len(names)), np.nan)
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            rate = rates.get(f"{first}|{second}")
            if rate is not None and rate["mean"] is not None:
                table[row, column] = rate["mean"]
    colors = colormaps[WIN_COLORS].with_extremes(bad="#F2F2F2")
    image = axes.imshow(np.ma.masked_invalid(table), cmap=colors, vmin=0, vmax=1)
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            if not math.isnan(table[row, column]):
                _write_rate(axes, row, column, rates[f"{first}|{second}"])
    plain_names = [_plain(name) for name in names]
    axes.set_xticks(range(len(names)), plain_names, rotation=45, ha="right", fontsize=TICK_SIZE)
    axes.set_yticks(range(len(names)), plain_names, fontsize=TICK_SIZE)
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("How often the row beats the column, in %", loc="left", fontsize=LABEL_SIZE + 1, color=INK)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0: column better", "50: equal", "100: row better"], fontsize=TICK_SIZE, color=INK)
    bar.outline.set_visible(False)
    return _save_png(figure, path)


def _write_rate(axes: Axes, row: int, column: int, rate: Mapping[str, Any]) -> None:
    low, high = rate["ci95"]
    decided = low is not None and (low > 0.5 or high < 0.5)
    is_dark = abs(rate["mean"] - 0.5) > 0.32
    axes.text(
        column,
        row,
        f"{100 * rate['mean']:.0f}",
        ha="center",
        va="center",
        fontsize=TICK_SIZE + 0.5,
        fontweight="bold" if decided else "normal",
        color="white" if is_dark else "black",
    )


# --- use cases --------------------------------------------------------------------------------------------------------


def plot_categories(
    points: Sequence[Point], categories: Mapping[str, Mapping[str, Any]], path: str | Path, *, gold: str = "gold reward"
) -> Path:
    """Draws the gold of each system in each use case as a PNG, one panel per use case.

    Args:
        points: the systems in their order, with `name` and `kind`.
        categories: by use case, `n` and `systems`: by name, a mapping whose `gold` has `mean` and `ci95`. At most nine
            are drawn, those with the most prompts.
        path: File to write. Missing folders are created.
        gold: Name of the judge's score.

    Raises:
        ValueError: There are no use cases or no systems.
    """
    if not points or not categories:
        raise ValueError("no use cases: there is nothing to draw.")
    chosen = sorted(categories, key=lambda name: -categories[name]["n"])[:MAX_CATEGORIES]
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = _new_figure(2.0 + 3.1 * columns, 0.8 + rows * (0.7 + 0.27 * len(points)), dpi=130)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in panels[len(chosen) :]:
        axes.axis("off")
    for axes, name in zip(panels, chosen, strict=False):  # the last row may have empty panels
        _draw_category(axes, points, categories[name]["systems"])
        axes.set_title(f"{_plain(name)} ({categories[name]['n']} prompts)", loc="left", fontsize=LABEL_SIZE, color=INK)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(points)), [_plain(point["name"]) for point in points])
    panels[0].invert_yaxis()  # the first system at the top
    figure.supxlabel(f"{gold} (95 % intervals; dotted: the reference)", fontsize=LABEL_SIZE, color=INK)
    return _save_png(figure, path)


def _draw_category(axes: Axes, points: Sequence[Point], systems: Mapping[str, Any]) -> None:
    for position, (point, (color, marker)) in enumerate(zip(points, system_styles(points), strict=True)):
        value = systems.get(point["name"], {}).get("gold")
        if value is None or value["mean"] is None:
            continue
        if point.get("is_reference"):
            axes.axvline(value["mean"], color=INK, linewidth=0.9, linestyle=":", zorder=1)
        axes.errorbar(
            [value["mean"]],
            [position],
            xerr=_distances(value["mean"], value["ci95"]),
            fmt=marker,
            color=color,
            markersize=6,
            capsize=2.5,
            markeredgecolor="white",
        )
    axes.grid(color=GRID, linewidth=0.7, axis="x")
    axes.set_axisbelow(True)
    _plain_axes(axes)


# --- calibration ------------------------------------------------------------------------------------------------------


def plot_calibration(bins: Sequence[Mapping[str, Any]], path: str | Path, *, judge: str = "the judge") -> Path:
    """Draws how often a judge agrees with the reward model, against how sure the reward model is, as a PNG.

    Args:
        bins: mappings of `predicted` (mean confidence, 0.5 to 1), `observed` (`mean` and `ci95` of the agreement) and
            `n` (pairs).
        path: File to write. Missing folders are created.
        judge: Name of the judge.

    Raises:
        ValueError: There are no bins.
    """
    if not bins:
        raise ValueError("no pair has both rewards and a judgment: there is nothing to draw.")
    figure = _new_figure(6.6, 5.2, dpi=130)
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="#777777", linewidth=1.4, linestyle="--", zorder=1, label="calibrated")
    axes.axhline(0.5, color=GRID, linewidth=1.2, zorder=0)
    for entry in bins:
        mean = entry["observed"]["mean"]
        axes.errorbar(
            [entry["predicted"]],
            [mean],
            yerr=_distances(mean, entry["observed"]["ci95"]),
            fmt="o",
            color=COLORS["best_of_n"],
            capsize=3,
            markersize=7,
            zorder=3,
        )
        axes.annotate(
            f"{entry['n']} pairs",
            (entry["predicted"], mean),
            xytext=(7, -11),
            textcoords="offset points",
            fontsize=TICK_SIZE - 0.5,
            color=INK,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    axes.legend(loc="lower right", frameon=False, fontsize=TICK_SIZE, labelcolor=INK)
    axes.set_title("Does the judge agree with the reward model?", loc="left", fontsize=LABEL_SIZE + 1, color=INK)
    axes.set_xlabel("P(better) by the reward model, of the side it prefers", fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel(f"share that {_plain(judge)} prefers too", fontsize=LABEL_SIZE, color=INK)
    axes.set_xlim(0.48, 1.08)
    axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    low = min(0.4, *(entry["observed"]["mean"] - 0.05 for entry in bins))
    axes.set_ylim(max(0.0, low), 1.02)
    _plain_axes(axes)
    return _save_png(figure, path)

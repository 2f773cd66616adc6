"""Draws the runs of `make bench-memory`: planned against measured memory, and the error of each plan.

`make bench-memory` draws it with its table. This only draws the points in docs/study/memory again:

python benchmarks/memory_plot.py
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from hf_rlhf_ext.metrics.plots import (
    GOLD_COLOR,
    GRID,
    INK,
    LABEL_SIZE,
    PROXY_COLOR,
    TICK_SIZE,
    _new_figure,
    _plain_axes,
)

STUDY = Path(__file__).parents[1] / "docs" / "study"
POINTS = STUDY / "memory"
PLOT = STUDY / "memory.png"
BANDS = (5, 15)
"""Errors in percent that the bands show: the targets of the median and of the largest error."""
DIGEST_KEY = "Description"
"""Key of the text in the PNG that names the points it shows, see `digest_of`."""

_STAGES = {"sft": ("SFT", PROXY_COLOR), "reward": ("reward model", "#009E73"), "ppo": ("PPO", GOLD_COLOR)}
"""What a stage is called, and its color."""
_GB = 10**9
_MARGIN = 1.3  # factor between the outermost points and the ends of the axes
_TICKS = [mantissa * 10**power for power in range(-3, 4) for mantissa in (1, 2, 5)]


def read_points(folder: Path = POINTS) -> list[dict[str, Any]]:
    """The measured points in a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def digest_of(points: Sequence[Mapping[str, Any]]) -> str:
    """A digest of what the plot shows of the points. The file of the plot has it, so that a test finds an old plot."""
    shown = [[point["name"], point["measured"], point["predicted"], point["chosen_after_freeze"]] for point in points]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def plot_points(points: Sequence[Mapping[str, Any]], path: Path = PLOT) -> Path:
    """Draws points as a PNG: planned memory at the left and errors at the right, both against measured memory.

    Args:
        points: What `make bench-memory` keeps of each run: `name`, `stage`, `measured` and `predicted` (bytes),
            `error` (a fraction of what was measured), and `chosen_after_freeze`.
        path: File to write. Missing folders are created.

    Returns:
        The path of the plot.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("plot_points: no points to draw: run `make bench-memory` first.")
    sizes = [point[key] / _GB for point in points for key in ("measured", "predicted")]
    limits = (min(sizes) / _MARGIN, max(sizes) * _MARGIN)
    figure = _new_figure(11, 5, dpi=130)
    left, right = figure.subplots(1, 2)
    _draw_memory(left, points, limits)
    _draw_errors(right, points, limits)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, which it writes as `Software`.
    figure.savefig(path, format="png", metadata={"Software": None, DIGEST_KEY: digest_of(points)})
    return path


def _draw_memory(axes: Axes, points: Sequence[Mapping[str, Any]], limits: tuple[float, float]) -> None:
    """Planned against measured memory, with the diagonal and the bands around it."""
    for band in BANDS:
        below = [size * (1 - band / 100) for size in limits]
        above = [size * (1 + band / 100) for size in limits]
        axes.fill_between(limits, below, above, color=INK, alpha=0.1, linewidth=0, zorder=0)
    axes.plot(limits, limits, color=INK, linewidth=0.9, zorder=1)
    _draw_points(axes, points, lambda point: point["predicted"] / _GB)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    _sizes_as_ticks(axes.yaxis)
    axes.set_ylabel("planned, GB (10⁹ bytes)", fontsize=LABEL_SIZE, color=INK)
    axes.legend(frameon=False, fontsize=TICK_SIZE, labelcolor=INK, loc="upper left")
    _finish(axes, limits)


def _draw_errors(axes: Axes, points: Sequence[Mapping[str, Any]], limits: tuple[float, float]) -> None:
    """The error of each plan, on the same bands, where small ones can be told apart."""
    for band in BANDS:
        axes.axhspan(-band, band, color=INK, alpha=0.1, linewidth=0, zorder=0)
        axes.text(limits[0] * 1.03, band, f"±{band}%", fontsize=TICK_SIZE, color=INK, va="top")
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
    _draw_points(axes, points, lambda point: 100 * point["error"])
    largest = max(abs(100 * point["error"]) for point in points)
    end = max(18.0, 1.1 * largest)
    axes.set_ylim(-end, end)
    axes.set_ylabel("planned, relative to measured, %", fontsize=LABEL_SIZE, color=INK)
    axes.set_title("Above 0, the plan says more", fontsize=LABEL_SIZE, color=INK, loc="left")
    _finish(axes, limits)


def _draw_points(axes: Axes, points: Sequence[Mapping[str, Any]], height: Callable[[Mapping[str, Any]], float]) -> None:
    """Circles for points with which the planner was made, triangles for those that were chosen afterward."""
    for stage, (label, color) in _STAGES.items():
        for after, marker, when in ((False, "o", ""), (True, "^", ", chosen after the planner")):
            drawn = [point for point in points if (point["stage"], point["chosen_after_freeze"]) == (stage, after)]
            if drawn:
                axes.scatter(
                    [point["measured"] / _GB for point in drawn],
                    [height(point) for point in drawn],
                    s=46,
                    color=color,
                    marker=marker,
                    edgecolor="white",
                    linewidth=0.8,
                    alpha=0.85,
                    label=label + when,
                    zorder=3,
                )


def _finish(axes: Axes, limits: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    _sizes_as_ticks(axes.xaxis)
    axes.set_xlabel("measured, GB (10⁹ bytes)", fontsize=LABEL_SIZE, color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain_axes(axes)


def _sizes_as_ticks(axis: Any) -> None:
    """Ticks such as 0.2, 0.5 and 1 on a logarithmic axis, in place of powers of ten."""
    axis.set_major_locator(FixedLocator(_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axis.set_minor_formatter(NullFormatter())


def main() -> None:
    path = plot_points(read_points())
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()

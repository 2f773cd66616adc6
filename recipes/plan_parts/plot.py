"""The plot of a memory plan: a stacked bar for each phase, and lines for the memory of cards."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes

from hf_rlhf_ext.cli.memory_table import CARDS
from hf_rlhf_ext.metrics.plots import INK, LABEL_SIZE, TICK_SIZE, _new_figure, _plain_axes, _save_png
from hf_rlhf_ext.modeling.memory.plan import PART_NAMES, MemoryPlan
from hf_rlhf_ext.training.memory_line import GB, in_gb

RESERVE = "CUDA and fragments"
_COLORS = colormaps["tab20"]
_RESERVE_COLOR = "#BBBBBB"


def plot_plan(plan: MemoryPlan, path: str | Path, *, n_bytes: int | None = None) -> Path:
    """Draws the parts of each phase as a stacked bar, as a PNG.

    Args:
        plan: The plan.
        path: File to write. Missing folders are created.
        n_bytes: Memory of the device, in bytes, drawn as a line. None draws lines for the common cards near the peak.

    Returns:
        The path of the plot.
    """
    figure = _new_figure(max(6.0, 2.6 + 1.1 * len(plan.phases)), 4.8, dpi=130)
    axes = figure.subplots()
    _draw_bars(axes, plan)
    _draw_lines(axes, plan, n_bytes)
    title = f"{plan.model}, {plan.stage}: {in_gb(plan.n_bytes)} at {plan.peak.name}".replace("$", r"\$")
    axes.set_title(title, fontsize=LABEL_SIZE + 1, color=INK, loc="left")
    axes.set_ylabel("GB (10⁹ bytes)", fontsize=LABEL_SIZE, color=INK)
    # The legend is read from the top, as the bars are.
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], frameon=False, fontsize=TICK_SIZE, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    _plain_axes(axes)
    return _save_png(figure, path)


def _draw_bars(axes: Axes, plan: MemoryPlan) -> None:
    names = [phase.name.replace(" ", "\n") for phase in plan.phases]
    sizes = [{part.name: part.n_bytes for part in phase.parts} for phase in plan.phases]
    tops = [0.0] * len(names)
    for number, part in enumerate(PART_NAMES):
        heights = [of_phase.get(part, 0) / GB for of_phase in sizes]
        if any(heights):
            axes.bar(names, heights, 0.7, bottom=tops, label=part, color=_COLORS(number % 20))
            tops = [top + height for top, height in zip(tops, heights, strict=True)]
    if plan.reserve:
        axes.bar(names, [plan.reserve / GB] * len(names), 0.7, bottom=tops, label=RESERVE, color=_RESERVE_COLOR)


def _draw_lines(axes: Axes, plan: MemoryPlan, n_bytes: int | None) -> None:
    """Draws the memory of the device, or of the cards around the peak: the largest that is too small, and the next."""
    lines = {f"{in_gb(n_bytes)}, all there is": n_bytes / GB} if n_bytes is not None else _nearest_cards(plan)
    highest = max([plan.n_bytes / GB, *lines.values()])
    axes.set_ylim(0, 1.08 * highest)
    for label, height in lines.items():
        axes.axhline(height, color=INK, linewidth=1.1, linestyle="--")
        axes.text(0.01, height, label, transform=axes.get_yaxis_transform(), va="bottom", fontsize=TICK_SIZE)


def _nearest_cards(plan: MemoryPlan) -> dict[str, float]:
    if plan.device == "cpu":
        return {}
    too_small = [card for card in CARDS if not plan.fits(card * GB)][-1:]
    fitting = [card for card in CARDS if plan.fits(card * GB)][:1]
    return {f"{card} GB card": float(card) for card in too_small + fitting}

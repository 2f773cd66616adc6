"""Plots of a run. They are drawn without pyplot, so they have no global state and need no display."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..reward.preference_metrics import JudgedPairs, longer_wins_baseline, reliability_bins

# Okabe & Ito's palette, which is safe for color blindness. The markers differ too, for grayscale print.
GOLD_COLOR = "#D55E00"
PROXY_COLOR = "#0072B2"
INK = "#333333"
GRID = "#DDDDDD"
LABEL_SIZE = 11
TICK_SIZE = 9.5
MAX_GROUPS = 20  # bars that one panel can hold

_NO_SOFTWARE_TAG = {"Software": None}  # with matplotlib's version in it, equal plots would have different bytes


def plot_frontier(points: Sequence[Mapping[str, float]], path: str | Path, *, title: str = "Reward against KL") -> Path:
    """Draws gold and proxy reward against KL as a PNG, with one point per evaluated update.

    Both rewards have their own panel, since their units differ. If the proxy reward still rises while the gold reward
    does not, the proxy is over-optimized (Gao et al. 2022, arXiv:2210.10760).

    Args:
        points: Dicts with `update`, `kl` (nats per completion), `gold`, `proxy` and optionally `gold_ci`, which is the
            half-width of the interval of the gold reward or its (low, high).
        path: File to write. Missing folders are created.
        title: Title of the plot.

    Returns:
        The path of the plot.

    Raises:
        ValueError: There are no points, a key is missing, or a number is not finite.
    """
    points = sorted(points, key=lambda point: point.get("update", 0))
    _check_points(points)
    figure = _new_figure(8, 6.4, dpi=160)  # 1,280 x 1,024 pixels
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_frontier(upper, points, "gold", GOLD_COLOR, "o-")
    _draw_frontier(lower, points, "proxy", PROXY_COLOR, "s-")
    _draw_gold_intervals(upper, points)
    _set_limits(upper, lower, points)
    upper.set_title(title, fontsize=LABEL_SIZE + 2, color=INK, loc="left", pad=10)
    upper.set_ylabel("gold reward", fontsize=LABEL_SIZE, color=GOLD_COLOR)
    lower.set_ylabel("proxy reward (reward model)", fontsize=LABEL_SIZE, color=PROXY_COLOR)
    lower.set_xlabel("KL(policy || reference), nats per completion", fontsize=LABEL_SIZE, color=INK)
    return _save_png(figure, path)


def _new_figure(width: float, height: float, *, dpi: int) -> Figure:
    """Returns a figure, with its size in inches, that has its own canvas instead of pyplot's."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save_png(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata=_NO_SOFTWARE_TAG)
    return path


def _plain_axes(axes: Axes) -> None:
    axes.tick_params(labelsize=TICK_SIZE, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _check_points(points: Sequence[Mapping[str, float]]) -> None:
    if not points:
        raise ValueError("plot_frontier: no points to draw: pass at least the start of the run.")
    for position, point in enumerate(points):
        numbers = {}
        for key in ("update", "kl", "gold", "proxy"):
            if key not in point:
                raise ValueError(f"plot_frontier: point {position} has no `{key}`; it has {sorted(point)}.")
            numbers[key] = point[key]
        numbers["gold_ci low"], numbers["gold_ci high"] = _gold_bounds(point)
        for key, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"plot_frontier: `{key}` of update {point['update']} is {value}, not a finite number.")


def _gold_bounds(point: Mapping) -> tuple[float, float]:
    """Returns the interval of the gold reward as (low, high). Without an interval, both are the gold reward."""
    ci = point.get("gold_ci")
    if ci is None:
        return point["gold"], point["gold"]
    if isinstance(ci, Sequence):
        return ci[0], ci[1]
    return point["gold"] - ci, point["gold"] + ci


def _draw_frontier(
    axes: Axes,
    points: Sequence[Mapping[str, float]],
    key: str,
    color: str,
    style: str,
) -> None:
    kl = [point["kl"] for point in points]
    rewards = [point[key] for point in points]
    axes.plot(
        kl,
        rewards,
        style,
        color=color,
        linewidth=1.6,
        markersize=6,
        markeredgecolor="white",
        zorder=3,
    )
    _label_end(axes, points[0], key, "start", "left")
    if len(points) > 1:
        _label_end(axes, points[-1], key, "end", "right")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain_axes(axes)
    axes.spines[["bottom", "left"]].set_color(GRID)


def _label_end(
    axes: Axes,
    point: Mapping[str, float],
    key: str,
    name: str,
    side: str,
) -> None:
    """Labels an end on its outer side, where the margin is: the label rarely hides another point."""
    offset = 12
    alignment = "left"
    if side == "left":
        offset = -12
        alignment = "right"
    axes.annotate(
        f"{name}, update {point['update']:g}\n{point[key]:.2f} at {point['kl']:.1f} nats",
        (point["kl"], point[key]),
        xytext=(offset, 0),
        textcoords="offset points",
        ha=alignment,
        va="center",
        fontsize=TICK_SIZE,
        color=INK,
        zorder=2,
    )


def _draw_gold_intervals(axes: Axes, points: Sequence[Mapping[str, float]]) -> None:
    """Draws error bars. A band would not work, since KL need not increase with the updates."""
    kl = []
    gold = []
    below = []
    above = []
    for point in points:
        if point.get("gold_ci") is None:
            continue
        low, high = _gold_bounds(point)
        kl.append(point["kl"])
        gold.append(point["gold"])
        # Matplotlib expects distances from the point, which must not be negative.
        below.append(max(0.0, point["gold"] - low))
        above.append(max(0.0, high - point["gold"]))
    if not kl:
        return
    bars = axes.errorbar(
        kl,
        gold,
        [below, above],
        fmt="none",
        ecolor=GOLD_COLOR,
        alpha=0.4,
        capsize=3,
        zorder=1,
    )
    axes.legend(
        [bars],
        ["95 % interval"],
        loc="lower right",
        frameon=False,
        fontsize=TICK_SIZE,
        labelcolor=INK,
    )


def _set_limits(upper: Axes, lower: Axes, points: Sequence[Mapping[str, float]]) -> None:
    """Makes room for the labels at both ends, and avoids an axis that magnifies rounding errors."""
    kl = [point["kl"] for point in points]
    width = max(max(kl) - min(kl), 0.1)
    margin = 0.27 * width
    right = max(kl) + margin
    lower.set_xlim(min(kl) - margin, right)
    # KL is not negative, so there are no ticks in the left margin.
    first_tick = min(kl) - 0.05 * width
    lower.set_xticks([tick for tick in lower.get_xticks() if first_tick <= tick <= right])
    for axes in (upper, lower):
        bottom, top = axes.get_ylim()
        height = top - bottom
        padding = max(0.08 * height, (0.2 - height) / 2)
        axes.set_ylim(bottom - padding, top + padding)


_CRITIC_PANEL = "explained variance of values; clipped tokens"
_PPO_PANELS = {
    "reward per completion": ("objective/scores", "objective/rlhf_reward", "eval_objective/scores"),
    "KL to the reference, nats per completion": ("objective/kl", "eval_objective/kl", "eval_objective/kl_exact"),
    "entropy, nats per completion": ("objective/entropy",),
    "tokens per completion": ("completions/mean_length", "eval_completions/mean_length"),
    _CRITIC_PANEL: ("val/explained_variance", "policy/clipfrac_avg"),
    "β, reward per nat": ("objective/kl_coef",),
}
"""Title of each panel -> metrics in the panel."""

_PPO_STYLES = ((PROXY_COLOR, ""), (INK, ""), (GOLD_COLOR, "o"))
"""Color and marker of the first, second and third metric in a panel."""


def plot_ppo_run(log_history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """Draws the logged metrics of a PPO run over optimizer steps as a PNG: rewards, KL, entropy, critic and β.

    Args:
        log_history: `trainer.state.log_history` of a `PPOTrainer`.
        path: File to write.

    Returns:
        The path of the plot.

    Raises:
        ValueError: The history contains none of these metrics.
    """
    if not _has_ppo_metrics(log_history):
        raise ValueError("log_history has no metrics of a PPO run.")
    figure = _new_figure(11, 8.5, dpi=120)
    panels = figure.subplots(3, 2).flatten()
    for axes, (title, names) in zip(panels, _PPO_PANELS.items(), strict=True):
        for name, (color, marker) in zip(names, _PPO_STYLES, strict=False):  # most panels have fewer than three
            _draw_logged(axes, log_history, name, color, marker)
        if title == _CRITIC_PANEL and not any(names[0] in row for row in log_history):  # a run without a critic
            title = "clipped tokens"
        axes.set_title(title, fontsize=LABEL_SIZE, color=INK, loc="left")
        axes.grid(color=GRID, linewidth=0.7)
        _plain_axes(axes)
        if axes.lines:
            axes.legend(frameon=False, fontsize=TICK_SIZE, labelcolor=INK)
    figure.supxlabel("optimizer steps", fontsize=LABEL_SIZE, color=INK)
    return _save_png(figure, path)


def _has_ppo_metrics(log_history: Sequence[Mapping[str, float]]) -> bool:
    for row in log_history:
        for names in _PPO_PANELS.values():
            if any(name in row for name in names):
                return True
    return False


def _draw_logged(
    axes: Axes,
    log_history: Sequence[Mapping[str, float]],
    name: str,
    color: str,
    marker: str,
    *,
    label: str | None = None,
) -> None:
    """Draws one metric over the optimizer steps at which it was logged. `label` defaults to its name."""
    steps = []
    values = []
    for row in log_history:
        if name in row:
            steps.append(row["step"])
            values.append(row[name])
    if not steps:
        return
    if len(steps) == 1:
        marker = "o"  # a line through a single point is not visible
    axes.plot(
        steps,
        values,
        color=color,
        linewidth=1.4,
        label=(label or name).replace("$", r"\$"),  # between two dollar signs, matplotlib reads a formula
        marker=marker,
        markersize=4,
    )


LOSS_PLOT = "loss.png"
"""Usual name of the plot of `plot_loss` in the folder of a run."""
_HELDOUT_STYLES = ((GOLD_COLOR, "o"), ("#009E73", "s"), ("#CC79A7", "^"), ("#56B4E9", "D"))
"""Color and marker of the loss on each evaluation set."""


def plot_loss(
    log_history: Sequence[Mapping[str, float]], path: str | Path, *, weights_step: int | None = None
) -> Path | None:
    """Draws the logged loss of an SFT run over optimizer steps as a PNG, in training and on each evaluation set.

    Args:
        log_history: `trainer.state.log_history`, with `loss` and `eval_loss`, or `eval_NAME_loss` of several sets.
        path: File to write. Missing folders are created.
        weights_step: Step of the weights that are published. It is marked if training went on after it. An evaluation
            after training is then left out, as its weights are not those of the step at which it is logged.

    Returns:
        The path of the plot. None if no loss was logged at two steps, so that there is no curve: nothing is written,
        and a plot of an earlier run is deleted.
    """
    goes_on = weights_step is not None and any(row.get("step", 0) > weights_step for row in log_history)
    if goes_on:
        log_history = _while_training(log_history)
    heldout = _heldout_losses(log_history)
    names = ["loss", *heldout]
    steps = {name: {row["step"] for row in log_history if _is_finite(row.get(name))} for name in names}
    if max(map(len, steps.values())) < 2:
        Path(path).unlink(missing_ok=True)
        return None
    figure = _new_figure(8, 4.5, dpi=120)
    axes = figure.subplots()
    rows = [{name: value for name, value in row.items() if name == "step" or _is_finite(value)} for row in log_history]
    _draw_logged(axes, rows, "loss", PROXY_COLOR, "", label="training")
    for name, (color, marker) in zip(heldout, _HELDOUT_STYLES, strict=False):  # more curves cannot be told apart
        label = "held-out rows" if name == "eval_loss" else name.removeprefix("eval_").removesuffix("_loss")
        _draw_logged(axes, rows, name, color, marker, label=label)
    if goes_on:
        axes.axvline(weights_step, color=INK, linewidth=0.9, linestyle=":", label="published weights")
    axes.set_xlabel("optimizer steps", fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel("loss, nats per token", fontsize=LABEL_SIZE, color=INK)
    axes.legend(frameon=False, fontsize=TICK_SIZE, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain_axes(axes)
    return _save_png(figure, path)


def loss_caption(log_history: Sequence[Mapping[str, float]]) -> str:
    """Returns the caption of the plot of `plot_loss`, which has no curve of held-out rows if none were evaluated."""
    heldout = " and on held-out rows" if _heldout_losses(log_history) else ""
    return f"loss in training{heldout}, nats per token, over optimizer steps"


def _while_training(log_history: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """Returns the logs up to the end of training, which Trainer logs with `train_runtime`."""
    ends = [position for position, row in enumerate(log_history) if "train_runtime" in row]
    return log_history[: ends[-1]] if ends else log_history


def _heldout_losses(log_history: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns the names of the logged losses of evaluation sets, in the order in which they were first logged."""
    names = []
    for row in log_history:
        for name in row:
            if name.startswith("eval_") and name.endswith("_loss") and name not in names:
                names.append(name)
    return names


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def histogram_png(edges: Sequence[float], counts: Sequence[int], xlabel: str) -> bytes:
    """Draws a small histogram of `counts` (N) between `edges` (N + 1), and returns the bytes of a PNG."""
    figure = _new_figure(5, 2.6, dpi=110)
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color=PROXY_COLOR)
    if min(edges) < 0 < max(edges):
        axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel(xlabel, fontsize=LABEL_SIZE, color=INK)
    _plain_axes(axes)
    target = BytesIO()
    figure.savefig(target, format="png", metadata=_NO_SOFTWARE_TAG)
    return target.getvalue()


def plot_judged(
    judged: JudgedPairs,
    path: str | Path,
    *,
    bins: Sequence[Mapping[str, float]] | None = None,
    xlabel: str = "raw score",
) -> Path:
    """Draws an evaluation of a reward model as a PNG: reliability, scores of both sides, and accuracy by group.

    Args:
        judged: The scored pairs.
        path: File to write. Missing folders are created.
        bins: Result of `reliability_bins`. Needed if the scores in `judged` are not log-odds, such as the rewards of an
            ensemble. The default computes the bins from `judged`.
        xlabel: Name of the scores in `judged`.

    Returns:
        The path of the plot.
    """
    if bins is None:
        bins = reliability_bins(judged.deltas, judged.targets)
    figure = _new_figure(11, 8, dpi=120)
    reliability, scores, by_size, by_category = figure.subplots(2, 2).flatten()
    _draw_reliability(reliability, bins)
    _draw_scores(scores, judged, xlabel)
    _draw_groups(by_size, judged, ("length_gap", "margin"))
    _draw_groups(by_category, judged, ("category",))
    for axes in (reliability, scores, by_size, by_category):
        _plain_axes(axes)
    return _save_png(figure, path)


def _draw_reliability(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    """Draws confidence and accuracy. The points of a calibrated model are on the diagonal."""
    axes.plot([0.5, 1], [0.5, 1], color=GRID, linewidth=2)
    confidences = [entry["confidence"] for entry in bins]
    accuracies = [entry["accuracy"] for entry in bins]
    axes.plot(confidences, accuracies, "o-", color=PROXY_COLOR)
    for entry in bins:
        axes.annotate(
            f"{entry['n']}",
            (entry["confidence"], entry["accuracy"]),
            xytext=(4, -11),
            textcoords="offset points",
            fontsize=TICK_SIZE - 1,
        )
    axes.set_xlabel("confidence, σ(|Δ|)", fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel("accuracy (higher score wins)", fontsize=LABEL_SIZE, color=INK)


def _draw_scores(axes: Axes, judged: JudgedPairs, xlabel: str) -> None:
    finite_scores = {}
    for side, scores in judged.sides.items():
        finite_scores[side] = scores[np.isfinite(scores)]  # a diverged model has non-finite scores
    # Both sides have the same bins, so that their heights are comparable.
    edges = np.histogram_bin_edges(np.concatenate(list(finite_scores.values())), bins=24)
    for side, color in (("rejected", GOLD_COLOR), ("chosen", PROXY_COLOR)):
        axes.hist(
            finite_scores[side],
            edges,
            histtype="stepfilled",
            color=color,
            alpha=0.45,
            label=side,
        )
    axes.legend(frameon=False, fontsize=TICK_SIZE)
    axes.set_xlabel(xlabel, fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel("completions", fontsize=LABEL_SIZE, color=INK)


def _draw_groups(axes: Axes, judged: JudgedPairs, titles: Sequence[str]) -> None:
    """Draws bars of the accuracy in each group, and a line for the accuracy of always preferring the longer one."""
    groups = judged.groups()
    labels = []
    accuracies = []
    for title in titles:
        for name, group in groups.get(title, {}).items():
            label = f"{title.replace('_', ' ')} {name} ({group['n']})"
            labels.append(label.replace("$", r"\$"))  # between two dollar signs, matplotlib reads a formula
            accuracies.append(group["accuracy"])
    if not labels:
        axes.axis("off")
        return
    # Bars are drawn from the bottom up, and the first group belongs at the top.
    axes.barh(labels[:MAX_GROUPS][::-1], accuracies[:MAX_GROUPS][::-1], color=PROXY_COLOR)
    longer = longer_wins_baseline(judged.length_deltas, judged.targets)
    axes.axvline(longer, color=GOLD_COLOR, linewidth=1.5, label=f"longer wins, {longer:.2f}")
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=TICK_SIZE, loc="lower right")
    axes.set_xlabel("accuracy (number of pairs in parentheses)", fontsize=LABEL_SIZE, color=INK)


def plot_rounds(points: Sequence[Mapping], path: str | Path, *, quality: str = "gold reward") -> Path:
    """Draws quality and KL of the policies of several rounds as a PNG, with one point per round.

    Args:
        points: Dicts in the order of the rounds, with `name` (label of the policy), `quality` and `kl` (nats per
            completion), which are dicts of `mean` and optionally `ci95` (low, high). A point may have no `quality`,
            such as the first policy, which has no win rate against an earlier one. A point with `apart` true is a
            policy for comparison that is no round: it is drawn beside the others, with a dashed line at its level.
        path: File to write. Missing folders are created.
        quality: Name of the quality, with its unit if it has one. With "win rate", a dotted line marks one half,
            otherwise the level of the first policy.

    Returns:
        The path of the plot.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("plot_rounds: no points to draw: pass at least one policy.")
    figure = _new_figure(max(8, 1 + 0.85 * len(points)), 6.4, dpi=160)  # room for the names of the policies
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_rounds(upper, points, "quality", GOLD_COLOR, "o")
    _draw_rounds(lower, points, "kl", PROXY_COLOR, "s")
    first = points[0].get("quality")
    if quality.startswith("win rate"):
        upper.axhline(0.5, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    elif first is not None:
        upper.axhline(first["mean"], color=INK, linewidth=0.9, linestyle=":", zorder=1)
    upper.set_title("Rounds, with 95 % intervals", fontsize=LABEL_SIZE + 2, color=INK, loc="left", pad=10)
    upper.set_ylabel(quality, fontsize=LABEL_SIZE, color=GOLD_COLOR)
    lower.set_ylabel("KL to the SFT policy,\nnats per completion", fontsize=LABEL_SIZE, color=PROXY_COLOR)
    lower.set_xticks(range(len(points)), [str(point["name"]).replace("$", r"\$") for point in points])
    lower.set_xlim(-0.5, len(points) - 0.4)
    return _save_png(figure, path)


def _draw_rounds(axes: Axes, points: Sequence[Mapping], key: str, color: str, marker: str) -> None:
    """Draws the means with error bars over the policies, and a line through the rounds."""
    rounds: list[tuple[int, float]] = []
    for position, point in enumerate(points):
        value = point.get(key)
        if value is None:
            continue
        mean = value["mean"]
        low, high = value.get("ci95") or (mean, mean)
        # Matplotlib expects distances from the point, which must not be negative.
        distances = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        face = color
        if point.get("apart"):
            face = "white"
            axes.axhline(mean, color=color, linewidth=0.9, linestyle="--", alpha=0.6, zorder=1)
        else:
            rounds.append((position, mean))
        style = {"color": color, "markerfacecolor": face, "markersize": 7, "capsize": 3, "zorder": 3}
        axes.errorbar([position], [mean], distances, fmt=marker, **style)
    means = dict(rounds)
    for position, point in enumerate(points):
        if point.get(key) is not None:
            mean = point[key]["mean"]
            _write_mean(axes, position, mean, is_above=means.get(position + 1, mean) < mean)
    axes.plot([x for x, _ in rounds], [y for _, y in rounds], color=color, linewidth=1.4, alpha=0.6, zorder=2)
    axes.grid(color=GRID, linewidth=0.7, axis="y")
    axes.set_axisbelow(True)
    axes.margins(y=0.1)
    _plain_axes(axes)


def _write_mean(axes: Axes, position: int, mean: float, *, is_above: bool) -> None:
    """Writes a mean to the right of its point, above or below the line to the next point."""
    axes.annotate(
        f"{mean:.2f}",
        (position, mean),
        xytext=(7, 10 if is_above else -10),
        textcoords="offset points",
        va="center",
        fontsize=TICK_SIZE,
        color=INK,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],  # readable where it crosses a line
        zorder=4,
    )

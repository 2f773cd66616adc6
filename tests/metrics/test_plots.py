import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colors, image
from PIL import Image

from hf_rlhf_ext.metrics.plots import (
    GOLD_COLOR,
    INK,
    PROXY_COLOR,
    loss_caption,
    plot_frontier,
    plot_judged,
    plot_loss,
    plot_ppo_run,
)
from hf_rlhf_ext.reward.preference_metrics import JudgedPairs

POINTS = [
    {"update": u, "kl": kl, "gold": gold, "proxy": proxy, "gold_ci": 0.1}
    for u, kl, gold, proxy in [(0, 0.0, 0.1, -0.1), (1, 2.0, 0.3, 0.6), (2, 5.0, 0.5, 1.2), (3, 4.5, 0.55, 1.4)]
]


def count_pixels(path, color):
    pixels = image.imread(path)[..., :3]
    return int((np.abs(pixels - np.array(colors.to_rgb(color))).max(-1) < 0.02).sum())


def test_plot_shows_both_curves_and_more_points_draw_more(tmp_path):
    path = plot_frontier(POINTS, tmp_path / "new" / "frontier.png")
    assert image.imread(path).shape[:2] == (1024, 1280)
    single = plot_frontier(POINTS[:1], tmp_path / "single.png")
    for color in (GOLD_COLOR, PROXY_COLOR):
        assert count_pixels(path, color) > count_pixels(single, color) + 1000
        assert count_pixels(single, color) > 50


def test_same_points_in_any_order_give_the_same_bytes(tmp_path):
    first = plot_frontier(POINTS, tmp_path / "a.png").read_bytes()
    assert plot_frontier(POINTS[::-1], tmp_path / "b.png").read_bytes() == first


def test_an_interval_is_drawn_as_half_width_or_as_bounds(tmp_path):
    bounds = [p | {"gold_ci": [p["gold"] - 0.1, p["gold"] + 0.1]} for p in POINTS]
    without = [{k: v for k, v in p.items() if k != "gold_ci"} for p in POINTS]
    half_width = plot_frontier(POINTS, tmp_path / "a.png").read_bytes()
    assert plot_frontier(bounds, tmp_path / "b.png").read_bytes() == half_width
    assert plot_frontier(without, tmp_path / "c.png").read_bytes() != half_width


@pytest.mark.parametrize("key", ["update", "kl", "gold", "proxy", "gold_ci"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"`{key}.*not a finite number"):
        plot_frontier([*POINTS[:-1], POINTS[-1] | {key: value}], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_no_points_and_a_missing_key_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no points"):
        plot_frontier([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="point 0 has no `proxy`"):
        plot_frontier([{"update": 0, "kl": 0.0, "gold": 0.0}], tmp_path / "x.png")


def test_pyplot_stays_unused(tmp_path):
    code = (
        "import sys; from hf_rlhf_ext.metrics.plots import plot_frontier\n"
        f"plot_frontier([dict(update=0, kl=0.0, gold=0.0, proxy=0.0)], {str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_evaluation_is_drawn_panel_by_panel(tmp_path):
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(80, 2)), np.ones(80)
    lengths, names = rng.integers(1, 9, 80), np.array(["chat", "open qa"] * 40)

    def panels(name, bins=None, **changed):
        given = {"scores_i": scores[:, 0], "scores_j": scores[:, 1], "targets": targets, "weights": targets}
        given |= {"margins": np.zeros(80), "length_deltas": lengths, "prompts": np.arange(80), "categories": names}
        picture = image.imread(plot_judged(JudgedPairs(**given | changed), tmp_path / name, bins=bins))[..., :3]
        height, width = (size // 2 for size in picture.shape[:2])
        halves = picture[:height], picture[height:]
        return [part for rows in halves for part in (rows[:, :width], rows[:, width:])]

    def counted(panel, color):
        return int((np.abs(panel - np.array(colors.to_rgb(color))).max(-1) < 0.02).sum())

    def faded(color):  # as the histogram has it, on white
        return tuple(0.45 * value + 0.55 for value in colors.to_rgb(color))

    whole = panels("whole.png")
    assert [counted(panel, PROXY_COLOR) > 200 for panel in whole] == [True, False, True, True]
    assert counted(whole[1], faded(PROXY_COLOR)) > 500 < counted(whole[1], faded(GOLD_COLOR))
    bare = panels("bare.png", categories=np.array([""] * 80), length_deltas=np.zeros(80))
    assert counted(bare[2], PROXY_COLOR) == 0 == counted(bare[3], PROXY_COLOR)  # nothing to group by
    apart = panels("apart.png", scores_i=scores[:, 0] + 9)  # sides that do not overlap hide nothing of each other
    assert counted(apart[1], faded(GOLD_COLOR)) > counted(whole[1], faded(GOLD_COLOR))
    assert counted(apart[0], PROXY_COLOR) < counted(whole[0], PROXY_COLOR)  # one bin instead of a curve
    given = panels("given.png", bins=[{"n": 80, "confidence": 0.9, "accuracy": 0.6}])  # calibration of other scores
    assert counted(given[0], PROXY_COLOR) < counted(whole[0], PROXY_COLOR)
    assert counted(given[1], faded(GOLD_COLOR)) == counted(whole[1], faded(GOLD_COLOR))
    lost = panels("lost.png", scores_i=np.full(80, np.nan), scores_j=np.full(80, np.nan))  # a diverged run
    assert counted(lost[1], faded(GOLD_COLOR)) < 500


def test_the_curves_of_a_ppo_run_are_drawn_where_they_were_logged(tmp_path):
    history = [{"step": step, "objective/scores": 0.1 * step, "objective/kl": step / 2} for step in range(1, 9)]
    history += [{"step": 8, "eval_objective/kl": 5.0}, {"step": 8, "train_runtime": 1.0}]
    picture = image.imread(plot_ppo_run(history, tmp_path / "curves.png"))[..., :3]
    height, width, _ = picture.shape
    left = picture[: height // 3, : width // 2].reshape(-1, 3)
    right = picture[: height // 3, width // 2 :].reshape(-1, 3)
    bottom = picture[2 * height // 3 :].reshape(-1, 3)

    def drawn(part):
        return int((np.abs(part - np.array(colors.to_rgb(PROXY_COLOR))).max(-1) < 0.02).sum())

    assert drawn(left) > 100 < drawn(right) and drawn(bottom) == 0  # no critic and no coefficient in that history
    with pytest.raises(ValueError, match="no metrics of a PPO run"):
        plot_ppo_run([{"step": 1, "loss": 0.1}], tmp_path / "none.png")


def losses(name, values, every=10):
    return [{"step": every * n, name: value} for n, value in enumerate(values, start=1)]


def test_the_loss_is_drawn_in_training_and_on_each_set_of_held_out_rows(tmp_path):
    training = losses("loss", [4.0, 3.0, 2.5, 2.2, 2.1])

    def drawn(*logs, **options):
        path = plot_loss([*training, *logs, {"step": 50, "train_runtime": 3.0}], tmp_path / "loss.png", **options)
        return count_pixels(path, PROXY_COLOR), count_pixels(path, GOLD_COLOR), count_pixels(path, "#009E73")

    alone, one, none = drawn()
    assert alone > 200 and one == none == 0
    heldout = losses("eval_loss", [3.9, 3.1, 2.9, 2.9, 3.0])
    assert drawn(*heldout)[1] > 200
    sets = drawn(*losses("eval_short_loss", [3.9, 3.1]), *losses("eval_$long$_loss", [3.5, 3.4]))
    assert sets[1] > 100 < sets[2]
    assert drawn({"step": 50, "eval_loss": math.nan})[1] == 0

    def dark(weights_step):
        plot_loss([*training, *heldout], tmp_path / "loss.png", weights_step=weights_step)
        return count_pixels(tmp_path / "loss.png", INK)

    ended = [*training, *heldout, {"step": 50, "train_runtime": 3.0}]
    plots = [plot_loss(logs, tmp_path / "best.png", weights_step=30).read_bytes() for logs in (ended, ended[:-1])]
    after = plot_loss([*ended, {"step": 50, "eval_loss": 2.9}], tmp_path / "best.png", weights_step=30)
    assert plots[0] == plots[1] == after.read_bytes()  # not a second loss at the last step
    assert dark(30) > dark(None) + 30 and dark(50) == dark(None)  # marked where training went on after them


def test_a_run_without_a_curve_has_no_plot_and_loses_an_earlier_one(tmp_path):
    path = tmp_path / "loss.png"
    assert plot_loss(losses("loss", [4.0, 3.0]), path) == path
    assert "held-out" not in loss_caption(losses("loss", [4.0, 3.0]))
    assert "held-out" in loss_caption(losses("eval_loss", [4.0, 3.0]))
    for history in ([], losses("loss", [4.0]), [{"step": 4, "eval_loss": 3.0}] * 2, losses("loss", [math.nan] * 3)):
        plot_loss(losses("loss", [4.0, 3.0]), path)
        assert plot_loss(history, path) is None and not path.exists()


def test_pictures_of_a_run_have_no_text(tmp_path):
    pictures = [
        plot_loss(losses("loss", [4.0, 3.0]), tmp_path / "loss.png"),
        plot_ppo_run(losses("objective/kl", [4.0, 3.0]), tmp_path / "curves.png"),
        plot_frontier(POINTS, tmp_path / "frontier.png"),
    ]
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert picture.info.keys() <= {"dpi"}

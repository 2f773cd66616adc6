"""The plot of over-optimization: drawn from a summary, and different where the summary differs."""

import copy

import pytest

from hf_rlhf_ext.metrics.overoptimization_plot import plot_overoptimization


def entry(pairs, flips, form, ends, peak=4.0):
    fit = {
        "form": form,
        "start": 0.0,
        "alpha": {"mean": 1.0},
        "beta": {"mean": 0.25},
        "peak_kl": {"mean": peak, "ci95": ends},
        "peaks_before_last": ends[1] is not None,
    }
    points = []
    for d in (0.0, 1.0, 3.0):
        gold = {"mean": d * (1.0 - 0.25 * d), "ci95": [d * (1.0 - 0.25 * d) - 0.2, d * (1.0 - 0.25 * d) + 0.2]}
        points.append({"kl": d * d, "gold": gold, "proxy": d})
    return {"pairs": pairs, "flips": flips, "points": points, "fit": fit}


SUMMARY = {
    "best_of_n": [entry(128, 0.0, "best_of_n", [2.0, 6.0]), entry(512, 0.25, "best_of_n", [2.0, None], None)],
    "ppo": [entry(128, 0.0, "rl", [2.0, 6.0])],
}


def test_it_is_the_same_for_the_same_summary_and_shows_the_peak(tmp_path):
    path = plot_overoptimization(SUMMARY, tmp_path / "new" / "plot.png")
    assert path.read_bytes() == plot_overoptimization(SUMMARY, tmp_path / "again.png").read_bytes()
    without_peak = copy.deepcopy(SUMMARY)
    without_peak["ppo"][0]["fit"]["peaks_before_last"] = False
    assert path.read_bytes() != plot_overoptimization(without_peak, tmp_path / "without.png").read_bytes()


def test_points_without_an_interval_and_a_missing_method_are_drawn(tmp_path):
    bare = {"ppo": [copy.deepcopy(SUMMARY["ppo"][0])], "best_of_n": []}
    bare["ppo"][0]["points"][0]["gold"]["ci95"] = [None, None]
    assert plot_overoptimization(bare, tmp_path / "plot.png").stat().st_size > 10_000


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one reward model"):
        plot_overoptimization({"best_of_n": [], "ppo": []}, tmp_path / "plot.png")

"""The plot of `make bench-memory`, and `make bench-memory-card`, which runs here with tiny models on the CPU."""

import json
import sys

import pytest
import torch
from PIL import Image

from hf_rlhf_ext import load_base_model
from hf_rlhf_ext.metrics.plots import _new_figure
from hf_rlhf_ext.modeling.loading import four_bit_config
from hf_rlhf_ext.modeling.memory.live_bytes import state_tensors

GB = 10**9


# The plot


@pytest.fixture
def plot(script):
    return script("memory_plot")


def point(stage: str, measured: int, error: float, *, after: bool = False) -> dict:
    predicted = round(measured * (1 + error))
    return {
        "name": f"{stage}-{measured}",
        "stage": stage,
        "measured": measured,
        "predicted": predicted,
        "error": predicted / measured - 1,
        "chosen_after_freeze": after,
    }


POINTS = [
    point("sft", GB, 0.0),
    point("sft", 2 * GB, 0.1, after=True),
    point("reward", 3 * GB, -0.05),
    point("ppo", 4 * GB, 0.2),
]


def test_the_committed_plot_shows_the_committed_points(plot):
    with Image.open(plot.PLOT) as image:
        assert image.info[plot.DIGEST_KEY] == plot.digest_of(plot.read_points()), "run `make bench-memory`"


def test_a_plot_is_an_image_that_names_its_points(plot, tmp_path):
    path = plot.plot_points(POINTS, tmp_path / "new" / "memory.png")
    with Image.open(path) as image:
        assert image.width > 1000 and image.height > 400
        assert image.info == {**image.info, plot.DIGEST_KEY: plot.digest_of(POINTS)} and "Software" not in image.info
    moved = [*POINTS[:-1], POINTS[-1] | {"predicted": 1}]
    assert plot.digest_of(moved) != plot.digest_of(POINTS)
    with pytest.raises(ValueError, match="make bench-memory"):
        plot.plot_points([], path)


def test_each_point_is_drawn_where_its_numbers_say(plot):
    left, right = _new_figure(11, 5, dpi=40).subplots(1, 2)
    plot._draw_memory(left, POINTS, (0.5, 8.0))
    plot._draw_errors(right, POINTS, (0.5, 8.0))
    # GB measured and planned, and percent; by stage, those that were chosen afterward last.
    at_left = [[1.0, 1.0], [2.0, 2.2], [3.0, 2.85], [4.0, 4.8]]
    at_right = [[1.0, 0.0], [2.0, 10.0], [3.0, -5.0], [4.0, 20.0]]
    for axes, expected in ((left, at_left), (right, at_right)):
        drawn = [dots for dots in axes.collections if dots.get_label()[0] != "_"]
        assert [dots.get_offsets().tolist() for dots in drawn] == [[pytest.approx(place)] for place in expected]
        labels = ["SFT", "SFT, chosen after the planner", "reward model", "PPO"]
        assert [dots.get_label() for dots in drawn] == labels
        corners = [len(dots.get_paths()[0].vertices) for dots in drawn]
        assert corners[1] < corners[0] == corners[2] == corners[3]  # a triangle among circles
    low, high = right.get_ylim()
    assert low < -20 and high > 20  # a point outside the bands is not cut off


# On a card


@pytest.fixture
def on_card(script):
    return script("memory_on_card")


@pytest.mark.slow  # two processes
def test_a_case_runs_in_its_own_process_and_one_that_fails_does_not_stop_the_others(on_card, capsys):
    cases = [on_card.Case("card-1gb", tiny=True), on_card.Case("card-12gb", tiny=True)]  # there is no card-1gb
    results = on_card.run_all(cases, card=None)
    assert "No such file" in results[0]["failed"] and "card-1gb" in results[0]["failed"]
    ran = results[1]
    assert (ran["model"], ran["updates"], ran["context"]) == ("meta-llama/Llama-3.2-3B-Instruct", 2, 0)
    assert abs(ran["error_allocated"]) < 0.15 and ran["allocated"] > 4 * ran["weights"] * 0.9
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("card-1gb: failed: ") and said[1].startswith("card-12gb: ")


def test_a_case_that_takes_too_long_is_stopped(on_card):
    result = on_card.run_in_process(on_card.Case("card-8gb", tiny=True), 0.2)
    assert result == {"case": "card-8gb", "failed": "stopped after 0 s"}


def test_cases_without_time_or_memory_are_not_started(on_card):
    case = on_card.Case("card-24gb")
    assert case.card == 24 * GB
    (late,) = on_card.run_all([case], card=25 * GB, budget=0)
    (large,) = on_card.run_all([case], card=8 * GB, budget=1000)
    assert "not run" in late["failed"] and "not run: this card has 8.0 GB" in large["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
def test_without_a_card_it_says_so_in_one_line(on_card, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory_on_card.py"])
    assert on_card.main() == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "no CUDA card" in said.err and "--tiny" in said.err


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_a_random_base_is_what_is_loaded_from_a_checkpoint_of_its_shape(on_card, quantization, tmp_path):
    """The same tensors, dtypes and tied weights, with the statistics of layers in 4 bits."""
    config, _ = on_card.model_config_of(on_card.Case("card-8gb", tiny=True))
    options = {"dtype": torch.bfloat16, "quantization_config": None if quantization is None else four_bit_config()}
    on_card.random_base(config, options | {"quantization_config": None}, "cpu").save_pretrained(tmp_path)
    loaded = load_base_model(tmp_path, **options)
    made = on_card.random_base(config, options, "cpu")
    expected, shapes = (
        [(name, tensor.shape, tensor.dtype) for name, tensor in state_tensors(model)] for model in (loaded, made)
    )
    assert shapes == expected and config.tie_word_embeddings
    assert made.lm_head.weight is made.model.embed_tokens.weight
    weights = made.model.layers[0].mlp.up_proj.weight
    assert weights.dtype == (torch.bfloat16 if quantization is None else torch.uint8)
    assert weights.float().std() > 0 and made.model.norm.weight.eq(1).all()


RESULT = {
    "case": "card-8gb",
    "model": "a/b",
    "weights": 1_240_000_000,
    "allocated": 5 * GB,
    "reserved": 6 * GB,
    "planned_allocated": 5.5 * GB,
    "planned_reserved": 5.7 * GB,
    "error_allocated": 0.1,
    "error_reserved": -0.05,
    "peak_phase": "rollout",
    "seconds": 40.4,
}


def test_the_table_and_the_last_line(on_card):
    results = [RESULT, {"case": "card-24gb", "failed": "CUDA out of memory"}]
    lines = on_card.table(results).splitlines()
    assert lines[2] == "| card-8gb | a/b, 1.24B | 5.00 | 5.50 | +10.0% | 6.00 | 5.70 | −5.0% | rollout |"
    assert lines[3].startswith("| card-24gb | CUDA out of memory |") and lines[3].count("|") == lines[2].count("|")
    assert json.loads(json.dumps(on_card.summary(results))) == {
        "cases": ["card-8gb"],
        "failed": {"card-24gb": "CUDA out of memory"},
        "seconds": 40,
        "worst_error_allocated": 0.1,
        "worst_underestimate_allocated": 0.0,
        "worst_error_reserved": 0.05,
        "worst_underestimate_reserved": 0.05,
    }
    assert on_card.summary(results[1:])["worst_error_reserved"] is None

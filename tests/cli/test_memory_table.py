"""A memory plan as text, with numbers that are worked by hand."""

import io
import re

import pytest
from rich.console import Console

from hf_rlhf_ext.cli.memory_table import (
    card_bytes,
    cards_line,
    fit_line,
    largest_line,
    print_plan,
    suggestion_lines,
)
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase, Suggestion

GB = 10**9
WEIGHTS = Part("base weights", 2 * GB)
PHASES = (
    Phase("loading", (WEIGHTS,)),
    Phase("policy update", (WEIGHTS, Part("gradients", 0), Part("activations", 4 * GB + GB // 4))),
    Phase("optimizer step", (WEIGHTS, Part("optimizer", GB // 8))),
)
PLAN = MemoryPlan("a/model-with-[brackets]", "ppo", "cuda", {}, PHASES, reserve=GB // 2)


def printed(plan: MemoryPlan) -> list[str]:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=40))  # no terminal: it is made wide enough
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_table_has_phases_parts_sums_and_the_peak():
    lines = printed(PLAN)
    assert lines[0] == "a/model-with-[brackets], ppo on a GPU: 6.8 GB (table in GB)"
    rows = [re.split(r"  +", line.strip()) for line in lines]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["base weights"] == ["2.00"] * 3
    assert cells["activations"] == ["–", "4.25", "–"]
    assert cells["optimizer"] == ["–", "–", "0.12"]
    assert cells["CUDA and fragments"] == ["0.50"] * 3
    assert cells["all"] == ["2.50", "6.75", "2.62"]
    assert "gradients" not in cells  # of no size in any phase
    # Under the sum of the second phase, to its last digit.
    (total,) = [line for line in lines if line.strip().startswith("all")]
    (mark,) = [line for line in lines if "▲ peak" in line]
    assert len(mark) == total.index("6.75") + 4


def test_a_cpu_has_no_reserve():
    plan = MemoryPlan("m", "sft", "cpu", {}, PHASES)
    text = "\n".join(printed(plan))
    assert "on a CPU: 6.2 GB" in text and "CUDA" not in text


def test_whether_it_fits():
    assert fit_line(PLAN, 8 * GB, "Card of 8GB") == "Card of 8GB: fits, with 1.2 GB left."
    assert fit_line(PLAN, 6 * GB, "Card of 6GB") == "Card of 6GB: does not fit: 0.8 GB too much."
    assert fit_line(PLAN, 27 * GB // 4, "x") == "x: fits, with 0.00 GB left."
    assert cards_line(PLAN) == "Fits a card of: 6 GB no · 8 GB yes · 12 GB yes · 16 GB yes · 24 GB yes"


def test_what_may_be_larger_and_what_to_change():
    line = "Fits up to --per_device_train_batch_size 12, or up to 700 tokens of prompt and completion."
    assert largest_line({"per_device_train_batch_size": 12, "length": 700}) == line
    assert largest_line({"per_device_train_batch_size": 0, "length": 0}).startswith("Not even one row")
    changes = [Suggestion("--load_in_4bit true", 3 * GB, "speed"), Suggestion("--lora_r 8", GB // 10, "a small one")]
    assert suggestion_lines(changes) == [
        "  --load_in_4bit true  saves 3.0 GB, costs speed",
        "  --lora_r 8           saves 0.1 GB, costs a small one",
    ]
    assert suggestion_lines([]) == []


@pytest.mark.parametrize(
    "text, n_bytes",
    [
        ("12GB", 12 * GB),
        ("12", 12 * GB),
        ("8g", 8 * GB),
        ("8000MB", 8 * GB),
        (" 11.5 gib ", 23 * 2**29),
        ("500MB", 5 * 10**8),
        ("1.5MiB", 3 * 2**19),
    ],
)
def test_a_size_of_a_card(text, n_bytes):
    assert card_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "12TB", "-3GB", "0GB", "12 GB of it", "nan", "rtx3060"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="card: .* is no size: .*--card 12GB"):
        card_bytes(text)


def test_a_number_that_must_be_megabytes_needs_its_unit():
    assert card_bytes("999") == 999 * GB
    with pytest.raises(UserError, match="card: '8192' has no unit: .*--card 8192MB"):
        card_bytes("8192")

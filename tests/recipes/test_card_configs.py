"""The configurations for cards with 6 to 24 GB: their plans are fresh, and fit; their models are the public ones."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.card_plans import BLOCK, CONFIGS, card_of, model_config, plan_config, with_plan
from hf_rlhf_ext.cli.memory_table import CARDS
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase

GB = 10**9
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "meta-llama/Llama-3.2-1B-Instruct": 1.24,
    "meta-llama/Llama-3.2-3B-Instruct": 3.21,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
}
"""Billions of weights, as the models' own pages have them."""
PLAN = MemoryPlan(
    "m", "ppo", "cuda", {}, (Phase("rollout", (Part("base weights", 2 * GB), Part("rollout", 1000))),), reserve=GB
)


@pytest.mark.slow  # three seconds each
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_plan_in_the_comment_is_fresh_and_fits(path):
    plan = plan_config(path)
    text = path.read_text(encoding="utf-8")
    assert with_plan(text, plan) == text, "run `make card-plans`"
    assert plan.fits(card_of(path))


def test_every_card_of_the_table_has_configs():
    assert {card_of(path) for path in CONFIGS} == {card * GB for card in CARDS}
    assert len(CONFIGS) == 3 * len(CARDS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_are_those_of_the_public_models(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    assert round(model.num_parameters() / 1e9, 2) == PUBLISHED[name]


def test_the_comment_is_replaced_and_nothing_else():
    text = "# A title with Plan: in it.\n# Plan: 3 GB,\n# and more.\nmodel: x # Plan: y\n# Plan for later\n"
    new = with_plan(text, PLAN)
    assert new.startswith("# A title with Plan: in it.\n# Plan: 3.0 GB at the peak, in the phase rollout (base w")
    assert new.endswith("\nmodel: x # Plan: y\n# Plan for later\n") and "and more" not in new
    assert all(len(line) <= 120 for line in new.splitlines())
    assert with_plan(new, PLAN) == new
    assert not re.search(r"rollout 0\.00", new)  # too small a part to name
    with pytest.raises(UserError, match="no comment that begins with"):
        with_plan("model: x\n", PLAN)
    assert BLOCK.search(new)

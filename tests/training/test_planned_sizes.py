"""The sizes with which `auto_batch` begins, searched with the real planner: the largest that fit, in a few plans."""

from dataclasses import replace

import pytest

from hf_rlhf_ext import BradleyTerryConfig, PPOConfig
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase
from hf_rlhf_ext.modeling.memory.planner import PlanRequest, plan_of, plan_request
from hf_rlhf_ext.training import planned_sizes as searching
from hf_rlhf_ext.training.auto_batch import COMPLETIONS, TOKENS
from hf_rlhf_ext.training.planned_sizes import planned_sizes

OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False}


@pytest.fixture
def request_of(tiny_config, tmp_path):
    """`make(stage, **options)`: a request to plan a run on a card."""

    def make(stage: str, **options) -> PlanRequest:
        config = {"ppo": PPOConfig, "reward": BradleyTerryConfig}[stage]
        args = config(str(tmp_path), **(OPTIONS | options))
        lengths = {"prompt_tokens": 40, "completion_tokens": 24}
        return plan_request(tiny_config, stage, args, reward_model=False, device="cuda", **lengths)

    return make


def bytes_with(request: PlanRequest, **setup) -> int:
    return plan_of(replace(request, setup=replace(request.setup, **setup))).n_bytes


def count_plans(monkeypatch) -> list[PlanRequest]:
    requests = []
    monkeypatch.setattr(searching, "plan_of", lambda request: requests.append(request) or plan_of(request))
    return requests


@pytest.mark.parametrize("rows, layout", [(1, "plain"), (12, "plain"), (5, "auto")])
def test_the_token_budget_is_the_largest_that_fits(request_of, monkeypatch, rows, layout):
    request = request_of("reward", per_device_train_batch_size=16, layout=layout)
    tokens = 2 * 64 if layout == "plain" else 40 + 2 * 24  # of a comparison
    card = bytes_with(request, max_tokens_per_batch=rows * tokens)
    plans = count_plans(monkeypatch)
    assert planned_sizes(request, card) == {TOKENS: rows * tokens}
    assert len(plans) <= 4
    assert bytes_with(request, max_tokens_per_batch=(rows + 1) * tokens) > card


def test_sizes_of_the_options_that_fit_stay_and_take_one_plan(request_of, monkeypatch):
    request = request_of("reward", per_device_train_batch_size=4)
    plans = count_plans(monkeypatch)
    known = plan_of(request)
    assert planned_sizes(request, known.n_bytes, known) == {}
    assert planned_sizes(request, plan_of(request).n_bytes) == {}
    assert len(plans) == 1


def test_what_no_size_bounds_makes_no_pass_smaller(request_of, monkeypatch):
    step = Phase("training step", (Part("activations", 100),))
    plan = MemoryPlan("a-model", "reward", "cuda", {}, (step, Phase("optimizer step", (Part("optimizer", 1000),))))
    monkeypatch.setattr(searching, "plan_of", lambda request: plan)
    assert planned_sizes(request_of("reward"), 900) == {}


def test_where_nothing_fits_passes_of_one_prompt_are_left(request_of):
    request = request_of("ppo", per_device_train_batch_size=8, num_generations=4, num_mini_batches=2)
    assert planned_sizes(request, 1000) == {TOKENS: 40 + 4 * 24, COMPLETIONS: 4}


def test_sampling_is_bounded_only_where_the_rollout_does_not_fit(request_of):
    """The completions of a prompt stay together."""
    options = {"num_generations": 2, "num_mini_batches": 16, "activation_checkpointing": True}
    request = request_of("ppo", per_device_train_batch_size=2, critic="head", **options)
    plan = plan_of(request)
    assert plan.peak.name == "rollout"
    card = bytes_with(request, generation_batch=24, generation_limit=24)
    assert card < plan.n_bytes
    sizes = planned_sizes(request, card)
    completions = sizes.pop(COMPLETIONS)
    assert not sizes and completions % 2 == 0
    assert bytes_with(request, generation_batch=completions, generation_limit=completions) <= card
    assert bytes_with(request, generation_batch=completions + 2, generation_limit=completions + 2) > card


def test_a_smaller_budget_of_the_user_is_where_the_search_begins(request_of):
    request = request_of("reward", per_device_train_batch_size=16, layout="plain", max_tokens_per_batch=6 * 128)
    assert planned_sizes(request, plan_of(request).n_bytes) == {}
    card = bytes_with(request, max_tokens_per_batch=3 * 128)
    assert planned_sizes(request, card) == {TOKENS: 3 * 128}

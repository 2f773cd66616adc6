"""What to change so that a run fits, against plans that are made with the change."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from hf_rlhf_ext.modeling.memory.advice import largest, suggestions
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase
from hf_rlhf_ext.modeling.memory.planner import plan_of, plan_request
from hf_rlhf_ext.modeling.memory.search import largest_that_fits

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=2,  # of which no shallower model is traced: half the time
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=2048,
    max_position_embeddings=512,
)


def request(stage="reward", batch=8, model=None, **given):
    options = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 1, "bf16": False} | given
    return plan_request(
        CONFIG,
        stage,
        SimpleNamespace(**options),
        model_args=SimpleNamespace(**({"dtype": "float32"} | (model or {}))),
        reward_model=False,
        prompt_tokens=40,
        completion_tokens=40,
        device="cpu",
    )


def test_each_suggestion_saves_what_a_plan_with_it_saves():
    before = plan_of(request(activation_checkpointing=False)).n_bytes
    found = {one.option: one for one in suggestions(request(activation_checkpointing=False), before // 2)}
    assert len(found) == 3
    with_it = plan_of(request(activation_checkpointing=True)).n_bytes
    assert found["--activation_checkpointing true"].saves == before - with_it
    assert all(one.costs and one.saves > 0 for one in found.values())


def test_options_with_which_the_run_fits_come_first():
    whole = request("sft", batch=1, model={"use_peft": False})
    before = plan_of(whole).n_bytes
    card = plan_of(request("sft", batch=1)).n_bytes
    found = suggestions(whole, card)
    assert found[0].option == "--use_peft true"
    assert before - found[0].saves <= card


def test_the_largest_batch_and_length_fit_and_a_little_more_does_not():
    card = plan_of(request(batch=20)).n_bytes
    found = largest(request(batch=8), card)
    assert found["per_device_train_batch_size"] == 20
    tokens = found["length"]
    assert 80 < tokens < 512

    def fits(length):
        given = request(batch=8)
        return plan_of(replace(given, setup=given.setup.with_length(length))).fits(card)

    assert fits(tokens) and not fits(round(1.01 * tokens) + 1)


MEGABYTE = 10**6
SIZES = {
    "line": (lambda n: (1000 + 37 * n, 5000), 1),
    "curve": (lambda n: (1000 + 37 * n + n * n / 2, 5000 + 80 * n), 2),
    "bend": (lambda n: (1000 + 37 * n + 50 * min(n, 40), 5000), 1),
    "steps": (lambda n: (1000 + 100 * -(-n // 64), 900 + n), 2),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("card, start, most", [(20_000, 8, 4096), (9_000, 700, 4096), (900, 8, 50), (10**7, 8, 700)])
def test_the_search_finds_the_largest_value_from_few_plans(sizes, card, start, most):
    size_of, degree = SIZES[sizes]
    asked = []

    def plan_with(n):
        asked.append(n)
        phases = [
            Phase(f"phase {i}", (Part("activations", int(size * MEGABYTE)),)) for i, size in enumerate(size_of(n))
        ]
        return MemoryPlan("model", "sft", "cpu", {}, tuple(phases))

    found = largest_that_fits(plan_with, card * MEGABYTE, start=start, most=most, degree=degree)
    expected = max((n for n in range(1, most + 1) if max(size_of(n)) <= card), default=0)
    assert expected / 1.01 - 1 <= found <= expected
    assert len(asked) == len(set(asked)) <= (6 if sizes in ("line", "curve") else 14)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_can_wait_on_the_cpu_is_suggested_on_a_gpu_only(device):
    run = request("ppo", batch=8, model={"use_peft": False}, critic="none", rollout_batch_size=8)
    run = replace(run, setup=replace(run.setup, device=device))
    plan = plan_of(run)
    found = {one.option: one.saves for one in suggestions(run, plan.n_bytes // 2, plan)}
    assert ("--offload_optimizer true" in found) == (device == "cuda")
    if device == "cuda":
        with_it = plan_of(replace(run, setup=replace(run.setup, offloads_optimizer=True)))
        assert found["--offload_optimizer true"] == plan.n_bytes - with_it.n_bytes > 0

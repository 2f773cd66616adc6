"""What to change so that a run fits, against plans that are made with the change."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from hf_rlhf_ext.modeling.memory.advice import _largest_that, largest, suggestions
from hf_rlhf_ext.modeling.memory.planner import plan_of, plan_request

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
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
    assert 19 <= found["per_device_train_batch_size"] <= 21
    assert 80 < found["length"] < 512
    assert largest(request(batch=8), 1) == {"per_device_train_batch_size": 0, "length": 0}


@pytest.mark.parametrize(
    "limit, start, most, expected", [(7, 1, 100, 7), (7, 50, 100, 7), (500, 8, 100, 100), (0, 8, 9, 0)]
)
def test_the_search_finds_the_largest_number(limit, start, most, expected):
    assert _largest_that(lambda n: n <= limit, start, most) == expected

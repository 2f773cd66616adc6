"""The costs of layouts are the sums worked by hand, and the order of the layouts is the one that was measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from hf_rlhf_ext.data.storage import TokenCounts
from hf_rlhf_ext.modeling.layout_costs import (
    COPIED_KEYS,
    PAIR_FACTOR,
    ModelSizes,
    Work,
    causal_pairs,
    cheaper_layout,
    layout_cost,
    mask_work,
    plain_work,
    segment_work,
)
from hf_rlhf_ext.modeling.layouts import Layout

SMALL = ModelSizes(per_token=589_952, per_pair=1024)
"""A Llama of 4 layers, 128 units and 4 heads."""


def counts(*prompts):
    """Token counts of prompts (P, [T of each completion])."""
    rows = [(prompt, sum(lengths), max(lengths), len(lengths)) for prompt, lengths in prompts]
    return TokenCounts(*(np.array(values, np.int64) for values in zip(*rows, strict=True)))


def same(prompt, k, length, n=1):
    return counts(*[(prompt, [length] * k)] * n)


def test_sizes_of_models(tiny_config):
    # 2 layers: q and o 32 x 32, k and v 32 x 16, three matrices 32 x 64 of the MLP; 4 heads of 8.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    tiny_config.num_labels = 1
    model = LlamaForSequenceClassification(tiny_config)
    assert ModelSizes.of(model) == ModelSizes(2 * layer + 32, 2 * 2 * 4 * 8)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    n_adapter = 2 * 4 * (32 + 32)
    assert ModelSizes.of(lora).per_token == pytest.approx(2 * layer + 2 * 32 + n_adapter, abs=32)


def test_sizes_of_other_layers():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32))  # Conv1D
    assert ModelSizes.of(gpt2) == ModelSizes(3 * 12 * 16 * 16, 2 * 3 * 16)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    # Attention, the router, and two of the four experts.
    assert ModelSizes.of(MixtralForCausalLM(config)).per_token == 4 * 16 * 16 + 4 * 16 + 2 * 3 * 16 * 24


def test_quantized_layers_count_as_the_layers_they_stand_for():
    bnb = pytest.importorskip("bitsandbytes")
    packed = bnb.nn.Linear4bit(64, 32, bias=False)
    packed.to("cpu")
    from hf_rlhf_ext.modeling.layout_costs import _multiply_adds

    assert _multiply_adds(packed, None) == _multiply_adds(torch.nn.Linear(64, 32), None) == 64 * 32


def test_work_by_hand():
    one = counts((10, [4, 6, 2]))
    assert plain_work(one) == Work(3 * 16, 3 * 16**2)
    assert mask_work(one) == Work(22, 22**2)
    assert segment_work(one) == Work(22, 10**2 + 3 * (4 + COPIED_KEYS) * (10 + 4))
    assert Work(3, 5).cost(ModelSizes(7, 11)) == 3 * 7 + PAIR_FACTOR * 5 * 11
    assert layout_cost(Layout.MASK, ModelSizes(7, 11), one) == 22 * 7 + PAIR_FACTOR * 22**2 * 11
    # Two batches. The first: rows of 16 and of 8 tokens, padded to 16. The second: nothing is padded.
    three = counts((10, [4, 6, 2]), (5, [3, 3]), (7, [1, 1]))
    assert plain_work(three, together=2) == Work(5 * 16 + 2 * 8, 5 * 16**2 + 2 * 8**2)
    # 22 + 11 tokens are two rows of 22.
    assert mask_work(three, together=2) == Work(2 * 22 + 9, 2 * 22**2 + 9**2)


def test_causal_attention_skips_blocks_of_long_rows():
    assert causal_pairs(np.array([100, 512, 1024])).tolist() == [100**2, 512**2, 1024 * 1536 / 2]
    assert plain_work(same(1000, 2, 24)).pairs == 2 * 1024 * 1536 / 2  # without padding, no mask is needed
    assert plain_work(counts((1000, [24, 23]))).pairs == 2 * 1024**2


@pytest.mark.parametrize(
    "shape, measured",
    [((155, 4, 48, 2), 0.5), ((16, 32, 128), 8), ((512, 4, 128), 0.6), ((512, 9, 64), 0.4)],
    ids=str,
)
def test_the_mask_is_taken_where_it_was_measured_to_be_faster(shape, measured):
    """Seconds with a mask, divided by those of plain rows, of the model `SMALL` on a CPU."""
    layout, ratio = cheaper_layout(Layout.MASK, SMALL, same(*shape))
    assert ratio == pytest.approx(measured, rel=0.3)
    assert layout == (Layout.MASK if measured < 1 else Layout.PLAIN)
    assert cheaper_layout(Layout.SEGMENTS, SMALL, same(*shape)).layout == Layout.SEGMENTS


def test_flex_attention_skips_what_a_mask_hides(tiny_config):
    shape = same(16, 32, 128)
    assert cheaper_layout(Layout.MASK, SMALL, shape).layout == Layout.PLAIN
    skipping = replace(SMALL, skips_hidden=True)
    assert cheaper_layout(Layout.MASK, skipping, shape).layout == Layout.MASK
    model = LlamaForSequenceClassification(tiny_config)
    assert not ModelSizes.of(model).skips_hidden
    model.config._attn_implementation_internal = "flex_attention"
    assert ModelSizes.of(model).skips_hidden


def test_padding_counts():
    """Prompts of different lengths in one batch: plain rows are padded to the longest, and so are rows with a mask."""
    prompts = counts((400, [10, 10]), (10, [10] * 12))
    alone = cheaper_layout(Layout.MASK, SMALL, prompts, together=1).ratio
    together = cheaper_layout(Layout.MASK, SMALL, prompts, together=2).ratio
    assert together < alone


def test_without_rows_or_another_layout_there_is_nothing_to_compare():
    nothing = TokenCounts(*(np.zeros(0, np.int64) for _ in range(4)))
    assert cheaper_layout(Layout.MASK, SMALL, nothing) == (Layout.MASK, 1.0)
    assert cheaper_layout(Layout.PLAIN, SMALL, same(9, 2, 3)) == (Layout.PLAIN, 1.0)

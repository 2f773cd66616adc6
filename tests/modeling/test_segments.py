"""Attention by segments: against attention by brute force in float64, and as a part of Transformers."""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling import segment_plans
from hf_rlhf_ext.modeling import segments as module
from hf_rlhf_ext.modeling.packing import Layout
from hf_rlhf_ext.modeling.prefix import model_inputs, prefix_mask
from hf_rlhf_ext.modeling.segment_plans import Family, PromptSegments, SegmentPlan
from hf_rlhf_ext.modeling.segments import segments_attention, sentinel

LAYER = nn.Module()


def random_batch(chooser: random.Random) -> dict[str, Tensor]:
    """Rows of prompts with no to four completions of one to six tokens, and padding."""
    rows = []
    for _ in range(chooser.randint(1, 3)):
        columns = {"segments": [], "owners": [], "positions": []}
        segment = 0
        for _ in range(chooser.randint(1, 3)):
            owner, n_prompt = segment, chooser.randint(1, 7)
            lengths = [n_prompt] + [chooser.randint(1, 6) for _ in range(chooser.randint(0, 4))]
            for number, length in enumerate(lengths):
                first = n_prompt if number else 0
                columns["segments"] += [segment] * length
                columns["owners"] += [owner] * length
                columns["positions"] += range(first, first + length)
                segment += 1
        rows.append(columns)
    width = max(len(row["segments"]) for row in rows) + chooser.randint(0, 2)
    padding = {"segments": -1, "owners": -1, "positions": 0}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in padding.items()
    }


def brute_force(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    weights = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(repeats, 1)) * scaling
    weights = weights.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value.repeat_interleave(repeats, 1))


@pytest.mark.parametrize("call_cost", [0, 30, 1e9])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_it_is_attention_by_brute_force(call_cost, window, monkeypatch):
    monkeypatch.setattr(segment_plans, "_CALL_COST", {"cpu": call_cost})
    chooser = random.Random(0)
    with_padding = 0
    for seed in range(25):
        batch = random_batch(chooser)
        rows, length = batch["segments"].shape
        torch.manual_seed(seed)
        units, own_units = 4, chooser.choice([4, 6])
        query = torch.randn(rows, 4, length, units, dtype=torch.float64, requires_grad=True)
        key = torch.randn(rows, 2, length, units, dtype=torch.float64, requires_grad=True)
        value = torch.randn(rows, 2, length, own_units, dtype=torch.float64, requires_grad=True)
        real = (batch["segments"] >= 0)[..., None, None]
        weights = torch.randn(rows, length, 4, own_units, dtype=torch.float64)

        plan = SegmentPlan.of(**batch)
        mask = sentinel(window, torch.device("cpu"))
        found, _ = segments_attention(LAYER, query, key, value, mask, plan, scaling=0.7)
        gradients = torch.autograd.grad((found * weights).sum(), (query, key, value))
        expected = brute_force(query, key, value, prefix_mask(**batch, window=window), 0.7)
        expected_gradients = torch.autograd.grad((expected * weights * real).sum(), (query, key, value))

        assert_close(found, expected * real, atol=1e-12, rtol=1e-12)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-12)
            assert (gradient.transpose(1, 2)[~real[..., 0, 0]] == 0).all()
        with_padding += int((~real).sum())
    assert with_padding > 20


def test_the_path_without_masks_and_with_repeated_heads_is_the_same(monkeypatch):
    torch.manual_seed(0)
    prompts = [PromptSegments(0, 3, ((3, 2), (5, 4))), PromptSegments(9, 3, ((12, 4), (16, 1)))]
    query, key, value = (torch.randn(1, heads, 17, 8, dtype=torch.float64) for heads in (4, 2, 2))
    mask = sentinel(None, torch.device("cpu"))

    def attend() -> Tensor:
        return segments_attention(LAYER, query, key, value, mask, SegmentPlan.of_prompts(prompts, (1, 17)))[0]

    expected = attend()
    plan = SegmentPlan.of_prompts(prompts, (1, 17))
    assert plan.mask(0, "completions", None, torch.float64) is not None
    monkeypatch.setattr(SegmentPlan, "mask", lambda *given: None)
    monkeypatch.setattr(module, "_can_group", lambda *given: False)
    assert_close(attend(), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("has_mask", [True, False])
def test_autocast_reaches_every_kernel(has_mask, monkeypatch):
    """In a model in fp32, autocast leaves values in bf16, and queries and keys in fp32 after the rotary embedding."""
    torch.manual_seed(0)
    plan = SegmentPlan.of_prompts(
        [PromptSegments(0, 3, ((3, 2), (5, 4))), PromptSegments(9, 3, ((12, 4), (16, 1)))], (1, 17)
    )
    query, key, value = (torch.randn(1, heads, 17, 8) for heads in (4, 2, 2))
    mask = sentinel(None, torch.device("cpu"))
    expected = segments_attention(LAYER, query, key, value, mask, plan)[0]
    if not has_mask:
        monkeypatch.setattr(SegmentPlan, "mask", lambda *given: None)
    with torch.autocast("cpu", torch.bfloat16):
        found = segments_attention(LAYER, query, key, value.bfloat16(), mask, plan)[0]
        double = segments_attention(LAYER, query.double(), key.double(), value.double(), mask, plan)[0]
    assert found.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert_close(found.float(), expected, atol=0.03, rtol=0)
    assert_close(double.float(), expected, atol=1e-6, rtol=0)


def test_lower_right_causal_without_a_mask_is_for_cuda_and_equal_prompts():
    equal = Family((4, 4), 2, 4, 3)
    ragged = Family((3, 4), 2, 4, 3)
    assert segment_plans._completion_mask(equal, None, torch.device("cuda")) is None
    assert (
        segment_plans._completion_mask(equal, 7, torch.device("cuda")) is None
    )  # no distance is as large as the window
    assert segment_plans._completion_mask(equal, None, torch.device("cpu")).shape == (3, 7)
    assert segment_plans._completion_mask(ragged, None, torch.device("cpu")).shape == (4, 1, 3, 7)


def test_dropout_reaches_the_weights():
    torch.manual_seed(0)
    plan = SegmentPlan.of_prompts([PromptSegments(0, 8, ((8, 8), (16, 8)))], (1, 24))
    query, key = torch.randn(1, 2, 24, 4), torch.randn(1, 2, 24, 4)
    ones = torch.ones(1, 2, 24, 4)
    mask = sentinel(None, torch.device("cpu"))
    found = [segments_attention(LAYER, query, key, ones, mask, plan, dropout=0.3)[0] for _ in range(200)]
    assert (found[0] - 1).abs().max() > 0.1  # without dropout, weights add up to 1
    assert_close(torch.stack(found).mean(0), torch.ones(1, 24, 2, 4), atol=0.25, rtol=0)


# --- families ---------------------------------------------------------------------------------------------------------


def prompts_of(shapes: list[tuple[int, list[int]]]) -> list[PromptSegments]:
    """Prompts with completions, one after the other."""
    found = []
    start = 0
    for n_prompt, lengths in shapes:
        completions = []
        next_start = start + n_prompt
        for length in lengths:
            completions.append((next_start, length))
            next_start += length
        found.append(PromptSegments(start, n_prompt, tuple(completions)))
        start = next_start
    return found


def families_of(shapes: list[tuple[int, list[int]]]) -> list[Family]:
    n_tokens = sum(n_prompt + sum(lengths) for n_prompt, lengths in shapes)
    return list(SegmentPlan.of_prompts(prompts_of(shapes), (1, n_tokens)).families)


def test_prompts_of_similar_length_are_computed_together():
    (family,) = families_of([(15, [5] * 4), (17, [4] * 4)])
    assert (family.n_prompts, family.per_prompt, family.prompt_length, family.completion_length) == (2, 4, 17, 5)
    assert len(families_of([(20, [48] * 4), (500, [48] * 4)])) == 2  # padding would cost more
    assert len(families_of([(20, [9, 9]), (20, [9, 9, 9])])) == 2


def test_one_completion_behind_its_prompt_is_an_ordinary_row():
    (family,) = families_of([(5, [7])])
    assert (family.prompt_lengths, family.per_prompt) == ((12,), 0)


def test_batches_that_are_not_in_the_layout_are_refused():
    segments, owners = torch.tensor([[1, 1, 0, 0]]), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="precedes its prompt"):
        SegmentPlan.of(segments, owners, torch.arange(4)[None])
    with pytest.raises(ValueError, match="starts at position 3, not at 2"):
        SegmentPlan.of(segments.flip(1), owners, torch.tensor([[0, 1, 3, 4]]))


# --- as a part of Transformers ----------------------------------------------------------------------------------------


def tiny_llama(attention: str = module.SEGMENTS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, **sizes)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def packed(shapes: list[tuple[int, list[int]]]) -> dict[str, Tensor]:
    """One row of random tokens in the layout."""
    columns = {"segments": [], "owners": [], "positions": []}
    segment = 0
    for n_prompt, lengths in shapes:
        owner = segment
        for number, length in enumerate([n_prompt, *lengths]):
            first = n_prompt if number else 0
            columns["segments"] += [segment] * length
            columns["owners"] += [owner] * length
            columns["positions"] += range(first, first + length)
            segment += 1
    batch = {name: torch.tensor([values]) for name, values in columns.items()}
    return batch | {"input_ids": torch.randint(1, 64, batch["segments"].shape)}


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_plan_it_is_sdpa_to_the_bit(padded):
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    if padded:
        attention_mask[0, :4] = 0
    found = {}
    for attention in ("sdpa", module.SEGMENTS):
        model = tiny_llama(attention)
        assert model.config._attn_implementation == attention
        logits = model(input_ids=ids, attention_mask=attention_mask).logits
        logits.sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        tokens = model.generate(ids, attention_mask=attention_mask, max_new_tokens=8, do_sample=False)
        found[attention] = (logits.detach(), gradient, tokens)
    for first, second in zip(found["sdpa"], found[module.SEGMENTS], strict=True):
        assert torch.equal(first, second)


def test_the_name_is_not_saved():
    assert "segments" not in str(tiny_llama().config.to_dict())


@pytest.mark.parametrize(
    "options, fragment",
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "position_bias"),
        ({"cache": object()}, "cache"),
        ({"invented": 1}, "invented"),
        ({"is_causal": False}, "is causal"),
    ],
)
def test_what_it_does_not_support_is_refused(options, fragment):
    plan = SegmentPlan.of_prompts(prompts_of([(3, [2, 4])]), (1, 9))
    mask = sentinel(None, torch.device("cpu"))
    states = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=fragment):
        segments_attention(LAYER, *states, mask, plan, **options)
    known = {name: None for name in options} | {"use_cache": False, "sliding_window": 3, "output_router_logits": False}
    segments_attention(LAYER, *states, mask, plan, **known)


def test_a_changed_mask_and_a_plan_of_another_batch_are_refused():
    plan = SegmentPlan.of_prompts(prompts_of([(3, [2, 4])]), (1, 9))
    states = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    mask = sentinel(5, torch.device("cpu"))
    for changed in (None, mask.float(), torch.ones(1, 1, 9, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match="changes the attention mask"):
            segments_attention(LAYER, *states, changed, plan)
    longer = [torch.randn(1, 2, 10, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="the plan is of a batch"):
        segments_attention(LAYER, *longer, mask, plan)


def test_the_sentinel_is_never_taken_for_a_mask():
    model = tiny_llama()
    inputs = model_inputs(model, packed([(3, [2, 4])]))
    del inputs["segment_plan"]
    with pytest.raises(ValueError, match="does not hand keywords down"):
        model(**inputs)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="dtype"):
        model(**inputs)


class Sizes(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def largest_tensor(attention: str, per_prompt: int) -> int:
    model = tiny_llama(attention).model.train()
    batch = packed([(16, [64] * per_prompt)])
    with Sizes() as sizes:
        model(**model_inputs(model, batch), use_cache=False).last_hidden_state.sum().backward()
    return sizes.largest


def test_memory_grows_with_the_number_of_completions_and_not_with_its_square():
    few, many = (largest_tensor(module.SEGMENTS, n) for n in (4, 32))
    assert many <= 8.1 * few
    assert largest_tensor("sdpa", 32) > 4 * many  # the mask alone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_was_set_to_another_attention_is_refused(attention):
    """Eager attention would add the sentinel to all pairs, and mask nothing."""
    model, batch = tiny_llama(), packed([(3, [2, 4])])
    model.set_attn_implementation(attention)
    with pytest.raises(UserError, match="attn_implementation.*set_attn_implementation"):
        model_inputs(model, batch, Layout.SEGMENTS)
    model_inputs(model, batch, Layout.MASK)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="'flash_attention_2'.*needs 'sdpa'"):
        model_inputs(model, batch)


@pytest.mark.seam("transformers.masking_utils.create_causal_mask")
def test_transformers_hands_masks_of_four_dimensions_and_keywords_down():
    received = []

    def spy(layer, query, key, value, attention_mask, **options):
        received.append((attention_mask, options))
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    model = tiny_llama("spy")
    mask, plan = sentinel(None, torch.device("cpu")), object()
    model(input_ids=torch.ones(1, 5, dtype=torch.int64), attention_mask=mask, segment_plan=plan)
    assert len(received) == 2
    for attention_mask, options in received:
        assert attention_mask is mask and options["segment_plan"] is plan


@pytest.mark.seam("transformers.masking_utils.AttentionMaskInterface")
def test_an_attention_without_its_function_of_masks_would_get_none():
    """Why `SEGMENTS` is registered twice: with padding, it would silently attend to it."""
    received = []

    def spy(layer, query, key, value, attention_mask, **options):
        received.append(attention_mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    ids = torch.ones(2, 5, dtype=torch.int64)
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    tiny_llama("spy")(input_ids=ids, attention_mask=attention_mask)
    assert received == [None, None]
    received.clear()
    try:
        AttentionInterface.register(module.SEGMENTS, spy)
        tiny_llama()(input_ids=ids, attention_mask=attention_mask)
    finally:
        AttentionInterface.register(module.SEGMENTS, segments_attention)
    assert received[0].shape == (2, 1, 5, 5)

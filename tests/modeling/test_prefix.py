"""The shared-prefix layout compared with plain rows: masks by brute force, scores and gradients by architecture."""

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from hf_rlhf_ext.data.collators import DataCollatorForComparisons
from hf_rlhf_ext.modeling import prefix
from hf_rlhf_ext.modeling.adapters import mixed_precision
from hf_rlhf_ext.modeling.layouts import Layout, LayoutChoice, find_layout
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.modeling.prefix import mask_function, prefix_mask, why_not
from hf_rlhf_ext.modeling.segments import SEGMENTS
from hf_rlhf_ext.reward.scores import score_batch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "num_labels": 1,
}
WINDOW = {"sliding_window": 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
# name -> (config, options beside SIZES)
ARCHITECTURES = {
    "llama": (hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen2-sliding": (hf.Qwen2Config, WINDOW | MIXED | {"use_sliding_window": True}),
    "qwen3": (hf.Qwen3Config, {}),
    "qwen3-sliding": (hf.Qwen3Config, WINDOW | MIXED | {"use_sliding_window": True}),
    "gemma": (hf.GemmaConfig, {}),
    "gemma2": (hf.Gemma2Config, WINDOW | MIXED | {"attn_implementation": "eager"}),
    "gemma3": (hf.Gemma3TextConfig, WINDOW | MIXED),
    "mistral": (hf.MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (hf.MistralConfig, WINDOW),
    "phi3": (hf.Phi3Config, {"sliding_window": None}),
    "phi3-sliding": (hf.Phi3Config, WINDOW),
    "gpt2": (hf.GPT2Config, {}),
    "gpt-neox": (hf.GPTNeoXConfig, {}),
    "opt": (hf.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def make(name, dtype=torch.float32, **larger):
    torch.manual_seed(0)
    config_class, options = ARCHITECTURES[name]
    options = options | larger
    attention = options.get("attn_implementation", "sdpa")
    sizes = SIZES | {k: v for k, v in options.items() if k != "attn_implementation"}
    config = config_class(**sizes, attn_implementation=attention)
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    model = hf.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():  # the default initialization is so small that a wrong mask would hardly show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows(seed=0, n=3, longest=9):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        k = int(rng.integers(2, 5))
        completions = [rng.integers(1, 64, rng.integers(1, longest)).tolist() for _ in range(k)]
        pairs = [[i, j] for i in range(k) for j in range(i)]
        row = {"prompt_ids": rng.integers(1, 64, rng.integers(1, 12)).tolist(), "completion_ids": completions}
        made.append(row | {"pairs": pairs, "targets": [1.0] * len(pairs), "weights": [1.0] * len(pairs)})
    return made


def scores_and_gradients(model, layout, data):
    model.zero_grad()
    device = next(model.parameters()).device
    batch = DataCollatorForComparisons(0, layout=layout)(data)
    scores = score_batch(model, {name: values.to(device) for name, values in batch.items()})
    torch.tanh(scores * torch.arange(1, len(scores) + 1, device=device)).sum().backward()
    return scores.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_and_gradients_are_those_of_plain_rows(name, checkpointing):
    # Norms and rotary angles are fp32 in most of these, also where the weights are float64; Gemma 2's own padded rows
    # are NaN in float64 (eager attention, a window, and fully masked padding).
    double = (torch.float64, 1e-10 if name in ("gpt2", "opt") else 1e-7)
    for dtype, tolerance in ((torch.float32, 1e-5), double)[: 1 if name == "gemma2" else 2]:
        model = make(name, dtype).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        plain, plain_gradient = scores_and_gradients(model, "plain", rows())
        assert plain.abs().max() > 0.05  # there is something to get wrong
        for attention in ("sdpa", SEGMENTS)[: 1 if name == "gemma2" else 2]:
            if name != "gemma2":
                model.set_attn_implementation(attention)
            shared, shared_gradient = scores_and_gradients(model, "shared_prefix", rows())
            assert (shared - plain).abs().max() <= tolerance * max(1.0, plain.abs().max())
            assert (shared_gradient - plain_gradient).norm() <= tolerance * plain_gradient.norm()


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_in_bf16_and_nf4_is_near_plain_rows(name, load_in_4bit, tmp_path):
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    make(name).save_pretrained(tmp_path)
    base = load_base_model(str(tmp_path), task="reward", dtype="bfloat16", load_in_4bit=load_in_4bit)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    model, found = get_peft_model(base, config).train(), {}
    for layout in ("plain", "shared_prefix"):
        with mixed_precision(model, torch.bfloat16):
            found[layout] = scores_and_gradients(model, layout, rows())
    (plain, plain_gradient), (shared, shared_gradient) = found.values()
    assert plain.std() > 0.05 and (shared - plain).abs().max() < 0.05 * plain.abs().max()
    assert torch.nn.functional.cosine_similarity(shared_gradient, plain_gradient, dim=0) > 0.99


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3"])
def test_the_probe_sees_a_window_that_no_short_text_reaches(name, monkeypatch):
    model = make(name, sliding_window=64).eval()
    assert find_layout(model, may_segment=False).layout == Layout.MASK and model.config.sliding_window == 64
    monkeypatch.setattr(prefix, "prefix_mask", lambda *given: prefix_mask(*given[:3]))  # forgets the window
    choice = find_layout(model, may_segment=False)
    assert choice.layout == Layout.PLAIN and "from those of plain rows" in choice.reason


def test_the_probe_refuses_a_mask_that_is_ignored(monkeypatch):
    model = make("llama")
    forward = type(model).forward

    def deaf(self, *args, attention_mask=None, segment_plan=None, **kwargs):
        return forward(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(type(model), "forward", deaf)
    choice = find_layout(model)
    assert choice.layout == Layout.PLAIN and "from those of plain rows" in choice.reason


@pytest.mark.parametrize("error", [NotImplementedError(), AssertionError("no 4-D mask\nhere")])
def test_a_model_that_raises_at_the_layout_takes_plain_rows_and_says_why(error, monkeypatch):
    model = make("llama").train()
    forward = type(model).forward

    def refuse(self, *args, attention_mask=None, **kwargs):
        if attention_mask.dim() == 4:
            raise error
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", refuse)
    reason = str(error).splitlines()[0] if str(error) else "NotImplementedError"
    assert find_layout(model) == LayoutChoice(Layout.PLAIN, f"it does not accept the layout: {reason}")
    assert model.training and model.config._attn_implementation == "sdpa"


def test_architectures_that_cannot_are_told_from_their_configuration():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_labels": 1, "pad_token_id": 0}
    bloom = hf.BloomForSequenceClassification(hf.BloomConfig(**sizes, n_layer=1, n_head=2))
    assert why_not(bloom) == "its backbone accepts no position ids"
    neo = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}
    local = hf.GPTNeoForSequenceClassification(hf.GPTNeoConfig(**sizes, **neo, max_position_embeddings=64))
    assert why_not(local) == "it has local attention"


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.integers(1, 5), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), padding=st.integers(0, 3),
    window=st.none() | st.integers(1, 6),
)  # fmt: skip
def test_the_mask_is_that_of_rows_of_their_own(prompt, lengths, padding, window):
    segments = [0] * prompt + [k for k, n in enumerate(lengths, 1) for _ in range(n)] + [-1] * padding
    positions = [*range(prompt), *(prompt + i for n in lengths for i in range(n)), *[0] * padding]
    owners = [min(segment, 0) for segment in segments]
    mask = prefix_mask(*(torch.tensor([values]) for values in (segments, owners, positions)), window)[0, 0]
    for q, (sq, pq) in enumerate(zip(segments, positions, strict=True)):
        for k, (sk, pk) in enumerate(zip(segments, positions, strict=True)):
            in_row = sk in (0, sq) and sq >= 0 and sk >= 0 and pk <= pq and not (sq == 0 and sk > 0)
            expected = (in_row and (window is None or pq - pk < window)) or q == k
            if sq >= 0 and sk >= 0:
                assert bool(mask[q, k]) == expected
            if sq >= 0 > sk:
                assert not mask[q, k]  # nobody looks at padding
    assert mask.any(-1).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(3)), budget=st.integers(1, 200))
def test_scores_do_not_depend_on_order_neighbours_or_budget(seed, order, budget):
    model, data = make("llama").eval(), rows(seed)
    expected = {}
    with torch.no_grad():
        for k, row in enumerate(data):
            expected[k] = score_batch(model, DataCollatorForComparisons(0, layout="plain")([row]))
        shuffled = [data[k] | {"completion_ids": data[k]["completion_ids"][::-1]} for k in order]
        for layout in ("plain", "shared_prefix"):
            found = score_batch(model, DataCollatorForComparisons(0, layout=layout)(shuffled))
            assert_close(found, torch.cat([expected[k].flip(0) for k in order]), atol=1e-5, rtol=1e-5)
            parts = DataCollatorForComparisons(0, layout=layout, max_tokens=budget)(data)["micro_batches"]
            assert sum(len(part["completion_counts"]) for part in parts) == 3
            for part in parts:
                assert part["input_ids"].numel() <= budget or len(part["completion_counts"]) == 1
            found = torch.cat([score_batch(model, part) for part in parts]).sort().values
            assert_close(found, torch.cat(list(expected.values())).sort().values, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # FlexAttention compiles on its first call
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_flex_attention_scores_the_same(name):
    model, data = make(name).eval(), rows()
    batch = DataCollatorForComparisons(0, layout="shared_prefix")(data)
    with torch.no_grad():
        expected = score_batch(model, batch)
        model.set_attn_implementation("flex_attention")
        found = score_batch(model, batch)
    assert expected.abs().max() > 0.05
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert why_not(model) == "flex_attention has no backward pass on a CPU"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_flex_attention_trains_the_same_on_a_gpu(name):
    sizes = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 512}
    model, data = make(name, **sizes).cuda().train(), rows(longest=60)
    length = DataCollatorForComparisons(0, layout="shared_prefix")(data)["input_ids"].shape[1]
    assert length > 128 and length % 128
    plain, plain_gradient = scores_and_gradients(model, "plain", data)
    model.set_attn_implementation("flex_attention")
    assert find_layout(model).layout == Layout.MASK
    shared, shared_gradient = scores_and_gradients(model, "shared_prefix", data)
    assert (shared - plain).abs().max() <= 1e-3 * plain.abs().max()
    assert (shared_gradient - plain_gradient).norm() <= 1e-3 * plain_gradient.norm()


def test_the_mask_function_is_what_flex_attention_calls():
    from torch.nn.attention.flex_attention import create_mask

    batch = DataCollatorForComparisons(0, layout="shared_prefix")(rows(n=5))
    given = [batch[name] for name in ("segments", "owners", "positions")]
    n_rows, length = given[0].shape
    assert n_rows < 5  # some share a row
    for window in (None, 3):
        called = create_mask(mask_function(*given, window), n_rows, None, length, length, device="cpu")
        assert torch.equal(called, prefix_mask(*given, window))

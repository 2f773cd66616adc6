"""Chunked log-probabilities compared with log_softmax of the full logits, without tensors of that size."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
)

from hf_rlhf_ext.compat import selective_log_softmax_and_entropy
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling import logprobs as logprobs_module
from hf_rlhf_ext.modeling import vocabulary_tiles
from hf_rlhf_ext.modeling.logprobs import (
    LogitTransform,
    captured_hidden_states,
    check_output_head,
    chunked_kl,
    chunked_logprobs,
    completion_hidden_states,
    contiguous_head_inputs,
    hidden_width,
    logit_transform,
    rows_per_chunk,
    scatter_to_mask,
)
from hf_rlhf_ext.modeling.vocabulary_tiles import frozen_linear
from hf_rlhf_ext.ppo.kl import kl_k1

PROMPT_LENGTHS = torch.tensor([2, 5, 1])
LENGTHS = torch.tensor([4, 1, 3])
MASK = torch.arange(4) < LENGTHS[:, None]


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest new tensor of any operation, except those that share memory with `known`."""

    def __init__(self, known=()):
        super().__init__()
        self.numel = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return output


@pytest.fixture
def head_and_hidden():
    """An LM head (H 8 → V 50), hidden states (N 10) and targets."""
    torch.manual_seed(0)
    return torch.nn.Linear(8, 50, bias=False), torch.randn(10, 8, requires_grad=True), torch.randint(50, (10,))


@pytest.fixture
def sequences(tiny_config):
    """Input ids (3, 6) of prompts and completions of different lengths, padded on the right with nonsense."""
    torch.manual_seed(1)
    return torch.randint(3, tiny_config.vocab_size, (3, 6))


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 128])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, None), (1.3, 2.0)])
def test_values_and_gradients_equal_those_of_full_logits(head_and_hidden, chunk_size, temperature, softcap):
    head, hidden, targets = head_and_hidden
    logits = head(hidden) if softcap is None else softcap * torch.tanh(head(hidden) / softcap)
    full = torch.log_softmax(logits / temperature, -1)
    expected = full.gather(1, targets[:, None]).squeeze(1), -(full.exp() * full).sum(1)
    weights = torch.randn(2, 10)

    def gradients(logprobs, entropies):
        loss = (weights[0] * logprobs).sum() + (weights[1] * entropies).sum()
        return torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)

    got = chunked_logprobs(
        hidden,
        head,
        targets,
        temperature=temperature,
        transform=LogitTransform(softcap=softcap),
        chunk_size=chunk_size,
        entropy_requires_grad=True,
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients(*got), gradients(*expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numbers_are_those_of_trl_to_the_bit(with_entropy, temperature):
    head, targets = torch.nn.Linear(8, 500), torch.randint(500, (200,))
    weights = torch.randn(2, 200)
    states = torch.randn(200, 8)

    def results(function):
        hidden = states.clone().requires_grad_()
        logprobs, entropies = function(hidden)
        loss = (weights[0] * logprobs).sum() + ((weights[1] * entropies).sum() if with_entropy else 0)
        return logprobs, entropies, *torch.autograd.grad(loss, [hidden, head.weight])

    options = {"temperature": temperature, "entropy_requires_grad": with_entropy}
    ours = results(lambda hidden: chunked_logprobs(hidden, head, targets, **options))
    theirs = results(lambda hidden: selective_log_softmax_and_entropy(head(hidden), targets, with_entropy, temperature))
    assert all(torch.equal(got, expected) for got, expected in zip(ours, theirs, strict=True))
    assert ours[1].requires_grad == with_entropy


# ---- A frozen head is read in parts of the vocabulary ----


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 256 entries for seven tokens, also where there are few logits."""
    monkeypatch.setattr(logprobs_module, "FEW_LOGITS_BYTES", 0)
    monkeypatch.setattr(vocabulary_tiles, "_TILE_BYTES", {"cpu": 1})
    monkeypatch.setattr(vocabulary_tiles, "_MAX_ROWS", 7)


@pytest.mark.parametrize("bias, with_entropy", [(False, True), (True, False)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.3, 4.0), LogitTransform(softcap=3.0)])
def test_tiles_of_the_vocabulary_give_numbers_and_gradients_in_double_precision(
    small_tiles, bias, with_entropy, temperature, transform
):
    head = torch.nn.Linear(16, 1000, bias=bias).requires_grad_(False)
    torch.nn.init.normal_(head.weight)
    hidden, targets, weights = torch.randn(20, 16, requires_grad=True), torch.randint(1000, (20,)), torch.randn(2, 20)
    targets[:3] = torch.tensor([0, 999, 256])  # the edges of tiles
    precise = hidden.detach().double().requires_grad_()
    logits = transform(torch.nn.functional.linear(precise, *[p.double() for p in head.parameters()])) / temperature
    full = logits.log_softmax(-1)
    expected = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)

    def gradient(logprobs, entropies, of):
        loss = (weights[0] * logprobs).sum() + ((weights[1] * entropies).sum() if with_entropy else 0)
        return torch.autograd.grad(loss, of)[0]

    options = {"temperature": temperature, "transform": transform, "entropy_requires_grad": with_entropy}
    got = chunked_logprobs(hidden, head, targets, **options)
    torch.testing.assert_close(got, tuple(x.float() for x in expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(*got, hidden), gradient(*expected, precise).float(), rtol=1e-5, atol=1e-5)
    assert got[1].requires_grad == with_entropy
    with torch.no_grad():
        again = chunked_logprobs(hidden, head, targets, **options)
    assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1]) and not again[0].requires_grad


def test_extreme_logits_and_hidden_entries_are_summed_like_others(small_tiles):
    head = torch.nn.Linear(4, 1000).requires_grad_(False)
    head.weight *= 1e4
    head.bias[:256] = -torch.inf  # a whole tile, and the first one
    head.bias[700] = -torch.inf
    hidden, targets = torch.randn(20, 4, requires_grad=True), torch.randint(300, 700, (20,))
    precise = hidden.detach().double().requires_grad_()
    weight, bias = head.weight.double(), head.bias.double()
    expected = torch.nn.functional.linear(precise, weight, bias).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert expected.min() < -1e4
    got, _ = chunked_logprobs(hidden, head, targets)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-2)
    gradients = torch.autograd.grad(got.sum(), hidden)[0], torch.autograd.grad(expected.sum(), precise)[0].float()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1.0)


def test_what_is_wrong_is_not_a_number(small_tiles):
    """A state that is not finite, or a token that is not in the vocabulary: guards look for NaN."""
    head = torch.nn.Linear(4, 600, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(9, 4), torch.randint(600, (9,))
    hidden[2, 1], hidden[5, 0] = torch.nan, torch.inf
    targets[7], targets[8] = 600, -100
    logprobs, _ = chunked_logprobs(hidden, head, targets)
    assert logprobs.isfinite().tolist() == [True, True, False, True, True, False, True, False, False]


def test_tiles_have_no_second_derivative(small_tiles):
    head = torch.nn.Linear(4, 600, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    logprobs, _ = chunked_logprobs(hidden, head, torch.tensor([1, 2, 3]))
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("autocast", [True, False])
def test_tiles_in_half_precision_round_logits_only(small_tiles, autocast):
    head, targets = torch.nn.Linear(16, 1000, bias=False).requires_grad_(False), torch.randint(1000, (20,))
    hidden = torch.randn(20, 16, requires_grad=True)
    states, rounded = hidden.bfloat16(), copy.deepcopy(head).bfloat16()
    logits = rounded(states).double()
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    share = torch.nn.functional.one_hot(targets, 1000) - logits.softmax(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, _ = chunked_logprobs(*((hidden, head) if autocast else (states, rounded)), targets)
        (gradient,) = torch.autograd.grad(got.sum(), hidden)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    exact = (share @ rounded.weight.double()).float()
    torch.testing.assert_close(gradient, exact, rtol=5e-3, atol=1e-4 if autocast else 5e-3)


def test_tiles_need_no_memory_for_all_logits_and_keep_none(small_tiles):
    head, targets = torch.nn.Linear(16, 5000, bias=False).requires_grad_(False), torch.randint(5000, (20,))
    hidden, kept = torch.randn(20, 16, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x)
    with LargestTensor(known=[head.weight]) as seen, hooks:
        chunked_logprobs(hidden, head, targets)[0].sum().backward()
    assert seen.numel == 7 * 256 and kept == [(20, 16)]


def test_no_tokens_have_no_logprobs(small_tiles, head_and_hidden):
    head, hidden, targets = head_and_hidden
    for layer in (head, head.requires_grad_(False)):
        logprobs, entropies = chunked_logprobs(hidden[:0], layer, targets[:0])
        assert logprobs.shape == entropies.shape == (0,)


def test_only_a_frozen_plain_head_is_read_in_parts(tiny_llama):
    hidden = torch.randn(3, 32)
    head = torch.nn.Linear(32, 50).requires_grad_(False)
    assert frozen_linear(head, hidden) is head and frozen_linear(head.forward, hidden) is head
    assert frozen_linear(lambda states: head(states), hidden) is None
    assert frozen_linear(head, hidden.double()) is None
    adapted = get_peft_model(tiny_llama, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert frozen_linear(adapted.get_output_embeddings(), hidden) is None
    head.register_forward_hook(lambda *_: None)
    assert frozen_linear(head, hidden) is None and frozen_linear(head.forward, hidden) is head
    assert frozen_linear(torch.nn.Linear(32, 50), hidden) is None  # it is trained


def test_chunks_are_as_large_as_memory_allows_whatever_the_vocabulary():
    assert [rows_per_chunk(vocabulary) for vocabulary in (2**15, 151_936, 10**9)] == [1024, 220, 1]


def test_entropy_carries_no_gradient_unless_asked_for(head_and_hidden):
    head, hidden, targets = head_and_hidden
    logprobs, entropies = chunked_logprobs(hidden, head, targets, chunk_size=4)
    assert logprobs.requires_grad and not entropies.requires_grad
    with torch.no_grad():
        again = chunked_logprobs(hidden, head, targets, chunk_size=7)
    torch.testing.assert_close((logprobs.detach(), entropies), again, rtol=0, atol=1e-6)
    assert not again[0].requires_grad


def test_half_precision_logits_are_reduced_in_fp32(head_and_hidden):
    head, hidden, targets = head_and_hidden
    got, _ = chunked_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
    expected = torch.log_softmax(head(hidden.bfloat16()).float(), -1).gather(1, targets[:, None]).squeeze(1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.fixture
def two_roles(head_and_hidden):
    """Heads and hidden states of a policy and a reference: `chunked_kl`'s first four arguments."""
    head, hidden, _ = head_and_hidden
    ref_head = torch.nn.Linear(8, 50, bias=False)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(ref_head.weight)
    return hidden, torch.randn(10, 8), head, ref_head


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 128])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, None), (1.3, 2.0)])
def test_kl_over_the_vocabulary_equals_that_of_torch(two_roles, chunk_size, temperature, softcap):
    hidden, ref_hidden, head, ref_head = two_roles
    logits = head(hidden).double(), ref_head(ref_hidden).double()
    logits = [x if softcap is None else softcap * torch.tanh(x / softcap) for x in logits]
    policy, reference = (torch.distributions.Categorical(logits=x / temperature) for x in logits)
    expected = torch.distributions.kl_divergence(policy, reference).float()
    transform = LogitTransform(softcap=softcap)
    got = chunked_kl(*two_roles, temperature=temperature, transform=transform, chunk_size=chunk_size)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got.shape == (10,) and got.dtype == torch.float32 and not got.requires_grad and expected.min() > 0.01


def test_kl_of_a_policy_from_itself_is_zero_and_half_precision_is_summed_in_fp32(two_roles):
    hidden, ref_hidden, head, ref_head = two_roles
    assert chunked_kl(hidden, hidden, head, head).abs().max() == 0
    halves = [x.bfloat16() for x in two_roles]
    logits = halves[2](halves[0]).float(), halves[3](halves[1]).float()
    policy, reference = (torch.distributions.Categorical(logits=x) for x in logits)
    expected = torch.distributions.kl_divergence(policy, reference)
    torch.testing.assert_close(chunked_kl(*halves), expected, rtol=1e-5, atol=1e-6)


def test_kl_makes_no_tensor_larger_than_a_chunk_of_logits(two_roles):
    def largest(chunk_size):
        with LargestTensor(known=[two_roles[2].weight, two_roles[3].weight]) as seen:
            chunked_kl(*two_roles, chunk_size=chunk_size)
        return seen.numel

    assert (largest(3), largest(10)) == (3 * 50, 10 * 50)


def test_the_sampled_estimates_average_to_the_kl_over_the_vocabulary(two_roles):
    # Of position 0: every token in the place of a sample, weighted by its probability.
    hidden, ref_hidden, head, ref_head = (x[:1] if isinstance(x, torch.Tensor) else x for x in two_roles)
    tokens = torch.arange(50)
    logprobs, _ = chunked_logprobs(hidden.expand(50, -1), head, tokens)
    ref_logprobs, _ = chunked_logprobs(ref_hidden.expand(50, -1), ref_head, tokens)
    exact = chunked_kl(hidden, ref_hidden, head, ref_head)
    torch.testing.assert_close((logprobs.exp() * kl_k1(logprobs, ref_logprobs)).sum()[None], exact)


def test_scatter_to_mask_keeps_order_and_gradient():
    x = torch.arange(1.0, 9.0, requires_grad=True)
    out = scatter_to_mask(x, MASK)
    assert out.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 0]]
    (out * torch.arange(12.0).reshape(3, 4)).sum().backward()
    assert x.grad.tolist() == [0, 1, 2, 3, 4, 8, 9, 10]


def variants(tiny_llama, kind):
    """The model with a random adapter of some kind, in eval mode."""
    configs = {
        "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    torch.manual_seed(2)
    model = get_peft_model(tiny_llama, configs[kind]) if kind in configs else tiny_llama
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["plain", "lora", "prompt"])
def test_hidden_states_predict_what_the_whole_model_predicts(tiny_llama, sequences, kind):
    model = variants(tiny_llama, kind)
    hidden = completion_hidden_states(model, model, sequences, PROMPT_LENGTHS, MASK)
    targets = torch.cat([row[p : p + n] for row, p, n in zip(sequences, PROMPT_LENGTHS, LENGTHS, strict=True)])
    logprobs, _ = chunked_logprobs(hidden, tiny_llama.get_output_embeddings(), targets, chunk_size=3)
    expected = []
    for row, prompt, length in zip(sequences, PROMPT_LENGTHS, LENGTHS, strict=True):  # alone, without any padding
        logits = model(input_ids=row[None, : prompt + length]).logits[0, -length - 1 : -1]
        expected.append(torch.log_softmax(logits, -1).gather(1, row[prompt : prompt + length, None]).squeeze(1))
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["plain", "lora", "prompt"])
def test_what_stands_in_the_padding_changes_nothing(tiny_llama, sequences, kind):
    model = variants(tiny_llama, kind)
    real = torch.arange(6) < (PROMPT_LENGTHS + LENGTHS)[:, None]
    other = torch.where(real, sequences, (sequences + 1) % 300)
    first, second = (completion_hidden_states(model, model, ids, PROMPT_LENGTHS, MASK) for ids in (sequences, other))
    assert torch.equal(first, second)


# What models do to the output of their heads

FACTORS = [
    (GraniteConfig, {"logits_scaling": 8.0}, 1 / 8),
    (HyperCLOVAXConfig, {"logits_scaling": 8.0}, 8.0),
    (CohereConfig, {"logit_scale": 0.25}, 0.25),
    (MptConfig, {"logit_scale": 0.25}, None),  # its forward pass ignores the option
    (GraniteConfig, {"logits_scaling": 1.0}, None),
    (LlamaConfig, {}, None),
]


def random_model(config_class, **options):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32, "hidden_size": 16}
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    sizes = {name: size for name, size in sizes.items() if name in known}
    if "num_key_value_heads" in known:
        sizes["num_key_value_heads"] = 2
    model = AutoModelForCausalLM.from_config(config_class(vocab_size=64, **sizes, **options))
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    return model.eval()


@pytest.mark.parametrize("config_class, options, factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_factor_of_the_logits_is_measured(config_class, options, factor, dtype):
    model = random_model(config_class, **options).to(dtype)
    expected = LogitTransform(scale=factor)
    assert logit_transform(model) == expected  # measured when it is first asked for
    assert check_output_head(model, list(range(20))) == expected
    assert logit_transform(copy.deepcopy(model)) == expected  # a reference is a copy


def test_a_soft_cap_is_used_even_where_logits_are_too_small_to_show_it():
    model = random_model(Gemma2Config, head_dim=8, final_logit_softcapping=30.0)
    model.get_output_embeddings().weight.data *= 1e-3
    assert check_output_head(model, [3, 4, 5]) == LogitTransform(softcap=30.0)


def test_scale_and_soft_cap_in_closed_form():
    logits = torch.tensor([-3.0, 0.0, 5.0])
    expected = [2 * math.tanh(0.25 * x) for x in (-3, 0, 5)]  # 2 · tanh(0.5 · x / 2)
    assert LogitTransform(scale=0.5, softcap=2.0)(logits).tolist() == pytest.approx(expected, abs=1e-6)
    assert LogitTransform()(logits) is logits


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda logits: logits**3, "changes the output of its head"),
        (lambda logits: logits * 2, "changes the output of its head"),  # the config has no such factor
        (lambda logits: logits[..., :-1], "not the output of one linear layer"),
        (lambda logits: logits * float("nan"), "not finite"),
    ],
)
def test_logits_that_the_config_does_not_explain_are_refused(tiny_llama, change, message):
    tiny_llama.register_forward_hook(lambda module, args, output: output.__setitem__("logits", change(output.logits)))
    with pytest.raises(UserError, match=f"LlamaForCausalLM.*{message}"):
        check_output_head(tiny_llama, list(range(20)))
    assert not tiny_llama.lm_head._forward_hooks and not tiny_llama.lm_head._forward_pre_hooks


def test_states_are_those_before_the_head_with_their_own_width(tiny_llama):
    assert hidden_width(tiny_llama) == 32
    adapted = get_peft_model(tiny_llama, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert hidden_width(adapted) == 32
    config = OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
                       num_attention_heads=2, do_layer_norm_before=False)  # fmt: skip
    ids = torch.arange(3, 9)[None]
    for model in (OPTForCausalLM(config).eval(), OPTForSequenceClassification(config).eval()):
        with captured_hidden_states(model) as captured:
            model(input_ids=ids)
        assert hidden_width(model) == captured[0].shape[-1] == 16


def test_the_hook_goes_even_after_an_exception(tiny_llama):
    with pytest.raises(RuntimeError, match="stop"), captured_hidden_states(tiny_llama):
        raise RuntimeError("stop")
    assert not tiny_llama.lm_head._forward_pre_hooks


def loss_and_gradients(model, lm_head, sequences, chunk_size):
    targets = torch.cat([row[p : p + n] for row, p, n in zip(sequences, PROMPT_LENGTHS, LENGTHS, strict=True)])
    hidden = completion_hidden_states(model, model, sequences, PROMPT_LENGTHS, MASK)
    logprobs, entropies = chunked_logprobs(hidden, lm_head, targets, chunk_size=chunk_size, entropy_requires_grad=True)
    loss = -(logprobs + 0.1 * entropies).mean()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, trained)


def test_no_tensor_of_all_logits_is_ever_made(tiny_config):
    tiny_config.vocab_size = 5000  # so that one row of logits is larger than any other activation
    base = LlamaForCausalLM(tiny_config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    sequences = torch.randint(3, 5000, (3, 6))

    def largest(chunk_size):
        with LargestTensor(known=model.parameters()) as seen:
            loss_and_gradients(model, base.lm_head, sequences, chunk_size)
        return seen.numel

    # The model's own head is asked for one position a sequence, ours for a chunk of completion tokens.
    assert largest(2) == len(sequences) * 5000
    assert largest(4) == 4 * 5000
    assert largest(128) == LENGTHS.sum() * 5000  # the recorder does see what is large


def test_no_logits_are_kept_for_the_backward_pass(head_and_hidden):
    head, hidden, targets = head_and_hidden
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        chunked_logprobs(hidden, head, targets, chunk_size=4)[0].sum().backward()
        assert not [shape for shape in kept if shape[-1:] == (50,)]  # V
        torch.log_softmax(head(hidden), -1).sum().backward()
        assert (10, 50) in kept  # the recorder does see what is kept


def test_gradient_checkpointing_is_on_and_changes_no_gradient(tiny_llama, sequences):
    model = variants(tiny_llama, "lora").train()
    calls = []
    tiny_llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = loss_and_gradients(model, tiny_llama.lm_head, sequences, 3)
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    checkpointed = loss_and_gradients(model, tiny_llama.lm_head, sequences, 3)
    assert len(calls) == 3  # once more in the forward pass, and recomputed in the backward pass
    for got, expected in zip(checkpointed, plain, strict=True):
        assert torch.equal(got, expected)


def test_output_head_gets_contiguous_states_where_transformers_slices(tiny_llama):
    seen = []
    tiny_llama.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].is_contiguous()))
    ids = torch.arange(3, 15).view(2, 6)
    tiny_llama(input_ids=ids, logits_to_keep=1)
    with contiguous_head_inputs(tiny_llama):
        tiny_llama(input_ids=ids, logits_to_keep=1)
    tiny_llama(input_ids=ids, logits_to_keep=1)
    assert seen == [False, True, False]

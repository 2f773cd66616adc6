"""Rollouts: their prompts, the sampling and the end of completions, and how a rollout is stored."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.ppo.engine import (
    SampledLogprobs,
    generate_completions,
    generation_config_of,
    sampling_config,
    stop_token_ids,
)
from hf_rlhf_ext.ppo.prompts import prompt_indices
from hf_rlhf_ext.ppo.rollout import Rollout, pack_sequences
from hf_rlhf_ext.ppo.stopping import cut_at_stop

CPU = torch.device("cpu")


def config(**changes):
    defaults = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_ids": [2], "pad_token_id": 0}
    return sampling_config(**(defaults | changes))


@pytest.fixture
def rollout():
    """Three completions of 2, 3 and 1 tokens after prompts of 1, 2 and 4."""
    lengths = torch.tensor([2, 3, 1])
    per_token = {
        name: torch.randn(3, 3).masked_fill(torch.arange(3) >= lengths[:, None], 0.0)
        for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
    }
    return Rollout(
        input_ids=torch.arange(15).reshape(3, 5),
        prompt_lengths=torch.tensor([1, 2, 4]),
        completion_lengths=lengths,
        order=torch.tensor([[2, 0, 1], [0, 1, 2]]),
        **per_token,
    )


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([5, 6, 7], [5, 6, 7]),
        ([5, 2, 7], [5, 2]),
        ([5, 7, 2], [5, 7, 2]),
        ([1, 2, 5], [1]),  # the first of several stops
        ([2, 2, 2], [2]),  # pad == eos: one real stop, then padding
    ],
)
def test_cut_at_stop(ids, expected):
    assert cut_at_stop(ids, {1, 2}) == expected


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), n=st.integers(1, 13), seed=st.integers(0, 99), count=st.integers(1, 6))
def test_prompts_are_a_function_of_seed_and_number_and_every_epoch_a_permutation(size, n, seed, count):
    rollouts = [prompt_indices(number, size, n, seed) for number in range(count)]
    assert all(len(rows) == size for rows in rollouts)  # also where the data set is smaller than a rollout
    assert prompt_indices(count - 1, size, n, seed) == rollouts[-1]  # asked alone, as after a resume
    stream = [row for rows in rollouts for row in rows]
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n))


def test_epochs_and_seeds_have_their_own_permutations():
    epochs = {tuple(prompt_indices(number, 50, 50, seed)) for number in range(2) for seed in (0, 1, 2)}
    assert len(epochs) == 6


def test_stop_ids_come_from_tokenizer_and_generation_config(stories_path):
    model, tokenizer = load_base_model(str(stories_path), dtype="float32"), load_tokenizer(str(stories_path))
    assert tokenizer.eos_token_id == 2
    assert stop_token_ids(tokenizer, model, None) == [1, 2]  # a story ends with <s>, which the tokenizer does not say
    assert stop_token_ids(tokenizer, get_peft_model(model, LoraConfig(target_modules=["q_proj"])), None) == [1, 2]
    assert stop_token_ids(tokenizer, model, [7, 3, 7]) == [3, 7]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(tokenizer, model, None) == [2]


@pytest.mark.parametrize("pad", ["own", "eos"])
def test_completions_end_at_their_first_stop_whatever_the_pad(stories_path, pad):
    model, tokenizer = load_base_model(str(stories_path), dtype="float32"), load_tokenizer(str(stories_path))
    prompts = [tokenizer(text)["input_ids"][:-1] for text in ["The end. The", "Once", "They all lived happily ever"]]
    stops = [1, tokenizer.convert_tokens_to_ids("▁the"), tokenizer.convert_tokens_to_ids(".")]
    settings = config(stop_ids=stops, pad_token_id=0 if pad == "own" else stops[-1], max_new_tokens=40)
    torch.manual_seed(0)
    completions, logprobs = generate_completions(model, prompts, settings, CPU)
    assert len({len(ids) for ids in completions}) > 1  # ragged: shorter rows were padded by `generate`
    for ids in completions:
        assert not set(ids[:-1]) & set(stops)
        assert ids[-1] in stops or len(ids) == 40
    assert [len(row) for row in logprobs] == [len(ids) for ids in completions]


def test_left_padding_does_not_change_a_greedy_completion(tiny_llama):
    prompts = [[5, 6, 7, 8, 9], [11], [12, 13]]
    greedy = config(top_k=1)
    together, logprobs = generate_completions(tiny_llama, prompts, greedy, CPU)
    alone = [generate_completions(tiny_llama, [ids], greedy, CPU)[0][0] for ids in prompts]
    assert together == alone
    assert {x for row in logprobs for x in row} == {0.0}  # a certain choice


def warped_logprobs(logits, temperature, top_k, top_p):
    """log of the distribution (V,) after temperature, top-k and top-p, as a list, one token after the other."""
    probs = torch.softmax(logits.double() / temperature, 0).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])[: top_k or len(probs)]
    total, kept, mass = sum(probs[token] for token in ranked), [], 0.0
    for token in ranked:
        if mass >= top_p * total:
            break
        kept.append(token)
        mass += probs[token]
    return {token: math.log(probs[token] / mass) for token in kept}


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 40, 0.8), (1.3, 0, 0.6), (0.7, 5, 1.0)])
@pytest.mark.parametrize("peft", [False, True])
def test_sampled_logprobs_are_those_of_the_warped_distribution(tiny_llama, temperature, top_k, top_p, peft):
    tiny_llama.lm_head.weight.data *= 20  # a random model is almost uniform
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"])) if peft else tiny_llama
    prompts = [[5, 6, 7, 8, 9], [11], [12, 13]]
    settings = config(temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=list(range(0, 384, 9)))
    torch.manual_seed(0)
    completions, logprobs = generate_completions(model, prompts, settings, CPU)
    assert len({len(ids) for ids in completions}) > 1
    distinct = set()
    for prompt, ids, found in zip(prompts, completions, logprobs, strict=True):
        logits = tiny_llama(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]  # alone, without padding
        for row, token, logprob in zip(logits, ids, found, strict=True):
            assert logprob == pytest.approx(warped_logprobs(row, temperature, top_k, top_p)[token], abs=2e-5)
            distinct.add(round(logprob, 3))
    assert len(distinct) > 5


def test_taking_logprobs_leaves_the_tokens_as_they_are(tiny_llama):
    settings = config(temperature=0.7, top_k=40, top_p=0.8)
    for seed in range(3):
        torch.manual_seed(seed)
        completions, _ = generate_completions(tiny_llama, [[5, 6, 7], [8, 9, 10]], settings, CPU)
        torch.manual_seed(seed)
        plain = tiny_llama.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), generation_config=settings)[:, 3:]
        assert completions == [cut_at_stop(row, {2}) for row in plain.tolist()]


def test_one_step_of_scores_is_kept_at_a_time(tiny_llama):
    alive, most = weakref.WeakSet(), 0

    class Counting(SampledLogprobs):
        def __call__(self, input_ids, scores):
            nonlocal most
            alive.add(scores)
            scores = super().__call__(input_ids, scores)
            most = max(most, len(alive))
            return scores

    recorder = Counting()
    tiny_llama.generate(
        torch.tensor([[5, 6, 7]]), generation_config=config(max_new_tokens=30), logits_processor=[recorder]
    )
    assert most <= 2  # this step's, and the last one's until its token is known


@pytest.mark.parametrize("width", [2, 3])
def test_a_step_that_generate_takes_back_is_left_out(width):
    # Some devices look for stops one step late and drop the last token: three calls, two or three tokens.
    recorder, scores = SampledLogprobs(), torch.randn(3, 1, 7)
    tokens = torch.tensor([[4, 0, 6]])
    for step in range(3):
        recorder(tokens[:, :step], scores[step])
    expected = [scores[step, 0].log_softmax(0)[tokens[0, step]] for step in range(width)]
    torch.testing.assert_close(recorder.logprobs(tokens[:, :width]), torch.stack(expected)[None])


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("num_beams", 2, "leave it out"),
        ("num_return_sequences", 2, "num_generations"),
        ("do_sample", False, "leave it"),
    ],
)
def test_what_would_not_be_plain_sampling_is_refused(name, value, remedy):
    with pytest.raises(UserError, match=f"generation_kwargs: {name}={value} .*PPO samples .*{remedy}"):
        config(**{name: value})
    assert config(num_beams=1, do_sample=True).num_beams == 1


def test_nothing_leaks_from_the_generation_config_of_the_model(tiny_llama):
    prompts = [[5, 6, 7], [8, 9]]
    tiny_llama.lm_head.weight.data *= 50  # a random model is almost uniform: penalties would not show

    def sample(**given):
        torch.manual_seed(3)
        return generate_completions(tiny_llama, prompts, config(**given), CPU)[0]

    plain = sample()
    tiny_llama.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        typical_p=0.2,
        min_p=0.9,
        epsilon_cutoff=0.01,
        bad_words_ids=[[plain[0][0]]],
        suppress_tokens=[plain[1][0]],
        forced_eos_token_id=3,
        min_new_tokens=30,
        max_new_tokens=2,
        num_beams=2,
        num_return_sequences=2,
    )
    assert sample() == plain
    assert sample(repetition_penalty=5.0) != plain  # what the caller gives still counts


@pytest.mark.parametrize("peft", [False, True])
def test_the_generation_config_is_put_back_after_an_exception_too(tiny_llama, peft):
    base, own = tiny_llama, tiny_llama.generation_config
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"])) if peft else tiny_llama
    before, ours = model.generation_config, config()
    with pytest.raises(RuntimeError, match="stop"), generation_config_of(model, ours):
        assert model.generation_config is ours and base.generation_config is ours
        raise RuntimeError("stop")
    assert model.generation_config is before and base.generation_config is own


def test_pack_sequences():
    packed = pack_sequences([[5, 6], [7]], [[8, 2], [9, 10, 2]], 2, CPU)
    assert packed.input_ids.tolist() == [[5, 6, 8, 2], [7, 9, 10, 2]]
    assert packed.prompt_lengths.tolist() == [2, 1] and packed.completion_lengths.tolist() == [2, 3]
    assert packed.lengths.tolist() == [4, 4]
    assert packed.mask.tolist() == [[True, True, False], [True, True, True]]
    assert packed.targets().tolist() == [8, 2, 9, 10, 2]


def select(rollout, rows):
    return rollout.select(torch.tensor(rows), minibatch_tokens=torch.tensor(6), share=0.5)


def test_select_trims_to_its_own_longest(rollout):
    batch = select(rollout, [0])
    assert batch.sequences.input_ids.tolist() == [[0, 1, 2]]  # one prompt token, two of the completion
    assert batch.mask.tolist() == [[True, True]]
    assert torch.equal(batch.advantages, rollout.advantages[:1, :2])
    assert (batch.minibatch_tokens, batch.share) == (6, 0.5)
    batch = select(rollout, [2, 1])
    assert batch.sequences.input_ids.tolist() == [[10, 11, 12, 13, 14], [5, 6, 7, 8, 9]]
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.sequences.prompt_lengths.tolist() == [4, 2]


def test_sampling_weights_go_along_with_their_tokens(rollout):
    assert select(rollout, [0]).sampling_weights is None
    weighted = replace(rollout, sampling_weights=torch.arange(9.0).reshape(3, 3))
    assert select(weighted, [2, 0]).sampling_weights.tolist() == [[6, 7], [0, 1]]


@pytest.mark.parametrize("weights", [None, torch.arange(9.0).reshape(3, 3)])
def test_a_rollout_survives_saving_to_the_bit(rollout, tmp_path, weights):
    rollout = replace(rollout, sampling_weights=weights)
    rollout.save(tmp_path / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "rollout.safetensors", CPU)
    assert (loaded.sampling_weights is None) == (weights is None)
    tensors = {name: value for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 9 + (weights is not None)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(loaded, name), tensor) and getattr(loaded, name).dtype == tensor.dtype
    assert torch.equal(loaded.sequences.mask, rollout.sequences.mask)

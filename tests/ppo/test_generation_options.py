"""Every field of `GenerationConfig` is used by sampling, or refused in one line when `PPOConfig` is made."""

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine, sampling_config, sampling_of
from hf_rlhf_ext.ppo.generation_options import SAMPLING_OPTIONS

PROMPTS = [[70, 71, 72], [80, 81, 82, 83], [90]]
STOPS = [2, *range(50, 60)]
FIELDS = sorted(name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version")


def make(**given):
    return PPOConfig("out", use_cpu=True, bf16=False, generation_kwargs=given)


@pytest.fixture(scope="module")
def model(chat_tokenizer_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = chat_tokenizer_factory()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 60  # a random model is almost uniform: nothing would show
    return model


def sample(model, tokenizer, **given):
    """Completions with their log-probabilities, and what each forward pass got: its width and its kind of cache."""
    calls = []

    def note(module, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the name before Transformers 5.24
        room = cache.layers[0].max_cache_len if type(cache).__name__ == "StaticCache" else None
        input_ids = args[0] if args else kwargs["input_ids"]
        calls.append((input_ids.shape[1], type(cache).__name__, room))

    torch.manual_seed(0)
    engine = TransformersEngine()
    engine.sync(model)
    strings = given.pop("stop_strings", ())
    sampling = Sampling(12, STOPS, 0, further=given, stop_strings=strings, tokenizer=tokenizer)
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return engine.generate(PROMPTS, sampling), calls
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def plain(model, chat_tokenizer_factory):
    return sample(model, chat_tokenizer_factory())


# Fields that sampling uses. The values must change the samples, or what the forward passes get.
CHANGED = {
    "begin_suppress_tokens": lambda ids: [ids[0][0]],
    "bad_words_ids": lambda ids: [[ids[0][0]]],
    "suppress_tokens": lambda ids: [ids[0][1]],
    "sequence_bias": lambda ids: [[[ids[0][0]], -50.0]],
    "stop_strings": lambda ids: ["e", "o", "n"],
    "min_new_tokens": lambda ids: 12,
    "max_time": lambda ids: 1e-9,
    "min_p": lambda ids: 0.3,
    "top_h": lambda ids: 0.3,
    "typical_p": lambda ids: 0.3,
    "epsilon_cutoff": lambda ids: 0.1,
    "eta_cutoff": lambda ids: 0.1,
    "repetition_penalty": lambda ids: 3.0,
    "no_repeat_ngram_size": lambda ids: 1,
    "guidance_scale": lambda ids: 3.0,
    "forced_eos_token_id": lambda ids: 2,
    "exponential_decay_length_penalty": lambda ids: [2, 9.0],
    "watermarking_config": lambda ids: {"bias": 20.0},
}
COMPUTED_OTHERWISE = {
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 64},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
}

# A value that has an effect in `generate`, for each of the other fields: PPO must refuse it.
REFUSED = {
    "do_sample": False,
    "num_beams": 4,
    "num_return_sequences": 2,
    "early_stopping": True,
    "length_penalty": 2.0,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": ["x"],
    "force_words_ids": [[5]],
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "use_mtp": True,
    "is_assistant": True,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_early_exit": 4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    "assistant_ensemble_weight": 0.5,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "speculation_type": "dflash",
    "encoder_repetition_penalty": 2.0,
    "encoder_no_repeat_ngram_size": 2,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": 1,
    "bos_token_id": 1,
    "min_length": 5,
    "max_length": 5,
    "max_new_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "eos_token_id": 5,
    "pad_token_id": 5,
    "token_healing": True,
    "renormalize_logits": True,
    "compile_config": {"mode": "default"},
    "cache_config": {"backend": "hqq"},
    "continuous_batching_config": {"page_size": 8},
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
}
OTHER = {"remove_invalid_values", "disable_compile"}  # each has a test of its own


def test_the_walk_is_complete():
    walked = [*CHANGED, *COMPUTED_OTHERWISE, *REFUSED, *OTHER]
    assert sorted(walked) == FIELDS
    assert set(SAMPLING_OPTIONS) <= set(CHANGED)


@pytest.mark.parametrize("name", CHANGED)
def test_a_field_changes_what_is_sampled(name, model, chat_tokenizer, plain):
    given = {name: CHANGED[name](plain[0].ids)}
    make(**given)
    assert sample(model, chat_tokenizer, **given)[0] != plain[0]


@pytest.mark.parametrize("name", COMPUTED_OTHERWISE)
def test_a_field_changes_how_the_same_is_computed(name, model, chat_tokenizer, plain):
    given = COMPUTED_OTHERWISE[name]
    make(**given)
    samples, calls = sample(model, chat_tokenizer, **given)
    assert samples.ids == plain[0].ids and calls != plain[1]
    for found, expected in zip(samples.logprobs, plain[0].logprobs, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    if name == "max_cache_len":
        assert calls[1][2] == 64


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_without_use_is_one_line(name):
    with pytest.raises(UserError, match=f"^generation_kwargs: {name}[ =].*: ") as error:
        make(**{name: REFUSED[name]})
    assert "\n" not in str(error.value)
    if not isinstance(REFUSED[name], dict):
        make(**{name: None})  # not set
    if name in ("max_new_tokens", "eos_token_id"):
        assert {"max_new_tokens": "max_completion_length", "eos_token_id": "stop_token_ids"}[name] in str(error.value)


def test_values_of_refused_fields_that_change_nothing_are_allowed(model, chat_tokenizer, plain):
    given = {
        "do_sample": True,
        "num_beams": 1,
        "num_return_sequences": 1,
        "output_scores": False,
        "length_penalty": 1.0,
    }
    make(**given)
    assert sample(model, chat_tokenizer, **given) == plain


def test_invalid_values_are_removed_where_asked(chat_tokenizer, tiny_llama):
    make(remove_invalid_values=True)
    tiny_llama.lm_head.weight.data[7] = float("nan")
    with pytest.raises(RuntimeError, match="probability tensor"):
        sample(tiny_llama, chat_tokenizer)
    samples, _ = sample(tiny_llama, chat_tokenizer, remove_invalid_values=True)
    assert len(samples.ids) == 3


def test_compilation_is_turned_off_with_the_cache_that_turns_it_on():
    make(cache_implementation="static", disable_compile=True)
    rest = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_ids": [2], "pad_token_id": 0}
    assert sampling_config(**rest, cache_implementation="static", disable_compile=True).disable_compile is True
    with pytest.raises(UserError, match="disable_compile has an effect with cache_implementation='static' only"):
        make(disable_compile=True)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"min_pp": 0.1}, "no field 'min_pp': did you mean min_p"),
        ({"stop_string": ["x"]}, "no field 'stop_string': did you mean stop_strings"),
        ({"transformers_version": "5"}, "no field 'transformers_version'"),
        ({"_mask_length": 3}, "no field '_mask_length'"),
        ({"frobnicate": 3}, "no field 'frobnicate': see the fields"),
        ({"min_p": 5}, r"min_p=5 is not valid \(.*0, 1.*\)"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 is not valid"),
        ({"epsilon_cutoff": 3.0}, "epsilon_cutoff=3.0 is not valid"),
        ({"bad_words_ids": [5]}, r"bad_words_ids=\[5\] is not valid"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens=.* is not valid"),
        ({"sequence_bias": [[5]]}, "sequence_bias=.* is not valid"),
        ({"watermarking_config": {"bia": 1.0}}, "watermarking_config=.* is not valid"),
        ({"guidance_scale": 0}, "guidance_scale=0 is not valid"),
        ({"min_new_tokens": 1.5}, "min_new_tokens=1.5 is not valid"),
        ({"use_cache": "no"}, "use_cache='no' is not valid"),
        ({"stop_strings": [""]}, "stop_strings: '' is not a text"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' is not supported: choose one of dynamic"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' is not supported"),
        ({"cache_implementation": "offloaded"}, "this run has no GPU"),
        ({"max_cache_len": 64}, "max_cache_len has an effect with cache_implementation='static' only"),
        ({"use_cache": False, "cache_implementation": "static"}, "needs use_cache=True"),
    ],
)
def test_wrong_names_and_values_are_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        make(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["min_p", ["min_p"], 3])
def test_what_is_no_dict_is_one_line(given):
    with pytest.raises(UserError, match="generation_kwargs: .* is not a dict"):
        PPOConfig("out", use_cpu=True, bf16=False, generation_kwargs=given)


def test_the_command_line_gives_a_dict_as_text():
    args = PPOConfig("out", use_cpu=True, bf16=False, generation_kwargs='{"min_p": 0.1, "stop_strings": ["\\n\\n"]}')
    assert args.generation_kwargs == {"min_p": 0.1, "stop_strings": ["\n\n"]}


@pytest.mark.parametrize(
    "given", [{"suppress_tokens": [9000]}, {"bad_words_ids": [[5, 9000]]}, {"forced_eos_token_id": -1}]
)
def test_tokens_that_the_policy_does_not_have_are_one_line(tiny_llama, chat_tokenizer, given):
    with pytest.raises(UserError, match=r"vocabulary of the policy has only the tokens 0 to \d+"):
        sampling_of(make(**given), chat_tokenizer, tiny_llama)


def test_objects_of_transformers_are_taken_too(model, chat_tokenizer, plain):
    watermark = WatermarkingConfig(bias=20.0)
    make(watermarking_config=watermark)
    assert sample(model, chat_tokenizer, watermarking_config=watermark)[0] != plain[0]
    assert sample(model, chat_tokenizer, sequence_bias={(plain[0].ids[0][0],): -50.0})[0] != plain[0]

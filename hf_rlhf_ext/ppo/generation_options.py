"""The fields of `GenerationConfig` that `generation_kwargs` may contain, and what is wrong with the other ones."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

from ..errors import UserError, first_line
from .stopping import stop_string_list

SAMPLING_OPTIONS = {
    "repetition_penalty": 1,
    "typical_p": 1,
    "guidance_scale": 1,
    "min_p": 0,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}
"""Fields that change the distribution of tokens, each with the value that has no effect."""

OTHER_OPTIONS = (
    "stop_strings",
    "max_time",
    "remove_invalid_values",
    "use_cache",
    "cache_implementation",
    "max_cache_len",
    "disable_compile",
    "prefill_chunk_size",
)
"""Fields that change where completions end, or only how they are computed."""

OWN_OPTIONS = {
    "max_new_tokens": "set max_completion_length",
    "max_length": "set max_completion_length",
    "temperature": "set temperature itself",
    "top_p": "set top_p itself",
    "top_k": "set top_k itself",
    "eos_token_id": "set stop_token_ids",
    "pad_token_id": "set tokenizer.pad_token",
}
"""Fields that PPO sets from an option of its own, each with what to set instead."""

_ONE_SAMPLE = "PPO samples every completion by itself: leave it out"
_IDS_ONLY = "PPO reads the sampled tokens only, and computes log-probabilities itself: leave it out"
_BEAMS = "it belongs to beam search, and PPO samples: leave it out"
_ASSISTED = "it belongs to assisted decoding, which PPO does not use: leave it out"
_ENCODER_DECODER = "it belongs to encoder-decoder models: leave it out"
_GREEDY = "PPO needs sampled completions: leave it out"

REFUSED_FIELDS = {
    "do_sample": _ONE_SAMPLE,
    "num_beams": _ONE_SAMPLE,
    "num_return_sequences": "PPO samples one completion per prompt, or as many as num_generations says: set that",
    "early_stopping": _BEAMS,
    "length_penalty": f"{_BEAMS} (PPOConfig has an option length_penalty)",
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "low_memory": _BEAMS,
    "penalty_alpha": _GREEDY,
    "dola_layers": _GREEDY,
    "return_dict_in_generate": _IDS_ONLY,
    "output_scores": _IDS_ONLY,
    "output_logits": _IDS_ONLY,
    "output_attentions": _IDS_ONLY,
    "output_hidden_states": _IDS_ONLY,
    "use_mtp": _ASSISTED,
    "is_assistant": _ASSISTED,
    "num_assistant_tokens": _ASSISTED,
    "num_assistant_tokens_schedule": _ASSISTED,
    "assistant_confidence_threshold": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "assistant_lookbehind": _ASSISTED,
    "target_lookbehind": _ASSISTED,
    "assistant_ensemble_weight": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "max_matching_ngram_size": _ASSISTED,
    "speculation_type": _ASSISTED,
    "encoder_repetition_penalty": _ENCODER_DECODER,
    "encoder_no_repeat_ngram_size": _ENCODER_DECODER,
    "decoder_start_token_id": _ENCODER_DECODER,
    "forced_bos_token_id": _ENCODER_DECODER,
    "bos_token_id": "prompts are tokenized with their begin token: leave it out",
    "min_length": "it counts the padding of prompts: set min_new_tokens",
    "token_healing": "it changes the tokens of the prompts: leave it out",
    "renormalize_logits": "it has no effect on sampling, which normalizes anyway: leave it out",
    "cache_config": "it belongs to quantized caches, whose samples differ from what PPO scores: leave it out",
    "compile_config": "compiled generation is not supported: leave it out",
    "continuous_batching_config": "it is not an option of sampling in batches: leave it out",
}
"""Fields that PPO cannot use, each with the reason and the remedy."""

NO_EFFECT = {
    "do_sample": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "num_beam_groups": 1,
    "encoder_repetition_penalty": 1.0,
}
"""Values of refused fields that change nothing and are allowed. Of the other ones, only false values are."""

_CACHES = ("dynamic", "static", "offloaded", "offloaded_static")

# Values are checked by the object that `generate` builds from them, as it would only say so at the first rollout.
_BUILT_FROM: dict[str, Callable[[Any], Any]] = {
    "min_p": MinPLogitsWarper,
    "top_h": TopHLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
    "sequence_bias": SequenceBiasLogitsProcessor,
    "bad_words_ids": NoBadWordsLogitsProcessor,
    "exponential_decay_length_penalty": lambda value: ExponentialDecayLengthPenalty(value, 0, 1),
    "stop_strings": stop_string_list,
}

_TOKEN_IDS = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "bad_words_ids", "sequence_bias")


def check_generation_kwargs(given: Mapping[str, Any], device: str | None = None) -> None:
    """Refuses fields and values that sampling in PPO does not use.

    Args:
        given: fields of `GenerationConfig`.
        device: type of the device that samples, such as `cuda`; `None` if it is not known.

    Raises:
        UserError: for the first field that does not exist, that PPO sets itself or cannot use, or whose value is wrong.
    """
    for name, value in given.items():
        if value is None and (name in OWN_OPTIONS or name in REFUSED_FIELDS):
            continue  # not set
        if name in OWN_OPTIONS:
            raise UserError(f"generation_kwargs: {name} has an option of its own in PPO: {OWN_OPTIONS[name]}.")
        if name in REFUSED_FIELDS:
            if value and value != NO_EFFECT.get(name) or (value is False and NO_EFFECT.get(name) is True):
                raise UserError(f"generation_kwargs: {name}={_short(value)} is not supported: {REFUSED_FIELDS[name]}.")
        elif name in SAMPLING_OPTIONS or name in OTHER_OPTIONS:
            _check_value(name, value)
        else:
            raise UserError(_unknown(name))
    _check_cache(given, device)


def _unknown(name: str) -> str:
    if name in vars(GenerationConfig()) and not name.startswith("_") and name != "transformers_version":
        return f"generation_kwargs: {name} is not supported in PPO: leave it out."
    known = [*SAMPLING_OPTIONS, *OTHER_OPTIONS, *OWN_OPTIONS]
    nearest = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else "see the fields of transformers.GenerationConfig."
    return f"generation_kwargs: GenerationConfig has no field {name!r}: {remedy}"


def _check_value(name: str, value: Any) -> None:
    if value is None or value == SAMPLING_OPTIONS.get(name):
        return
    problem = ""
    try:
        GenerationConfig(**{name: value})
        if name in _BUILT_FROM:
            _BUILT_FROM[name](value)
        if name in ("guidance_scale", "min_new_tokens", "max_time", "prefill_chunk_size", "max_cache_len"):
            _check_number(value, whole=name not in ("guidance_scale", "max_time"))
        if name in ("suppress_tokens", "begin_suppress_tokens"):
            _check_ids(value)
        if name in ("use_cache", "disable_compile", "remove_invalid_values") and not isinstance(value, bool):
            raise ValueError("it must be true or false")
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        problem = first_line(error)
    if problem:
        raise UserError(
            f"generation_kwargs: {name}={_short(value)} is not valid ({problem}): give it a value that "
            "transformers.GenerationConfig describes."
        )


def _check_number(value: Any, *, whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
        raise ValueError(f"it must be a positive {'integer' if whole else 'number'}")


def _check_ids(value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(token, int) for token in value):
        raise ValueError("it must be a list of token ids")


def _check_cache(given: Mapping[str, Any], device: str | None) -> None:
    """Refuses options of the cache that have no effect, or that exclude each other."""
    kind = given.get("cache_implementation")
    if kind in ("offloaded", "offloaded_static") and device == "cpu":
        raise UserError(
            f"generation_kwargs: cache_implementation={kind!r} moves the cache from a GPU to the CPU, but this run has "
            "no GPU: leave it out."
        )
    if kind is not None and kind not in _CACHES:
        raise UserError(
            f"generation_kwargs: cache_implementation={kind!r} is not supported: choose one of {', '.join(_CACHES)}."
        )
    needed = {
        "max_cache_len": ("static", "offloaded_static"),
        "disable_compile": ("static", "offloaded_static"),
    }
    for name, kinds in needed.items():
        if given.get(name) and kind not in kinds:
            raise UserError(
                f"generation_kwargs: {name} has an effect with cache_implementation={kinds[0]!r} only: set that, or "
                f"leave {name} out."
            )
    if given.get("use_cache") is False:
        for name in ("cache_implementation", "prefill_chunk_size"):
            if given.get(name) is not None:
                raise UserError(f"generation_kwargs: {name} needs use_cache=True: leave one of them out.")


def check_ids_in_vocabulary(given: Mapping[str, Any], vocabulary: int) -> None:
    """Refuses token ids that the vocabulary does not have, as they would have no effect.

    Args:
        given: fields of `GenerationConfig`.
        vocabulary: number of tokens for which the policy computes logits.

    Raises:
        UserError: if an id is out of range.
    """
    for name in _TOKEN_IDS:
        if given.get(name) is None:
            continue
        for token in _flat(given[name]):
            if not 0 <= token < vocabulary:
                raise UserError(
                    f"generation_kwargs: {name} has the token {token}, but the vocabulary of the policy has only the "
                    f"tokens 0 to {vocabulary - 1}: remove it, or check the tokenizer."
                )


def _flat(value: Any) -> list[int]:
    """All token ids in a token id, a list of ids, a list of lists, or in the forms of `sequence_bias`."""
    if isinstance(value, bool) or isinstance(value, float):
        return []  # a bias
    if isinstance(value, int):
        return [value]
    ids: list[int] = []
    for part in value:
        ids += _flat(part)
    return ids


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

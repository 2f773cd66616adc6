"""Sampling with `generate` of Transformers: complete options, and the log-probability of each sampled token."""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..errors import UserError
from ..modeling.cache_name import virtual_tokens_in_generate
from ..modeling.logprobs import contiguous_head_inputs
from ..modeling.shared_prefill import prompts_computed_once
from .generation_options import check_generation_kwargs
from .stopping import StopAtStrings, StopStrings, cut_at_stop

# Fields that `generate` would otherwise fill from the model's generation config, at values that have no effect.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "do_sample": True,
    "use_cache": True,
    "bos_token_id": None,
}


def sampling_config(
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop_ids: list[int],
    pad_token_id: int,
    **further: Any,
) -> GenerationConfig:
    """Builds a complete `GenerationConfig`, so that `generate` fills no field from the model's generation config.

    Args:
        max_new_tokens: maximum number of tokens of a completion.
        temperature: sampling temperature.
        top_p: nucleus sampling; 1.0 samples from all tokens.
        top_k: number of most probable tokens to sample from; 0 samples from all tokens.
        stop_ids: token ids that end a completion.
        pad_token_id: id used for padding.
        further: further fields of `GenerationConfig`.

    Raises:
        UserError: if `further` has a field or a value that sampling does not use, such as beams.
    """
    if further.get("stop_strings"):
        raise UserError("Sampling: stop_strings are not found in `further`: pass stop_strings and tokenizer.")
    check_generation_kwargs(further)
    options = {
        **_NEUTRAL,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        **further,
    }
    return GenerationConfig(**options, eos_token_id=stop_ids, pad_token_id=pad_token_id)


@contextmanager
def generation_config_of(model, config: GenerationConfig):
    """Inside the context, `config` replaces the model's generation config, from which `generate` fills unset fields."""
    owners = [model]
    if hasattr(model, "get_base_model"):
        owners = [model.get_base_model(), model]
    before = [owner.__dict__.get("generation_config") for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            if old is None:
                del owner.generation_config
            else:
                owner.generation_config = old


class SampledLogprobs(LogitsProcessor):
    """Logits processor that records the log-probability of each sampled token.

    It must be the last processor, after temperature, top-k and top-p. It keeps the scores (B, V) of the last step only:
    at the next call, `input_ids` contains the token that was sampled from them.
    """

    def __init__(self, on_token: Callable[[], None] | None = None):
        self._on_token = on_token
        self._scores: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._take(input_ids[:, -1:])
        self._scores = scores
        if self._on_token is not None:
            self._on_token()
        return scores

    def _take(self, tokens: Tensor) -> None:
        logprobs = self._scores.gather(1, tokens) - self._scores.logsumexp(1, keepdim=True)
        self._columns.append(logprobs)

    def logprobs(self, completions: Tensor) -> Tensor:
        """Log-probabilities of the tokens that `generate` returned.

        Args:
            completions: (B, T) int64, the new tokens.

        Returns:
            (B, T) fp32, in nats. Values after the stop token have no meaning.
        """
        self._take(completions[:, -1:])
        return torch.cat(self._columns[: completions.shape[1]], dim=1)  # `generate` may drop its last step


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    config: GenerationConfig,
    device: torch.device,
    stop_strings: StopStrings | None = None,
    streamer: BaseStreamer | None = None,
    on_token: Callable[[], None] | None = None,
    synced: bool = False,
    share_prompts: bool = False,
) -> tuple[list[list[int]], list[list[float]]]:
    """Samples one completion per prompt with `model.generate`.

    A completion ends with its first stop token, with the token that completes a stop string, or at `max_new_tokens`.
    The pad id is not used to find its end, so the pad token may be a stop token.

    Args:
        model: the policy.
        prompt_ids: token ids of each prompt. They are padded on the left.
        config: a complete generation config, see `sampling_config`.
        device: where to generate.
        stop_strings: strings that end a completion; `None` for none.
        streamer: gets each token as it is sampled, as in Transformers, but never the prompt; for a single prompt.
        on_token: called at each step, in which every completion gets a token, for a progress bar.
        synced: whether all processes run equally many steps, as each needs the shards of the others.
        share_prompts: whether equal prompts that lie next to each other go through the model once, see
            `prompts_computed_once`.

    Returns:
        The token ids of each completion, and the log-probability of each of these tokens in nats, under the
        distribution that it was sampled from: after temperature, top-k and top-p.
    """
    width = max(len(ids) for ids in prompt_ids)
    input_ids = torch.full((len(prompt_ids), width), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    # Padded on the left, so that every prompt ends in the last column, where generation continues.
    for row, ids in enumerate(prompt_ids):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    recorder = SampledLogprobs(on_token)
    shares = [len(list(equal)) for _, equal in groupby(prompt_ids)] if share_prompts else [1] * len(prompt_ids)

    def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        # A processor passed to `generate` would run before top-k and top-p. Here the list is complete, so ours runs
        # last.
        logits_processor.append(recorder)
        with prompts_computed_once(model, shares):
            return model._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer=streamer,
                synced_gpus=synced,  # `generate` itself drops it for a function such as this one
                **kwargs,
            )

    # `generate` fills the unset fields of the config that it gets from the model's generation config.
    with generation_config_of(model, config), contiguous_head_inputs(model), virtual_tokens_in_generate(model):
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            stopping_criteria=None if stop_strings is None else [StopAtStrings(stop_strings, width)],
            custom_generate=sample,
        )
    generated = output[:, width:]
    stops = set(config.eos_token_id)
    completions = [cut_at_stop(row, stops) for row in generated.tolist()]
    if stop_strings is not None:
        completions = [ids[: stop_strings.end(ids)] for ids in completions]
    logprobs = recorder.logprobs(generated).tolist()
    return completions, [row[: len(ids)] for row, ids in zip(logprobs, completions, strict=True)]

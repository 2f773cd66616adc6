"""Prompts that several completions share go through the model once: their keys and values are repeated in the cache."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import first_line
from .adapter_kinds import why_own_rows
from .adapters import bare_model
from .probing import unchanged_random_state
from .quantization import each_token_alone

_PER_ROW = ("attention_mask", "position_ids")
"""Arguments of the forward pass with one row for each prompt."""

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of cache layers of which a row is all that is known about a sequence."""

_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""By dtype: the difference of logits, relative to the largest one, that another number of rows explains."""

_MAX_TOKENS = 16
"""Number of tokens of a prompt that the test computes."""

_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model raises that is given a cache with more rows than it has seen itself."""


@contextmanager
def prompts_computed_once(model: nn.Module, completions_per_prompt: Sequence[int]) -> Iterator[None]:
    """Inside the context, `_sample` of the model computes each prompt once for all its completions.

    The rows that `_sample` gets and returns are the same as without: a row for each completion. Where the cache cannot
    be repeated, see `why_not_once`, every row is computed as usual.

    Args:
        model: the causal LM whose `_sample` is called, as `custom_generate` gets it.
        completions_per_prompt: number of consecutive rows of each prompt.
    """
    n_prompts, n_rows = len(completions_per_prompt), sum(completions_per_prompt)
    if n_prompts == n_rows:
        yield
        return
    ends = torch.tensor(completions_per_prompt).cumsum(0)
    last_rows = ends - 1  # a row of each prompt
    prompt_of_row = torch.repeat_interleave(torch.arange(n_prompts), torch.tensor(completions_per_prompt))
    prefill = model._prefill  # a method of the class

    def prefill_once(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        cache = _cache_to_repeat(model_kwargs)
        if cache is None:
            return prefill(input_ids, config, model_kwargs, **kwargs)
        rows = last_rows.to(input_ids.device)
        fewer = dict(model_kwargs)
        for name in _PER_ROW:
            if fewer.get(name) is not None:
                fewer[name] = fewer[name][rows]
        outputs = prefill(input_ids[rows], config, fewer, **kwargs)
        _repeat(cache, prompt_of_row)
        outputs.logits = outputs.logits[:, -1:][prompt_of_row.to(outputs.logits.device)]
        return outputs

    model._prefill = prefill_once
    try:
        yield
    finally:
        del model._prefill


def _cache_to_repeat(model_kwargs: dict[str, Any]) -> DynamicCache | None:
    """The new cache among the arguments; `None` if its rows, or further arguments by row, cannot be repeated."""
    caches = [value for value in model_kwargs.values() if hasattr(value, "layers")]
    further = [name for name, value in model_kwargs.items() if isinstance(value, Tensor) and name not in _PER_ROW]
    if len(caches) != 1 or further or not model_kwargs.get("use_cache"):
        return None
    (cache,) = caches
    is_plain = type(cache) is DynamicCache and not cache.offloading
    # Layers with states of their own, such as those of Mamba, are not made to be repeated.
    return cache if is_plain and all(type(layer) in _LAYERS for layer in cache.layers) else None


def _repeat(cache: DynamicCache, rows: Tensor) -> None:
    """Selects rows of a cache, whose layers may be on several devices."""
    on_device: dict[torch.device, Tensor] = {}
    for layer in cache.layers:
        if not layer.is_initialized:  # it uses the keys of another layer
            continue
        device = layer.keys.device
        if device not in on_device:
            on_device[device] = rows.to(device)
        layer.batch_select_indices(on_device[device])


def why_not_once(
    model: nn.Module, prompts: Sequence[list[int]], config: GenerationConfig, *, dtype: torch.dtype
) -> str | None:
    """Why prompts of several completions must be computed for each of them; `None` if once is enough.

    The random state does not change. The test runs the model three times, for the ends of two prompts.

    Args:
        model: a causal LM in eval mode, also inside PEFT.
        prompts: token ids of prompts.
        config: the generation config of the run.
        dtype: dtype in which the model computes, which determines the tolerance.
    """
    causal_lm = bare_model(model)
    name = type(causal_lm).__name__
    if config.use_cache is False:
        return "use_cache=False"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r}"
    problem = why_own_rows(model)
    if problem is not None:
        return problem
    if causal_lm.config.is_encoder_decoder or getattr(causal_lm, "_is_stateful", False):
        return f"{name} keeps more than keys and values"
    ends = [max(prompts, key=len)[-_MAX_TOKENS:], min(prompts, key=len)[-_MAX_TOKENS:]]
    try:
        plain = _second_logits(model, ends, config, once=False)
        once = None if plain is None else _second_logits(model, ends, config, once=True)
    except _FAILURES as error:
        return f"{name} does not take a cache that was repeated ({first_line(error)})"
    if once is None:
        return f"the cache of {name} is not made to be repeated"
    largest = (plain - plain.mean(-1, keepdim=True)).abs().max().clamp(min=1e-30)
    difference = (once - plain).abs().max()
    if not difference <= _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16]) * largest:  # also if it is NaN
        return f"{name} computes something else from a cache that was repeated"
    return None


class _Forced(LogitsProcessor):
    """Makes the first token of each row a given one."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens[:, None], 0.0)


@torch.no_grad()
def _second_logits(
    model: nn.Module, prompts: list[list[int]], config: GenerationConfig, *, once: bool
) -> Tensor | None:
    """(4, V) logits after the first new token of two completions per prompt; `None` if the cache is not repeated.

    The completions of a prompt differ in that token.
    """
    device = next(model.parameters()).device
    width = max(len(ids) for ids in prompts)
    rows = [ids for ids in prompts for _ in range(2)]
    padded = [[config.pad_token_id] * (width - len(ids)) + ids for ids in rows]
    input_ids = torch.tensor(padded, device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    config = copy.deepcopy(config)
    # Not `None`: `generate` would take that of the run, and warn that it is more than two tokens.
    config.max_new_tokens, config.min_new_tokens, config.min_length = 2, 0, None
    config.eos_token_id = []  # the first token ends nothing
    config.output_logits = config.return_dict_in_generate = True
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.tensor([(ids[0] + k) % vocabulary for k, ids in enumerate(rows)], device=device)
    is_repeated = []

    def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        is_repeated.append(_cache_to_repeat(kwargs) is not None)
        processors = LogitsProcessorList([_Forced(tokens)])
        arguments = input_ids, processors, stopping_criteria, generation_config
        if not once:
            return model._sample(*arguments, **kwargs)
        with prompts_computed_once(model, [2, 2]):
            return model._sample(*arguments, **kwargs)

    with unchanged_random_state(device), each_token_alone(model):
        output = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=sample
        )
    return output.logits[1].float() if is_repeated[0] else None

"""Rollout engines, which sample completions. The default engine uses `generate` of Transformers.

An engine depends only on a policy and token ids, so that PPO, best-of-n sampling and other code can use the same one.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..modeling.adapters import evaluating, merged_adapter, mixed_precision
from ..modeling.logprobs import contiguous_head_inputs
from .config import PPOConfig


class Samples(NamedTuple):
    """Sampled completions.

    Attributes:
        ids: token ids of each completion, including its stop token if it has one.
        logprobs: log-probability of each of these tokens in nats, under the distribution that it was sampled from:
            after temperature, top-k and top-p, and in the precision of the engine. `None` if the engine does not return
            them.
    """

    ids: list[list[int]]
    logprobs: list[list[float]] | None


@dataclass(frozen=True)
class Sampling:
    """Options of sampling. The defaults of `temperature`, `top_p` and `top_k` sample from the policy itself.

    Attributes:
        max_new_tokens: maximum number of tokens of a completion, including the stop token.
        stop_ids: token ids that end a completion.
        pad_token_id: id that pads prompts on the left. It may be a stop token.
        temperature: sampling temperature, as in Transformers.
        top_p: nucleus sampling, as in Transformers; 1.0 samples from all tokens.
        top_k: number of most probable tokens to sample from, as in Transformers; 0 samples from all tokens.
        batch_size: number of prompts per generation batch, which are of similar length; `None` means one batch.
        further: further fields of `GenerationConfig`.
    """

    max_new_tokens: int
    stop_ids: Sequence[int]
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int | None = None
    further: dict[str, Any] = field(default_factory=dict)


def sampling_of(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Sampling:
    """Builds the sampling options of a PPO run.

    Args:
        args: options of the run.
        tokenizer: tokenizer of the policy.
        model: the policy, whose generation config may name more stop tokens.
    """
    return Sampling(
        max_new_tokens=args.max_completion_length,
        stop_ids=stop_token_ids(tokenizer, model, args.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        batch_size=args.generation_batch_size,
        further=dict(args.generation_kwargs or {}),
    )


class RolloutEngine(Protocol):
    """Protocol of an object that samples completions for `PPOTrainer`.

    An engine must not change the policy. It may hold its own resources, such as a server, a cache or a copy of the
    weights.
    """

    def sync(self, policy: nn.Module) -> None:
        """Updates the engine to the current weights of `policy`. Later calls of `generate` sample from them."""
        ...

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, n: int = 1) -> Samples:
        """Samples `n` completions per prompt.

        Args:
            prompt_ids: token ids of each prompt.
            sampling: options of sampling.
            n: number of completions per prompt.

        Returns:
            The completions; those of one prompt are next to each other.
        """
        ...


class TransformersEngine:
    """The default engine: samples with `generate` of the policy itself.

    Args:
        merge: whether to merge the adapter into the base during generation, which is faster. The base is restored
            exactly afterward. Ignored on a quantized base, which merging would quantize again.
        autocast: dtype to compute in; `None` means that of the weights.
    """

    def __init__(self, *, merge: bool = True, autocast: torch.dtype | None = None):
        self.merge = merge
        self.autocast = autocast
        self.policy: nn.Module | None = None

    def sync(self, policy: nn.Module) -> None:
        """Keeps a reference to the policy. No weights are copied."""
        self.policy = policy

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, n: int = 1) -> Samples:
        """Samples `n` completions per prompt; see `RolloutEngine.generate`.

        Raises:
            UserError: if `sync` was not called before, or if an option of `sampling.further` is not supported.
        """
        if self.policy is None:
            raise UserError("TransformersEngine.generate: there is no policy: call sync(policy) first.")
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        config = sampling_config(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_ids=list(sampling.stop_ids),
            pad_token_id=sampling.pad_token_id,
            **sampling.further,
        )
        batch_size = sampling.batch_size or len(prompts)
        order = list(range(len(prompts)))
        if batch_size < len(prompts):
            order.sort(key=lambda row: -len(prompts[row]))  # prompts of similar length per batch: less padding

        ids: list[list[int]] = [[]] * len(prompts)
        logprobs: list[list[float]] = [[]] * len(prompts)
        with (
            evaluating(self.policy),  # eval mode: no gradient checkpointing, no dropout, and the KV cache works
            merged_adapter(self.policy, enabled=self.merge),
            mixed_precision(self.policy, self.autocast),
        ):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                completions, drawn = generate_completions(
                    self.policy, [prompts[row] for row in rows], config, next(self.policy.parameters()).device
                )
                for row, completion, row_logprobs in zip(rows, completions, drawn, strict=True):
                    ids[row] = completion
                    logprobs[row] = row_logprobs
        return Samples(ids, logprobs)


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, override: list[int] | None = None
) -> list[int]:
    """Token ids that end a completion.

    Args:
        tokenizer: its end-of-sequence token is one of them.
        model: the end-of-sequence tokens of its generation config are included, as some models stop at a token that is
            not the tokenizer's end-of-sequence token.
        override: use exactly these ids instead; `None` means those of tokenizer and model.

    Returns:
        The ids, sorted.
    """
    if override is not None:
        return sorted(set(override))
    configured = getattr(model.generation_config, "eos_token_id", None)
    if isinstance(configured, int):
        configured = [configured]
    known = {tokenizer.eos_token_id, *(configured or [])}
    return sorted(known - {None})


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
        UserError: if `further` asks for greedy decoding, beams or several sequences per prompt.
    """
    for name in ("do_sample", "num_beams", "num_return_sequences"):
        if further.get(name, _NEUTRAL[name]) != _NEUTRAL[name]:
            raise UserError(
                f"generation_kwargs: {name}={further[name]} is not supported: PPO samples one completion per prompt."
            )
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

    def __init__(self):
        self._scores: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._take(input_ids[:, -1:])
        self._scores = scores
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
    model: PreTrainedModel, prompt_ids: list[list[int]], config: GenerationConfig, device: torch.device
) -> tuple[list[list[int]], list[list[float]]]:
    """Samples one completion per prompt with `model.generate`.

    A completion ends with its first stop token or at `max_new_tokens`. The pad id is not used to find its end, so the
    pad token may be a stop token.

    Args:
        model: the policy.
        prompt_ids: token ids of each prompt. They are padded on the left.
        config: a complete generation config, see `sampling_config`.
        device: where to generate.

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
    recorder = SampledLogprobs()

    def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        # A processor passed to `generate` would run before top-k and top-p. Here the list is complete, so ours runs
        # last.
        logits_processor.append(recorder)
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    # `generate` fills the unset fields of the config that it gets from the model's generation config.
    with generation_config_of(model, config), contiguous_head_inputs(model):
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            custom_generate=sample,
        )
    generated = output[:, width:]
    stops = set(config.eos_token_id)
    completions = [cut_at_stop(row, stops) for row in generated.tolist()]
    logprobs = recorder.logprobs(generated).tolist()
    return completions, [row[: len(ids)] for row, ids in zip(logprobs, completions, strict=True)]


def cut_at_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Cuts `ids` after the first stop token; returns all ids if there is none."""
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1]
    return ids

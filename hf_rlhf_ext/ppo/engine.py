"""Rollout engines: where completions come from. An engine needs a policy and token ids, and nothing else of PPO.

So PPO, best-of-n and sampling for people share one. The engine here is Transformers' `generate`.
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
    """Completions as token ids, each with its stop token if it has one, and what each token's draw was worth.

    `logprobs` are log-probabilities, in nats, under which the tokens were really drawn: after temperature, top-k and
    top-p, in the arithmetic of the engine. None where an engine does not tell.
    """

    ids: list[list[int]]
    logprobs: list[list[float]] | None


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: most tokens of a completion, the stop token included.
        stop_ids: ids that end a completion.
        pad_token_id: what pads prompts on the left; it may be a stop token, as stops are found by position.
        temperature, top_p, top_k: as in Transformers; 1.0, 1.0 and 0 draw from the policy itself.
        batch_size: prompts that generate at one time, of similar length; None: all of them, in their order.
        further: other fields of `GenerationConfig`.
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
    """How a PPO run draws completions, by its options."""
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
    """What samples completions for `PPOTrainer`. It owns its own resources only: a server, a cache, a copy."""

    def sync(self, policy: nn.Module) -> None:
        """Samples from this policy, with the weights that it has now, from here on."""
        ...

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, n: int = 1) -> Samples:
        """`n` completions of every prompt, those of a prompt next to each other."""
        ...


class TransformersEngine:
    """`generate` of the policy itself.

    Args:
        merge: generate from weights with the adapter merged in, which is faster; the base is restored to the bit. Never
            done on a quantized base, where merging would re-quantize it.
        autocast: dtype to compute in; None is that of the weights.
    """

    def __init__(self, *, merge: bool = True, autocast: torch.dtype | None = None):
        self.merge = merge
        self.autocast = autocast
        self.policy: nn.Module | None = None

    def sync(self, policy: nn.Module) -> None:
        """Keeps a reference: the weights are the policy's own, so there is nothing to copy."""
        self.policy = policy

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, n: int = 1) -> Samples:
        """`n` completions of every prompt (token ids), those of a prompt next to each other."""
        if self.policy is None:
            raise UserError("TransformersEngine.generate: no policy yet: call sync(policy) first.")
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
            order.sort(key=lambda row: -len(prompts[row]))  # similar lengths go together: less padding

        ids: list[list[int]] = [[]] * len(prompts)
        logprobs: list[list[float]] = [[]] * len(prompts)
        with (
            evaluating(self.policy),  # eval mode: gradient checkpointing and dropout are off, the cache works
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
    """Ids that end a completion: `override`, or the tokenizer's eos and every eos of the model's generation config.

    Both matter: some models stop on a token that the tokenizer does not call eos.
    """
    if override is not None:
        return sorted(set(override))
    configured = getattr(model.generation_config, "eos_token_id", None)
    if isinstance(configured, int):
        configured = [configured]
    known = {tokenizer.eos_token_id, *(configured or [])}
    return sorted(known - {None})


# Every field that would otherwise be filled from the model's own generation config, at the value where it does nothing.
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
    """A complete sampling configuration: no field is left for the model's own generation config to fill in."""
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
    """Puts `config` in the place of the model's own inside: `generate` fills unset fields from there."""
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
    """Notes the log-probability under which each token is drawn. It must come last, after temperature and top-k/top-p.

    Of the scores (B, V), only those of the last step are kept: the token that they led to shows at the next call.
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
        """(B, T) fp32, nats, of the tokens that `generate` returned; what stands after a stop means nothing."""
        self._take(completions[:, -1:])
        return torch.cat(self._columns[: completions.shape[1]], dim=1)  # `generate` may take its last step back


@torch.no_grad()
def generate_completions(
    model, prompt_ids: list[list[int]], config: GenerationConfig, device: torch.device
) -> tuple[list[list[int]], list[list[float]]]:
    """Samples one completion per prompt; each ends with its first stop token, or at `max_new_tokens`.

    Prompts are padded left. Stops are found by position, never by looking for the pad id, so pad == eos is safe.
    Returns the completions, and for each of their tokens the log-probability (nats) under which it was really drawn:
    after temperature, top-k and top-p, in the arithmetic of generation.
    """
    width = max(len(ids) for ids in prompt_ids)
    input_ids = torch.full((len(prompt_ids), width), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    # Padded on the left: the last token of every prompt is where generation goes on.
    for row, ids in enumerate(prompt_ids):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    recorder = SampledLogprobs()

    def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        # Processors given to `generate` run before top-k and top-p: here, where its list is complete, ours is the last.
        logits_processor.append(recorder)
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    # A generation config that is passed does not win by itself: unset fields are filled from the model's own.
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
    """`ids` up to and with the first stop token; all of them where there is none."""
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1]
    return ids

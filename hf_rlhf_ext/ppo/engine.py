"""Rollout engines, which sample completions. The default engine uses `generate` of Transformers.

An engine depends only on a policy and token ids, so that PPO, best-of-n sampling and other code can use the same one.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..modeling.adapters import bare_model, merged_adapter, mixed_precision
from ..modeling.padding import reads_left_padding
from ..modeling.probing import evaluating, unchanged_random_state
from ..modeling.shared_prefill import why_not_once
from ..training.auto_batch import COMPLETIONS, FixedSizes, smaller_of
from ..training.bars import Advance, progress_bar
from ..training.leaving import check
from .config import PPOConfig
from .generation import SampledLogprobs, generate_completions, generation_config_of, sampling_config
from .generation_options import check_generation_kwargs, check_ids_in_vocabulary
from .sharding import Whole
from .stopping import StopStrings, cut_at_stop

__all__ = [
    "RolloutEngine",
    "SampledLogprobs",
    "Samples",
    "Sampling",
    "TransformersEngine",
    "generate_completions",
    "generation_config_of",
    "sampling_config",
    "sampling_of",
    "stop_token_ids",
]

logger = logging.getLogger(__name__)


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
        batch_size: number of completions per generation batch, whose prompts are of similar length; `None` means one
            batch.
        further: further fields of `GenerationConfig`.
        stop_strings: strings that end a completion, see `StopStrings`. They need `tokenizer`.
        tokenizer: tokenizer that decodes completions to find `stop_strings`.
    """

    max_new_tokens: int
    stop_ids: Sequence[int]
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int | None = None
    further: dict[str, Any] = field(default_factory=dict)
    stop_strings: str | Sequence[str] = ()
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.stop_strings and self.tokenizer is None:
            raise UserError("Sampling: stop_strings need the tokenizer that decodes completions: pass tokenizer too.")

    @cached_property
    def string_stops(self) -> StopStrings | None:
        """Finds the stop strings in completions; `None` if there are none."""
        return StopStrings(self.stop_strings, self.tokenizer) if self.stop_strings else None

    def cut(self, ids: list[int]) -> list[int]:
        """The tokens of a completion up to its end: its first stop token or the token that completes a stop string."""
        ids = cut_at_stop(ids, set(self.stop_ids))
        if self.string_stops is None:
            return ids
        return ids[: self.string_stops.end(ids)]  # all of them if there is no stop string

    def is_stopped(self, ids: list[int]) -> bool:
        """Whether a completion has a stop token or a stop string at its end, rather than the maximum length."""
        if ids[-1] in self.stop_ids:
            return True
        return self.string_stops is not None and self.string_stops.is_complete(ids)


def sampling_of(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Sampling:
    """Builds the sampling options of a PPO run.

    Args:
        args: options of the run.
        tokenizer: tokenizer of the policy.
        model: the policy, whose generation config may name more stop tokens.

    Raises:
        UserError: if an option names a token that the policy does not have.
    """
    further = dict(args.generation_kwargs or {})
    stop_ids = stop_token_ids(tokenizer, model, args.stop_token_ids)
    vocabulary = model.config.get_text_config().vocab_size
    check_ids_in_vocabulary(further, vocabulary)
    return Sampling(
        max_new_tokens=args.max_completion_length,
        stop_ids=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        batch_size=args.generation_batch_size,
        stop_strings=further.pop("stop_strings", None) or (),
        tokenizer=tokenizer,
        further=further,
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
        self.sharding = Whole()  # a trainer replaces it
        self._reads_padding: bool | None = None  # of this policy; `None` until the first batch that needs padding
        self._shares_prompts: bool | None = None  # the same; `None` until a prompt has several completions

    def sync(self, policy: nn.Module) -> None:
        """Keeps a reference to the policy. No weights are copied."""
        if policy is not self.policy:
            self._reads_padding = None
            self._shares_prompts = None
        self.policy = policy

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, n: int = 1) -> Samples:
        """Samples `n` completions per prompt; see `RolloutEngine.generate`.

        A prompt goes through the policy once for all its completions where the cache of the policy allows it.

        Raises:
            UserError: if `sync` was not called before, or if an option of `sampling.further` is not supported.
        """
        if self.policy is None:
            raise UserError("TransformersEngine.generate: there is no policy: call sync(policy) first.")
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        check_generation_kwargs(sampling.further)
        further = {name: value for name, value in sampling.further.items() if value is not None}
        config = sampling_config(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_ids=list(sampling.stop_ids),
            pad_token_id=sampling.pad_token_id,
            **further,
        )
        batch_size = sampling.batch_size or len(prompts)
        with (
            evaluating(self.policy),  # eval mode: no gradient checkpointing, no dropout, and the KV cache works
            self.sharding.inference(),  # before and after merging, which changes the weights of the base
            merged_adapter(self.policy, enabled=self.merge),
            self.sharding.inference(),
            mixed_precision(self.policy, self.autocast),
        ):
            # The rows of a prompt stay together, so that it is computed once.
            batch_size = max(batch_size - batch_size % n, min(batch_size, n))
            batches = self._batches(prompts, batch_size, config)
            once = n > 1 and self._may_share_prompts(prompts, config)
            return self._generate(prompts, batches, config, sampling.string_stops, share_prompts=once)

    def _generate(
        self,
        prompts: list[list[int]],
        batches: list[list[int]],
        config: GenerationConfig,
        stop_strings: StopStrings | None,
        *,
        share_prompts: bool,
    ) -> Samples:
        """Samples one completion per prompt, batch after batch."""
        options = {"share_prompts": share_prompts, "synced": self.sharding.is_sharded}
        ids: list[list[int]] = [[]] * len(prompts)
        logprobs: list[list[float]] = [[]] * len(prompts)
        device = next(self.policy.parameters()).device
        n_tokens = sum(len(rows) for rows in batches) * config.max_new_tokens
        with progress_bar(f"sampling {len(prompts)} completions", n_tokens) as advance:
            for rows, counts in self.sharding.in_step(batches):
                own_prompts = [prompts[row] for row in rows]
                if not counts:  # another process has more batches
                    with unchanged_random_state(device):
                        generate_completions(self.policy, own_prompts, config, device, stop_strings, **options)
                    continue
                counter = _TokenCounter(len(rows), config.max_new_tokens, advance)
                completions, drawn = generate_completions(
                    self.policy, own_prompts, config, device, stop_strings, on_token=counter.count, **options
                )
                counter.finish()
                for row, completion, row_logprobs in zip(rows, completions, drawn, strict=True):
                    ids[row] = completion
                    logprobs[row] = row_logprobs
        return Samples(ids, logprobs)

    def _batches(self, prompts: list[list[int]], batch_size: int, config: GenerationConfig) -> list[list[int]]:
        """The rows of each batch: of equal length if the policy reads padding, else of similar length."""
        lengths = [len(ids) for ids in prompts]
        order = list(range(len(prompts)))
        if batch_size < len(prompts):
            order.sort(key=lambda row: -lengths[row])  # prompts of similar length per batch: less padding
        # The test is a forward pass, in which all processes take part that must.
        is_padded = self.sharding.most(len(set(lengths))) > 1
        if not is_padded or not self._must_not_pad(prompts, config):
            return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

        order.sort(key=lambda row: -lengths[row])
        batches: list[list[int]] = []
        for row in order:
            if batches and len(batches[-1]) < batch_size and lengths[batches[-1][0]] == lengths[row]:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _must_not_pad(self, prompts: list[list[int]], config: GenerationConfig) -> bool:
        """Whether padding changes what the policy computes. It is tested once per policy, with the shortest prompt."""
        if self._reads_padding is None:
            # The model's own config could force the first token, as that of BART forces the last one.
            with generation_config_of(self.policy, config):
                reads_padding = reads_left_padding(
                    self.policy,
                    min(prompts, key=len),
                    config,
                    width=max(len(ids) for ids in prompts),
                    dtype=self.autocast or next(self.policy.parameters()).dtype,
                )
            self._reads_padding = bool(self.sharding.most(reads_padding))
            if self._reads_padding:
                logger.warning(
                    "%s reads the padding of shorter prompts: completions are sampled in batches of prompts of equal "
                    "length, which is slower.",
                    type(bare_model(self.policy)).__name__,
                )
        return self._reads_padding

    def _may_share_prompts(self, prompts: list[list[int]], config: GenerationConfig) -> bool:
        """Whether a prompt can go through the policy once for several completions. It is tested once per policy."""
        if self._shares_prompts is None:
            dtype = self.autocast or next(self.policy.parameters()).dtype
            with generation_config_of(self.policy, config):
                reason = why_not_once(self.policy, prompts, config, dtype=dtype)
            # The test is a forward pass, in which all processes take part that must.
            self._shares_prompts = not self.sharding.most(reason is not None)
            if not self._shares_prompts:
                logger.warning(
                    "Sampling: each prompt goes through the policy once for every completion, which is slower: %s.",
                    reason or "another process found that its cache cannot be repeated",
                )
        return self._shares_prompts


def sample_what_fits(
    engine: TransformersEngine, prompt_ids: Sequence[list[int]], sampling: Sampling, n: int, sizes: FixedSizes
) -> Samples:
    """Samples `n` completions per prompt, all of them again in smaller batches if a batch does not fit.

    Args:
        engine: the engine.
        prompt_ids: token ids of each prompt.
        sampling: options of sampling.
        n: number of completions per prompt.
        sizes: the sizes of the run, of which `generation_batch_size` bounds a batch.
    """

    def sample() -> Samples:
        batch_size = sizes.limit(COMPLETIONS, sampling.batch_size)
        in_force = sampling if batch_size == sampling.batch_size else replace(sampling, batch_size=batch_size)
        rows = smaller_of(batch_size, len(prompt_ids) * n)
        width = max(len(ids) for ids in prompt_ids) + sampling.max_new_tokens
        with sizes.one_pass(
            "sampling", COMPLETIONS, rows=rows, width=width, n_parts=lambda size: math.ceil(rows / size)
        ):
            return engine.generate(prompt_ids, in_force, n=n)

    return sizes.until_it_fits(sample)


class _TokenCounter:
    """Moves a bar by one token of each completion in a batch. A batch may end before the maximum number of tokens."""

    def __init__(self, n_completions: int, max_new_tokens: int, advance: Advance):
        self.n_completions = n_completions
        self.left = max_new_tokens
        self.advance = advance

    def count(self) -> None:
        """Counts a token of each completion. After a signal, the rollout ends here."""
        check()
        if self.left > 0:
            self.left -= 1
            self.advance(self.n_completions)

    def finish(self) -> None:
        """Counts the tokens that were not needed."""
        self.advance(self.left * self.n_completions)


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

"""Best-of-n and rejection sampling: n completions of each prompt, of which the one with the highest reward is kept.

The winners are answers of a better policy without any training. They are also demonstrations (rejection-sampling
fine-tuning: `hf-rlhf sft`), and best and worst together are comparisons (`hf-rlhf reward`, or DPO).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.prompt_form import form_of_model
from ..data.templates import template_options
from ..data.text import (
    Messages,
    Unrenderable,
    check_tokenizer,
    decode_completion,
    encode_generation_prompt,
    is_messages,
    is_text,
    make_message,
    open_thought,
    prefill_of,
    with_prefill,
)
from ..errors import UserError
from ..modeling.embeddings import n_rows
from ..modeling.loading import load_policy
from ..modeling.probing import unchanged_random_state
from ..modeling.quantization import quantization_record
from ..ppo.assembly import config_positions
from ..ppo.engine import RolloutEngine, Samples, Sampling, TransformersEngine, stop_token_ids
from ..ppo.engine_check import check_engine, checked_samples, takes_n
from ..ppo.prompts import warn_of_other_form
from ..ppo.stopping import stop_string_list
from ..training.bars import progress_bar
from .best_of_n_estimates import (
    exact_kl_of_best_of_n,
    expected_best,
    expected_kl,
    kl_estimate,
    kl_of_best_of_n,
)
from .best_of_n_file import Chunk, SamplesFile
from .best_of_n_result import UNSCORED, BestOfN, ChosenPairs, Dropped, refuse_nothing, scored_places
from .best_of_n_rewards import CompletionRewards, Reward, weights_digest

__all__ = [
    "BestOfN",
    "ChosenPairs",
    "Dropped",
    "best_of_n",
    "exact_kl_of_best_of_n",
    "expected_best",
    "expected_kl",
    "kl_estimate",
    "kl_of_best_of_n",
]


def best_of_n(
    policy: nn.Module | str | Path,
    prompts: Sequence[str | Messages | dict[str, Any]],
    reward: Reward | Sequence[Reward],
    n: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_strings: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    engine: RolloutEngine | None = None,
    path: str | Path | None = None,
    reward_weights: Sequence[float] | None = None,
    **load_options: Any,
) -> BestOfN:
    """Samples `n` completions of each prompt, scores them, and finds the best and the worst one.

    The same arguments give the same result, and the random state of the caller is not changed. The completions depend
    on `batch_size` and on the other prompts, as rounding does.

    Args:
        policy: a model with its `tokenizer`, or the folder or Hub id of one, which is loaded.
        prompts: text, messages, or rows with `prompt` and further columns, which reward functions get.
        reward: a function with the parameters of TRL's reward functions that returns a number or `None` for each
            completion, a `RewardScorer` or `RewardEnsemble`, the folder or Hub id of a reward model, or a list of
            these.
        n: number of completions of each prompt.
        tokenizer: tokenizer of the policy, if that is a model.
        max_new_tokens: largest number of tokens of a completion.
        temperature: temperature of sampling. The KL of best-of-n is to the policy at this temperature.
        top_p: nucleus sampling; 1.0 samples from all tokens.
        top_k: number of most probable tokens to sample from; 0 samples from all.
        stop_strings: strings that end a completion.
        seed: seed of the sampling.
        batch_size: number of completions that are sampled, scored and written together.
        engine: what samples, see `RolloutEngine`; `None` means `generate` of the policy.
        path: file of JSON lines that keeps the samples, so that a stopped run goes on where it was, with the same
            result as without a stop. Another reward uses the samples in it too. `None` keeps nothing.
        reward_weights: weight of each reward in the sum; `None` means 1 each.
        load_options: options of `load_policy`, such as `dtype` and `revision`, if `policy` is a folder or an id.

    Returns:
        The samples with their rewards, the winners, and the prompts that were dropped: those that the policy cannot
        read, and those without any score. Completions without a score (`None` or NaN) are counted and cannot win.

    Raises:
        UserError: for an unusable option or prompt, a policy or reward that does not load, a reward function that
            fails, a `path` of a run with other options, or if no prompt is left.
    """
    _check_options(n, max_new_tokens, temperature, top_p, top_k, batch_size)
    rows = [_as_row(prompt, number) for number, prompt in enumerate(_listed(prompts))]
    if not rows:
        raise UserError("prompts: the list is empty: give at least one prompt.")
    trust = {"trust_remote_code": True} if load_options.get("trust_remote_code") else {}
    rewards = CompletionRewards(reward, reward_weights, **trust)
    rewards.check_columns(sorted(set().union(*rows)))
    has_messages = any(is_messages(row["prompt"]) for row in rows)
    rewards.check_prompts(has_messages)  # before the first sample, as each completion would have no score
    model, tokenizer = _loaded(policy, tokenizer, load_options)
    check_tokenizer(tokenizer, needs_chat_template=has_messages)
    warn_of_other_form(form_of_model(model), tokenizer, {"prompts": rows})
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        stop_ids=stop_token_ids(tokenizer, model),
        pad_token_id=tokenizer.pad_token_id,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        batch_size=batch_size,
        stop_strings=tuple(stop_string_list(stop_strings)) if stop_strings else (),
        tokenizer=tokenizer,
    )
    run = _Run(model, tokenizer, rows, rewards, n, seed, sampling, engine or TransformersEngine())
    return run.result(path)


# --- what is given ---------------------------------------------------------------------------------------------------


def _check_options(n: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int, batch_size: int) -> None:
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r}: give a whole number (int) of 1 or more.")
    if not isinstance(temperature, Real) or not temperature > 0:
        raise UserError(
            f"temperature={temperature!r}: give a number above 0, such as 1, as all completions of a prompt would be "
            "the same at 0."
        )
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p!r}: give a probability above 0, at most 1.")
    if not isinstance(top_k, int) or top_k < 0:
        raise UserError(f"top_k={top_k!r}: give a whole number of tokens, or 0 for all.")


def _listed(prompts: Any) -> list[Any]:
    """The prompts as a list. Raises `UserError` for what has something else in it, such as a table or one text."""
    if is_text(prompts) or isinstance(prompts, Mapping) or hasattr(prompts, "iterrows"):
        kind = "one prompt" if is_text(prompts) else f"a {type(prompts).__name__}"
        raise UserError(f"prompts: {kind} is no list of prompts: give a list of text, messages or rows with `prompt`.")
    if not isinstance(prompts, Iterable):
        raise UserError(f"prompts: a {type(prompts).__name__} is no list of prompts: give a list.")
    return list(prompts)


def _as_row(prompt: Any, number: int) -> dict[str, Any]:
    row = dict(prompt) if isinstance(prompt, dict) and "prompt" in prompt else {"prompt": prompt}
    if not is_text(row["prompt"]):
        raise UserError(
            f"prompts row {number}: {row['prompt']!r:.80} is no text and no list of messages: fix or drop the row."
        )
    return row


def _loaded(
    policy: Any, tokenizer: PreTrainedTokenizerBase | None, load_options: dict[str, Any]
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The policy and its tokenizer. One that is loaded goes to the GPU if there is one."""
    if isinstance(policy, nn.Module):
        if load_options:
            raise UserError(f"{next(iter(load_options))}: it is used for a policy that is loaded: leave it out.")
        if tokenizer is None:
            raise UserError("tokenizer: the policy is a model in memory: pass its tokenizer too.")
        return policy, tokenizer
    if tokenizer is not None:
        raise UserError("tokenizer: a policy that is loaded brings its own: leave it out, or pass the model.")
    model, tokenizer = load_policy(str(policy), **load_options)
    if quantization_record(model) is None and torch.cuda.is_available():  # quantized weights are in their place
        model.to("cuda")
    return model, tokenizer


# --- sampling and scoring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Completion:
    """A completion as data has it."""

    prompt: str | Messages
    completion: str | Messages
    text: str


@dataclass
class _Run:
    """The parts of one run, checked."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict[str, Any]]
    rewards: CompletionRewards
    n: int
    seed: int
    sampling: Sampling
    engine: RolloutEngine

    def result(self, path: str | Path | None) -> BestOfN:
        """Samples and scores what is not in the file yet."""
        check_engine(self.engine)
        encoded, dropped = self._encode()
        refuse_nothing(len(encoded), dropped)
        order = sorted(encoded, key=lambda row: -len(encoded[row]))  # prompts of similar length: less padding
        per_chunk = max(1, self.sampling.batch_size // self.n)
        chunks = [order[start : start + per_chunk] for start in range(0, len(order), per_chunk)]
        file = SamplesFile(path, self._settings(encoded))
        reward = self.rewards.digest
        device = next(self.model.parameters()).device
        description = f"best of {self.n}"
        with unchanged_random_state(device), progress_bar(description, len(order) * self.n) as advance:
            self.engine.sync(self.model)
            for number, rows in enumerate(chunks):
                chunk = file.samples(number)
                if chunk is None:
                    chunk = self._sample(number, rows, encoded)
                    file.add_samples(number, chunk)
                if file.rewards(reward, number) is None:
                    file.add_rewards(reward, number, self._score(chunk, encoded))
                advance(len(rows) * self.n)
        samples = [file.samples(number) for number in range(len(chunks))]
        scores = [file.rewards(reward, number) for number in range(len(chunks))]
        return self._collected(samples, scores, encoded, dropped)

    def _encode(self) -> tuple[dict[int, list[int]], list[Dropped]]:
        """Token ids of each prompt by its position, and the prompts that the policy cannot read."""
        room = config_positions(self.model) - self.sampling.max_new_tokens
        encoded: dict[int, list[int]] = {}
        dropped = []
        for number, row in enumerate(self.rows):
            try:
                ids = encode_generation_prompt(self.tokenizer, row["prompt"], template_options(row))
            except Unrenderable as error:
                dropped.append(Dropped(number, error.reason))
                continue
            if not ids:
                dropped.append(Dropped(number, "the prompt has no tokens"))
            elif len(ids) > room:
                dropped.append(
                    Dropped(
                        number,
                        f"the prompt and max_new_tokens={self.sampling.max_new_tokens} are longer than the "
                        f"{room + self.sampling.max_new_tokens} tokens of the policy",
                    )
                )
            else:
                encoded[number] = ids
        return encoded, dropped

    def _settings(self, encoded: dict[int, list[int]]) -> dict[str, Any]:
        """What the samples depend on."""
        tokens = hashlib.sha256(repr(sorted(encoded.items())).encode()).hexdigest()[:16]
        return {
            "n": self.n,
            "prompts": f"{len(encoded)} ({tokens})",
            "policy": weights_digest(self.model),
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "stop_ids": list(self.sampling.stop_ids),
            "stop_strings": list(self.sampling.stop_strings),
            "seed": self.seed,
            "batch_size": self.sampling.batch_size,
            "engine": type(self.engine).__name__,
        }

    def _sample(self, number: int, rows: list[int], encoded: dict[int, list[int]]) -> Chunk:
        # Each chunk has a seed of its own, so that nothing that ran before changes it.
        torch.manual_seed(_seed(self.seed, number))
        samples = self._generate([encoded[row] for row in rows])
        ids = _grouped(samples.ids, self.n)
        if samples.logprobs is None:
            return Chunk(rows, ids, None)
        return Chunk(rows, ids, _grouped([float(sum(values)) for values in samples.logprobs], self.n))

    def _generate(self, prompt_ids: list[list[int]]) -> Samples:
        if self.n == 1:  # an engine of the user need not take `n`
            samples = self.engine.generate(prompt_ids, self.sampling)
        elif takes_n(self.engine):
            samples = self.engine.generate(prompt_ids, self.sampling, n=self.n)
        else:
            samples = self.engine.generate([ids for ids in prompt_ids for _ in range(self.n)], self.sampling)
        token_rows = n_rows(self.model)
        return checked_samples(samples, prompt_ids, self.sampling, token_rows=token_rows, engine=self.engine, n=self.n)

    def _score(self, chunk: Chunk, encoded: dict[int, list[int]]) -> list[list[float | None]]:
        """(P, n) rewards of a chunk."""
        done = [self._completed(row, ids, encoded[row]) for row, of_row in _each(chunk) for ids in of_row]
        examples = [self.rows[row] for row in chunk.rows for _ in range(self.n)]
        names = dict.fromkeys(name for example in examples for name in example if name != "prompt")
        columns = {name: [example.get(name) for example in examples] for name in names}
        scores = self.rewards(
            [entry.prompt for entry in done],
            [entry.completion for entry in done],
            [ids for of_row in chunk.ids for ids in of_row],
            columns,
            per_prompt=self.n,
        )
        texts = _grouped([entry.text for entry in done], self.n)
        grouped = _grouped(scores, self.n)
        if self.rewards.only_models:
            return [_same_for_same_text(*of_prompt) for of_prompt in zip(texts, grouped, strict=True)]
        return grouped

    def _completed(self, row: int, ids: list[int], prompt_ids: list[int]) -> _Completion:
        """Prompt and completion as data has them, which reward functions get."""
        example = self.rows[row]
        prompt, options = example["prompt"], template_options(example)
        text = decode_completion(self.tokenizer, ids, prompt_ids)
        if isinstance(prompt, str):
            return _Completion(prompt, text, text)
        if prefill_of(prompt) is not None:  # a begun answer, which the completion then holds as a whole
            return _Completion(*with_prefill(self.tokenizer, prompt, text, options), text)
        text = decode_completion(self.tokenizer, ids)
        # Some templates open a thought in the prompt, which belongs to the answer.
        opening = open_thought(self.tokenizer, prompt, options)
        return _Completion(prompt, [make_message("assistant", opening + text)], text)

    def _collected(
        self,
        chunks: list[Chunk],
        scores: list[list[list[float | None]]],
        encoded: dict[int, list[int]],
        dropped: list[Dropped],
    ) -> BestOfN:
        """The samples in the order of the prompts, without those of which none has a score."""
        samples: dict[int, tuple[list[list[int]], list[float] | None, list[float | None]]] = {}
        for chunk, of_chunk in zip(chunks, scores, strict=True):
            for place, row in enumerate(chunk.rows):
                logprobs = None if chunk.logprobs is None else chunk.logprobs[place]
                samples[row] = (chunk.ids[place], logprobs, of_chunk[place])
        kept = sorted(row for row, (_, _, rewards) in samples.items() if scored_places(rewards))
        dropped = dropped + [Dropped(row, UNSCORED) for row in samples if row not in set(kept)]
        dropped.sort(key=lambda entry: entry.row)
        refuse_nothing(len(kept), dropped, self.rewards.problems)
        done = [[self._completed(row, ids, encoded[row]) for ids in samples[row][0]] for row in kept]
        has_logprobs = all(samples[row][1] is not None for row in kept)
        return BestOfN(
            n=self.n,
            rows=kept,
            prompts=[of_prompt[0].prompt for of_prompt in done],
            completions=[[entry.completion for entry in of_prompt] for of_prompt in done],
            texts=[[entry.text for entry in of_prompt] for of_prompt in done],
            ids=[samples[row][0] for row in kept],
            logprobs=[samples[row][1] for row in kept] if has_logprobs else None,
            rewards=[samples[row][2] for row in kept],
            stopped=[[self.sampling.is_stopped(ids) for ids in samples[row][0]] for row in kept],
            columns=[{k: v for k, v in self.rows[row].items() if k != "prompt"} for row in kept],
            dropped=dropped,
            reward_problems=list(self.rewards.problems),
        )


def _each(chunk: Chunk) -> list[tuple[int, list[list[int]]]]:
    return list(zip(chunk.rows, chunk.ids, strict=True))


def _grouped(values: Sequence[Any], n: int) -> list[list[Any]]:
    """Each n values that follow each other as one list."""
    return [list(values[start : start + n]) for start in range(0, len(values), n)]


def _same_for_same_text(texts: list[str], rewards: list[float | None]) -> list[float | None]:
    """The rewards, of which those of equal texts are equal: a reward model's rounding depends on the batch."""
    first: dict[str, float | None] = {}
    for text, reward in zip(texts, rewards, strict=True):
        first.setdefault(text, reward)
    return [first[text] for text in texts]


def _seed(seed: int, number: int) -> int:
    """The seed of a chunk."""
    digest = hashlib.sha256(repr((seed, "best of n", number)).encode()).digest()
    return int.from_bytes(digest[:6])

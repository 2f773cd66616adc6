"""Reward functions as TRL's GRPOTrainer takes them, with every wrong answer named."""

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..compat import get_callable_name, is_async_callable
from ..data.text import decode_completion
from ..errors import UserError
from ..modeling.loading import load_tokenizer
from ..reward.ensemble import RewardEnsemble, load_reward
from ..reward.scorer import RewardScorer

RewardFunc = str | nn.Module | Callable[..., list[float | None] | list[list[float] | None]]


class Scores(NamedTuple):
    """What F reward functions say of B completions, fp32.

    `per_func` (B, F): each one's score, NaN where it returned None; that of token rewards is their sum. `sequence`
    (B,): weighted sum of the functions that score whole completions. `dense` (B, T): weighted sum of the others'
    token rewards, zero in the padding; T is the longest completion. None where no function returned token rewards.
    """

    per_func: Tensor
    sequence: Tensor
    dense: Tensor | None = None

    def to(self, device: torch.device) -> "Scores":
        return Scores(*(None if tensor is None else tensor.to(device) for tensor in self))


class RewardFunctions:
    """One or several reward functions, called with `prompts, completions, completion_ids, **columns` as in TRL.

    A function returns a number for each completion or, for each, a list of rewards, one per completion token.

    Args:
        reward_funcs: a callable (plain or async), a sequence-classification model, the path or Hub id of one or of a
            reward adapter, or a list of these.
        reward_weights: weight of each in the sum; None is 1 each.
        processing_classes: tokenizer of each reward model (None for callables); loaded by the model's name if left out.
        share: takes a path or Hub id and returns a scorer on weights that are loaded already, or None to load it.
        trust_remote_code: for reward models and tokenizers that are loaded, as in Transformers.
        option: name of the argument, for error messages.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        reward_weights: list[float] | None = None,
        processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        *,
        share: Callable[[str | Path], RewardScorer | None] | None = None,
        trust_remote_code: bool = False,
        option: str = "reward_funcs",
    ):
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not funcs or any(func is None for func in funcs):
            raise UserError(f"{option}: give at least one callable, reward model or path.")
        if isinstance(processing_classes, list):
            tokenizers = processing_classes
        else:
            tokenizers = [processing_classes] * len(funcs)
        for name, entries in (("reward_weights", reward_weights), ("reward_processing_classes", tokenizers)):
            if entries is not None and len(entries) != len(funcs):
                raise UserError(f"{name} has {len(entries)} entries for {len(funcs)} {option}: give one each.")
        self.funcs = [
            _as_callable(func, tokenizer, share, option, trust_remote_code)
            for func, tokenizer in zip(funcs, tokenizers, strict=True)
        ]
        self.names = _distinct_names([get_callable_name(func) for func in self.funcs])
        self.weights = torch.tensor(reward_weights or [1.0] * len(funcs), dtype=torch.float32)

    def weighted(self) -> Iterator[tuple[Callable, float]]:
        """Each function with its weight."""
        return zip(self.funcs, self.weights.tolist(), strict=True)

    def to(self, device: torch.device) -> Self:
        """Moves reward models there, those in 4 or 8 bits excepted."""
        for func in self.funcs:
            scorers = func.members if isinstance(func, RewardEnsemble) else [func]
            for scorer in scorers:
                if isinstance(scorer, RewardScorer) and not getattr(scorer.model, "is_quantized", False):
                    scorer.model.to(device)
        return self

    def score(
        self, prompts: list, completions: list, *, completion_ids: list[list[int]] | None = None, **columns: Any
    ) -> Scores:
        """What every function says; functions get `columns` and, where given, `completion_ids`.

        Raises:
            UserError: a wrong number of scores or token rewards, one that is not finite, or a row that no function
                scored.
        """
        if completion_ids is not None:
            columns["completion_ids"] = completion_ids
        outputs = self._outputs(prompts, completions, columns)
        answers = [_checked(output, len(prompts), name) for output, name in zip(outputs, self.names, strict=True)]
        # A function that gives a list for some completion gives token rewards; the others score whole completions.
        dense = [i for i, answer in enumerate(answers) if any(isinstance(row, list) for row in answer)]
        for i in dense:
            answers[i] = _checked_tokens(answers[i], completion_ids, self.names[i])

        # NaN stands for "not scored by this function".
        totals = [[_total(row) for row in answer] for answer in answers]  # F lists of B numbers
        per_func = torch.tensor(totals, dtype=torch.float32).T
        self._refuse_unscored(per_func)

        scores_whole = torch.tensor([i not in dense for i in range(len(answers))])
        sequence = self.combine(per_func.masked_fill(~scores_whole, 0.0))
        if not dense:
            return Scores(per_func, sequence)
        width = max(len(ids) for ids in completion_ids or [])
        weighted = [self.weights[i] * _padded(answers[i], width) for i in dense]
        return Scores(per_func, sequence, torch.stack(weighted).sum(0))

    def _refuse_unscored(self, per_func: Tensor) -> None:
        unscored = per_func.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            raise UserError(
                f"reward function {', '.join(map(repr, self.names))} returned None for completion {unscored[0]} of "
                f"{len(per_func)}: at least one function must score every completion."
            )

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Tensor:
        """Scores of each function, (B, F) fp32; NaN where a function returned None for a row (as in TRL)."""
        return self.score(prompts, completions, **columns).per_func

    def combine(self, scores: Tensor) -> Tensor:
        """Weighted sum over functions of (B, F) scores, leaving out the ones that returned None: (B,)."""
        return (scores * self.weights.to(scores.device)).nansum(dim=1)

    def _outputs(self, prompts: list, completions: list, columns: dict[str, Any]) -> list[Any]:
        """What each function returned; async ones run at the same time."""
        # An async function returns a coroutine here, which runs below.
        outputs = [func(prompts=prompts, completions=completions, **columns) for func in self.funcs]
        pending = [i for i, func in enumerate(self.funcs) if is_async_callable(func)]
        for i, output in zip(pending, _run_all([outputs[i] for i in pending]), strict=True):
            outputs[i] = output
        return outputs


def score_completions(
    rewards: RewardFunctions,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, Any]],
    completion_ids: list[list[int]],
    **hooks: Any,
) -> Scores:
    """What the reward functions say of completions, as text, or as messages where prompts are messages.

    Args:
        examples: rows of the data set; their columns beside `prompt` go to the functions.
        completion_ids: token ids of a completion for each.
        hooks: further arguments of the functions: `trainer_state`, `log_metric`, `log_extra`, as in TRL.
    """
    prompts = [example["prompt"] for example in examples]
    completions: list[Any] = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        completion = decode_completion(tokenizer, ids)
        if not isinstance(prompt, str):
            completion = [{"role": "assistant", "content": completion}]
        completions.append(completion)
    # A column of these names would take the place of what is scored.
    taken = ("prompt", "completion", "completion_ids")
    columns = {name: [example[name] for example in examples] for name in examples[0] if name not in taken}
    return rewards.score(prompts, completions, completion_ids=completion_ids, **columns, **hooks)


def extra_columns(n: int) -> tuple[dict[str, list], Callable[[str, list], None]]:
    """Columns of a table of `n` completions, and the `log_extra(column, values)` by which reward functions fill it."""
    columns: dict[str, list] = {}

    def log_extra(column: str, values: list) -> None:
        if len(values) != n:
            raise UserError(f"log_extra({column!r}): {len(values)} values for {n} completions: give one for each.")
        columns[column] = list(values)

    return columns, log_extra


def _distinct_names(names: list[str]) -> list[str]:
    """Names as they are, with their number where two are the same: logs tell them apart."""
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _as_callable(
    func: RewardFunc,
    tokenizer: PreTrainedTokenizerBase | None,
    share: Callable[[str | Path], RewardScorer | None] | None,
    option: str,
    trust_remote_code: bool,
) -> Callable:
    if isinstance(func, str | Path):
        # On the policy's base where it fits: the base is loaded once.
        shared = share(func) if share is not None else None
        func = shared if shared is not None else load_reward(func, trust_remote_code=trust_remote_code)
        if isinstance(func, RewardScorer):
            func.tokenizer = tokenizer or func.tokenizer
    elif isinstance(func, nn.Module):
        name = func.config.name_or_path
        func = RewardScorer(func, tokenizer or load_tokenizer(name, trust_remote_code=trust_remote_code))
    elif not callable(func):
        raise UserError(f"{option}: {func!r} is neither callable, a model, nor a path.")
    return func


def _run_all(coroutines: list) -> list:
    async def gather() -> list:
        return await asyncio.gather(*coroutines)

    if not coroutines:
        return []
    with ThreadPoolExecutor(1) as pool:  # a thread of its own: a notebook's has an event loop running already
        return pool.submit(asyncio.run, gather()).result()


def _checked(output: Any, expected: int, name: str) -> list:
    """One function's answer: a float for each completion, or a list for each; None stays.

    Raises `UserError` for anything else; what the lists hold is left to `_checked_tokens`.
    """
    rows = None
    if isinstance(output, Iterable) and getattr(output, "ndim", 1):  # a tensor without axes is one number
        rows = list(output)
    if rows is None or len(rows) != expected:
        returned = repr(output) if rows is None else f"{len(rows)} scores"
        raise UserError(
            f"reward function {name!r} returned {returned} for {expected} completions: return one score each."
        )
    is_list = [isinstance(row, list | tuple) or getattr(row, "ndim", 0) == 1 for row in rows]
    if not any(is_list):
        return [None if row is None else _number(row, name, f"completion {i}") for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if row is not None and not is_list[i]:
            raise UserError(
                f"reward function {name!r} returned {row!r} for completion {i} and a list for completion "
                f"{is_list.index(True)}: return a number for every completion, or for each a list with one number per "
                "token."
            )
    return [None if row is None else list(row) for row in rows]


def _checked_tokens(rows: list[list | None], completion_ids: list[list[int]] | None, name: str) -> list:
    """Rewards per token as floats; raises `UserError` where they are not one for each token of a completion."""
    if completion_ids is None:
        raise UserError(f"reward function {name!r} returned token rewards: they need completion_ids.")
    for i, (row, ids) in enumerate(zip(rows, completion_ids, strict=True)):
        if row is not None and len(row) != len(ids):
            raise UserError(
                f"reward function {name!r} returned {len(row)} token rewards for completion {i}, which has {len(ids)} "
                "tokens: return one for each of completion_ids, the stop token included."
            )
    checked: list[list[float] | None] = []
    for i, row in enumerate(rows):
        if row is not None:
            row = [_number(value, name, f"token {t} of completion {i}") for t, value in enumerate(row)]
        checked.append(row)
    return checked


def _number(value: Any, name: str, where: str) -> float:
    if not isinstance(value, Real) and getattr(value, "ndim", 1) != 0:
        raise UserError(f"reward function {name!r} returned {value!r} for {where}: return a number.")
    if not math.isfinite(value):
        raise UserError(
            f"reward function {name!r} returned {float(value)} for {where}: return a finite number, or None where "
            "another function scores the completion."
        )
    return float(value)


def _total(row: float | Sequence[float] | None) -> float:
    """The score of one completion, NaN where there is none."""
    if row is None:
        return math.nan
    if isinstance(row, list):
        return math.fsum(row)
    return row


def _padded(rows: list[list[float] | None], width: int) -> Tensor:
    """Token rewards as (B, `width`) fp32, zero in the padding and where there are none."""
    padded = torch.zeros(len(rows), width, dtype=torch.float32)
    for i, row in enumerate(rows):
        if row:
            padded[i, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return padded

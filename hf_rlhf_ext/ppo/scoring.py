"""Reward functions as TRL's GRPOTrainer takes them, with every wrong answer named."""

import asyncio
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..compat import get_callable_name, is_async_callable
from ..errors import UserError
from ..modeling.loading import load_tokenizer
from ..reward.ensemble import RewardEnsemble, load_reward
from ..reward.scorer import RewardScorer

RewardFunc = str | nn.Module | Callable[..., list[float | None]]


class RewardFunctions:
    """One or several reward functions, called with `prompts, completions, completion_ids, **columns` as in TRL.

    Args:
        reward_funcs: a callable (plain or async), a sequence-classification model, the path or Hub id of one or of a
            reward adapter, or a list of these.
        reward_weights: weight of each in the sum; None is 1 each.
        processing_classes: tokenizer of each reward model (None for callables); loaded by the model's name if left out.
        option: name of the argument, for error messages.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        reward_weights: list[float] | None = None,
        processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        *,
        device: torch.device | None = None,
        option: str = "reward_funcs",
    ):
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        tokenizers = processing_classes if isinstance(processing_classes, list) else [processing_classes] * len(funcs)
        if not funcs or any(func is None for func in funcs):
            raise UserError(f"{option}: give at least one callable, reward model or path.")
        for name, given in (("reward_weights", reward_weights), ("reward_processing_classes", tokenizers)):
            if given is not None and len(given) != len(funcs):
                raise UserError(f"{name} has {len(given)} entries for {len(funcs)} {option}: give one each.")
        self.funcs = [_as_callable(f, t, device, option) for f, t in zip(funcs, tokenizers, strict=True)]
        names = [get_callable_name(func) for func in self.funcs]
        self.names = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
        self.weights = torch.tensor(reward_weights or [1.0] * len(funcs), dtype=torch.float32)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Tensor:
        """Scores of each function, (B, F) fp32; NaN where a function returned None for a row (as in TRL).

        Raises:
            UserError: a wrong number of scores, a score that is not finite, or a row that no function scored.
        """
        outputs: list[Any] = [None] * len(self.funcs)
        pending = {}
        for i, func in enumerate(self.funcs):
            if is_async_callable(func):
                pending[i] = func(prompts=prompts, completions=completions, **columns)
            else:
                outputs[i] = func(prompts=prompts, completions=completions, **columns)
        for i, output in zip(pending, _run_all(list(pending.values())), strict=True):
            outputs[i] = output
        checked = [_checked(output, len(prompts), name) for output, name in zip(outputs, self.names, strict=True)]
        scores = torch.tensor(checked, dtype=torch.float32).T  # (B, F)
        unscored = scores.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            raise UserError(
                f"reward function {', '.join(map(repr, self.names))} returned None for completion {unscored[0]} of "
                f"{len(prompts)}: at least one function must score every completion."
            )
        return scores

    def combine(self, scores: Tensor) -> Tensor:
        """Weighted sum over functions of (B, F) scores, leaving out the ones that returned None: (B,)."""
        return (scores * self.weights.to(scores.device)).nansum(dim=1)


def _as_callable(
    func: RewardFunc, tokenizer: PreTrainedTokenizerBase | None, device: torch.device | None, option: str
) -> Callable:
    if isinstance(func, str | Path):
        func = load_reward(func)
        if isinstance(func, RewardScorer):
            func.tokenizer = tokenizer or func.tokenizer
    elif isinstance(func, nn.Module):
        func = RewardScorer(func, tokenizer or load_tokenizer(func.config.name_or_path))
    elif not callable(func):
        raise UserError(f"{option}: {func!r} is neither callable, a model, nor a path.")
    for scorer in func.members if isinstance(func, RewardEnsemble) else [func]:
        if isinstance(scorer, RewardScorer) and device is not None and not getattr(scorer.model, "is_quantized", False):
            scorer.model.to(device)
    return func


def _run_all(coroutines: list) -> list:
    async def gather() -> list:
        return await asyncio.gather(*coroutines)

    if not coroutines:
        return []
    with ThreadPoolExecutor(1) as pool:  # a thread of its own: a notebook's has an event loop running already
        return pool.submit(asyncio.run, gather()).result()


def _checked(output: Any, expected: int, name: str) -> list[float]:
    """One function's answer as floats, None as NaN; raises `UserError` for anything else."""
    scores = list(output) if isinstance(output, Iterable) and getattr(output, "ndim", 1) else None
    if scores is None or len(scores) != expected:
        found = repr(output) if scores is None else f"{len(scores)} scores"
        raise UserError(f"reward function {name!r} returned {found} for {expected} completions: return one score each.")
    for i, score in enumerate(scores):
        if score is None:
            scores[i] = math.nan
        elif not isinstance(score, Real) and getattr(score, "ndim", 1) != 0:
            raise UserError(f"reward function {name!r} returned {score!r} for completion {i}: return a number.")
        elif not math.isfinite(score):
            raise UserError(
                f"reward function {name!r} returned {float(score)} for completion {i}: return a finite number, or None "
                "where another function scores it."
            )
    return [float(score) for score in scores]

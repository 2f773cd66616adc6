"""Rewards of sampled completions, of which some may have none: those that a reward model cannot read, None and NaN."""

import hashlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerState

from ..data.templates import TEMPLATE_COLUMNS
from ..data.text import Messages, check_tokenizer
from ..errors import UserError
from ..ppo.reward_answers import checked_answer, checked_tokens, total
from ..ppo.reward_calls import (
    Parameters,
    awaited,
    check_function,
    check_parameters,
    checked_weights,
    distinct_names,
    failures_named,
    given_name,
    weighted_sum,
)
from ..ppo.rewards import RESERVED_COLUMNS
from ..reward.ensemble import RewardEnsemble, load_reward
from ..reward.scorer import RewardScorer

OPTION = "reward"
_SAMPLED_VALUES = 16
"""Number of values of each weight that identify a model."""
_DEEPEST = 3
"""How deep functions within functions are looked into."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

Reward = Callable[..., Any] | RewardScorer | RewardEnsemble | str | Path


class CompletionRewards:
    """One or several rewards as one, which gives None where a completion has no score.

    Args:
        reward: a function with the parameters of TRL's reward functions, a reward model, the folder or Hub id of one,
            or a list of these, whose weighted sum is the reward.
        weights: one weight for each; `None` means 1 each.
        load_options: options of `load_reward` for folders and Hub ids.

    Raises:
        UserError: if an entry is no reward, or the number of weights differs.
    """

    def __init__(self, reward: Reward | Sequence[Reward], weights: Sequence[float] | None = None, **load_options: Any):
        given = list(reward) if isinstance(reward, list | tuple) else [reward]
        if not given:
            raise UserError("reward: the list is empty: give a function or a reward model.")
        if weights is not None and not isinstance(weights, Iterable):
            raise UserError(f"reward_weights={weights!r}: give a list with one number for each reward.")
        self.weights = checked_weights(
            None if weights is None else list(weights), [given_name(func) for func in given], OPTION
        )
        self.funcs = [_as_callable(func, load_options) for func in given]
        self.names = distinct_names([given_name(func) for func in self.funcs])
        self.problems: list[str] = []

    @property
    def formula(self) -> str:
        """The sum of the rewards, such as `1 × reward_model + 0.5 × short`."""
        return weighted_sum(self.names, self.weights)

    @property
    def only_models(self) -> bool:
        """Whether reward models alone give the reward, for which a completion is its text."""
        return all(map(_is_model, self.funcs))

    @property
    def digest(self) -> str:
        """Tells this reward from others: by the weights of models, and by name and source of functions."""
        parts = [[_identity(func), weight] for func, weight in zip(self.funcs, self.weights, strict=True)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises `UserError` if a function needs a column that the prompts do not have."""
        passed_on = [column for column in columns if column not in RESERVED_COLUMNS]
        for func, name in zip(self.funcs, self.names, strict=True):
            if not _is_model(func):
                check_parameters(func, name, passed_on, where="prompts")

    def check_prompts(self, has_messages: bool) -> None:
        """Raises `UserError` if prompts are messages, and a reward model has no chat template for them."""
        for func in filter(_is_model, self.funcs):
            for member in func.members if isinstance(func, RewardEnsemble) else [func]:
                check_tokenizer(member.tokenizer, needs_chat_template=has_messages)

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list] | None = None,
        *,
        per_prompt: int = 1,
    ) -> list[float | None]:
        """Rewards of B completions.

        Args:
            prompts: B prompts.
            completions: B completions.
            completion_ids: token ids of each completion.
            columns: further columns of the prompts, with B entries each.
            per_prompt: number of consecutive completions that have the same prompt.

        Returns:
            B rewards. `None` where no function gave a score; a function without a score counts as 0 if another has one.

        Raises:
            UserError: if a function fails, or returns something that is no list of scores.
        """
        passed_on = {name: values for name, values in (columns or {}).items() if name not in RESERVED_COLUMNS}
        totals: list[float | None] = [None] * len(completions)
        for func, name, weight in zip(self.funcs, self.names, self.weights, strict=True):
            if _is_model(func):
                scores = self._of_model(func, list(prompts), list(completions), passed_on, per_prompt)
            else:
                scores = _of_function(func, name, list(prompts), list(completions), list(completion_ids), passed_on)
            for number, score in enumerate(scores):
                if score is not None:
                    totals[number] = (totals[number] or 0.0) + weight * score
        return totals

    def _of_model(
        self, scorer: Any, prompts: list, completions: list, columns: dict[str, list], per_prompt: int
    ) -> list[float | None]:
        """Scores of a reward model. What it refuses, such as a completion that is too long, has none."""
        of_template = {name: columns[name] for name in TEMPLATE_COLUMNS if name in columns}
        try:
            scores = scorer(prompts, completions, per_prompt=per_prompt, **of_template)
        except UserError as error:
            if len(completions) == 1:
                self.problems.append(str(error))
                return [None]
        else:
            found = [_or_none(score) for score in scores]
            if None in found:
                self.problems.append("a reward model gives scores that are not finite, so it has diverged in training")
            return found
        # One of them is refused: the halves lead to it.
        n_prompts = len(completions) // per_prompt
        middle = n_prompts // 2 * per_prompt if n_prompts > 1 else len(completions) // 2
        per_prompt = per_prompt if n_prompts > 1 else 1
        scores = []
        for part in (slice(None, middle), slice(middle, None)):
            of_part = {name: values[part] for name, values in columns.items()}
            scores += self._of_model(scorer, prompts[part], completions[part], of_part, per_prompt)
        return scores


def _of_function(
    func: Callable, name: str, prompts: list, completions: list, completion_ids: list, columns: dict[str, list]
) -> list[float | None]:
    """Scores of a function of the user."""
    hooks = {"trainer_state": TrainerState(), "log_metric": _ignore, "log_extra": _ignore}
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
    # A function that extends the messages of its prompts, say, must not change the prompts of the result.
    arguments = {name: [deepcopy(value) for value in values] for name, values in given.items()} | hooks
    with failures_named(func, name, completions):
        output = awaited([func(**Parameters.of(func).select(arguments))])[0]
        answer = checked_answer(_none_for_nan(output), len(completions), name, completion_ids)
    if any(isinstance(row, list) for row in answer):
        answer = checked_tokens(answer, completion_ids, name)
    return [None if row is None else total(row) for row in answer]


def _none_for_nan(output: Any) -> Any:
    """What a function returned, with None for NaN. Anything else is left to the check of the answer."""
    if isinstance(output, Mapping):
        return {name: _none_for_nan(values) for name, values in output.items()}
    if hasattr(output, "tolist"):
        if getattr(output, "ndim", 1) == 2 and 1 in output.shape:  # one score each, as classifiers return them
            output = output.reshape(-1)
        output = output.tolist()
    elif inspect.isgenerator(output):
        output = list(output)
    if not isinstance(output, list | tuple):
        return output
    return [None if _is_nan(value) else value for value in output]


def _is_nan(value: Any) -> bool:
    try:
        return not isinstance(value, list | tuple) and bool(value != value)
    except (TypeError, ValueError, RuntimeError):  # an array of several elements has no truth value
        return False


def _or_none(score: float) -> float | None:
    return float(score) if math.isfinite(score) else None


def _ignore(*values: Any, **named: Any) -> None:
    """Stands for the hooks of a trainer."""


def _is_model(func: Any) -> bool:
    return isinstance(func, RewardScorer | RewardEnsemble)


def _as_callable(func: Any, load_options: dict[str, Any]) -> Callable:
    if isinstance(func, str | Path):
        return load_reward(func, **load_options)
    if not _is_model(func):
        check_function(func, OPTION)
    return func


# --- which reward it is ----------------------------------------------------------------------------------------------


def _identity(func: Any, depth: int = 0) -> str:
    """Describes a reward by its content, without addresses in memory."""
    if isinstance(func, RewardEnsemble):
        return repr([func.combine, func.penalty, *map(_identity, func.members)])
    if isinstance(func, RewardScorer):
        head = "" if func.head is None else weights_digest(func.head)
        of_text = [func.tokenizer.chat_template, len(func.tokenizer), func.asked.trained]
        return repr([weights_digest(func.model, func.adapter), head, func.adapter, func.mean, func.std, *of_text])
    if isinstance(func, nn.Module):
        return weights_digest(func)
    named = func if hasattr(func, "__qualname__") else type(func)
    return repr([named.__module__, named.__qualname__, *_sources(named), _settings(func, depth)])


def _sources(named: Any) -> list[str]:
    """The source of a function or class, and that of its file, as it may call other functions there."""
    sources = []
    for described in (named, sys.modules.get(named.__module__)):
        try:
            sources.append(inspect.getsource(described))
        except (OSError, TypeError):
            sources.append("")
    code = getattr(named, "__code__", None)  # two functions on one line have the same source
    if code is not None:
        plain = [value for value in code.co_consts if isinstance(value, str | int | float)]  # sets have no fixed order
        sources.append(repr([code.co_code, plain, code.co_names]))
    return sources


def _settings(func: Any, depth: int) -> list[str]:
    """The values that make two functions of the same source different: of a closure, a partial, or an object."""
    if depth > _DEEPEST:
        return []
    values: list[Any] = [cell.cell_contents for cell in getattr(func, "__closure__", None) or () if _is_set(cell)]
    values += [getattr(func, "__defaults__", None)]
    if isinstance(func, partial):
        values += [func.func, func.args, sorted(func.keywords.items())]
    elif not inspect.isroutine(func):
        values += sorted(getattr(func, "__dict__", {}).items())
    described = []
    for value in values:
        written = repr(value)
        if isinstance(value, nn.Module | RewardScorer | RewardEnsemble) or callable(value):
            written = _identity(value, depth + 1)
        described.append(_ADDRESS.sub("", written))
    return described


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@torch.no_grad()
def weights_digest(model: nn.Module, adapter: str | None = None) -> str:
    """Tells the weights of a model from others, by 16 values of each, which takes little time for a large model.

    Args:
        model: any module. Weights that are quantized count by their stored bytes.
        adapter: the adapter that counts; `None` means the active ones. Others on the same base are left out.
    """
    others: set[str] = set()
    if isinstance(model, PeftModel):
        counted = model.active_adapters if adapter is None else [adapter]
        others = set(model.peft_config) - set(counted)
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, torch.Tensor) or others.intersection(name.split(".")):
            continue
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_VALUES)
        values = flat[::step][: _SAMPLED_VALUES + 1].to("cpu")
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

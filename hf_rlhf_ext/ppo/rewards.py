"""Reward functions with the interface of TRL's `GRPOTrainer`. What they return is checked."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..compat import get_callable_name
from ..data.templates import template_options
from ..data.text import decode_completion, open_thought, prefill_of, with_prefill
from ..errors import UserError
from ..modeling.loading import load_tokenizer
from ..reward.ensemble import RewardEnsemble, load_reward
from ..reward.scorer import RewardScorer
from ..training.leaving import at_once
from .reward_answers import checked_answer, checked_tokens, padded, total
from .reward_calls import (
    HOOKS,
    Parameters,
    as_list,
    awaited,
    check_given,
    check_parameters,
    check_tokenizers,
    checked_weights,
    comes_later,
    distinct_names,
    failures_named,
    given_name,
    is_reward_model,
    resolved,
    weighted_sum,
)

logger = logging.getLogger(__name__)

RESERVED_COLUMNS = frozenset(
    ("prompt", "prompts", "completion", "completions", "completion_ids", "environments", "self", *HOOKS)
)
"""Columns that are not passed to reward functions, as arguments of TRL's reward functions have these names."""

RewardFunc = str | nn.Module | Callable[..., list[float | None] | list[list[float] | None]]


class Scores(NamedTuple):
    """Scores of B completions from F reward functions, all fp32.

    Attributes:
        per_func: (B, F) score of each function, NaN where it returned `None`. The score of a function that returns
            token rewards is their sum.
        sequence: (B,) weighted sum over the functions that score whole completions.
        dense: (B, T) weighted sum over the functions that return token rewards, zero in the padding; T is the length of
            the longest completion. `None` if no function returned token rewards.
    """

    per_func: Tensor
    sequence: Tensor
    dense: Tensor | None = None

    def to(self, device: torch.device) -> "Scores":
        """The same scores on `device`."""
        return Scores(*(None if tensor is None else tensor.to(device) for tensor in self))


class RewardFunctions:
    """One or more reward functions, called as in TRL: `func(prompts, completions, completion_ids, **columns)`.

    A function returns one number per completion, or one list per completion with a reward for each of its tokens.

    Args:
        reward_funcs: a function (plain or async), a sequence-classification model, the path or Hub id of such a model,
            of a reward adapter or of an ensemble, or a list of these.
        reward_weights: weight of each function in the sum; `None` means 1 each.
        processing_classes: tokenizer of each reward model, `None` for functions. If left out, the tokenizer is loaded
            with the model.
        share: takes a path or Hub id and returns a scorer that uses weights already in memory, or `None` if the model
            must be loaded. If left out, every reward model is loaded.
        trust_remote_code: whether to run Python code from the repository of a reward model, as in Transformers.
        option: name of the argument in error messages.
        beside: the reward functions of training, for those of evaluation only: another function that has the name of
            one of them is called `eval_<name>`, as metrics have these names.

    Raises:
        UserError: if there is no reward function, if an entry is not a reward function, or if the numbers of functions,
            weights and tokenizers differ.
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
        beside: "RewardFunctions | None" = None,
    ):
        funcs = check_given(reward_funcs, reward_weights, option)
        weights = checked_weights(reward_weights, [given_name(func) for func in funcs], option)
        tokenizers = as_list(processing_classes)
        if not isinstance(processing_classes, list | tuple):
            tokenizers *= len(funcs)  # one for all
        check_tokenizers(tokenizers, len(funcs), option)
        self.funcs = [
            _as_callable(func, tokenizer, share, option, trust_remote_code)
            for func, tokenizer in zip(funcs, tokenizers, strict=True)
        ]
        self.names = distinct_names([_name_beside(func, beside) for func in self.funcs])
        self._parameters = [Parameters.of(func) for func in self.funcs]
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.placed: Callable[[], AbstractContextManager] = nullcontext
        """Makes the context in which reward models score, see `offload.ModelsOnCall`."""

    def weighted(self) -> Iterator[tuple[Callable, float]]:
        """Pairs of a function and its weight."""
        return zip(self.funcs, self.weights.tolist(), strict=True)

    @property
    def formula(self) -> str:
        """The sum of the rewards by the names that logs have, such as `1 × reward_model + 0.5 × short`."""
        return weighted_sum(self.names, self.weights.tolist())

    def scorers(self) -> Iterator[RewardScorer]:
        """The reward models among the functions, also those in ensembles, in the order in which they are called."""
        for func in self.funcs:
            members = func.members if isinstance(func, RewardEnsemble) else [func]
            yield from (member for member in members if isinstance(member, RewardScorer))

    def models(self) -> list[nn.Module]:
        """The models of the reward models among the functions."""
        return [scorer.model for scorer in self.scorers()]

    def scorers_on(self, model: nn.Module) -> list[RewardScorer]:
        """The reward models that are adapters of `model`."""
        return [scorer for scorer in self.scorers() if scorer.model is model]

    def to(self, device: torch.device, *, besides: nn.Module | None = None) -> Self:
        """Moves the reward models to `device`, except quantized ones and the model `besides`; returns itself."""
        for model in self.models():
            if model is not besides and not getattr(model, "is_quantized", False):
                model.to(device)
        return self

    def score(
        self,
        prompts: list,
        completions: list,
        per_prompt: int = 1,
        /,
        *,
        completion_ids: list[list[int]] | None = None,
        **columns: Any,
    ) -> Scores:
        """Calls every function and combines what they return.

        Args:
            prompts: B prompts, as text or as messages.
            completions: B completions, as text or as messages.
            per_prompt: number of consecutive completions that have the same prompt, which reward models compute once.
            completion_ids: token ids of each completion. Token rewards need them.
            columns: further arguments of the functions, such as columns of the dataset with B entries each.

        Returns:
            The scores.

        Raises:
            UserError: if a function returned a wrong number of scores or token rewards, or one that is not finite, or
                if no function scored a completion.
        """
        if completion_ids is not None:
            columns["completion_ids"] = completion_ids
        with self.placed():
            outputs = self._outputs(prompts, completions, columns, per_prompt)
        answers = []
        for func, name, output in zip(self.funcs, self.names, outputs, strict=True):
            with _mistakes_named(func, name, completions):  # a generator runs only here
                answers.append(checked_answer(output, len(prompts), name, completion_ids))
        # A function that returns a list for any completion returns token rewards; the others score whole completions.
        dense = [i for i, answer in enumerate(answers) if any(isinstance(row, list) for row in answer)]
        for i in dense:
            answers[i] = checked_tokens(answers[i], completion_ids, self.names[i])

        # NaN stands for "not scored by this function".
        totals = [[total(row) for row in answer] for answer in answers]  # F lists of B numbers
        per_func = torch.tensor(totals, dtype=torch.float32).T
        self._refuse_unscored(per_func)

        scores_whole = torch.tensor([i not in dense for i in range(len(answers))])
        sequence = self.combine(per_func.masked_fill(~scores_whole, 0.0))
        if not dense:
            return Scores(per_func, sequence)
        width = max(len(ids) for ids in completion_ids or [])
        weighted = [self.weights[i] * padded(answers[i], width) for i in dense]
        return Scores(per_func, sequence, torch.stack(weighted).sum(0))

    def _refuse_unscored(self, per_func: Tensor) -> None:
        unscored = per_func.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            raise UserError(
                f"reward function {', '.join(map(repr, self.names))} returned None for completion {unscored[0]} of "
                f"{len(per_func)}: at least one function must score every completion. Return a number there (the "
                "built-in judge has otherwise=0.0 for it)."
            )

    def check_call(self, columns: Iterable[str], *, where: str) -> None:
        """Raises `UserError` if a function cannot be called with a dataset's columns, before anything is sampled.

        Args:
            columns: names of the columns of the dataset.
            where: name of the dataset for the message.
        """
        passed_on = [column for column in columns if column not in RESERVED_COLUMNS]
        for func, name in zip(self.funcs, self.names, strict=True):
            check_parameters(func, name, passed_on, where=where)

    @property
    def read_columns(self) -> bool:
        """Whether any function is the user's own; reward models read only what the chat template needs."""
        return not all(isinstance(func, RewardScorer | RewardEnsemble) for func in self.funcs)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Tensor:
        """Scores of each function, (B, F) fp32; NaN where a function returned `None`, as in TRL. See `score`."""
        return self.score(prompts, completions, **columns).per_func

    def combine(self, scores: Tensor) -> Tensor:
        """Weighted sum of the scores of each completion.

        Args:
            scores: (B, F) scores of the functions; NaN where a function returned `None`.

        Returns:
            (B,) sums, in which NaN counts as 0.
        """
        return (scores * self.weights.to(scores.device)).nansum(dim=1)

    def _outputs(self, prompts: list, completions: list, columns: dict[str, Any], per_prompt: int) -> list[Any]:
        """What each function returned. It gets all arguments, or those that it names. Async functions run together."""
        arguments = {"prompts": prompts, "completions": completions, **columns}
        of_models = {name: value for name, value in arguments.items() if name != "per_prompt"}
        if per_prompt > 1:
            of_models["per_prompt"] = per_prompt
        outputs = []
        for func, name, parameters in zip(self.funcs, self.names, self._parameters, strict=True):
            of_this = of_models if isinstance(func, RewardScorer | RewardEnsemble) else arguments
            with _mistakes_named(func, name, completions), _left_at_signals(func):
                output = func(**parameters.select(of_this))
            # An async function returns a coroutine here, also where a decorator hides that it is one.
            if comes_later(output):
                output = _named_result(output, func, name, completions)
            outputs.append(output)
        with at_once():
            return awaited(outputs)


def _left_at_signals(func: Callable) -> AbstractContextManager:
    """A signal that stops training ends a function of the user, which may ask a slow service, but no reward model."""
    if isinstance(func, RewardScorer | RewardEnsemble):
        return nullcontext()
    return at_once()


def _mistakes_named(func: Callable, name: str, completions: list) -> AbstractContextManager:
    if isinstance(func, RewardScorer | RewardEnsemble):  # not the user's code
        return nullcontext()
    return failures_named(func, name, completions)


async def _named_result(output: Any, func: Callable, name: str, completions: list) -> Any:
    with _mistakes_named(func, name, completions):
        return await resolved(output)


def score_completions(
    rewards: RewardFunctions,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, Any]],
    completion_ids: list[list[int]],
    prompt_ids: list[list[int]] | None = None,
    per_prompt: int = 1,
    **hooks: Any,
) -> Scores:
    """Decodes completions and scores them. The functions get text, or messages if the prompt is a list of messages.

    If the generation prompt opens a thought (`<think>`), the text of the message begins with it, as in data. If the
    prompt ends with a turn of the assistant, which the policy has continued, the functions get the whole turn as the
    completion, and the messages before it as the prompt.

    Args:
        rewards: the reward functions.
        tokenizer: tokenizer of the policy.
        examples: B rows of the dataset. Their columns, except those in `RESERVED_COLUMNS`, are passed to the functions.
        completion_ids: token ids of the completion of each row.
        prompt_ids: token ids of the prompt of each row, with which a space between text and completion is kept.
        per_prompt: number of consecutive rows that are the same row of the dataset.
        hooks: further arguments of the functions: `trainer_state`, `log_metric` and `log_extra`, as in TRL.

    Returns:
        The scores.

    Raises:
        UserError: see `RewardFunctions.score`.
    """
    prompts = [example["prompt"] for example in examples]
    completions: list[Any] = []
    for i, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True)):
        if isinstance(prompt, str):
            completions.append(decode_completion(tokenizer, ids, prompt_ids[i] if prompt_ids else None))
            continue
        options = template_options(examples[i])
        if prefill_of(prompt) is not None:
            generated = decode_completion(tokenizer, ids, prompt_ids[i] if prompt_ids else None)
            prompts[i], completion = with_prefill(tokenizer, prompt, generated, options)
            completions.append(completion)
            continue
        opening = open_thought(tokenizer, prompt, options)
        completions.append([{"role": "assistant", "content": opening + decode_completion(tokenizer, ids)}])
    # Other columns would replace the arguments of the same name.
    passed_on = [name for name in examples[0] if name not in RESERVED_COLUMNS]
    columns = {name: [example[name] for example in examples] for name in passed_on}
    return rewards.score(prompts, completions, per_prompt, completion_ids=completion_ids, **columns, **hooks)


def named_sets(eval_dataset: Any) -> dict[str, Any]:
    """The evaluation sets by their names in messages; empty without any."""
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset {name!r}": dataset for name, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def check_columns(rewards: RewardFunctions, eval_rewards: RewardFunctions | None, datasets: dict[str, Any]) -> None:
    """Checks before training that every reward function can be called with the columns of each dataset.

    Logs one warning that names the columns that are not passed on, as arguments have their names.

    Args:
        rewards: the reward functions of training, which evaluation uses too.
        eval_rewards: those of evaluation only.
        datasets: datasets by their names, `train_dataset` or that of an evaluation set.

    Raises:
        UserError: see `RewardFunctions.check_call`.
    """
    taken: dict[str, None] = {}
    for where, dataset in datasets.items():
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list):  # not a table, which is refused elsewhere
            continue
        further = eval_rewards if where != "train_dataset" else None
        check_calls(rewards, further, columns, where=where)
        taken.update((column, None) for column in columns if column in RESERVED_COLUMNS - {"prompt"})
    reads_columns = rewards.read_columns or (eval_rewards is not None and eval_rewards.read_columns)
    if taken and reads_columns:
        first = next(iter(taken))
        logger.warning(
            "%s: not passed on to reward functions, which have arguments with these names: to use such a column, "
            "rename it, as in dataset.rename_column(%r, %r).",
            f"column{'s' * (len(taken) > 1)} {', '.join(taken)}",
            first,
            f"my_{first}",
        )


def check_calls(
    rewards: RewardFunctions, eval_rewards: RewardFunctions | None, columns: list[str], *, where: str
) -> None:
    """Checks that every reward function can be called with the columns of one dataset. See `check_columns`."""
    for functions in (rewards, eval_rewards):
        if functions is not None:
            functions.check_call(columns, where=where)


def extra_columns(n: int) -> tuple[dict[str, list], Callable[[str, list], None]]:
    """Makes an empty table and the `log_extra(column, values)` with which reward functions add columns to it.

    Args:
        n: number of completions, which is the length of each column.

    Returns:
        The columns by name, and the function. The function raises `UserError` unless it gets `n` values.
    """
    columns: dict[str, list] = {}

    def log_extra(column: str, values: list) -> None:
        if len(values) != n:
            raise UserError(f"log_extra({column!r}): {len(values)} values for {n} completions: give one for each.")
        columns[column] = list(values)

    return columns, log_extra


def _name_beside(func: Callable, beside: "RewardFunctions | None") -> str:
    name = get_callable_name(func)
    if beside is None or name not in beside.names or any(func is other for other in beside.funcs):
        return name
    return f"eval_{name}"


def _as_callable(
    func: RewardFunc,
    tokenizer: PreTrainedTokenizerBase | None,
    share: Callable[[str | Path], RewardScorer | None] | None,
    option: str,
    trust_remote_code: bool,
) -> Callable:
    if isinstance(func, str | Path):
        # If it fits the policy's base, that base is shared and need not be loaded again.
        shared = share(func) if share is not None else None
        func = shared if shared is not None else load_reward(func, trust_remote_code=trust_remote_code)
        if isinstance(func, RewardScorer):
            func.tokenizer = tokenizer or func.tokenizer
    elif is_reward_model(func):
        func = RewardScorer(func, tokenizer or _tokenizer_of(func, option, trust_remote_code))
    return func


def _tokenizer_of(model: nn.Module, option: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loads the tokenizer from where the reward model was loaded."""
    name = model.config.name_or_path
    if name:
        return load_tokenizer(name, trust_remote_code=trust_remote_code)
    remedy = "pass the tokenizer in reward_processing_classes"
    if option != "reward_funcs":
        remedy = "pass RewardScorer(model, tokenizer)"
    raise UserError(f"{option}: {type(model).__name__} names no checkpoint to load its tokenizer from: {remedy}.")

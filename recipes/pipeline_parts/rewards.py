"""The reward functions of a pipeline: tried before training, and named in reports."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerState

from hf_rlhf_ext.cli.lineage import lineage_of
from hf_rlhf_ext.compat import get_callable_name
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.privacy import strip_local_paths
from hf_rlhf_ext.ppo.reward_calls import weighted_sum
from hf_rlhf_ext.ppo.rewards import RewardFunctions, score_completions
from hf_rlhf_ext.recipes.pipeline_parts.data import Row
from hf_rlhf_ext.reward_functions.named import public_text

ANSWERS = ("Yes.", "This is a short answer.")
"""Completions of a trial call."""


def try_function(
    name: str, function: Callable, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, where: str
) -> None:
    """Calls a reward function with two prompts, as PPO would.

    Args:
        name: how the option names it.
        function: the reward function.
        rows: prompts to train on, with their columns.
        tokenizer: tokenizer of the policy.
        where: name of the prompts in messages.

    Raises:
        UserError: it fails, or does not return a number for each completion.
    """
    rows = [rows[0], rows[-1]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ANSWERS]
    hooks = {"trainer_state": TrainerState(), "log_metric": _ignore, "log_extra": _ignore}
    # None is allowed where another reward gives a number.
    rewards = RewardFunctions([function, _zero])
    try:
        rewards.check_call(rows[0], where=where)
        score_completions(rewards, tokenizer, rows, ids, **hooks)
    except UserError as error:
        raise UserError(f"reward_funcs: {error}") from error
    except Exception as error:  # raised by the user's file
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"reward_funcs: {name} fails in a trial call on two of your prompts ({problem}): correct it."
        ) from error


def _zero(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def _ignore(*values: Any, **named: Any) -> None:
    """Stands for the hooks of the trainer."""


def reward_in_words(n_models: int, names: Sequence[str], weights: Sequence[float] | None) -> str:
    """The reward as a sum, such as `reward = 1 × reward model + 0.5 × short`.

    Args:
        n_models: number of reward models, which come first.
        names: names of the functions.
        weights: the weight of each; None means 1.
    """
    models = ["reward model"] if n_models == 1 else [f"reward model {number}" for number in range(1, n_models + 1)]
    terms = [*models, *names]
    return f"reward = {weighted_sum(terms, weights or [1.0] * len(terms))}"


def sources_of(functions: Mapping[str, Callable]) -> dict[str, str]:
    """The file of each reward function, with a digest.

    Args:
        functions: the functions by the names under which they were given.

    Returns:
        Name of the function -> its file. Of several functions with one name, the later ones get numbers.
    """
    sources: dict[str, str] = {}
    for given, function in functions.items():
        name = get_callable_name(function)
        n_before = sum(known == name or known.startswith(f"{name} ") for known in sources)
        sources[f"{name} {n_before + 1}" if n_before else name] = source_of_function(given, function)
    return sources


def source_of_function(given: str, function: Callable) -> str:
    """The file that a name of a function has, or that the function was written in, with a digest.

    The name without local paths, for what is written in C; the call with its arguments, for a built-in function.
    """
    if hasattr(function, "call_text"):
        return strip_local_paths(public_text(function.call_text))
    file = given if given.endswith(".py") else given.rpartition(":")[0]
    if not Path(file).expanduser().is_file():
        written = inspect.unwrap(function)
        try:
            file = inspect.getsourcefile(written if inspect.isroutine(written) else type(written)) or ""
        except TypeError:
            file = ""
    return lineage_of(file, dataset=True) if file else strip_local_paths(given)

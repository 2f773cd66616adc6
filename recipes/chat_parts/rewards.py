"""The reward of an answer: of the reward model, or its weighted sum with functions that the user names."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerState

from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.cli.run_folder import PIPELINE_FILE, RunFolder
from hf_rlhf_ext.errors import UserError, first_line
from hf_rlhf_ext.ppo.reward_calls import checked_weights
from hf_rlhf_ext.ppo.rewards import RewardFunctions, score_completions
from hf_rlhf_ext.recipes.pipeline_parts.rewards import reward_in_words, sources_of

OPTION = "reward_funcs"


@dataclass(frozen=True)
class Reward:
    """The reward of an answer.

    Attributes:
        total: what is shown: the score of the reward model, or the weighted sum.
        parts: the score of each reward in the sum, by its name; `None` where a function gave none. Empty for a reward
            model alone.
    """

    total: float
    parts: dict[str, float | None] = field(default_factory=dict)


class RewardSum:
    """The weighted sum of a reward model and functions, which get what PPO gives them.

    Args:
        scorer: the reward model; `None` for functions alone.
        functions: the functions.
        weights: the weight of each: of the reward model, if there is one, and then of the functions.
    """

    def __init__(self, scorer: Any, functions: Sequence[Callable], weights: Sequence[float]):
        models = [] if scorer is None else [scorer]
        self.n_models = len(models)
        self.rewards = RewardFunctions([*models, *functions], list(weights))

    @property
    def formula(self) -> str:
        """Such as `reward = 1 × reward model + 0.5 × short`."""
        return reward_in_words(self.n_models, self.rewards.names[self.n_models :], self.rewards.weights.tolist())

    def score(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, Any]],
        completion_ids: list[list[int]],
        prompt_ids: list[list[int]],
    ) -> list[Reward]:
        """Rewards of answers.

        Args:
            tokenizer: tokenizer of the model that answered.
            rows: the prompt of each answer, as the model got it, and the other columns of its row.
            completion_ids: token ids of each answer.
            prompt_ids: token ids of each prompt.

        Raises:
            UserError: the reward model cannot score an answer, or a function fails.
        """
        hooks = {"trainer_state": TrainerState(), "log_metric": _ignore, "log_extra": _ignore}
        try:
            scores = score_completions(self.rewards, tokenizer, rows, completion_ids, prompt_ids, **hooks).per_func
        except UserError:
            raise
        except Exception as error:  # of a function, such as one whose server does not answer
            raise UserError(f"a reward function failed: {type(error).__name__}: {first_line(error)}") from error
        rewards = []
        for total, of_answer in zip(self.rewards.combine(scores).tolist(), scores.tolist(), strict=True):
            parts = {}
            for name, score in zip(self.rewards.names, of_answer, strict=True):
                parts[name] = score if score == score else None  # NaN: the function gave no score
            rewards.append(Reward(total, parts))
        return rewards


def _ignore(*values: Any, **named: Any) -> None:
    """Stands for the hooks of the trainer."""


def load_functions(names: Sequence[str]) -> dict[str, Callable]:
    """The functions that the user names, by these names. Their files are run.

    Raises:
        UserError: there is no such function, or it is given twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{OPTION}: {name} is given twice: give it once.")
    return {name: reward_function(name, OPTION) for name in names}


def check_functions(functions: dict[str, Callable], columns: Sequence[str], *, where: str) -> None:
    """Raises `UserError` for a function that needs a column which the prompts do not have.

    Args:
        functions: the functions.
        columns: names of the columns.
        where: what has these columns, for the message.
    """
    if not functions:
        return
    try:
        RewardFunctions(list(functions.values())).check_call(columns, where=where)
    except UserError as error:
        raise UserError(f"{OPTION}: {str(error).removeprefix(f'{OPTION}: ')}") from error


def not_run(functions: Sequence[str], *, has_score: bool) -> str:
    """Says that functions of a run are not run, and how to run them.

    Args:
        functions: names of the functions.
        has_score: whether a reward model scores the answers.
    """
    are = "is" if len(functions) == 1 else "are"
    effect = "until then, answers have no score"
    if has_score:
        effect = "the score is not the reward that PPO was trained on"
    return (
        f"{', '.join(functions)} {are} not run, as the folder could name any code: add --{OPTION} "
        f"{shlex.join(functions)}; {effect}"
    )


def weights_of_run(
    run: RunFolder, functions: dict[str, Callable], reward_model: str | None
) -> tuple[list[float], list[str]]:
    """The weights of rewards: those of training if the rewards are those of training, or else 1 each.

    Args:
        run: the run.
        functions: the functions by the names under which they were given.
        reward_model: the reward model; `None` for functions alone.

    Returns:
        The weight of the reward model, if there is one, and of each function, and lines on what is not as in training.
    """
    n_models = int(reward_model is not None)
    ones = [1.0] * (n_models + len(functions))
    found = [_position(name, function, run.reward_funcs) for name, function in functions.items()]
    are_same = (
        run.n_reward_models == n_models
        and (reward_model is None or _is_same_folder(reward_model, run.reward_model))
        and None not in found
        and sorted(found) == list(range(len(run.reward_funcs)))
    )
    if not are_same:
        trained = [*["reward model"] * run.n_reward_models, *run.reward_funcs]
        return ones, [f"weights of 1 each, as PPO was trained on other rewards: {', '.join(trained) or 'not known'}"]
    try:
        weights = checked_weights(run.reward_weights, [*["reward model"] * n_models, *run.reward_funcs], "rewards")
    except UserError as error:
        return ones, [f"weights of 1 each, as those in {PIPELINE_FILE} cannot be used: {error}"]
    notes = []
    for source in sources_of(functions).values():
        if run.reward_sources and source not in run.reward_sources.values():
            notes.append(f"reward functions: {source} differs from what PPO was trained with")
    return [*weights[:n_models], *(weights[n_models + position] for position in found)], notes


def _position(name: str, function: Callable, recorded: Sequence[str]) -> int | None:
    """Which of the functions of a run a function is; `None` if it is none of them.

    Its file may be written in another way, as a run may have been started in another folder: the name of the file and
    that of the function count.
    """
    if name in recorded:
        return list(recorded).index(name)
    own = _key(name, getattr(function, "__name__", ""))
    for position, other in enumerate(recorded):
        if own == _key(other, own[1]):
            return position
    return None


def _key(name: str, only: str) -> tuple[str, str]:
    """Name of the file or module, and of the function, which is `only` for the name of a file alone."""
    place, function = (name, only) if name.endswith(".py") else name.rpartition(":" if ":" in name else ".")[::2]
    return Path(place.removesuffix(".py").replace(".", "/")).name, function


def _is_same_folder(one: str, other: str | None) -> bool:
    return other is not None and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()

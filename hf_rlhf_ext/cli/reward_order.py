"""The order of rewards on the command line and in a config file, to which their weights belong."""

from collections.abc import Sequence
from typing import Any

from .config_file import read_config
from .shipped import find_config

MODELS, FUNCTIONS, WEIGHTS = "reward_model", "reward_funcs", "reward_weights"


def weights_of_models_first(
    argv: Sequence[str], models: Sequence[str], functions: Sequence[str], weights: list[float] | None
) -> list[float] | None:
    """Returns the weights in the order in which recipes take rewards: models, then functions.

    Args:
        argv: words of the command line, which a parser has checked.
        models: what `reward_model` has.
        functions: what `reward_funcs` has.
        weights: weights in the order in which the rewards were given; `None` if there are none.

    Raises:
        UserError: if there is not one finite number for each reward.
    """
    if weights is None or not models or not functions or not functions_come_first(argv):
        return weights
    from ..ppo.reward_calls import checked_weights  # imported here: it loads torch, which `--help` does not need

    weights = checked_weights(weights, [*functions, *models], "rewards")
    return [*weights[len(functions) :], *weights[: len(functions)]]


def functions_come_first(argv: Sequence[str]) -> bool:
    """Whether `reward_funcs` was given before `reward_model`.

    The keys of the config file come first, in their order, then the options of the command line. If both options are on
    the command line, and the weights are there too or nowhere, the order is that of the command line.
    """
    typed: list[str] = []
    in_file: list[str] = []
    for position, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if not option.startswith("--"):
            continue
        if option == "--config":
            in_file = _given_keys(read_config(find_config(value if equals else argv[position + 1])))
        typed.append(option.removeprefix("--").replace("-", "_"))

    weights_are_typed = WEIGHTS in typed or WEIGHTS not in in_file
    if MODELS in typed and FUNCTIONS in typed and weights_are_typed:
        order = typed
    else:
        order = in_file + typed
    return FUNCTIONS in order and MODELS in order and order.index(FUNCTIONS) < order.index(MODELS)


def _given_keys(config: dict[Any, Any]) -> list[str]:
    return [str(key) for key, value in config.items() if value]


def sum_of_rewards(rewards: Sequence[Any], weights: Any, shaping: str | None = None) -> str | None:
    """The sum of the rewards as a formula, such as `1 × runs/reward + 0.5 × short`.

    Args:
        rewards: paths or Hub ids of reward models, and functions.
        weights: their weights; `None` means 1 each.
        shaping: `reward_shaping` of `PPOConfig`, which the formula then names.

    Returns:
        The formula; `None` for one reward of weight 1 without shaping.

    Raises:
        UserError: if there is not one finite number for each reward.
    """
    from ..ppo.reward_calls import checked_weights, formula_of, given_name

    names = [given_name(reward) for reward in rewards]
    weights = checked_weights(weights, names, "rewards")
    return formula_of(names, weights, shaping)

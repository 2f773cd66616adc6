"""TRL's own reward functions that need arguments, under short names."""

from collections.abc import Callable

from ..errors import UserError


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable:
    """Share of repeated n-grams of tokens, times `max_penalty`: TRL's `get_repetition_penalty_reward`.

    Args:
        ngram_size: number of tokens of an n-gram.
        max_penalty: reward of a completion that only repeats, 0 or below.

    Raises:
        UserError: a value is out of its range.
    """
    from trl.rewards import get_repetition_penalty_reward

    if ngram_size < 1:
        raise UserError(f"repetition_penalty: ngram_size={ngram_size} must be at least 1.")
    if max_penalty > 0:
        raise UserError(f"repetition_penalty: max_penalty={max_penalty:g} must be 0 or below.")
    return get_repetition_penalty_reward(ngram_size, max_penalty)

"""Checks what a rollout engine returns, so that a mistake in an engine of the user is one line with its name."""

import inspect
import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..errors import UserError
from .engine import RolloutEngine, Samples, Sampling, TransformersEngine

logger = logging.getLogger(__name__)

_MAX_LOGPROB = 0.1
"""The largest log-probability that rounding explains, in nats."""


def check_engine(engine: Any) -> None:
    """Refuses an object that is not an engine.

    Args:
        engine: the argument of the trainer.

    Raises:
        UserError: if `sync` or `generate` is missing, or if it is a class.
    """
    if isinstance(engine, type):
        raise UserError(f"engine: {engine.__name__} is the class, not an object: pass engine={engine.__name__}(...).")
    for method in ("sync", "generate"):
        if not callable(getattr(engine, method, None)):
            raise UserError(
                f"engine: {type(engine).__name__} has no method {method}: an engine needs sync(policy) and "
                "generate(prompt_ids, sampling, n=1), see RolloutEngine."
            )


def takes_n(engine: Any) -> bool:
    """Whether `generate` of an engine takes `n`, the number of completions per prompt.

    An engine without it gets each prompt several times.
    """
    try:
        parameters = inspect.signature(engine.generate).parameters.values()
    except (TypeError, ValueError):  # of a function that is written in C
        return False
    return any(p.kind is p.VAR_KEYWORD or (p.name == "n" and p.kind is not p.POSITIONAL_ONLY) for p in parameters)


def checked_samples(
    samples: Any,
    prompt_ids: Sequence[list[int]],
    sampling: Sampling,
    *,
    token_rows: int,
    engine: RolloutEngine,
    n: int = 1,
) -> Samples:
    """What an engine returned for `n` completions per prompt, as lists that end where the completions end.

    Tensors and arrays are taken too. Tokens after a stop token, a stop string or the maximum length are cut off: what
    comes before them is sampled from the right distribution.

    Args:
        samples: the return value of `generate`.
        prompt_ids: token ids of each prompt.
        sampling: the options that the engine was given.
        token_rows: number of tokens that the policy has rows for.
        engine: the engine, for messages.
        n: number of completions per prompt.

    Raises:
        UserError: if there are not `n` completions per prompt, if one has no tokens or tokens that the policy does not
            have, or if the log-probabilities do not belong to the tokens.
    """
    name = type(engine).__name__
    if not isinstance(samples, tuple) or len(samples) != 2:
        raise UserError(f"engine: {name}.generate returned {type(samples).__name__}: return Samples(ids, logprobs).")
    ids = [_as_list(row) for row in samples[0]]
    logprobs = None if samples[1] is None else [_as_list(row) for row in samples[1]]
    if len(ids) != n * len(prompt_ids):
        asked = f"{len(prompt_ids)} prompts" + f" with n={n}" * (n > 1)
        raise UserError(
            f"engine: {name}.generate returned {len(ids)} completions for {asked}: return n for each prompt, next to "
            "each other."
        )
    for index, row in enumerate(ids):
        _check_ids(row, f"{name}.generate: completion {index}", token_rows)
    if logprobs is not None:
        _check_logprobs(logprobs, ids, name)

    ids = [sampling.cut(row)[: sampling.max_new_tokens] for row in ids]
    if logprobs is not None:
        logprobs = [values[: len(row)] for values, row in zip(logprobs, ids, strict=True)]
    is_own = type(engine) is not TransformersEngine  # whose `generate` may end otherwise, such as after `max_time`
    if is_own and any(len(row) < sampling.max_new_tokens and not sampling.is_stopped(row) for row in ids):
        _warn_of_missing_stops(name)
    return Samples(ids, logprobs)


def _as_list(row: Any) -> list:
    """One row as a list of Python numbers, also if it is a tensor, an array or a tuple."""
    if hasattr(row, "tolist"):
        return row.tolist()
    return [value.item() if hasattr(value, "item") else value for value in row]


def _check_ids(row: list, what: str, token_rows: int) -> None:
    if not row:
        raise UserError(
            f"engine: {what} has no tokens: return at least one, as the stop token belongs to the completion."
        )
    for token in row:
        if not isinstance(token, int):
            raise UserError(
                f"engine: {what} has {token!r} among its tokens: return token ids, which are whole numbers."
            )
        if not 0 <= token < token_rows:
            raise UserError(
                f"engine: {what} has token {token}, but the policy has {token_rows} tokens: sample with the policy's "
                "tokenizer."
            )


def _check_logprobs(logprobs: list[list], ids: list[list[int]], name: str) -> None:
    if len(logprobs) != len(ids):
        raise UserError(
            f"engine: {name}.generate returned log-probabilities of {len(logprobs)} completions instead of {len(ids)}: "
            "return those of every completion, or None."
        )
    for index, (values, row) in enumerate(zip(logprobs, ids, strict=True)):
        if len(values) != len(row):
            raise UserError(
                f"engine: {name}.generate: completion {index} has {len(row)} tokens, but {len(values)} "
                "log-probabilities: return one for each token, the stop token included, or None for all."
            )
        for value in values:
            if not isinstance(value, int | float) or not math.isfinite(value) or value > _MAX_LOGPROB:
                raise UserError(
                    f"engine: {name}.generate: completion {index} has the log-probability {value!r}: return finite "
                    "numbers of at most 0, in nats, or None for all."
                )


@lru_cache(maxsize=256)
def _warn_of_missing_stops(name: str) -> None:
    # Cached, so that it is said once and not for every rollout.
    logger.warning(
        "engine: %s.generate: a completion is shorter than max_completion_length and does not end with a stop token: "
        "the policy learns to stop only if the stop token is among the ids.",
        name,
    )

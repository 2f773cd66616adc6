"""The mathematics of best-of-n: its KL, and what it would reach for every n up to N from N samples of each prompt.

Best-of-n draws n completions from a policy and keeps the one with the highest reward. Among equal rewards it keeps each
with the same chance. All KL values are in nats, of best-of-n to the distribution that is sampled from: the policy at
the temperature of the sampling.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Number = float | None
"""A reward; `None` or NaN stands for a completion that was not scored."""


def kl_of_best_of_n(n: int) -> float:
    """KL(best-of-n ‖ policy) = log n − (n − 1)/n in nats, if no two completions have the same reward.

    It is an upper bound otherwise (Beirami et al. 2024, arXiv:2401.01879, section 3): a policy that may give the
    same completion twice, or two completions with the same reward, moves less.

    Args:
        n: number of completions that are drawn, 1 or more.

    Raises:
        UserError: if `n` is below 1.
    """
    _check_n(n)
    return math.log(n) - (n - 1) / n


def exact_kl_of_best_of_n(probabilities: Sequence[float], rewards: Sequence[float], n: int) -> float:
    """KL(best-of-n ‖ policy) of a policy whose completions are all known.

    With ties broken at random, best-of-n changes how often a reward occurs and not which completion has it. With the
    mass P of the completions with this reward and the mass L of those with lower ones, it is
    sum over rewards of W log(W / P), where W = (L + P)^n − L^n.

    Args:
        probabilities: (Y,) probability of each completion, which sum to 1.
        rewards: (Y,) reward of each completion.
        n: number of completions that are drawn.

    Returns:
        The KL in nats.

    Raises:
        UserError: if the probabilities do not sum to 1, or there is not one reward for each.
    """
    _check_n(n)
    masses = np.asarray(probabilities, dtype=np.float64)
    values = np.asarray(rewards, dtype=np.float64)
    if masses.shape != values.shape or masses.ndim != 1:
        raise UserError(f"probabilities: {masses.shape} for rewards {values.shape}: give one reward per probability.")
    if np.isnan(values).any():
        raise UserError("rewards: one is missing (None or NaN): give the reward of each completion.")
    if not (masses >= 0).all() or not abs(masses.sum() - 1) <= 1e-6:
        raise UserError(
            f"probabilities: they sum to {masses.sum():g}: give all completions of the policy, which sum to 1."
        )
    kl = 0.0
    below = 0.0
    for value in np.unique(values):
        mass = float(masses[values == value].sum())
        if mass > 0:
            kl += _atom_kl(below, below + mass, n)
        below += mass
    return kl


def kl_estimate(winner_logprobs: Sequence[float], n: int) -> float:
    """The estimate of KL(best-of-n ‖ policy) of Beirami et al. (arXiv:2401.01879, section 4) from the winners.

    With the probability e of a winner, it is the KL of a policy that has this completion at the top and no other
    completion twice:

        (1 − e)^n (log n + (n − 1) log(1 − e) − (n − 1)/n) + (1 − (1 − e)^n) log((1 − (1 − e)^n) / e)

    Its mean over winners lies between the KL and `kl_of_best_of_n`: close to the latter for long completions, each of
    which is improbable, and smaller where the policy gives few different completions. It takes different completions
    as differently good: where rewards have few values, such as 0 and 1, `expected_kl` is smaller and closer.

    Args:
        winner_logprobs: (P,) log-probability in nats of the best completion of each prompt, under the distribution
            that it was sampled from.
        n: number of completions that were drawn.

    Returns:
        The mean over prompts, in nats.
    """
    _check_n(n)
    logprobs = np.minimum(np.asarray(winner_logprobs, dtype=np.float64), 0.0)  # rounding may give 1e-7
    if not logprobs.size:
        raise UserError("winner_logprobs: the list is empty: give the log-probability of one winner at least.")
    if np.isnan(logprobs).any():
        raise UserError("winner_logprobs: one is missing (None or NaN): give the log-probability of each winner.")
    return float(np.mean([_kl_of_winner(logprob, n) for logprob in logprobs]))


def _kl_of_winner(logprob: float, n: int) -> float:
    if logprob == 0:  # the only completion
        return 0.0
    log_others = math.log1p(-math.exp(logprob)) if logprob > -700 else 0.0  # log(1 − e)
    all_others = math.exp(n * log_others)  # (1 − e)^n
    wins = -math.expm1(n * log_others)  # 1 − (1 − e)^n, without loss for a small e
    below = all_others * (math.log(n) + (n - 1) * log_others - (n - 1) / n)
    if wins == 0:  # e is too small to count
        return below
    return below + wins * (math.log(wins) - logprob)


def expected_kl(rewards: Sequence[Sequence[Number]], n: int | Sequence[int] | None = None) -> NDArray[np.float64]:
    """KL(best-of-n ‖ policy) for each n up to N, as far as ties among N samples of each prompt tell.

    A reward that occurs twice or more counts as a value that the policy gives with this share. A reward that occurs
    once counts as one of many different values. So it is `kl_of_best_of_n` without ties, and smaller with them, down to
    0 where all rewards are equal. It is too large by as much as rare values would repeat in more samples. Completions
    that were not scored share the lowest place.

    Args:
        rewards: (P, N) rewards; `None` or NaN where a completion was not scored.
        n: one or several numbers of completions; `None` means 1 … N.

    Returns:
        (prompts, number of n) nats, or (prompts,) for a single `n`. NaN for a prompt without any score.
    """
    table = _table(rewards, "rewards")
    sizes = _sizes(n, table.shape[1])
    kl = np.full((len(table), len(sizes)), np.nan)
    for prompt, row in enumerate(table):
        if not np.isnan(row).all():
            kl[prompt] = _kl_of_levels(row, np.array(sizes, dtype=np.float64))
    return kl[:, 0] if isinstance(n, Integral) else kl


def _kl_of_levels(row: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.float64]:
    """The KL for each n: a share for each value of the reward, which lies between two quantiles."""
    _, counts = np.unique(np.where(np.isnan(row), -np.inf, row), return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)]) / len(row)
    below, top = ends[:-1], ends[1:]
    sizes = n[:, None]
    wins = top**sizes - below**sizes
    tied = np.where(wins > 0, wins * np.log(np.where(wins > 0, wins, 1.0) / (top - below)), 0.0)
    untied = _untied_kl(top, sizes) - _untied_kl(below, sizes)
    return np.maximum(np.where(counts > 1, tied, untied).sum(axis=1), 0.0)


def _untied_kl(quantile: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of KL below a quantile without ties: the integral of n u^(n-1) log(n u^(n-1)) from 0 to it."""
    log_quantile = np.log(np.maximum(quantile, 1e-300))  # at 0, the power before it is 0
    return quantile**n * (np.log(n) + (n - 1) * log_quantile - (n - 1) / n)


def _atom_kl(below: float, top: float, n: int) -> float:
    """The share of KL of a single value that lies between two quantiles of the reward."""
    wins = top**n - below**n
    return wins * math.log(wins / (top - below)) if wins > 0 else 0.0


def expected_best(
    rewards: Sequence[Sequence[Number]],
    gold: Sequence[Sequence[Number]] | None = None,
    n: int | Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """What the best of n has on average, for each n up to N, from N samples of each prompt.

    It is the mean over all subsets of n of the N samples, which is unbiased for the best of n new samples (Nakano et
    al. 2021, arXiv:2112.09332; Gao et al. 2022, arXiv:2210.10760). Sorted by reward, sample i of 1 … N is
    the best in C(i − 1, n − 1) of C(N, n) subsets. Equal rewards share what their places have together.

    Args:
        rewards: (P, N) rewards by which the best is chosen; `None` or NaN for a completion that was not scored,
            which cannot win. The mean is then over the subsets with a score.
        gold: (P, N) values of the same completions that are averaged, such as scores of a judge; `None` means the
            rewards. Where a value is `None` or NaN, the others stand for it.
        n: one or several numbers of completions; `None` means 1 … N.

    Returns:
        (prompts, number of n) means, or (prompts,) for a single `n`. NaN for a prompt without any score.

    Raises:
        UserError: if prompts have different numbers of completions, `gold` has another shape, or an `n` is above N.
    """
    table = _table(rewards, "rewards")
    values = table if gold is None else _table(gold, "gold")
    if values.shape != table.shape:
        raise UserError(f"gold: {values.shape} values for {table.shape} rewards: give one value for each reward.")
    sizes = _sizes(n, table.shape[1])
    best = np.full((len(table), len(sizes)), np.nan)
    for prompt, row in enumerate(table):
        weights = best_weights(row)[[size - 1 for size in sizes]]  # (number of n, N)
        weights = np.where(np.isnan(values[prompt]), 0.0, weights)
        total = weights.sum(axis=1)
        has_weight = total > 0
        best[prompt, has_weight] = (weights @ np.nan_to_num(values[prompt]))[has_weight] / total[has_weight]
    return best[:, 0] if isinstance(n, Integral) else best


def best_weights(rewards: Sequence[Number]) -> NDArray[np.float64]:
    """Chance of each of N samples to be the best of n of them, for each n.

    Args:
        rewards: (N,) rewards of the samples of a prompt; `None` or NaN for those that cannot win.

    Returns:
        (N, N): row n − 1 has the chances for n. A row sums to 1, or to less if a subset may have no score at all.
    """
    row = _table([rewards], "rewards")[0]
    subsets = _subsets_within(len(row))  # (N + 1, N)
    weights = np.zeros((len(row), len(row)))
    scored = np.flatnonzero(~np.isnan(row))
    _, value_of, counts = np.unique(row[scored], return_inverse=True, return_counts=True)
    # Those without a score rank below all others.
    ranks = len(row) - len(scored) + np.concatenate([[0], np.cumsum(counts)])
    # (values, N): the share of subsets whose best has this reward, for each of the completions that have it.
    wins = (subsets[ranks[1:]] - subsets[ranks[:-1]]) / counts[:, None]
    weights[:, scored] = wins[value_of].T
    return weights


@lru_cache(maxsize=8)
def _subsets_within(size: int) -> NDArray[np.float64]:
    """C(k, n) / C(N, n) for k = 0 … N (rows) and n = 1 … N (columns): the share of subsets among the k lowest."""
    k = np.arange(size + 1, dtype=np.float64)[:, None]
    drawn = np.arange(size, dtype=np.float64)[None, :]
    factors = np.maximum(k - drawn, 0.0) / (size - drawn)  # 0 where fewer than n are there
    return np.cumprod(factors, axis=1)


def _table(values: Sequence[Sequence[Number]], name: str) -> NDArray[np.float64]:
    """Rows of equal length as float64, with NaN for `None`."""
    try:
        rows = [[math.nan if value is None else float(value) for value in row] for row in values]
    except (TypeError, ValueError):
        raise UserError(
            f"{name}: give a list of numbers for each prompt, with None for a completion without one."
        ) from None
    if any(math.isinf(value) for row in rows for value in row):
        raise UserError(f"{name}: a value is infinite, so that there is no mean: give a finite number, or None.")
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise UserError(
            f"{name}: prompts have {sorted(lengths) or 'no'} values: give the same number of values for every prompt, "
            "one or more."
        )
    return np.array(rows, dtype=np.float64)


def _sizes(n: int | Sequence[int] | None, n_samples: int) -> list[int]:
    if n is None:
        return list(range(1, n_samples + 1))
    sizes = [n] if isinstance(n, Integral) or not isinstance(n, Iterable) else list(n)
    for size in sizes:
        _check_n(size)
        if size > n_samples:
            raise UserError(f"n={size}: there are {n_samples} samples of each prompt: give at most as many.")
    return sizes


def _check_n(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise UserError(f"n={n!r}: give a whole number of completions, 1 or more.")

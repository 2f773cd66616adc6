"""Win rates and KL of a system, as plain functions of numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ..reward.preference_metrics import bootstrap_mean_ci


def count_outcomes(outcomes: Sequence[float | None]) -> dict[str, Any]:
    """Wins, ties and losses of a system against another one.

    Args:
        outcomes: P(the answer of the system is better) for each prompt, in [0, 1]: above 0.5 is a win, 0.5 a tie, None
            or NaN a prompt without a judgment.

    Returns:
        `wins`, `ties`, `losses` and `failed`, which are numbers of prompts; `win_rate`, the mean outcome of the judged
        prompts, in which a tie counts half, with the bounds `win_rate_low` and `win_rate_high` of its 95 % bootstrap
        interval over prompts; and `decided_low` and `decided_high`, the 95 % Wilson interval (Wilson 1927) of
        wins / (wins + losses). A rate of no prompts is NaN.

    Raises:
        ValueError: an outcome is not in [0, 1].
    """
    judged = []
    for row, outcome in enumerate(outcomes):
        if outcome is None or math.isnan(outcome):
            continue
        if not 0 <= outcome <= 1:
            raise ValueError(f"outcome {row} is {outcome}: give P(better) between 0 and 1, or None without a judgment.")
        judged.append(float(outcome))
    wins = sum(outcome > 0.5 for outcome in judged)
    losses = sum(outcome < 0.5 for outcome in judged)
    low, high = bootstrap_mean_ci(judged) if judged else (math.nan, math.nan)
    decided_low, decided_high = wilson_interval(wins, wins + losses)
    return {
        "wins": wins,
        "ties": len(judged) - wins - losses,
        "losses": losses,
        "failed": len(outcomes) - len(judged),
        "win_rate": sum(judged) / len(judged) if judged else math.nan,
        "win_rate_low": low,
        "win_rate_high": high,
        "decided_low": decided_low,
        "decided_high": decided_high,
    }


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson 1927, `successes` of `n`; NaN if there are none."""
    if n == 0:
        return math.nan, math.nan
    found = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(found.low), float(found.high)


def estimate_kl(logprobs: Sequence[Sequence[float]], ref_logprobs: Sequence[Sequence[float]]) -> dict[str, float]:
    """KL(policy ‖ reference) from the log-probabilities of tokens that the policy sampled.

    The estimators are those of Schulman 2020 (http://joschu.net/blog/kl-approx.html), with r = p_ref / p for a token:
    k1 = -log r, which is unbiased and may be negative, and k3 = r - 1 - log r, which is unbiased and never negative.
    Both are unbiased only for tokens that the policy sampled at the temperature of the log-probabilities.

    Args:
        logprobs: for each completion, the log-probability of each token under the policy, in nats.
        ref_logprobs: the same tokens under the reference.

    Returns:
        `kl` and `kl_k3` in nats per completion: summed over tokens, mean over completions; and `kl_per_token`, the mean
        of k1 over all tokens. They are NaN without completions, the last one also without tokens.

    Raises:
        ValueError: the numbers of completions or tokens differ.
    """
    if len(logprobs) != len(ref_logprobs):
        raise ValueError(
            f"{len(logprobs)} completions of the policy and {len(ref_logprobs)} of the reference: give both."
        )
    k1_sums, k3_sums = [], []
    n_tokens = 0
    for row, (own, reference) in enumerate(zip(logprobs, ref_logprobs, strict=True)):
        if len(own) != len(reference):
            raise ValueError(
                f"completion {row} has {len(own)} tokens under the policy and {len(reference)} under the reference: "
                "give log-probabilities of the same tokens."
            )
        log_ratio = np.asarray(reference, dtype=np.float64) - np.asarray(own, dtype=np.float64)
        k1_sums.append(float(-log_ratio.sum()))
        k3_sums.append(float((np.expm1(log_ratio) - log_ratio).sum()))
        n_tokens += len(own)
    return {
        "kl": float(np.mean(k1_sums)) if k1_sums else math.nan,
        "kl_k3": float(np.mean(k3_sums)) if k3_sums else math.nan,
        "kl_per_token": sum(k1_sums) / n_tokens if n_tokens else math.nan,
    }

"""Rewards per token, generalized advantage estimation (GAE) and whitening, as pure functions of tensors.

Shapes: B sequences of T completion tokens, padded on the right. `mask` (B, T) is bool, True for emitted tokens.
"""

import torch
from torch import Tensor

from .losses import masked_mean


def completion_mask(lengths: Tensor, width: int) -> Tensor:
    """Mask of the emitted tokens.

    Args:
        lengths: (B,) int64, number of emitted tokens of each completion.
        width: T, width of the mask.

    Returns:
        (B, T) bool, True at the first `lengths[b]` positions of row b.
    """
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def token_rewards(
    scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coef: float, dense: Tensor | None = None
) -> Tensor:
    """Reward of each token: −`kl_coef`·`kl`, plus the score of the completion at its last token, plus `dense`.

    This is the objective of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, eq. 2) as a reward per token, as in
    Ziegler et al. 2019 (arXiv:1909.08593, sec. 2.2).

    Args:
        scores: (B,) reward of each completion.
        kl: (B, T) estimate of KL(policy ‖ reference) per token, in nats.
        lengths: (B,) int64, number of emitted tokens, including the stop token; at least 1.
        kl_coef: β, reward per nat.
        dense: (B, T) rewards of single tokens, in addition to `scores`; `None` means zero.

    Returns:
        (B, T) rewards with the dtype of `kl`, zero in the padding.
    """
    if dense is None:
        rewards = -kl_coef * kl
    else:
        rewards = dense.to(kl.dtype) - kl_coef * kl
    mask = completion_mask(lengths, kl.shape[1])
    rewards = rewards.masked_fill(~mask, 0.0)
    # The score is added at the last emitted token, which is the stop token if there is one.
    last = (lengths - 1)[:, None]  # (B, 1)
    return rewards.scatter_add(1, last, scores.to(kl.dtype)[:, None])


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, GAE(γ, λ) (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, with V = 0 after the last emitted token.

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) value of the state before each token, in units of reward.
        mask: (B, T) bool, True for emitted tokens.
        gamma: discount factor γ per token.
        gae_lambda: λ.

    Returns:
        Advantages (B, T) and returns (B, T), which are advantages + values. Both are zero in the padding.
    """
    values = values.masked_fill(~mask, 0.0)
    rewards = rewards.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])  # (B,) A_{t+1}
    next_values = torch.zeros_like(running)  # (B,) V_{t+1}
    # From the last token to the first. In the padding all terms are zero, so `running` stays zero there.
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        running = delta + gamma * gae_lambda * running
        advantages[:, t] = running
        next_values = values[:, t]
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Normalizes `x` to mean 0 and variance 1 over `mask`.

    Args:
        x: (B, T) floats.
        mask: (B, T) bool.
        shift_mean: whether to shift the mean to 0; if `False`, the mean is kept.
        eps: added to the variance (population) before the square root.

    Returns:
        (B, T) normalized values, zero where `mask` is False.
    """
    mean = masked_mean(x, mask)
    centered = x - mean
    variance = masked_mean(centered.square(), mask)
    scaled = centered * (variance + eps).rsqrt()
    if not shift_mean:
        scaled = scaled + mean
    return scaled.masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Explained variance of the critic: 1 − Var(returns − values) / Var(returns) over `mask`.

    Args:
        values: (B, T) values of the critic.
        returns: (B, T) returns.
        mask: (B, T) bool, True for emitted tokens.

    Returns:
        A scalar: 1 for a perfect critic; 0 or less for a critic that predicts no better than a constant. NaN if all
        returns are the same, as there is nothing to explain.
    """
    errors = returns - values
    residual = masked_mean((errors - masked_mean(errors, mask)).square(), mask)
    mean = masked_mean(returns, mask)
    total = masked_mean((returns - mean).square(), mask)
    rounding = 1e-12 * mean.square() + 1e-16  # what the variance of equal returns may be in fp32
    return torch.where(total > rounding, 1.0 - residual / total, torch.nan)

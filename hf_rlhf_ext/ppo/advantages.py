"""Rewards per token, generalised advantage estimation and whitening, as pure functions.

Shapes: B sequences of T completion tokens, padded right; `mask` (B, T) is bool, True on emitted tokens.
"""

import torch
from torch import Tensor

from .losses import masked_mean


def completion_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) token counts → (B, width) bool mask, True on the first `lengths[b]` positions."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def token_rewards(
    scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coef: float, dense: Tensor | None = None
) -> Tensor:
    """Reward of each token: −`kl_coef`·kl_t, plus the sequence's score on its last emitted token, plus `dense`.

    InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, eq. 2) as a reward per token, following Ziegler et al. 2019
    (arXiv:1909.08593, sec. 2.2).

    Args:
        scores: (B,) reward of each completion.
        kl: (B, T) estimate of KL(policy ‖ reference) per token, nats.
        lengths: (B,) emitted tokens, the stop token included; at least 1.
        dense: (B, T) rewards that tokens earn by themselves, not part of `scores`.

    Returns:
        (B, T) rewards, zero in the padding.
    """
    if dense is None:
        rewards = -kl_coef * kl
    else:
        rewards = dense.to(kl.dtype) - kl_coef * kl
    mask = completion_mask(lengths, kl.shape[1])
    rewards = rewards.masked_fill(~mask, 0.0)
    # The score lands on the last emitted token: the stop token itself, where there is one.
    last = (lengths - 1)[:, None]  # (B, 1)
    return rewards.scatter_add(1, last, scores.to(kl.dtype)[:, None])


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE(γ, λ) (Schulman et al. 2016, arXiv:1506.02438, eq. 16) over ragged completions.

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, with V = 0 after the last emitted token.
    All tensors are (B, T). Returns advantages and returns (advantages + values), both zero in the padding.
    """
    values = values.masked_fill(~mask, 0.0)
    rewards = rewards.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])  # (B,) A_{t+1}
    next_values = torch.zeros_like(running)  # (B,) V_{t+1}
    # From the last token backwards. The padding, all zero, leaves `running` at zero.
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        running = delta + gamma * gae_lambda * running
        advantages[:, t] = running
        next_values = values[:, t]
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scales `x` (B, T) to unit variance (population, over `mask`), to zero mean if `shift_mean`; zero elsewhere."""
    mean = masked_mean(x, mask)
    centered = x - mean
    variance = masked_mean(centered.square(), mask)
    scaled = centered * (variance + eps).rsqrt()
    if not shift_mean:
        scaled = scaled + mean
    return scaled.masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns) over `mask`: 1 is a perfect critic, ≤ 0 no better than a constant."""
    errors = returns - values
    residual = masked_mean((errors - masked_mean(errors, mask)).square(), mask)
    total = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    return 1.0 - residual / total.clamp(min=1e-8)

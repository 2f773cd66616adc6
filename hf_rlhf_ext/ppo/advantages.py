"""Rewards per token, advantages (GAE, or leave-one-out) and whitening, as pure functions of tensors.

Shapes: B sequences of T completion tokens, padded on the right. `mask` (B, T) is bool, True for emitted tokens.
"""

import numpy as np
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
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, GAE(γ, λ) (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, with V = 0 after the last emitted token.

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) value of the state before each token, in units of reward.
        mask: (B, T) bool, True for emitted tokens.
        gamma: discount factor γ per token.
        gae_lambda: λ, or (B,) that of each completion.

    Returns:
        Advantages (B, T) and returns (B, T), which are advantages + values. Both are zero in the padding.
    """
    values = values.masked_fill(~mask, 0.0)
    rewards = rewards.masked_fill(~mask, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))  # (B, T) V_{t+1}
    deltas = rewards + gamma * next_values - values
    # In the padding all terms are zero, so that the sums of the tokens before it start at zero.
    advantages = _discounted_sums(deltas, gamma * gae_lambda)
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def lambda_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float | Tensor
) -> Tensor:
    """λ-returns, the targets of a critic (Sutton & Barto 2018, "Reinforcement Learning", eq. 12.18).

    G_t = r_t + γ·((1 − λ)·V_{t+1} + λ·G_{t+1}), with V = G = 0 after the last emitted token. This is V_t + A_t, where
    A_t is the GAE(γ, λ) advantage, up to rounding. With λ = 1 no value enters: G_t is exactly the discounted sum of the
    rewards (Monte Carlo), as VC-PPO (Yuan et al. 2025, arXiv:2503.01491) trains its critic.

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) value of the state before each token, in units of reward.
        mask: (B, T) bool, True for emitted tokens.
        gamma: discount factor γ per token.
        gae_lambda: λ, or (B,) that of each completion.

    Returns:
        (B, T) returns, zero in the padding.
    """
    values = values.masked_fill(~mask, 0.0)
    rewards = rewards.masked_fill(~mask, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))  # (B, T) V_{t+1}
    if isinstance(gae_lambda, Tensor):
        bootstrapped = (1 - gae_lambda)[:, None] * next_values
    else:
        bootstrapped = (1 - gae_lambda) * next_values
    return _discounted_sums(rewards + gamma * bootstrapped, gamma * gae_lambda).masked_fill(~mask, 0.0)


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ of the advantages of each completion by its length: 1 − 1/(α·length), and at least 0.

    This is VAPO's length-adaptive GAE (Yue et al. 2025, arXiv:2504.05118, with α = 0.05): the sum of the weights λ^k of
    the TD errors, 1/(1 − λ), is proportional to the length. λ is 0.99 for 2,000 tokens, but 0.58 for 48, and 0 for 20
    or fewer.

    Args:
        lengths: (B,) int64, number of emitted tokens of each completion, at least 1.
        alpha: α, above 0.

    Returns:
        (B,) fp32, from 0 to 1.
    """
    return (1.0 - 1.0 / (alpha * lengths.float())).clamp(0.0, 1.0)


def _discounted_sums(x: Tensor, discount: float | Tensor) -> Tensor:
    """(B, T) A_t = x_t + discount·A_{t+1}, with A = 0 after the last column. A discount (B,) has one for each row.

    These equations are a bidiagonal system, which LAPACK solves from the last column to the first in the dtype of `x`:
    the same operations as in a loop over columns, and therefore the same rounding. Such a loop starts six operations
    for each token, and takes 10 to 30 times as long on a CPU.
    """
    from scipy.linalg import solve_banded  # takes a quarter of a second to import

    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    columns = x.to(dtype).cpu().numpy()
    if isinstance(discount, Tensor):
        # Row after row, as one system. The last column of a row does not take from the next row.
        bands = np.zeros((3, columns.size), dtype=columns.dtype)  # above, on and below the diagonal
        factors = np.zeros_like(columns)
        factors[:, :-1] = discount.to(dtype).cpu().numpy()[:, None]
        bands[0, 1:] = -factors.ravel()[:-1]
        bands[1] = 1.0
        sums = solve_banded((1, 1), bands, columns.ravel(), check_finite=False).reshape(columns.shape)
        return torch.from_numpy(sums).to(x)
    bands = np.zeros((3, x.shape[1]), dtype=columns.dtype)  # above, on and below the diagonal
    bands[0, 1:] = -discount
    bands[1] = 1.0
    sums = solve_banded((1, 1), bands, columns.T, check_finite=False).T
    return torch.from_numpy(sums).to(x)


def leave_one_out_advantages(
    rewards: Tensor, mask: Tensor, *, per_prompt: int, counted: Tensor | None = None
) -> Tensor:
    """Advantages without a critic: the return of a completion minus the mean return of its prompt's other completions.

    This is the baseline of RLOO (Ahmadian et al. 2024, arXiv:2402.14740). The return of a completion is the sum
    of its token rewards. All of its tokens get the same advantage.

    Args:
        rewards: (B, T) reward of each token.
        mask: (B, T) bool, True for emitted tokens.
        per_prompt: K, number of completions of each prompt, at least 2. Rows j·K to j·K + K − 1 are those of prompt j.
        counted: (B,) bool, which completions count, in the baseline of others too; `None` means all.

    Returns:
        (B, T) advantages with the dtype of `rewards`, zero in the padding, for completions that do not count, and where
        no other completion of the prompt counts.
    """
    if counted is None:
        counted = torch.ones_like(mask[:, 0])
    counts = counted.unflatten(0, (-1, per_prompt))  # (B / K, K)
    returns = rewards.masked_fill(~mask, 0.0).sum(dim=1).unflatten(0, (-1, per_prompt))
    # Only differences count. Taken first, from the first return that counts, they make the advantages of equal returns
    # exactly 0, which whitening would otherwise make large.
    first = counts.int().argmax(dim=1, keepdim=True)  # (B / K, 1); 0 if none counts
    returns = (returns - returns.gather(1, first)).masked_fill(~counts, 0.0)
    n_others = counts.sum(dim=1, keepdim=True) - 1
    of_others = (returns.sum(dim=1, keepdim=True) - returns) / n_others.clamp(min=1)
    is_compared = counts & (n_others > 0)
    advantages = (returns - of_others).masked_fill(~is_compared, 0.0).flatten()
    return advantages[:, None].expand(mask.shape).masked_fill(~mask, 0.0)


def are_scores_equal(scores: Tensor, *, per_prompt: int) -> Tensor:
    """For each prompt, whether all of its completions have the same score, up to rounding.

    Args:
        scores: (B,) score of each completion.
        per_prompt: K, see `leave_one_out_advantages`.

    Returns:
        (B / K,) bool.
    """
    groups = scores.unflatten(0, (-1, per_prompt))
    spread = groups.amax(dim=1) - groups.amin(dim=1)
    return spread <= 1e-6 * groups.abs().amax(dim=1).clamp(min=1.0)


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

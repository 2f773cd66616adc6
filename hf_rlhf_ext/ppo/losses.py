"""The losses of PPO as pure functions of tensors.

Shapes: B sequences of T completion tokens. `mask` is bool, True for tokens that the policy emitted and False in the
padding. Values in the padding affect neither results nor gradients. Log-probabilities are in nats.
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Mean of `x` over the tokens where `mask` is True.

    Args:
        x: (B, T) floats.
        mask: (B, T) bool.
        denominator: number to divide the masked sum by; `None` means the number of True entries. For a micro-batch it
            is the token count of the whole mini-batch.

    Returns:
        The mean, a scalar with the dtype of `x`; 0 if `mask` is False everywhere.
    """
    total = x.masked_fill(~mask, 0.0).sum()
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    return total / denominator


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    denominator: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss of PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    −mean of min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A), with ρ = π/π_old. An upper limit of its own is the "clip-higher"
    of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 8 and sec. 3.1): a token of low probability may then rise further.

    Args:
        logprobs: (B, T) log-probabilities under the policy, in nats, with gradient.
        old_logprobs: (B, T) log-probabilities under the policy that made the rollout, in nats.
        advantages: (B, T) advantages.
        mask: (B, T) bool, True for emitted tokens that count.
        clip_range: ε; the probability ratio is clipped to [1 − ε, 1 + ε_high].
        clip_range_high: ε_high; `None` means ε.
        denominator: see `masked_mean`.
        weights: (B, T) factor on the loss of each token, such as `importance_weights`; `None` means 1. The metrics are
            not weighted.

    Returns:
        The loss, a scalar, and a dict of metrics without gradient, divided by the same denominator: `clipfrac`
        (fraction of tokens where the clip is active), `approxkl` (k3 estimate of KL(old policy ‖ policy), nats per
        token) and `ratio` (mean probability ratio).
    """
    if clip_range_high is None:
        clip_range_high = clip_range
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # before exp: inf * 0 is nan in the backward pass
    ratio = log_ratio.exp()  # (B, T)
    advantages = advantages.masked_fill(~mask, 0.0)
    surrogate = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range_high) * advantages
    # The minimum: once the ratio has moved beyond the clip in the direction of the advantage, the gradient is zero.
    objective = torch.minimum(surrogate, clipped)
    if weights is not None:
        objective = weights.detach() * objective
    loss = -masked_mean(objective, mask, denominator)
    with torch.no_grad():
        stats = {
            "clipfrac": masked_mean((clipped < surrogate).to(logprobs.dtype), mask, denominator),
            "approxkl": masked_mean(ratio - 1.0 - log_ratio, mask, denominator),
            "ratio": masked_mean(ratio, mask, denominator),
        }
    return loss, stats


def importance_weights(old_logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(π_old/q, `cap`) for tokens that were sampled from q instead of π_old.

    See Ionides 2008 ("Truncated importance sampling", J. Comput. Graph. Stat. 17(2)), and ρ of IMPALA (Espeholt et al.
    2018, arXiv:1802.01561, sec. 4.1). The weights do not correct for tokens that top-k or top-p gave probability zero.

    Args:
        old_logprobs: (B, T) log-probabilities under π_old as training computes them, in nats.
        sampled_logprobs: (B, T) log-probabilities under which the engine sampled the tokens, in nats.
        mask: (B, T) bool, True for emitted tokens.
        cap: maximum of a weight.

    Returns:
        (B, T) weights without gradient, 1 in the padding.
    """
    log_ratio = (old_logprobs - sampled_logprobs).detach().masked_fill(~mask, 0.0)
    return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 1.0)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped value loss: half the larger of the clipped and the unclipped squared error.

    As in OpenAI's baselines and in Huang et al. 2022 ("The 37 implementation details of PPO", no. 9).

    Args:
        values: (B, T) values of the critic, in units of reward, with gradient.
        old_values: (B, T) values in the rollout.
        returns: (B, T) returns, the target of the critic.
        mask: (B, T) bool, True for emitted tokens.
        clip_range: how far a value may move from its value in the rollout, in units of reward; `None` turns the clip
            off.
        denominator: see `masked_mean`.

    Returns:
        The loss, a scalar in reward², and the fraction of tokens where the clip is active, a scalar without gradient.
    """
    error = (values - returns).masked_fill(~mask, 0.0).square()
    if clip_range is None:
        return 0.5 * masked_mean(error, mask, denominator), torch.zeros_like(error[0, 0])
    # The maximum: once a value has moved beyond the clip, its gradient is zero.
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped_error = (clipped - returns).masked_fill(~mask, 0.0).square()
    with torch.no_grad():
        clip_fraction = masked_mean((clipped_error > error).to(error.dtype), mask, denominator)
    return 0.5 * masked_mean(torch.maximum(error, clipped_error), mask, denominator), clip_fraction

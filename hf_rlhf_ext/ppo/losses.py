"""PPO's losses as pure functions of tensors.

Shapes: B sequences of T completion tokens. `mask` is bool, True where the policy emitted the token; whatever stands in
the padding never reaches a result or a gradient. Log-probabilities are in nats.
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Mean of `x` (B, T) over `mask` (B, T), as a scalar.

    Args:
        denominator: what to divide the masked sum by instead of the number of True entries: the token count of the
            whole mini-batch, when `x` is one of its micro-batches. An all-False mask gives 0.
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
    denominator: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss of PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    All tensors are (B, T); `weights` (None is 1) multiply the loss of each token, and not the metrics. Returns the
    scalar to minimise, and detached scalars divided like it: `clipfrac` (fraction of tokens whose surrogate was
    clipped), `approxkl` (k3 of rollout policy against policy, nats per token), `ratio`.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # before exp: inf * 0 is nan in the backward pass
    ratio = log_ratio.exp()  # (B, T)
    advantages = advantages.masked_fill(~mask, 0.0)
    surrogate = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages
    # The smaller one: a step that has gone too far in the right direction gains nothing more.
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
    """Truncated importance weights min(π_old/q, `cap`) of tokens that were drawn from q rather than from π_old.

    Ionides 2008 ("Truncated importance sampling", J. Comput. Graph. Stat. 17(2)); ρ of IMPALA (Espeholt et al. 2018,
    arXiv:1802.01561, sec. 4.1). They cannot bring back tokens that top-k or top-p gave probability zero.

    Args:
        old_logprobs: (B, T) under the policy that made the rollout, as training computes them, nats.
        sampled_logprobs: (B, T) under which generation really drew the tokens, nats.

    Returns:
        (B, T) without gradient, 1 in the padding.
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
    """Half the squared error of the value head, the worse of the clipped and unclipped one.

    As in OpenAI's baselines and Huang et al. 2022 ("The 37 implementation details of PPO", no. 9): the new value may
    move by at most `clip_range` from the rollout's; `None` turns the clip off. All tensors are (B, T), in units of
    reward. Returns the scalar loss (reward²) and the fraction of tokens where the clip bound.
    """
    error = (values - returns).masked_fill(~mask, 0.0).square()
    if clip_range is None:
        return 0.5 * masked_mean(error, mask, denominator), torch.zeros_like(error[0, 0])
    # The worse of both errors: a value that has moved too far gains nothing by moving on.
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped_error = (clipped - returns).masked_fill(~mask, 0.0).square()
    with torch.no_grad():
        clip_fraction = masked_mean((clipped_error > error).to(error.dtype), mask, denominator)
    return 0.5 * masked_mean(torch.maximum(error, clipped_error), mask, denominator), clip_fraction

"""Estimators of KL(policy ‖ reference) from sampled tokens, and the controller of the KL coefficient.

The estimators are those of Schulman 2020 (http://joschu.net/blog/kl-approx.html). π is the policy, π_ref the reference.
"""

from dataclasses import dataclass

from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1: log π − log π_ref. Unbiased; a single estimate can be negative.

    Args:
        logprobs: (B, T) log-probabilities of the sampled tokens under the policy, in nats.
        ref_logprobs: (B, T) log-probabilities under the reference, in nats.

    Returns:
        (B, T) estimates in nats per token.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2: ½(log π − log π_ref)². Biased, never negative. As a loss, its expected gradient is that of the KL.

    Args:
        logprobs: (B, T) log-probabilities of the sampled tokens under the policy, in nats.
        ref_logprobs: (B, T) log-probabilities under the reference, in nats.

    Returns:
        (B, T) estimates in nats per token.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3: π_ref/π − 1 − log(π_ref/π). Unbiased, never negative, with less variance than k1 when the KL is small.

    Args:
        logprobs: (B, T) log-probabilities of the sampled tokens under the policy, in nats.
        ref_logprobs: (B, T) log-probabilities under the reference, in nats.

    Returns:
        (B, T) estimates in nats per token.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1.0 - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""The three estimators by name."""


def adapted_kl_coef(kl_coef: float, kl: float, *, kl_target: float, kl_horizon: int, n_sequences: int) -> float:
    """The next KL coefficient of the adaptive controller (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2).

    With e = clip(kl / kl_target − 1, −0.2, 0.2), the coefficient becomes β·(1 + e·n_sequences/kl_horizon).

    Args:
        kl_coef: current coefficient β, reward per nat.
        kl: measured KL(policy ‖ reference) in nats per completion, averaged over the rollout.
        kl_target: target of that KL, in nats per completion.
        kl_horizon: number of completions after which an error of ±0.2 (the clip) has changed β by a factor of about
            e^±0.2.
        n_sequences: number of completions in the rollout. It must be less than 5 · `kl_horizon`: otherwise β could
            become zero or negative.

    Returns:
        The next coefficient, reward per nat.
    """
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * n_sequences / kl_horizon)


@dataclass(frozen=True)
class KLController:
    """Adapts the KL coefficient to reach a target KL, or keeps it fixed.

    Attributes:
        target: target of KL(policy ‖ reference) in nats per completion; `None` keeps the coefficient fixed.
        horizon: see `adapted_kl_coef`; `None` means the completions of ten rollouts, which suits runs of thousands of
            completions.
    """

    target: float | None = None
    horizon: int | None = None

    def next(self, kl_coef: float, kl: float, n_sequences: int) -> float:
        """The coefficient after a rollout.

        Args:
            kl_coef: current coefficient, reward per nat.
            kl: mean KL(policy ‖ reference) of the rollout, in nats per completion.
            n_sequences: number of completions in the rollout, over all processes.

        Returns:
            The next coefficient, reward per nat.
        """
        if self.target is None:
            return kl_coef
        horizon = self.horizon or 10 * n_sequences
        return adapted_kl_coef(kl_coef, kl, kl_target=self.target, kl_horizon=horizon, n_sequences=n_sequences)

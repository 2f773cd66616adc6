"""Estimators of KL(policy ‖ reference) from sampled tokens, and the controller of its coefficient."""

from dataclasses import dataclass

from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref of the sampled tokens, (B, T), nats: unbiased, can be negative (Schulman 2020, "k1")."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½(log π − log π_ref)², (B, T), nats: biased, never negative; as a loss its gradient is the KL's ("k2")."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """π_ref/π − 1 − log(π_ref/π), (B, T), nats: unbiased, never negative, less variance than k1 near 0 ("k3")."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1.0 - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""The three estimators of http://joschu.net/blog/kl-approx.html (Schulman 2020) by name."""


def adapted_kl_coef(kl_coef: float, kl: float, *, kl_target: float, kl_horizon: int, n_sequences: int) -> float:
    """The next KL coefficient of Ziegler et al. 2019 (arXiv:1909.08593, sec. 2.2).

    e = clip(kl / target − 1, −0.2, 0.2), and β ← β·(1 + e·n/horizon).

    Args:
        kl_coef: β in force, reward per nat.
        kl: measured KL(policy ‖ reference), nats per completion, mean over the rollout.
        kl_target: nats per completion to aim at.
        kl_horizon: completions over which an error of ±0.2, where it is clipped, moves β by a factor of about e^±0.2.
        n_sequences: completions in the rollout; below 5·horizon, or β would not stay positive.
    """
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * n_sequences / kl_horizon)


@dataclass(frozen=True)
class KLController:
    """Moves the KL coefficient towards a target, or leaves it fixed.

    Attributes:
        target: KL(policy ‖ reference) per completion to aim at, nats; None keeps the coefficient as it is.
        horizon: see `adapted_kl_coef`; None is ten rollouts, as runs of thousands of completions need.
    """

    target: float | None = None
    horizon: int | None = None

    def next(self, kl_coef: float, kl: float, n_sequences: int) -> float:
        """The coefficient after a rollout of `n_sequences` completions whose mean KL was `kl` nats."""
        if self.target is None:
            return kl_coef
        horizon = self.horizon or 10 * n_sequences
        return adapted_kl_coef(kl_coef, kl, kl_target=self.target, kl_horizon=horizon, n_sequences=n_sequences)

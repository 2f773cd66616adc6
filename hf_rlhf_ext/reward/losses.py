"""The mathematics of reward modelling: pure functions on tensors."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    scores_i: Tensor, scores_j: Tensor, targets: Tensor, weights: Tensor, margins: Tensor | None = None
) -> Tensor:
    """Weighted cross-entropy of the Bradley-Terry model with soft targets and margins, in nats, one value a pair.

        loss = -w · [t · log σ(Δ - m) + (1 - t) · log σ(-(Δ - m))],   Δ = r_i - r_j

    With t = w = 1 and m = 0 this is eq. 1 of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155), after Bradley and
    Terry (1952); w = 1 / C(K, 2) is its weight for K ranked completions. The margin is that of Llama 2
    (Touvron et al. 2023, arXiv:2307.09288, eq. 2), signed here so that it also serves soft targets.

    Args:
        scores_i, scores_j: (P,) rewards of the two completions of each pair.
        targets: (P,) P(i ≻ j) in [0, 1]; 0.5 is a tie.
        weights: (P,) non-negative.
        margins: (P,) how much better i is than j, in units of reward; None is 0.

    Returns:
        (P,) losses. Divide their sum by the sum of `weights` over the whole optimizer step.
    """
    delta = scores_i - scores_j
    if margins is not None:
        delta = delta - margins
    return -weights * (targets * logsigmoid(delta) + (1 - targets) * logsigmoid(-delta))


def centering_penalty(scores_i: Tensor, scores_j: Tensor, weights: Tensor) -> Tensor:
    """Weighted (r_i + r_j)² of each pair (P,), which keeps rewards near mean zero.

    Eisenstein et al. 2023, arXiv:2312.09244, eq. 2; arguments as in `bradley_terry_loss`.
    """
    return weights * (scores_i + scores_j) ** 2

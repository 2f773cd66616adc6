"""The mathematics of reward modeling: pure functions on tensors."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

TIE_MODELS = ("soft", "rao_kupper", "davidson")


def bradley_terry_loss(
    scores_i: Tensor, scores_j: Tensor, targets: Tensor, weights: Tensor, margins: Tensor | None = None
) -> Tensor:
    """Weighted cross-entropy of the Bradley-Terry model with soft targets and margins, in nats, one value per pair.

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


def smooth_targets(targets: Tensor, smoothing: float) -> Tensor:
    """t (1 - ε) + ε / 2: labels that are wrong with probability ε / 2 (Szegedy et al. 2016, arXiv:1512.00567, sec. 7).

    Ties stay ties.
    """
    return targets * (1 - smoothing) + smoothing / 2


def tie_model_loss(
    scores_i: Tensor,
    scores_j: Tensor,
    targets: Tensor,
    weights: Tensor,
    margins: Tensor | None = None,
    *,
    model: str,
    threshold: float,
) -> Tensor:
    """As `bradley_terry_loss`, with a probability of a tie of its own; a target of exactly 0.5 is a tie.

    With Δ = r_i - r_j - m and η = `threshold` > 0,

        rao_kupper:  P(i ≻ j) = σ(Δ - η),   P(tie) = 1 - σ(Δ - η) - σ(-Δ - η)
        davidson:    P(i ≻ j) = e^{Δ/2} / Z,   P(tie) = η / Z,   Z = e^{Δ/2} + e^{-Δ/2} + η

    Rao & Kupper 1967, JASA 62 (η = log θ), and Davidson 1970, JASA 65 (η = ν). Other targets share the two wins.

    Raises:
        ValueError: an unknown model, or a threshold that is not positive.
    """
    if model not in ("rao_kupper", "davidson") or not threshold > 0:
        raise ValueError(f"model={model!r}, threshold={threshold}: rao_kupper or davidson, with a positive threshold.")
    delta = scores_i - scores_j
    if margins is not None:
        delta = delta - margins
    if model == "rao_kupper":
        win, lose, tie = _rao_kupper(delta, threshold)
    else:
        win, lose, tie = _davidson(delta, threshold)
    log_likelihood = torch.where(targets == 0.5, tie, targets * win + (1 - targets) * lose)
    return -weights * log_likelihood


def _rao_kupper(delta: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (P,) that i wins, that j wins, and of a tie."""
    win = logsigmoid(delta - threshold)
    lose = logsigmoid(-delta - threshold)
    # 1 - σ(Δ-η) - σ(-Δ-η) = σ(Δ+η) σ(-Δ+η) (1 - e^{-2η}): as a product, its logarithm is accurate
    tie = logsigmoid(delta + threshold) + logsigmoid(threshold - delta) + math.log(-math.expm1(-2 * threshold))
    return win, lose, tie


def _davidson(delta: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `_rao_kupper`."""
    log_threshold = math.log(threshold)
    log_z = torch.logsumexp(torch.stack([delta / 2, -delta / 2, torch.full_like(delta, log_threshold)]), 0)
    win = delta / 2 - log_z
    lose = -delta / 2 - log_z
    tie = log_threshold - log_z
    return win, lose, tie


def plackett_luce_loss(scores: Tensor) -> Tensor:
    """-log P of a full ranking (K,) given best first, a scalar in nats; for K = 2 the Bradley-Terry loss.

        P = Π_k exp(r_k) / Σ_{l ≥ k} exp(r_l)

    Plackett 1975, J. R. Stat. Soc. C 24; Luce 1959. Each choice among the rest counts once, unlike the C(K, 2) pairs.
    """
    log_rest = torch.logcumsumexp(scores.flip(0), 0).flip(0)  # log Σ_{l ≥ k} exp(r_l), (K,)
    return (log_rest - scores).sum()


def ranking_of(pairs: Tensor, targets: Tensor, n: int) -> Tensor | None:
    """Indices (n,) from best to worst where pairs (P, 2) and targets order all n completions strictly, else None."""
    is_decided = (targets == 0) | (targets == 1)
    if not bool(is_decided.all()):
        return None
    n_distinct = len(pairs.sort(1).values.unique(dim=0))  # a pair judged twice stands for no other one
    if not n_distinct == len(pairs) == n * (n - 1) // 2:
        return None

    winners = torch.where(targets == 1, pairs[:, 0], pairs[:, 1])
    wins = torch.zeros(n, dtype=torch.int64, device=pairs.device)
    wins.index_add_(0, winners, torch.ones_like(winners))
    order = wins.argsort(descending=True)
    # Each number of wins once: a tournament with distinct scores has no circles (Landau 1953).
    distinct_wins = torch.arange(n - 1, -1, -1, device=pairs.device)
    if bool((wins[order] == distinct_wins).all()):
        return order
    return None


def rank_prompts(losses: Tensor, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Pair losses (P,), in which every fully ranked prompt has its Plackett-Luce loss instead, on its first pair.

    `batch` has `pairs`, `targets`, `weights` and `prompt_index` (P, …), the pairs of a prompt together, as the collator
    makes them. What is ranked are the completions of these pairs. The ranking weighs as much as the pairs it replaces;
    prompts without a full strict ranking keep their pairs.
    """
    losses = losses.clone()
    _, pair_counts = batch["prompt_index"].unique_consecutive(return_counts=True)
    start = 0
    for count in pair_counts.tolist():
        of_prompt = slice(start, start + count)
        # Completions of these pairs by their number in the batch, and the pairs by their place in that list.
        members, pairs = batch["pairs"][of_prompt].unique(return_inverse=True)
        order = ranking_of(pairs, batch["targets"][of_prompt], len(members))
        if len(members) > 2 and order is not None:  # for two, the pair's own loss is the same and knows margins
            losses[of_prompt] = 0.0
            losses[start] = batch["weights"][of_prompt].sum() * plackett_luce_loss(scores[members[order]])
        start += count
    return losses


def centering_penalty(scores_i: Tensor, scores_j: Tensor, weights: Tensor) -> Tensor:
    """Weighted (r_i + r_j)² of each pair (P,), which keeps rewards near mean zero.

    Eisenstein et al. 2023, arXiv:2312.09244, eq. 2; arguments as in `bradley_terry_loss`.
    """
    return weights * (scores_i + scores_j) ** 2

"""The losses of reward models as pure functions of tensors.

Shapes: P pairs of completions. A target is P(i ≻ j), the probability that completion i is better than j.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

TIE_MODELS = ("soft", "rao_kupper", "davidson")


def bradley_terry_loss(
    scores_i: Tensor, scores_j: Tensor, targets: Tensor, weights: Tensor, margins: Tensor | None = None
) -> Tensor:
    """Weighted cross-entropy of the Bradley-Terry model (Bradley and Terry 1952) with soft targets and margins.

    With Δ = r_i - r_j, weight w, target t and margin m:

    ```text
    loss = -w · [t · log σ(Δ - m) + (1 - t) · log σ(-(Δ - m))]
    ```

    With t = w = 1 and m = 0 this is eq. 1 of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155), which weights the
    pairs of K ranked completions with w = 1 / C(K, 2). The margin is that of Llama 2 (Touvron et al. 2023,
    arXiv:2307.09288, eq. 2); here it has a sign, so that it also works with soft targets.

    Args:
        scores_i: (P,) scores of the first completion of each pair, in units of reward.
        scores_j: (P,) scores of the second completion.
        targets: (P,) P(i ≻ j), from 0 to 1; 0.5 is a tie.
        weights: (P,) weights of the pairs, not negative.
        margins: (P,) how much better i is than j, in units of reward; `None` means 0.

    Returns:
        (P,) losses in nats. Divide their sum by the sum of `weights` over the whole optimizer step.
    """
    delta = scores_i - scores_j
    if margins is not None:
        delta = delta - margins
    return -weights * (targets * logsigmoid(delta) + (1 - targets) * logsigmoid(-delta))


def smooth_targets(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al. 2016, arXiv:1512.00567, sec. 7): t · (1 - ε) + ε / 2.

    This models labels that are wrong with probability ε / 2. Ties stay ties.

    Args:
        targets: (P,) targets t, from 0 to 1.
        smoothing: ε, from 0 to 1.

    Returns:
        (P,) smoothed targets.
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
    """Negative log-likelihood of a model with a separate probability of a tie. A target of exactly 0.5 is a tie.

    With Δ = r_i - r_j - m and η = `threshold`:

    ```text
    rao_kupper:  P(i ≻ j) = σ(Δ - η),      P(tie) = 1 - σ(Δ - η) - σ(-Δ - η)
    davidson:    P(i ≻ j) = e^{Δ/2} / Z,   P(tie) = η / Z,   Z = e^{Δ/2} + e^{-Δ/2} + η
    ```

    See Rao and Kupper 1967, JASA 62 (η = log θ), and Davidson 1970, JASA 65 (η = ν). A target t other than 0.5 gives
    the win of i the weight t and the win of j the weight 1 - t.

    Args:
        scores_i: (P,) scores of the first completion of each pair, in units of reward.
        scores_j: (P,) scores of the second completion.
        targets: (P,) P(i ≻ j), from 0 to 1; 0.5 is a tie.
        weights: (P,) weights of the pairs, not negative.
        margins: (P,) how much better i is than j, in units of reward; `None` means 0.
        model: `"rao_kupper"` or `"davidson"`.
        threshold: η, positive. A larger value makes ties more likely.

    Returns:
        (P,) losses in nats.

    Raises:
        ValueError: if the model is unknown or the threshold is not positive.
    """
    if model not in ("rao_kupper", "davidson") or not threshold > 0:
        raise ValueError(
            f"model={model!r}, threshold={threshold}: choose model from rao_kupper and davidson, and a positive "
            "threshold."
        )
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
    """Log-probabilities (P,) of a win of i, of a win of j, and of a tie."""
    win = logsigmoid(delta - threshold)
    lose = logsigmoid(-delta - threshold)
    # 1 - σ(Δ-η) - σ(-Δ-η) = σ(Δ+η) σ(-Δ+η) (1 - e^{-2η}). The logarithm of the product is accurate.
    tie = logsigmoid(delta + threshold) + logsigmoid(threshold - delta) + math.log(-math.expm1(-2 * threshold))
    return win, lose, tie


def _davidson(delta: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same log-probabilities as in `_rao_kupper`."""
    log_threshold = math.log(threshold)
    log_z = torch.logsumexp(torch.stack([delta / 2, -delta / 2, torch.full_like(delta, log_threshold)]), 0)
    win = delta / 2 - log_z
    lose = -delta / 2 - log_z
    tie = log_threshold - log_z
    return win, lose, tie


def plackett_luce_loss(scores: Tensor) -> Tensor:
    """Negative log-likelihood of a full ranking under the Plackett-Luce model.

    ```text
    P = Π_k exp(r_k) / Σ_{l ≥ k} exp(r_l)
    ```

    See Plackett 1975, J. R. Stat. Soc. C 24, and Luce 1959. For K = 2 this is the Bradley-Terry loss.

    Args:
        scores: (K,) scores of the completions of a prompt, from the best to the worst.

    Returns:
        A scalar, in nats.
    """
    log_rest = torch.logcumsumexp(scores.flip(0), 0).flip(0)  # log Σ_{l ≥ k} exp(r_l), (K,)
    return (log_rest - scores).sum()


def ranking_of(pairs: Tensor, targets: Tensor, n: int) -> Tensor | None:
    """Finds the ranking of n completions in their pairs.

    Args:
        pairs: (P, 2) int64, numbers of the two completions of each pair, from 0 to n - 1.
        targets: (P,) P(i ≻ j), from 0 to 1.
        n: number of completions.

    Returns:
        (n,) int64, completions from the best to the worst; `None` if the pairs are not a full ranking without ties.
    """
    is_decided = (targets == 0) | (targets == 1)
    if not bool(is_decided.all()):
        return None
    n_distinct = len(pairs.sort(1).values.unique(dim=0))  # a pair that is judged twice counts once
    if not n_distinct == len(pairs) == n * (n - 1) // 2:
        return None

    winners = torch.where(targets == 1, pairs[:, 0], pairs[:, 1])
    wins = torch.zeros(n, dtype=torch.int64, device=pairs.device)
    wins.index_add_(0, winners, torch.ones_like(winners))
    order = wins.argsort(descending=True)
    # If all numbers of wins are different, the tournament has no cycles (Landau 1953).
    distinct_wins = torch.arange(n - 1, -1, -1, device=pairs.device)
    if bool((wins[order] == distinct_wins).all()):
        return order
    return None


def rank_prompts(losses: Tensor, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Replaces the pair losses of fully ranked prompts by their Plackett-Luce loss.

    The loss of the ranking has the total weight of the pairs that it replaces. Prompts without a full ranking, or with
    ties, keep their pair losses.

    Args:
        losses: (P,) losses of the pairs.
        scores: (N,) scores of the completions of the batch.
        batch: `pairs` (P, 2), `targets`, `weights` and `prompt_index` (P,) from the collator. The pairs of a prompt are
            next to each other.

    Returns:
        (P,) losses. The loss of a ranking is at the first pair of its prompt, and its other pairs have 0.
    """
    losses = losses.clone()
    _, pair_counts = batch["prompt_index"].unique_consecutive(return_counts=True)
    start = 0
    for count in pair_counts.tolist():
        of_prompt = slice(start, start + count)
        # The completions of these pairs, and the pairs as positions in this list.
        members, pairs = batch["pairs"][of_prompt].unique(return_inverse=True)
        order = ranking_of(pairs, batch["targets"][of_prompt], len(members))
        if len(members) > 2 and order is not None:  # for two, the pair loss is the same, and it supports margins
            losses[of_prompt] = 0.0
            losses[start] = batch["weights"][of_prompt].sum() * plackett_luce_loss(scores[members[order]])
        start += count
    return losses


def centering_penalty(scores_i: Tensor, scores_j: Tensor, weights: Tensor) -> Tensor:
    """Penalty w · (r_i + r_j)² that keeps rewards near mean zero (Eisenstein et al. 2023, arXiv:2312.09244, eq. 2).

    Args:
        scores_i: (P,) scores of the first completion of each pair, in units of reward.
        scores_j: (P,) scores of the second completion.
        weights: (P,) weights of the pairs.

    Returns:
        (P,) penalties, in reward².
    """
    return weights * (scores_i + scores_j) ** 2

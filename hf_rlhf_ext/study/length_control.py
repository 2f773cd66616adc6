"""Length-controlled win rates: the win rate if both answers had the same length.

Judges, people among them, tend to prefer longer answers, and training with their judgments makes answers longer. The
length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475) asks how often a system would win if
its answers were as long as those of its opponent.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from scipy import special
from sklearn.linear_model import LogisticRegression

from ..errors import UserError
from .statistics import Interval, as_numbers, checked_outcomes, mean_interval, win_rate

PENALTY = 0.01
"""Weight of φ²/2 in the loss, against a log loss that is summed over pairs. It keeps φ finite where length decides all
pairs, and is weak otherwise: AlpacaEval's own default without cross-validation (C = 100)."""


def length_controlled_win_rate(
    outcomes: Sequence[float | None],
    length_deltas: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    prompts: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 9999,
) -> Interval:
    """Win rate of the first of two systems at equal length, with its 95 % interval.

    The model is logit P(first better) = θ + φ tanh(Δ / sd(Δ)), with Δ the length of the first answer minus that of the
    second, and the result is its prediction at Δ = 0, which is the logistic function of θ. A judge that only likes
    length gives 50 %, a judge that ignores length the win rate itself.

    Compared with AlpacaEval 2 (`length_controlled_v1`): its third term, the difficulty of each instruction, is fixed
    for its own 805 instructions, so it is left out here. So are the rows of its two gamed baselines, and the penalty
    does not shrink θ. As there, the prediction is an extrapolation where nearly all answers of one side are longer.

    The interval is that of `mean_interval` for the contributions of the pairs to θ (influence function of the fit). It
    covers prompts, or seeds and prompts, with `groups`. Where one side won all pairs, it is that of the win rate.

    Args:
        outcomes: (N,) probability that the first is better, from 0 to 1; 0.5 is a tie, None a failed judgment.
        length_deltas: (N,) length of the first answer minus length of the second, in any unit.
        groups: (N,) seed of each outcome.
        prompts: (N,) prompt of each outcome; see `mean_interval`.
        n_resamples: resamples of the bootstrap over prompts of one seed.

    Returns:
        The interval. Its mean and ends are NaN if the effect of length cannot be told apart from that of the system:
        without outcomes, or if all length differences are equal and not 0.

    Raises:
        UserError: There is not one length difference per outcome, or an outcome is not between 0 and 1.
    """
    numbers = checked_outcomes(outcomes)
    deltas = as_numbers(length_deltas)
    if len(deltas) != len(numbers):
        raise UserError(f"`length_deltas` needs one entry per outcome: {len(deltas)} for {len(numbers)} outcomes.")
    judged = ~np.isnan(numbers) & ~np.isnan(deltas)
    spread = deltas[judged].std(ddof=1) if judged.sum() > 1 else 0.0
    if not judged.any() or (spread == 0 and deltas[judged][0] != 0):
        return Interval(math.nan, math.nan, math.nan, int(judged.sum()), null=0.5)

    if numbers[judged].min() == numbers[judged].max() and numbers[judged][0] in (0.0, 1.0):
        # One side won everything, so θ is infinite. Half a win and half a loss more (Haldane 1956) keep it finite.
        mean = (numbers[judged].sum() + 0.5) / (judged.sum() + 1)
        rate = win_rate(np.where(judged, numbers, math.nan), groups, prompts).rate
        return replace(rate, mean=float(mean))

    # Without any difference in length, the model is its intercept.
    features = np.tanh(deltas[judged] / spread) if spread > 0 else np.zeros(int(judged.sum()))
    intercept, influences = _fit(features, numbers[judged])
    contributions = np.full(len(numbers), math.nan)
    contributions[judged] = intercept + influences
    logits = mean_interval(contributions, groups, prompts, n_resamples=n_resamples)
    return Interval(
        mean=float(special.expit(intercept)),
        low=float(special.expit(logits.low)),
        high=float(special.expit(logits.high)),
        n=logits.n,
        seeds=logits.seeds,
        over=logits.over,
        p_value=logits.p_value,
        null=0.5,
    )


def _fit(features: np.ndarray, outcomes: np.ndarray) -> tuple[float, np.ndarray]:
    """Fits θ and φ. Returns θ, and the influence of each pair on it, (N,), with mean 0."""
    n = len(outcomes)
    # Each pair is a win with the weight of its probability, and a loss with the rest, so that ties count one half.
    model = LogisticRegression(C=1 / PENALTY, tol=1e-8, max_iter=1000)
    model.fit(
        np.concatenate([features, features])[:, None],
        np.repeat([1, 0], n),
        sample_weight=np.concatenate([outcomes, 1 - outcomes]),
    )
    intercept = float(model.intercept_[0])
    design = np.stack([np.ones(n), features], axis=1)  # (N, 2)
    predicted = special.expit(design @ [intercept, model.coef_[0, 0]])
    curvature = design.T @ (design * (predicted * (1 - predicted))[:, None]) + np.diag([0.0, PENALTY])
    scores = design * (outcomes - predicted)[:, None]
    influences = n * np.linalg.solve(curvature, scores.T)[0]
    return intercept, influences - influences.mean()

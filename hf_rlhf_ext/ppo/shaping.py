"""Shaping of scores: against reference answers (PAR), scale, running normalization, clip, and penalties.

Penalties are for length, for nearly overlong completions, and for a missing stop token.
"""

from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Running mean and variance of all scores so far.

    Attributes:
        count: number of scores.
        mean: their mean, in units of reward.
        m2: sum of their squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, x: Tensor) -> Self:
        """Returns new moments that include the values of `x`.

        See Chan, Golub and LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample variances"),
        eq. 2.1.

        Args:
            x: scores, of any shape.
        """
        values = x.double()
        count = values.numel()
        mean = values.mean().item()
        m2 = (values - mean).square().sum().item()
        total = self.count + count
        delta = mean - self.mean
        return type(self)(
            count=total,
            mean=self.mean + delta * count / total,
            m2=self.m2 + m2 + delta**2 * self.count * count / total,
        )

    @property
    def std(self) -> float:
        """Standard deviation (population); 1 before the first score."""
        return (self.m2 / self.count) ** 0.5 if self.count else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The moments as a dict, which a checkpoint stores."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """The moments from the dict that `to_dict` returned."""
        return cls(**state)


def length_penalty(lengths: Tensor, per_token: float, target: int) -> Tensor:
    """Penalty for long completions: `per_token` for each token beyond `target`.

    Args:
        lengths: (B,) number of tokens of each completion.
        per_token: reward per token.
        target: number of tokens without a penalty.

    Returns:
        (B,) fp32, reward to subtract; 0 or more if `per_token` is not negative.
    """
    return per_token * (lengths - target).clamp(min=0).float()


def soft_overlong_penalty(completions: Sequence[Sized], max_length: int, zone: int) -> Tensor:
    """Soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13), computed by TRL.

    0 up to L_max − L_zone tokens, then falling linearly to −1 at L_max: (L_max − L_zone − length) / L_zone.

    Args:
        completions: B completions, of which only the number of tokens is read, including the stop token.
        max_length: L_max, the maximum number of tokens of a completion.
        zone: L_zone, the number of tokens before it in which the penalty grows.

    Returns:
        (B,) fp32 from −1 to 0, to add to the scores.
    """
    from trl.rewards import get_soft_overlong_punishment  # slow to import

    return torch.tensor(get_soft_overlong_punishment(max_length, zone)(completion_ids=completions), dtype=torch.float32)


def preference_as_reward(scores: Tensor, references: Tensor) -> Tensor:
    """Preference As Reward, PAR (Fu et al. 2025, arXiv:2502.18770): mean over references of σ(score − score_ref).

    If scores are those of a Bradley–Terry model, this is the probability that the completion is preferred to a
    reference answer. It is bounded, and it rises fastest where a completion is about as good as the references.

    Args:
        scores: (B,) score of each completion, in log-odds.
        references: (B, M) scores of the reference answers of its prompt; NaN where a prompt has fewer than M. At least
            one of each row is a number.

    Returns:
        (B,) from 0 to 1, with the dtype of `scores`.
    """
    return torch.sigmoid(scores[:, None] - references).nanmean(dim=1)


class ShapedScores(NamedTuple):
    """Result of `shape_scores`.

    Attributes:
        scores: (B,) fp32, the shaped scores in units of reward.
        moments: the running moments, updated with these scores if they are normalized.
        clipped: (B,) bool, which scores were clipped; `None` without a clip.
    """

    scores: Tensor
    moments: RunningMoments
    clipped: Tensor | None


def shape_scores(
    scores: Tensor,
    lengths: Tensor,
    stopped: Tensor,
    moments: RunningMoments,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    clip: float | None = None,
    price_per_token: float = 0.0,
    free_tokens: int = 0,
    missing_eos_penalty: float | None = None,
    overlong: Tensor | None = None,
    overlong_weight: float = 1.0,
) -> ShapedScores:
    """Scales, normalizes and clips scores, in this order, and then subtracts the penalties.

    Args:
        scores: (B,) fp32, the scores from the reward functions.
        lengths: (B,) number of tokens of each completion.
        stopped: (B,) bool, whether the completion ends with a stop token.
        moments: running moments of all earlier scores, after `scale`.
        scale: factor on every score.
        normalize: whether to normalize with the running mean and standard deviation, which then include these scores.
        clip: scores are clipped to [−`clip`, `clip`]; `None` means no clip.
        price_per_token: reward subtracted for each token beyond `free_tokens`, see `length_penalty`.
        free_tokens: number of tokens without a penalty.
        missing_eos_penalty: reward subtracted where `stopped` is False; `None` means 0.
        overlong: (B,) from −1 to 0, see `soft_overlong_penalty`; `None` means 0.
        overlong_weight: factor on `overlong`.

    Returns:
        The shaped scores, the updated moments and which scores were clipped.
    """
    scores = scores * scale
    if normalize:
        moments = moments.update(scores)
        scores = (scores - moments.mean) / max(moments.std, 1e-8)
    clipped = None
    if clip is not None:
        clipped = scores.abs() >= clip
        scores = scores.clamp(-clip, clip)
    if price_per_token:
        scores = scores - length_penalty(lengths, price_per_token, free_tokens)
    if overlong is not None:
        scores = scores + overlong_weight * overlong
    scores = scores - (missing_eos_penalty or 0.0) * (~stopped).to(scores.dtype)
    return ShapedScores(scores, moments, clipped)

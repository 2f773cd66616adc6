"""Shapes of the sequence reward: running normalization, a clip, and prices for length and for no stop token."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Mean and population variance of every score seen so far; `m2` is the sum of squared deviations."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, x: Tensor) -> Self:
        """With the values of `x` (any shape) added; Chan, Golub and LeVeque 1979, "Updating formulae", eq. 2.1."""
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
        """Population standard deviation; 1 before anything was seen."""
        return (self.m2 / self.count) ** 0.5 if self.count else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        return cls(**state)


def length_penalty(lengths: Tensor, per_token: float, target: int) -> Tensor:
    """Reward taken off completions of `lengths` (B,) tokens: `per_token` for every token beyond `target`, (B,) fp32."""
    return per_token * (lengths - target).clamp(min=0).float()


class ShapedScores(NamedTuple):
    """What `shape_scores` makes of B scores.

    `scores` (B,) fp32, in reward; `moments` with the new scores in; `clipped` (B,) bool, None without a clip.
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
) -> ShapedScores:
    """Scores after scale, normalization and clip, in this order, less the penalties.

    Args:
        scores: (B,) as the reward functions gave them.
        lengths: (B,) tokens of the completions.
        stopped: (B,) bool, whether a completion ends with a stop token.
        moments: of all scores before these, after `scale`; these count too.
        scale: factor on every score.
        normalize: shift and scale by mean and deviation of `moments`.
        clip: scores are clipped to ± this; None: no clip.
        price_per_token, free_tokens: see `length_penalty`.
        missing_eos_penalty: taken off where `stopped` is False.
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
    scores = scores - (missing_eos_penalty or 0.0) * (~stopped).to(scores.dtype)
    return ShapedScores(scores, moments, clipped)

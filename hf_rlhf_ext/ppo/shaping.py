"""Shapes of the sequence reward: running normalisation and a price for length, as pure functions."""

from dataclasses import asdict, dataclass
from typing import Any, Self

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
        count, mean = values.numel(), values.mean().item()
        m2 = (values - mean).square().sum().item()
        total, delta = self.count + count, mean - self.mean
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

"""Sums of the training metrics on each process, between two logs."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

_SUMMED = ("decided", "right", "margin", "score", "n_scores", "tokens")
"""What is added up; the lowest and the highest score come beside."""


@dataclass
class TrainTotals:
    """What all processes have seen since the last log.

    `decided` pairs that are no ties, `right` of them with the preferred side higher, their summed `margin` in units of
    reward; sum `score`, number `n_scores`, `lowest` and `highest` of all scores; `tokens` without padding.
    """

    decided: float
    right: float
    margin: float
    score: float
    n_scores: float
    tokens: float
    lowest: float
    highest: float

    def metrics(self) -> dict[str, float]:
        """The logged metrics, under TRL's names."""
        decided = max(self.decided, 1.0)  # all ties: 0, as TRL has it
        return {
            "accuracy": self.right / decided,
            "margin": self.margin / decided,
            "mean_reward": self.score / self.n_scores,
            "min_reward": self.lowest,
            "max_reward": self.highest,
        }


class TrainMeter:
    """Adds up micro-batches without a collective, which would block where processes differ in how many they have."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # as `_SUMMED`
        self._lowest: Tensor | None = None
        self._highest: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """True right after a log."""
        return self._sums is None

    def add(self, scores: Tensor, batch: dict[str, Tensor]) -> None:
        """Counts one micro-batch by its scores (N,)."""
        sums = _sums_of(scores, batch)
        if self._sums is None:
            self._sums = sums
            self._lowest = scores.min()
            self._highest = scores.max()
        else:
            self._sums = self._sums + sums
            self._lowest = torch.minimum(self._lowest, scores.min())
            self._highest = torch.maximum(self._highest, scores.max())

    def reduce(self, accelerator: Accelerator) -> TrainTotals:
        """The totals over all processes, in one collective; counts from zero again after."""
        values = torch.cat([self._sums, self._lowest[None], self._highest[None]])  # (8,)
        gathered = accelerator.gather(values[None])  # (processes, 8)
        gathered = gathered.double().cpu()  # sums of many tokens are exact in fp64
        self._sums = None
        totals = {}
        for column, name in enumerate(_SUMMED):
            totals[name] = gathered[:, column].sum().item()
        totals["lowest"] = gathered[:, -2].min().item()
        totals["highest"] = gathered[:, -1].max().item()
        return TrainTotals(**totals)


def _sums_of(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """`_SUMMED` of a micro-batch, fp32."""
    scores_i, scores_j = scores[batch["pairs"]].unbind(1)  # (P,) each
    side = torch.sign(batch["targets"] - 0.5)  # 1 where i is preferred, -1 where j is, 0 for ties
    agreement = side * (scores_i - scores_j)  # how much higher the preferred side scores, 0 for ties
    if "segments" in batch:  # the shared-prefix layout, where padding is -1
        is_token = batch["segments"] >= 0
    else:
        is_token = batch["attention_mask"]
    sums = [
        side.abs().sum(),
        (agreement > 0).sum(),
        agreement.sum(),
        scores.sum(),
        torch.tensor(float(len(scores)), device=scores.device),
        is_token.sum(),
    ]
    return torch.stack([value.float() for value in sums])

"""Sums of the training metrics of each process from one log to the next."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

_SUMMED = ("decided", "right", "margin", "score", "n_scores", "tokens")
"""The sums. The lowest and the highest score are kept separately."""


@dataclass
class TrainTotals:
    """Totals over all processes since the last log.

    Attributes:
        decided: number of pairs that are not ties.
        right: number of these whose preferred completion has the higher score.
        margin: sum of their score differences, preferred minus other, in units of reward.
        score: sum of all scores.
        n_scores: number of scores.
        tokens: number of tokens without padding.
        lowest: lowest score.
        highest: highest score.
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
        """The metrics to log, under the names of TRL."""
        decided = max(self.decided, 1.0)  # if all pairs are ties, the metrics are 0, as in TRL
        return {
            "accuracy": self.right / decided,
            "margin": self.margin / decided,
            "mean_reward": self.score / self.n_scores,
            "min_reward": self.lowest,
            "max_reward": self.highest,
        }


class TrainMeter:
    """Sums metrics over micro-batches.

    It communicates at a log only, as processes may have different numbers of micro-batches.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # as `_SUMMED`
        self._lowest: Tensor | None = None
        self._highest: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last log."""
        return self._sums is None

    def add(self, scores: Tensor, batch: dict[str, Tensor]) -> None:
        """Adds one micro-batch with its scores (N,). Prompts that do not count add nothing, see `even_batches`."""
        sums = _sums_of(scores, batch)
        lowest, highest = scores.min(), scores.max()
        if "counted" in batch:
            is_counted = _of_completions(batch["counted"], batch)  # (N,)
            lowest = scores.masked_fill(~is_counted, torch.inf).min()
            highest = scores.masked_fill(~is_counted, -torch.inf).max()
        if self._sums is None:
            self._sums = sums
            self._lowest = lowest
            self._highest = highest
        else:
            self._sums = self._sums + sums
            self._lowest = torch.minimum(self._lowest, lowest)
            self._highest = torch.maximum(self._highest, highest)

    def reduce(self, accelerator: Accelerator) -> TrainTotals:
        """Returns the totals over all processes and resets the sums. Every process must call it."""
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
    side = torch.sign(batch["targets"] - 0.5)  # 1 if i is preferred, -1 if j is, 0 for ties
    is_counted = torch.ones_like(scores)
    n_tokens = _token_mask(batch).sum()
    if "counted" in batch:
        side = side * batch["counted"][batch["prompt_index"]]
        is_counted = _of_completions(batch["counted"], batch).float()
        n_tokens = (batch["token_counts"] * batch["counted"]).sum()
    agreement = side * (scores_i - scores_j)  # score of the preferred completion minus the other, 0 for ties
    sums = [
        side.abs().sum(),
        (agreement > 0).sum(),
        agreement.sum(),
        (scores * is_counted).sum(),
        is_counted.sum(),
        n_tokens,
    ]
    return torch.stack([value.float() for value in sums])


def _token_mask(batch: dict[str, Tensor]) -> Tensor:
    """Where the rows of a batch have a token and no padding."""
    if "segments" in batch:  # the shared-prefix layout, in which padding is -1
        return batch["segments"] >= 0
    return batch["attention_mask"]


def _of_completions(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Values (B,) of the prompts of a batch for each of its completions, (N,)."""
    return values.repeat_interleave(batch["completion_counts"])

"""What evaluation gathers of every judged pair, padded by prompt, and how it is read again."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .preference_metrics import JudgedPairs

PADDING = -100.0

LABEL_FIELDS = ("i", "j", "target", "weight", "margin", "length_delta", "category")
"""Last axis of the labels that evaluation gathers (B, Pmax, 7); a padded pair is -100 throughout."""


def pair_labels(batch: dict[str, Tensor]) -> Tensor:
    """(P, 7) fp32, `LABEL_FIELDS` of each pair of a batch; i and j number the completions of its prompt from 0."""
    prompt_index = batch["prompt_index"]
    counts = batch["completion_counts"]
    first_completion = counts.cumsum(0) - counts  # (B,), its number in the batch
    pairs = batch["pairs"] - first_completion[prompt_index][:, None]  # (P, 2)
    lengths = batch["completion_lengths"][batch["pairs"]]  # (P, 2)
    fields = [
        pairs[:, 0],
        pairs[:, 1],
        batch["targets"],
        batch["weights"],
        batch["margins"],
        lengths[:, 0] - lengths[:, 1],
        batch["categories"][prompt_index],
    ]
    return torch.stack([field.float() for field in fields], dim=1)


def pad_by_prompt(values: Tensor, counts: Tensor) -> Tensor:
    """(N, …) values in runs of `counts` (B,) as (B, max count, …), padded with -100."""
    return pad_sequence(values.split(counts.tolist()), batch_first=True, padding_value=PADDING)


def stack_padded(parts: list[Tensor]) -> Tensor:
    """Tensors (b, K, …) of different K as one (B, Kmax, …), padded with -100."""
    rows = []
    for part in parts:
        rows.extend(part)
    return pad_sequence(rows, batch_first=True, padding_value=PADDING)


@dataclass(frozen=True)
class EvaluatedPairs:
    """The P pairs of an evaluation set with the scores of its completions, read from what was gathered.

    `scores` (B, Kmax) fp64; all others (P,): `prompts` the row of `scores`, `i` and `j` the columns, `categories` a
    code, -1 without one.
    """

    scores: np.ndarray
    prompts: np.ndarray
    i: np.ndarray
    j: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    margins: np.ndarray
    length_deltas: np.ndarray
    categories: np.ndarray

    @classmethod
    def read(cls, scores: Any, labels: Any) -> Self:
        """Scores (B, Kmax) and labels (B, Pmax, 7) as `Trainer` gathers them."""
        scores = np.asarray(scores, np.float64)
        labels = np.asarray(labels, np.float64)
        is_pair = labels[..., 0] >= 0  # the rest is padding
        prompts, _ = np.nonzero(is_pair)
        i, j, targets, weights, margins, length_deltas, categories = labels[is_pair].T
        return cls(
            scores=scores,
            prompts=prompts,
            i=i.astype(int),
            j=j.astype(int),
            targets=targets,
            weights=weights,
            margins=margins,
            length_deltas=length_deltas,
            categories=categories.astype(int),
        )

    @property
    def scores_i(self) -> np.ndarray:
        return self.scores[self.prompts, self.i]

    @property
    def scores_j(self) -> np.ndarray:
        return self.scores[self.prompts, self.j]

    def as_batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        """All scores as one flat tensor (B · Kmax,) fp64, and the pairs as the loss takes a batch of them."""
        # Padded scores stay in the flat tensor; no pair names them.
        first_column = self.prompts * self.scores.shape[1]  # of each pair's prompt, in the flat scores
        columns = np.stack([first_column + self.i, first_column + self.j], axis=1)
        batch = {
            "pairs": torch.from_numpy(columns),
            "targets": torch.from_numpy(self.targets),
            "weights": torch.from_numpy(self.weights),
            "margins": torch.from_numpy(self.margins),
            "prompt_index": torch.from_numpy(self.prompts),
        }
        return torch.from_numpy(self.scores.ravel()), batch

    def judged(self, category_names: list[str]) -> JudgedPairs:
        """The pairs as the metrics take them; `category_names` by code, and "" for pairs without a category."""
        names = np.array([*category_names, ""])  # code -1 is the last
        return JudgedPairs(
            scores_i=self.scores_i,
            scores_j=self.scores_j,
            targets=self.targets,
            weights=self.weights,
            margins=self.margins,
            length_deltas=self.length_deltas,
            prompts=self.prompts,
            categories=names[self.categories],
        )

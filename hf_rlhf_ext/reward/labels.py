"""The labels of judged pairs as tensors padded by prompt, which `Trainer` gathers in an evaluation.

Shapes: B prompts, P pairs, Kmax and Pmax the largest numbers of completions and of pairs of a prompt.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .preference_metrics import JudgedPairs

PADDING = -100.0

LABEL_FIELDS = ("i", "j", "target", "weight", "margin", "length_delta", "category")
"""The last axis of the labels (B, Pmax, 7). All fields of a padded pair are -100."""


def pair_labels(batch: dict[str, Tensor]) -> Tensor:
    """(P, 7) fp32: `LABEL_FIELDS` of each pair of a batch. i and j are numbers of completions of the prompt, from 0."""
    prompt_index = batch["prompt_index"]
    counts = batch["completion_counts"]
    first_completion = counts.cumsum(0) - counts  # (B,), number of the first completion of each prompt in the batch
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
    """Splits values (N, …) into B groups of `counts` (B,) and pads them with -100: (B, max count, …)."""
    return pad_sequence(values.split(counts.tolist()), batch_first=True, padding_value=PADDING)


def stack_padded(parts: list[Tensor]) -> Tensor:
    """Concatenates tensors (b, K, …) of different K to (B, Kmax, …), padded with -100."""
    rows = []
    for part in parts:
        rows.extend(part)
    return pad_sequence(rows, batch_first=True, padding_value=PADDING)


def join_batches(values: Any) -> Any:
    """One array (B, Kmax, …) from the arrays of batches that `Trainer` passes with `eval_do_concat_batches=False`."""
    if not isinstance(values, list):
        return values
    return stack_padded([torch.as_tensor(batch) for batch in values]).numpy()


@dataclass(frozen=True)
class EvaluatedPairs:
    """The pairs of an evaluation set and the scores of its completions.

    Attributes:
        scores: (B, Kmax) fp64 scores, padded with -100.
        prompts: (P,) row of the pair's prompt in `scores`.
        i: (P,) column of the first completion in `scores`.
        j: (P,) column of the second completion in `scores`.
        targets: (P,) P(i ≻ j), from 0 to 1.
        weights: (P,) weights in the loss.
        margins: (P,) margins, in units of reward.
        length_deltas: (P,) length of i minus length of j, in tokens.
        categories: (P,) code of the category, -1 without one.
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
        """Reads scores (B, Kmax) and labels (B, Pmax, 7) as `Trainer` gathers them."""
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
        """All scores as one flat tensor (B · Kmax,) fp64, and the pairs as a batch for the loss."""
        # Padded scores stay in the flat tensor, but no pair refers to them.
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
        """The pairs as the metrics need them. `category_names` are by code; pairs without a category get ""."""
        names = np.array([*category_names, ""])  # code -1 selects the last
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

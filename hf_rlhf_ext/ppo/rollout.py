"""A rollout: completions with everything that PPO's update needs, and the micro-batches that are cut from it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .advantages import completion_mask
from .shaping import RunningMoments


@dataclass
class Sequences:
    """B prompts with their completions, side by side.

    `input_ids` (B, L) int64, padded right; `prompt_lengths`, `completion_lengths` (B,) int64, tokens: the stop token
    counts.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and completion together."""
        return self.prompt_lengths + self.completion_lengths

    @cached_property  # the width is read off the device: once, not at every use
    def mask(self) -> Tensor:
        """(B, T) bool, True on emitted tokens; T is the longest completion."""
        return completion_mask(self.completion_lengths, int(self.completion_lengths.max()))

    def select(self, rows: Tensor) -> "Sequences":
        """Those rows, trimmed to their longest sequence."""
        length = int(self.lengths[rows].max())
        return Sequences(self.input_ids[rows, :length], self.prompt_lengths[rows], self.completion_lengths[rows])

    def targets(self) -> Tensor:
        """(N,) ids of the emitted tokens, N = `mask.sum()`, row after row."""
        rows, steps = self.mask.nonzero(as_tuple=True)  # (N,): which sequence, and which of its emitted tokens
        return self.input_ids[rows, self.prompt_lengths[rows] + steps]


def pack_sequences(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_token_id: int, device: torch.device
) -> Sequences:
    """Token ids of prompts and completions as one batch."""
    sequences = [torch.tensor(p + c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])
    completion_lengths = torch.tensor([len(ids) for ids in completion_ids])
    return Sequences(input_ids.to(device), prompt_lengths.to(device), completion_lengths.to(device))


@dataclass
class MicroBatch:
    """Rows of a rollout that go through the model together, trimmed to their own longest sequence and completion.

    `sequences`: b of them. `mask` (b, t) bool, True on emitted tokens; `old_logprobs`, `ref_logprobs`, `values`,
    `advantages`, `returns`, and `sampling_weights` unless None: (b, t) fp32. `minibatch_tokens`: emitted tokens of the
    whole mini-batch on all processes, by which losses are divided. `share`: weight of this part in the means of an
    optimizer step.
    """

    sequences: Sequences
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    sampling_weights: Tensor | None
    minibatch_tokens: Tensor
    share: float


@dataclass
class CompletionTable:
    """This process's completions of a rollout as people read them: for the screen and for trackers.

    `rewards` and `further` (from `log_extra`) have a value for each completion.
    """

    prompts: list[str | list]
    completions: list[str]
    rewards: dict[str, list[float]]
    further: dict[str, list[Any]]


PER_TOKEN = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns", "sampling_weights")
"""Fields of a rollout that are (B, T)."""


@dataclass
class Rollout:
    """B completions with everything that PPO's update needs; T and L are the longest completion and sequence.

    `input_ids` (B, L) int64: prompt and completion, padded right. `prompt_lengths`, `completion_lengths` (B,) int64:
    the stop token counts. `old_logprobs`, `ref_logprobs`, `values`, `advantages`, `returns` (B, T) fp32, zero in the
    padding. `order` (epochs, B) int64: the permutation of each inner epoch. `sampling_weights` (B, T) fp32: of the
    tokens' losses, None for 1.

    The rest is what the rollout tells, which a saved one no longer needs: `metrics` by name (numbers, or scalars on the
    device), the same on every process; `moments` of scores, this rollout's included; `logged`, what reward functions
    gave to `log_metric` here; and the `completions` of this process.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    order: Tensor
    sampling_weights: Tensor | None = None
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    moments: RunningMoments = RunningMoments()
    logged: list[tuple[str, float]] = field(default_factory=list)
    completions: CompletionTable | None = None

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.input_ids, self.prompt_lengths, self.completion_lengths)

    def select(self, rows: Tensor, *, minibatch_tokens: Tensor, share: float) -> MicroBatch:
        """Those rows as a micro-batch."""
        sequences = self.sequences.select(rows)
        mask = sequences.mask
        # Trimmed: a short completion in a rollout with a long one would be mostly padding.
        per_token = {}
        for name in PER_TOKEN:
            tensor = getattr(self, name)
            per_token[name] = None if tensor is None else tensor[rows, : mask.shape[1]]
        return MicroBatch(sequences, mask, **per_token, minibatch_tokens=minibatch_tokens, share=share)

    def save(self, path: str | Path) -> None:
        """Writes the tensors as safetensors, so that a run can resume in the middle of its rollout."""
        tensors = {}
        for name in ("input_ids", "prompt_lengths", "completion_lengths", "order", *PER_TOKEN):
            tensor = getattr(self, name)
            if tensor is not None:
                tensors[name] = tensor.cpu().contiguous()
        save_file(tensors, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> "Rollout":
        """What `save` wrote; it has no metrics."""
        return cls(**{name: tensor.to(device) for name, tensor in load_file(path).items()})

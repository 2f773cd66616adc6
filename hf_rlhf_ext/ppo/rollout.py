"""The rollout: completions with all tensors that PPO's update needs, and its micro-batches.

Shapes: B sequences, T tokens of the longest completion, L tokens of the longest sequence (prompt and completion).
"""

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
    """B prompts, each followed by its completion.

    Attributes:
        input_ids: (B, L) int64 token ids, padded on the right.
        prompt_lengths: (B,) int64, number of tokens of each prompt.
        completion_lengths: (B,) int64, number of tokens of each completion, including the stop token.
        per_prompt: number K of completions per prompt: rows j·K … j·K + K − 1 have the same prompt.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    per_prompt: int = 1

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, number of tokens of prompt and completion together."""
        return self.prompt_lengths + self.completion_lengths

    @cached_property  # cached, as reading the width from the device is slow
    def mask(self) -> Tensor:
        """(B, T) bool, True for emitted tokens."""
        return completion_mask(self.completion_lengths, int(self.completion_lengths.max()))

    def select(self, rows: Tensor) -> "Sequences":
        """The given rows, trimmed to the longest sequence among them.

        Args:
            rows: (b,) int64, indices of rows. If they are not all completions of each of their prompts, in their order,
                `per_prompt` of the result is 1.
        """
        length, per_prompt = self.lengths[rows].max(), 1
        if self.per_prompt > 1:
            # Read from the device together, as reading is slow.
            length, are_groups = torch.stack([length, self._are_groups(rows).long()]).tolist()
            per_prompt = self.per_prompt if are_groups else 1
        return Sequences(
            self.input_ids[rows, : int(length)],
            self.prompt_lengths[rows],
            self.completion_lengths[rows],
            per_prompt,
        )

    def _are_groups(self, rows: Tensor) -> Tensor:
        """Scalar bool: whether rows are all completions of one prompt after the other."""
        size = self.per_prompt
        if len(rows) % size:
            return torch.tensor(False, device=rows.device)
        groups = rows.view(-1, size)
        starts = groups[:, :1]
        in_order = groups == starts + torch.arange(size, device=rows.device)
        return (in_order & (starts % size == 0)).all()

    def targets(self) -> Tensor:
        """(N,) int64 ids of all emitted tokens, row after row, with N = `mask.sum()`."""
        rows, steps = self.mask.nonzero(as_tuple=True)  # (N,) each: row, and position within the completion
        return self.input_ids[rows, self.prompt_lengths[rows] + steps]


def pack_sequences(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    pad_token_id: int,
    device: torch.device,
    per_prompt: int = 1,
) -> Sequences:
    """Builds one batch from the token ids of prompts and completions.

    Args:
        prompt_ids: token ids of B prompts, one for each completion.
        completion_ids: token ids of B completions.
        pad_token_id: id used for padding.
        device: where the tensors are created.
        per_prompt: number of consecutive completions that have the same prompt.

    Returns:
        The batch.
    """
    sequences = [torch.tensor(p + c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])
    completion_lengths = torch.tensor([len(ids) for ids in completion_ids])
    return Sequences(input_ids.to(device), prompt_lengths.to(device), completion_lengths.to(device), per_prompt)


@dataclass
class MicroBatch:
    """Rows of a rollout that pass through the model together, trimmed to the longest sequence among them.

    Attributes:
        sequences: b sequences; their longest completion has t tokens.
        mask: (b, t) bool, True for emitted tokens.
        old_logprobs: (b, t) fp32, log-probabilities under the policy that made the rollout, in nats.
        ref_logprobs: (b, t) fp32, log-probabilities under the reference, in nats.
        values: (b, t) fp32, values of the critic in the rollout, in units of reward; `None` without a critic.
        advantages: (b, t) fp32.
        returns: (b, t) fp32, what the critic learns, in units of reward; `None` without a critic.
        sampling_weights: (b, t) fp32, factors on the loss of each token; `None` means 1.
        minibatch_tokens: number of tokens of the whole mini-batch on all processes that losses count, see
            `Rollout.counted_tokens`. Losses are divided by it.
        share: weight of this micro-batch in the mean of a metric over the optimizer step.
        counted: (b,) bool, which completions losses count; `None` means all.
    """

    sequences: Sequences
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    sampling_weights: Tensor | None
    minibatch_tokens: Tensor
    share: float
    counted: Tensor | None = None

    @property
    def loss_mask(self) -> Tensor:
        """(b, t) bool, True for emitted tokens of completions that losses count."""
        return self.mask if self.counted is None else self.mask & self.counted[:, None]


@dataclass
class CompletionTable:
    """The completions of this process in a rollout as text, for the terminal and for trackers.

    Attributes:
        prompts: prompts, as text or as messages.
        completions: completions, as text.
        rewards: score of each completion, by the name of the reward function.
        further: further columns, which reward functions added with `log_extra`.
    """

    prompts: list[str | list]
    completions: list[str]
    rewards: dict[str, list[float]]
    further: dict[str, list[Any]]


PER_TOKEN = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns", "sampling_weights")
"""Names of the fields of a rollout with shape (B, T)."""


@dataclass
class Rollout:
    """B completions with all tensors that PPO's update needs.

    A saved rollout has the tensors only, not `metrics`, `moments`, `logged`, `completions` and `sampled_logprobs`.

    Attributes:
        input_ids: (B, L) int64, prompt and completion, padded on the right.
        prompt_lengths: (B,) int64, number of tokens of each prompt.
        completion_lengths: (B,) int64, number of tokens of each completion, including the stop token.
        old_logprobs: (B, T) fp32, log-probabilities under the policy that made the rollout, in nats, zero in the
            padding.
        ref_logprobs: (B, T) fp32, log-probabilities under the reference, in nats, zero in the padding.
        advantages: (B, T) fp32, zero in the padding.
        order: (epochs, B) int64, the order of the rows in each pass over the rollout.
        values: (B, T) fp32, values of the critic, in units of reward, zero in the padding; `None` without a critic.
        returns: (B, T) fp32, what the critic learns, in units of reward, zero in the padding; `None` without a critic.
        sampling_weights: (B, T) fp32, factors on the loss of each token; `None` means 1.
        metrics: metrics by name, as numbers or as scalar tensors; the same on every process.
        moments: running moments of the scores, including this rollout.
        logged: names and values that reward functions passed to `log_metric` on this process.
        completions: the completions of this process as text.
        sampled_logprobs: (B, T) fp32, log-probabilities that the engine returned, in nats; `old_logprobs` if it
            returned none. They are not used in training.
        per_prompt: number of completions per prompt, see `Sequences`.
        counted: (B,) bool, which completions losses count; `None` means all. With `mask_truncated_completions`, those
            that end with a stop token.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    order: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    sampling_weights: Tensor | None = None
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    moments: RunningMoments = RunningMoments()
    logged: list[tuple[str, float]] = field(default_factory=list)
    completions: CompletionTable | None = None
    sampled_logprobs: Tensor | None = None
    per_prompt: int = 1
    counted: Tensor | None = None

    def counted_tokens(self, rows: Tensor) -> Tensor:
        """Number of emitted tokens of these rows that losses count: a scalar, at least 1, to divide by.

        Args:
            rows: (b,) int64, indices of rows.
        """
        lengths = self.completion_lengths[rows]
        if self.counted is None:
            return lengths.sum()
        return (lengths * self.counted[rows]).sum().clamp(min=1)

    @property
    def sequences(self) -> Sequences:
        """The token ids and lengths."""
        return Sequences(self.input_ids, self.prompt_lengths, self.completion_lengths, self.per_prompt)

    def select(self, rows: Tensor, *, minibatch_tokens: Tensor, share: float) -> MicroBatch:
        """The given rows as a micro-batch.

        Args:
            rows: (b,) int64, indices of rows.
            minibatch_tokens: scalar, `counted_tokens` of the whole mini-batch on all processes.
            share: weight of the micro-batch in the mean of a metric over the optimizer step.
        """
        sequences = self.sequences.select(rows)
        mask = sequences.mask
        # Trimmed to the longest completion among these rows: less padding.
        per_token = {}
        for name in PER_TOKEN:
            tensor = getattr(self, name)
            per_token[name] = None if tensor is None else tensor[rows, : mask.shape[1]]
        counted = None if self.counted is None else self.counted[rows]
        return MicroBatch(sequences, mask, **per_token, minibatch_tokens=minibatch_tokens, share=share, counted=counted)

    def save(self, path: str | Path) -> None:
        """Writes the tensors to a safetensors file, so that a run can resume in the middle of a rollout."""
        tensors = {}
        for name in ("input_ids", "prompt_lengths", "completion_lengths", "order", "counted", *PER_TOKEN):
            tensor = getattr(self, name)
            if tensor is not None:
                tensors[name] = tensor.cpu().contiguous()
        save_file(tensors, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device, *, per_prompt: int = 1) -> "Rollout":
        """Reads a rollout that `save` wrote. It has no metrics.

        Args:
            path: the safetensors file.
            device: where the tensors go.
            per_prompt: number of completions per prompt, which the file does not have.
        """
        tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        return cls(**tensors, per_prompt=per_prompt)

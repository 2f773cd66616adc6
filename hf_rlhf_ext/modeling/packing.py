"""Rows of prompts and completions in the layouts in which the completions of a prompt share it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from .segment_plans import PromptSegments, SegmentPlan, move_together
from .segments import PLAN


class Layout(StrEnum):
    """How a model computes the completions of a prompt.

    `PLAIN`: each in a row of its own, behind the prompt. `MASK`: behind one prompt, with a mask over the whole row.
    `SEGMENTS`: behind one prompt, with attention by segments, see `modeling.segments`.
    """

    PLAIN = "plain"
    MASK = "mask"
    SEGMENTS = "segments"


@dataclass(frozen=True)
class PackedGroups:
    """Completions behind their prompts.

    Attributes:
        batch: what `modeling.prefix.model_inputs` takes.
        predicting: (N,) int64, the token before each emitted token, as an index of the flattened batch.
        row_names: name of the adapter of each row; `None` without names.
    """

    batch: dict[str, Any]
    predicting: Tensor
    row_names: list[str] | None


def packed_groups(
    input_ids: Tensor,
    prompt_lengths: Tensor,
    mask: Tensor,
    per_prompt: int,
    layout: Layout,
    names: Sequence[str] | None = None,
) -> PackedGroups:
    """Arranges plain rows in which K completions each have the same prompt, so that every prompt occurs once.

    The last token of a completion is left out, as nothing is predicted from it. In the layout `SEGMENTS`, all tokens
    are in one row, without padding, or in one row for each adapter; in the layout `MASK`, every prompt has a row.

    Args:
        input_ids: (B, L) int64, prompt and completion, padded on the right.
        prompt_lengths: (B,) int64.
        mask: (B, T) bool, True for emitted tokens.
        per_prompt: number K of completions of each prompt, which follow each other.
        layout: `MASK` or `SEGMENTS`.
        names: adapter of each row.
    """
    device = input_ids.device
    # On the CPU, as sizes depend on them. This waits for the device once.
    counts = torch.stack([prompt_lengths, mask.sum(1)]).tolist()
    groups = _groups(*counts, per_prompt)
    if layout == Layout.MASK:
        rows = [[group] for group in groups]
    elif names is None:
        rows = [groups]
    else:
        by_name: dict[str, list[_Group]] = {}
        for group in groups:
            by_name.setdefault(names[group.first_row], []).append(group)
        rows = list(by_name.values())
    row_names = None if names is None else [names[row[0].first_row] for row in rows]

    places = _places(rows, input_ids.shape[1], len(counts[0]))
    tensors = [places.source, places.segments, places.owners, places.positions, places.predicting]
    shape = (len(rows), places.length)
    moved = move_together(tensors, device)
    source, segments, owners, positions = (tensor.view(shape) for tensor in moved[:4])
    batch = {
        # Padding gets the first token of the batch.
        "input_ids": input_ids.flatten()[source],
        "segments": segments,
        "owners": owners,
        "positions": positions,
    }
    if layout == Layout.SEGMENTS:
        batch[PLAN] = SegmentPlan.of_prompts(places.prompts, shape, device=device)
    return PackedGroups(batch, moved[4], row_names)


@dataclass(frozen=True)
class _Group:
    """A prompt with its completions: the first of its plain rows, and numbers of tokens."""

    first_row: int
    prompt_length: int
    emitted: list[int]

    @property
    def length(self) -> int:
        """Tokens that are computed."""
        return self.prompt_length + sum(max(n - 1, 0) for n in self.emitted)


def _groups(prompt_lengths: list[int], emitted: list[int], per_prompt: int) -> list[_Group]:
    groups = []
    for first in range(0, len(emitted), per_prompt):
        groups.append(_Group(first, prompt_lengths[first], emitted[first : first + per_prompt]))
    return groups


@dataclass(frozen=True)
class _Places:
    """(R·L,) int64 each, but for `predicting`, which is (N,)."""

    source: Tensor
    segments: Tensor
    owners: Tensor
    positions: Tensor
    predicting: Tensor
    prompts: list[PromptSegments]
    length: int


def _places(rows: list[list[_Group]], width: int, n_plain_rows: int) -> _Places:
    """Where tokens of plain rows of `width` tokens go."""
    length = max(sum(group.length for group in row) for row in rows)
    # For each prompt and each completion: its place, source, number of tokens, position, segment and owner.
    runs: list[tuple[int, ...]] = []
    # For each plain row: the last token of the prompt, the first one of the completion, and the number of emitted ones.
    predicted: list[tuple[int, int, int]] = [(0, 0, 0)] * n_plain_rows
    prompts = []
    for number, row in enumerate(rows):
        place = number * length  # in the flattened batch
        segment = 0
        for group in row:
            owner, start, n_prompt = segment, place, group.prompt_length
            runs.append((place, group.first_row * width, n_prompt, 0, owner, owner))
            place += n_prompt
            completions = []
            for plain_row, emitted in enumerate(group.emitted, group.first_row):
                segment += 1
                n_tokens = max(emitted - 1, 0)
                predicted[plain_row] = (start + n_prompt - 1, place, emitted)
                if n_tokens:
                    runs.append((place, plain_row * width + n_prompt, n_tokens, n_prompt, segment, owner))
                    completions.append((place, n_tokens))
                place += n_tokens
            segment += 1
            prompts.append(PromptSegments(start, n_prompt, tuple(completions)))

    firsts, sources, sizes, first_positions, of_segment, of_owner = torch.tensor(runs).unbind(1)
    run, offset = _members(sizes)
    places = firsts[run] + offset
    source, positions = torch.zeros((2, len(rows) * length), dtype=torch.int64)
    segments, owners = torch.full((2, len(source)), -1)
    source[places] = sources[run] + offset
    positions[places] = first_positions[run] + offset
    segments[places] = of_segment[run]
    owners[places] = of_owner[run]

    last_of_prompt, first_of_completion, emitted = torch.tensor(predicted).unbind(1)
    plain_row, step = _members(emitted)
    predicting = torch.where(step == 0, last_of_prompt[plain_row], first_of_completion[plain_row] + step - 1)
    return _Places(source, segments, owners, positions, predicting, prompts, length)


def _members(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For each member of groups that follow each other: the number of its group, and its place in the group."""
    group = torch.arange(len(sizes)).repeat_interleave(sizes)
    return group, torch.arange(len(group)) - (sizes.cumsum(0) - sizes)[group]

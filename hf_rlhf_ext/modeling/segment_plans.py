"""How attention by segments splits the tokens of a batch: which are computed together, and which keys each query sees.

Shapes: R rows of L tokens; `slots` are places in padded batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_CALL_COST = {"cpu": 4096}
_CALL_COST_OF_DEVICES = 2**20
"""What one more family costs a layer, as a number of pairs of query and key that take as long (for each head)."""

_MASK_COST = 1.1
"""How much longer attention takes with a mask that differs from prompt to prompt."""


@dataclass(frozen=True)
class PromptSegments:
    """Where a prompt and its completions are in a batch: first tokens, as indices of the flattened batch, and lengths.

    Attributes:
        start: first token of the prompt.
        length: tokens of the prompt.
        completions: (start, length) of each completion, without empty ones.
    """

    start: int
    length: int
    completions: tuple[tuple[int, int], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        return max((length for _, length in self.completions), default=0)


@dataclass(frozen=True)
class Family:
    """Prompts with equally many completions, which are computed together.

    Attributes:
        prompt_lengths: tokens of each of the n prompts.
        per_prompt: completions K of each prompt.
        prompt_length: P, tokens of the longest prompt; others are padded on the right.
        completion_length: T, tokens of the longest completion.
    """

    prompt_lengths: tuple[int, ...]
    per_prompt: int
    prompt_length: int
    completion_length: int

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(self.prompt_lengths)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of slots of the prompts, and of their completions."""
        return self.n_prompts * self.prompt_length, self.n_prompts * self.per_prompt * self.completion_length

    @property
    def pairs(self) -> float:
        """Number of pairs of query and key that are computed."""
        prompts, completions = self.sizes
        keys = self.prompt_length + self.completion_length
        return prompts * self.prompt_length / 2 + completions * keys


@dataclass(frozen=True)
class SegmentPlan:
    """How attention splits the tokens of one batch, for all layers of a model.

    It is built on the CPU by `of` or `of_prompts`, and moved to the device of the batch in one transfer.

    Attributes:
        shape: (R, L), rows and tokens of the batch.
        families: the prompts that are computed together.
        index: (S,) int64, the token of each slot, as an index of the flattened batch. Slots of one family follow each
            other: those of its prompts, then those of its completions. A slot without a token has the last token of
            its segment, so that its values are finite, and those of no other sequence.
        inverse: (R·L,) int64, the slot of each token.
        empty_slots: int64, slots without a token.
        padding: int64, tokens that belong to no segment.
    """

    shape: tuple[int, int]
    families: tuple[Family, ...]
    index: Tensor
    inverse: Tensor
    empty_slots: Tensor
    padding: Tensor
    _masks: dict[Any, Tensor | None] = field(default_factory=dict, repr=False, compare=False)
    _moved: dict[torch.device, "SegmentPlan"] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, segments: Tensor, owners: Tensor, positions: Tensor) -> "SegmentPlan":
        """The plan of a batch of the shared-prefix layout, on the device of `segments`.

        Args:
            segments: (R, L) int64, number of the prompt or completion of each token, -1 in the padding. The tokens of
                a segment follow each other.
            owners: (R, L) int64, number of the prompt that each token belongs to.
            positions: (R, L) int64, position ids.

        Raises:
            ValueError: if a completion precedes its prompt, or if positions do not go on from prompt to completion.
        """
        stacked = torch.stack([segments, owners, positions]).cpu()  # waits for the device once
        prompts = _find_prompts(*stacked)
        return cls.of_prompts(prompts, tuple(segments.shape), device=segments.device)

    @classmethod
    def of_prompts(
        cls, prompts: Sequence[PromptSegments], shape: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> "SegmentPlan":
        """The plan of a batch in which the places of all segments are known.

        Args:
            prompts: the segments.
            shape: (R, L), rows and tokens of the batch.
            device: device of the batch.
        """
        device = torch.device(device)
        prompts = [_as_one(prompt) for prompt in prompts]
        groups = _families(prompts, _CALL_COST.get(device.type, _CALL_COST_OF_DEVICES))
        families: list[Family] = []
        starts: list[int] = []
        lengths: list[int] = []
        widths: list[int] = []
        for group, family in groups:
            families.append(family)
            for prompt in group:
                starts.append(prompt.start)
                lengths.append(prompt.length)
                widths.append(family.prompt_length)
            for prompt in group:
                for start, length in prompt.completions:
                    starts.append(start)
                    lengths.append(length)
                    widths.append(family.completion_length)
        index, is_token = _slots(torch.tensor(starts), torch.tensor(lengths), torch.tensor(widths))
        n_tokens = shape[0] * shape[1]
        inverse = torch.zeros(n_tokens, dtype=torch.int64)
        in_segment = torch.zeros(n_tokens, dtype=torch.bool)
        slots = is_token.nonzero()[:, 0]
        inverse[index[slots]] = slots
        in_segment[index[slots]] = True
        empty_slots = (~is_token).nonzero()[:, 0]
        padding = (~in_segment).nonzero()[:, 0]
        moved = move_together([index, inverse, empty_slots, padding], device)
        return cls(tuple(shape), tuple(families), *moved)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SegmentPlan":
        """The same plan on a device. A model in parts on several devices asks for it at each layer: it is kept."""
        device = torch.device(device)
        if device == self.index.device:
            return self
        if device not in self._moved:
            tensors = [self.index, self.inverse, self.empty_slots, self.padding]
            moved = [tensor.to(device, non_blocking=non_blocking) for tensor in tensors]
            self._moved[device] = SegmentPlan(self.shape, self.families, *moved)
        return self._moved[device]

    def mask(self, family: int, kind: str, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The mask of the prompts (`kind` "prompts") or of the completions of a family, computed once for all layers.

        Returns:
            A mask to add, in `dtype`, that broadcasts to (batch, H, queries, keys); `None` for causal attention, which
            is lower-right for completions.
        """
        key = (family, kind, window, dtype)
        if key not in self._masks:
            make = _prompt_mask if kind == "prompts" else _completion_mask
            allowed = make(self.families[family], window, self.index.device)
            self._masks[key] = None if allowed is None else _to_add(allowed, dtype)
        return self._masks[key]


def move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Moves int64 tensors of one dimension to a device in one transfer."""
    if device.type == "cpu":
        return list(tensors)
    together = torch.cat(list(tensors)).to(device)
    return list(together.split([len(tensor) for tensor in tensors]))


# --- masks ------------------------------------------------------------------------------------------------------------


def _prompt_mask(family: Family, window: int | None, device: torch.device) -> Tensor | None:
    """(P, P) bool, or `None` if causal attention is enough."""
    if window is None or window >= family.prompt_length:
        return None
    position = torch.arange(family.prompt_length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def _completion_mask(family: Family, window: int | None, device: torch.device) -> Tensor | None:
    """(T, P + T) bool, or (n·K, 1, T, P + T) if prompts differ in length; `None` if lower-right causal is enough."""
    longest, own = family.prompt_length, family.completion_length
    has_window = window is not None and window < longest + own
    is_ragged = len(set(family.prompt_lengths)) > 1
    if not has_window and not is_ragged and device.type == "cuda":
        return None  # there is a kernel for it
    lengths = list(family.prompt_lengths) if is_ragged else [longest]
    prompt_lengths = torch.tensor(lengths, device=device)[:, None, None]  # (n, 1, 1)
    queries = torch.arange(own, device=device)[:, None]
    keys = torch.arange(longest + own, device=device)
    in_prompt = keys < longest
    # The position of each query and key in its sequence: own tokens follow the last token of their prompt.
    key_positions = torch.where(in_prompt, keys, keys - longest + prompt_lengths)  # (n, 1, P + T)
    distance = prompt_lengths + queries - key_positions  # (n, T, P + T)
    allowed = (distance >= 0) & ((keys < prompt_lengths) | ~in_prompt)
    if has_window:
        allowed &= distance < window
    if not is_ragged:
        return allowed[0]
    return allowed.repeat_interleave(family.per_prompt, 0)[:, None]


def _to_add(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask to add for a bool mask. Its memory is aligned as kernels want it: they would copy others every time."""
    width = allowed.shape[-1]
    aligned = -(-width // 16) * 16
    mask = torch.zeros((*allowed.shape[:-1], aligned), dtype=dtype, device=allowed.device)[..., :width]
    return mask.masked_fill_(~allowed, float("-inf"))


# --- plans ------------------------------------------------------------------------------------------------------------


def _families(prompts: Sequence[PromptSegments], call_cost: float) -> list[tuple[list[PromptSegments], Family]]:
    """Prompts that are computed together: those with equally many completions, and of so similar lengths that padding
    costs less than a further call."""
    ordered = sorted(prompts, key=lambda prompt: (len(prompt.completions), prompt.length, prompt.longest))
    groups: list[tuple[list[PromptSegments], Family]] = []
    for prompt in ordered:
        alone = _family([prompt])
        if groups and groups[-1][1].per_prompt == alone.per_prompt:
            group, family = groups[-1]
            together = _family([*group, prompt])
            if _cost(together) <= _cost(family) + _cost(alone) + call_cost:
                groups[-1] = ([*group, prompt], together)
                continue
        groups.append(([prompt], alone))
    return groups


def _cost(family: Family) -> float:
    has_mask = family.per_prompt > 0 and len(set(family.prompt_lengths)) > 1
    return family.pairs * (_MASK_COST if has_mask else 1.0)


def _family(group: list[PromptSegments]) -> Family:
    lengths = tuple(prompt.length for prompt in group)
    longest = max(prompt.longest for prompt in group)
    return Family(lengths, len(group[0].completions), max(lengths), longest)


def _slots(starts: Tensor, lengths: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """The token of every slot of segments that are padded to `widths`, and whether the slot has one of its own."""
    segment = torch.arange(len(starts)).repeat_interleave(widths)
    first_slots = widths.cumsum(0) - widths
    place = torch.arange(len(segment)) - first_slots[segment]
    is_token = place < lengths[segment]
    return starts[segment] + torch.minimum(place, lengths[segment] - 1), is_token


def _find_prompts(segments: Tensor, owners: Tensor, positions: Tensor) -> list[PromptSegments]:
    """The segments of a batch from its tensors (R, L) on the CPU."""
    length = segments.shape[1]
    is_first = torch.ones_like(segments, dtype=torch.bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = is_first.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([segments.numel()]))
    found: dict[tuple[int, int], tuple[int, int, list[tuple[int, int]]]] = {}
    runs = zip(
        starts.tolist(),
        lengths.tolist(),
        segments.flatten()[starts].tolist(),
        owners.flatten()[starts].tolist(),
        positions.flatten()[starts].tolist(),
        strict=True,
    )
    for start, n_tokens, segment, owner, position in runs:
        if segment < 0:
            continue
        row = start // length
        prompt = found.get((row, owner))
        if segment == owner or prompt is None:
            if (row, segment) in found or segment != owner:
                raise ValueError(f"row {row}: segment {segment} is in several parts, or precedes its prompt")
            found[row, segment] = (start, n_tokens, [])
        elif position != prompt[1]:
            raise ValueError(f"row {row}: segment {segment} starts at position {position}, not at {prompt[1]}")
        else:
            prompt[2].append((start, n_tokens))
    return [PromptSegments(start, length, tuple(own)) for start, length, own in found.values()]


def _as_one(prompt: PromptSegments) -> PromptSegments:
    """A single completion that follows its prompt is one causal sequence with it."""
    if len(prompt.completions) == 1 and prompt.completions[0][0] == prompt.start + prompt.length:
        return PromptSegments(prompt.start, prompt.length + prompt.completions[0][1])
    return prompt

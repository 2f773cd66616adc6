"""Sequences that share a prompt, scored in rows `[prompt, y1 … yK]`: their groups, and those of each forward pass."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..data.collators import packed_rows, pad_right
from ..data.storage import TokenCounts
from ..errors import UserError
from ..modeling.layouts import Layout


class PromptGroup(NamedTuple):
    """Sequences with the same first tokens.

    Attributes:
        indices: numbers of the sequences.
        prompt_ids: the tokens that they share.
        completion_ids: the further tokens of each sequence. A sequence that shares no token is a group of its own,
            with all its tokens in `prompt_ids` and no completion.
    """

    indices: list[int]
    prompt_ids: list[int]
    completion_ids: list[list[int]]

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the group; the shared ones count once."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))


class ScoringPass(NamedTuple):
    """Groups that are scored in one forward pass.

    Attributes:
        layout: the layout of the batch. In `PLAIN`, each sequence is a group of its own.
        groups: the groups.
    """

    layout: Layout
    groups: list[PromptGroup]

    @classmethod
    def of_rows(cls, indices: list[int], sequences: Sequence[list[int]]) -> "ScoringPass":
        """The sequences with these numbers in plain rows."""
        return cls(Layout.PLAIN, [PromptGroup([index], sequences[index], []) for index in indices])

    @property
    def indices(self) -> list[int]:
        """Numbers of the sequences, in the order of their scores."""
        return [index for group in self.groups for index in group.indices]

    def batch(self, pad_token_id: int) -> dict[str, Tensor]:
        """The tensors of the pass, as of `DataCollatorForComparisons` in its layouts."""
        if self.layout == Layout.PLAIN:
            return pad_right([group.prompt_ids for group in self.groups], pad_token_id)
        places = [0] * len(self.groups)  # by segments, all are in one row, without padding
        if self.layout == Layout.MASK:
            places = list(range(len(self.groups)))
        return packed_rows([(group.prompt_ids, group.completion_ids) for group in self.groups], places, pad_token_id)


def check_per_prompt(n: int, per_prompt: int) -> None:
    """Raises `UserError` unless N completions are groups of `per_prompt`."""
    if not isinstance(per_prompt, int) or per_prompt < 1 or n % per_prompt:
        raise UserError(
            f"per_prompt={per_prompt}: {n} completions are not groups of {per_prompt}: give as many completions of "
            "each prompt, one after the other, or leave it out."
        )


def prompt_groups(sequences: Sequence[list[int]], per_prompt: int) -> list[PromptGroup]:
    """Groups each `per_prompt` sequences that follow each other by the tokens that all of them start with.

    The last token of a sequence is never shared, as each has a score of its own.

    Args:
        sequences: N lists of token ids, N divisible by `per_prompt`.
        per_prompt: number of sequences per group.
    """
    groups = []
    for first in range(0, len(sequences), per_prompt):
        indices = list(range(first, first + per_prompt))
        of_group = [sequences[index] for index in indices]
        n_shared = _common_prefix(of_group)
        if n_shared:
            completions = [ids[n_shared:] for ids in of_group]
            groups.append(PromptGroup(indices, of_group[0][:n_shared], completions))
        else:
            groups += [PromptGroup([index], sequences[index], []) for index in indices]
    return groups


def _common_prefix(sequences: list[list[int]]) -> int:
    """Number of tokens that all sequences start with, without the last token of any."""
    shortest = min(sequences, key=len)
    for position in range(len(shortest) - 1):
        token = shortest[position]
        if any(ids[position] != token for ids in sequences):
            return position
    return max(len(shortest) - 1, 0)


def counts_of_groups(groups: list[PromptGroup]) -> TokenCounts:
    """The numbers of tokens of groups. A sequence that is alone is counted as a completion without a prompt."""
    prompt, completions, longest, number = [], [], [], []
    for group in groups:
        is_alone = not group.completion_ids
        lengths = [len(ids) for ids in group.completion_ids] or [len(group.prompt_ids)]
        prompt.append(0 if is_alone else len(group.prompt_ids))
        completions.append(sum(lengths))
        longest.append(max(lengths))
        number.append(len(lengths))
    return TokenCounts(*(np.array(values, np.int64) for values in (prompt, completions, longest, number)))


def passes_of_groups(
    groups: list[PromptGroup],
    layout: Layout,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[ScoringPass]:
    """The groups of each forward pass, longest first, so that a lack of memory shows early. No group is split.

    Args:
        groups: the groups.
        layout: `SEGMENTS`, in which a pass is one row without padding, or `MASK`, with a padded row for each group.
        batch_size: maximum number of sequences per pass; a group with more is a pass by itself.
        max_tokens: maximum number of tokens per pass, padding included; `None` means no limit. A larger group is a
            pass by itself.
    """
    of_pass: list[PromptGroup] = []
    n_sequences = 0
    n_tokens = 0
    for group in sorted(groups, key=lambda group: -group.n_tokens):
        n_sequences += len(group.indices)
        if layout == Layout.MASK and of_pass:
            n_tokens += of_pass[0].n_tokens  # the others in the pass are padded to its longest
        else:
            n_tokens += group.n_tokens
        is_over = n_sequences > batch_size or (max_tokens is not None and n_tokens > max_tokens)
        if of_pass and is_over:
            yield ScoringPass(layout, of_pass)
            of_pass = []
            n_sequences = len(group.indices)
            n_tokens = group.n_tokens
        of_pass.append(group)
    if of_pass:
        yield ScoringPass(layout, of_pass)

"""Names of the phases of PPO, and the passes that are the same on the base of the policy and on a model of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from ..logprobs import captured_hidden_states, completion_hidden_states
from ..packing import Layout
from ..prefix import model_inputs
from .setup import Setup
from .training import layout_of, packed_batch, padded_rows

ROLLOUT = "rollout"
REWARD = "reward"
SCORING = "scoring"
POLICY_UPDATE = "policy update"
VALUE_UPDATE = "value update"
TEXTS = "PPO-ptx"
"""The language-model loss of texts, at the end of an optimizer step."""

NOT_COUNTED = "not counted"
"""Segment of what only prepares the next one."""

_SCORER_BATCH = 32
"""Sequences of a pass of `RewardScorer`, at most."""


def adds_gradients(setup: Setup) -> bool:
    """Whether a pass adds to gradients that are there: a step has several passes."""
    return setup.accumulates or setup.rows(setup.train_batch) < setup.train_batch


def score_rows(model: nn.Module, head: nn.Module, setup: Setup) -> Tensor:
    """One pass of `RewardScorer` over full completions: (rows, tokens), or (rows, 1) from a classifier of its own."""
    rows = min(_SCORER_BATCH, setup.rollout)
    layout = layout_of(model, setup)
    if layout == Layout.PLAIN or rows % setup.per_prompt:
        inputs: dict[str, Any] = padded_rows(rows, setup.length)
    else:
        inputs = model_inputs(model, packed_batch(rows, setup, layout, whole=True), layout)
    if model.get_output_embeddings() is not None:
        with captured_hidden_states(model) as captured:
            model(**inputs, use_cache=False)
        return head(captured[-1]).squeeze(-1)
    return model(**inputs, use_cache=False).logits


def hidden_states(model: nn.Module, setup: Setup, rows: int) -> Tensor:
    """`completion_hidden_states` of full completions."""
    layout = layout_of(model, setup)
    if layout == Layout.PLAIN:
        ids = torch.zeros(rows, setup.length, dtype=torch.int64)
        mask = torch.ones(rows, setup.completion_tokens, dtype=torch.bool)
        lengths = torch.full((rows,), setup.prompt_tokens)
        return completion_hidden_states(model, model, ids, lengths, mask)
    groups = packed_batch(rows, setup, layout)
    inputs = model_inputs(model, groups.batch, layout)
    with captured_hidden_states(model) as captured:
        model(**inputs, use_cache=False)
    return captured[0].flatten(0, 1)[groups.predicting]

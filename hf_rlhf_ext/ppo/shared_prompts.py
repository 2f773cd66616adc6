"""Chooses how the completions of a prompt pass through the models of a run: behind their prompt, or a copy for each."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ..data.storage import TokenCounts
from ..modeling.layout_costs import ModelSizes, cheaper_layout
from ..modeling.layouts import LayoutChoice, find_layout
from ..modeling.packing import Layout
from ..modeling.stack import AdapterStack, Role
from .config import PPOConfig
from .prompts import Prompts

logger = logging.getLogger(__name__)

PASSED = ("policy", "reference", "value")
"""The roles that rollouts and training pass completions through. A reward model finds its own layout."""


def choose_layouts(stack: AdapterStack, args: PPOConfig, prompts: Prompts, device: torch.device) -> list[str]:
    """Sets the layout of policy, reference and critic, once for the shared base and once for each other model.

    The layout stays the same for the whole run: scoring and training must compute the same. With one completion per
    prompt, nothing is tested and nothing changes.

    Args:
        stack: the roles, with their models on the device.
        args: options of the run.
        prompts: the prompts of the training data.
        device: device of the run.

    Returns:
        For each model that gets a copy of the prompt for each completion, one line that says why.
    """
    if args.num_generations == 1:
        return []
    lines = []
    for name, model, roles in _models(stack):
        choice = find_layout(model, device)
        if choice.layout is Layout.MASK:
            choice = _cheaper(choice, model, args, prompts)
        logger.info("num_generations=%d: layout of the %s: %s", args.num_generations, name, choice.layout)
        for role in roles:
            role.layout = choice.layout
        if choice.layout is Layout.PLAIN:
            lines.append(
                f"num_generations={args.num_generations}: the {name} computes a prompt once for each of its "
                f"completions, as {choice.reason}"
            )
    return lines


def _models(stack: AdapterStack) -> Iterator[tuple[str, nn.Module, list[Role]]]:
    """Each model with its name in messages and the roles that it computes."""
    roles = [(name, stack.roles[name]) for name in PASSED if name in stack.roles]
    yield "policy", stack.model, [role for _, role in roles if role.model is None]
    for name, role in roles:
        if role.model is not None:
            yield name, role.model, [role]


def _cheaper(choice: LayoutChoice, model: nn.Module, args: PPOConfig, prompts: Prompts) -> LayoutChoice:
    """The cheaper of a masked row and plain rows, if every completion has the maximum length."""
    lengths = prompts.lengths
    ones = np.ones_like(lengths)
    counts = TokenCounts(
        prompt=lengths,
        completions=ones * args.num_generations * args.max_completion_length,
        longest=ones * args.max_completion_length,
        n_completions=ones * args.num_generations,
    )
    together = args.per_device_train_batch_size // args.num_generations
    cheaper = cheaper_layout(choice.layout, ModelSizes.of(model), counts, together)
    if cheaper.layout is choice.layout:
        return choice
    return LayoutChoice(cheaper.layout, f"a mask would take {cheaper.ratio:.1f} times as long ({choice.reason})")

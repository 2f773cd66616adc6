"""What is said before training and scoring about the layouts with shared prompts, which `find_layout` tests."""

import logging

import torch
from accelerate import PartialState
from torch import nn

from ..modeling.adapters import bare_model
from ..modeling.heads import is_encoder
from ..modeling.layouts import Layout, find_layout

logger = logging.getLogger(__name__)


def shared_prefix_problem(model: nn.Module, device: torch.device | None = None) -> str | None:
    """Tests whether a model gives the same scores in the shared-prefix layout as in plain rows.

    See `modeling.layouts.find_layout`, which also sets a model with sdpa attention to attention by segments.

    Args:
        model: the reward model.
        device: device of training; `None` means the current device of the model.

    Returns:
        Why the layout is not supported, in a few words; `None` if it is.
    """
    choice = find_layout(model, device)
    return choice.reason if choice.layout == Layout.PLAIN else None


def log_plain_rows(model: nn.Module, message: str, *, is_expected: bool = False) -> None:
    """Logs that prompts are not shared. A decoder without it is slower than a user may expect: one warning.

    Args:
        model: the model.
        message: what is logged.
        is_expected: whether it is only an information for a decoder too.
    """
    is_expected = is_expected or is_encoder(bare_model(model)) or not PartialState().is_main_process
    logger.log(logging.INFO if is_expected else logging.WARNING, "%s", message)

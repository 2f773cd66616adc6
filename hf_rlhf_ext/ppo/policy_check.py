"""Checks that the policy can sample completions, before anything else is loaded."""

import torch
from torch import nn

from ..errors import UserError, first_line
from ..modeling.adapters import bare_model
from ..modeling.probing import probing
from .engine import generate_completions, sampling_config

_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_PROBED_TOKENS = 64


def check_generates(model: nn.Module, ids: list[int]) -> None:
    """Samples two tokens, so that a model with which `generate` fails is refused in one line.

    The random state and the mode of the model do not change.

    Args:
        model: the policy, also inside PEFT.
        ids: token ids of a prompt, of which the first 64 are used.

    Raises:
        UserError: if `generate` fails.
    """
    # No token stops the completion, as the second one is the first that needs the cache.
    config = sampling_config(max_new_tokens=2, temperature=1.0, top_p=1.0, top_k=0, stop_ids=[], pad_token_id=ids[0])
    device = next(model.parameters()).device
    try:
        with probing(model):
            generate_completions(model, [ids[:_PROBED_TOKENS]], config, device)
    except (UserError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        raise UserError(
            f"model: `generate` of Transformers fails with this {type(bare_model(model)).__name__} "
            f"({first_line(error)}): check its config, or use another model."
        ) from error

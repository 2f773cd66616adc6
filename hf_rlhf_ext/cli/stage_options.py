"""Options of trainers and models that the stages of a longer run share."""

import math
from typing import Any

import torch

from ..modeling.loading import resolve_dtype
from .options import ModelArguments, machine_defaults

MOST_WARMUP_STEPS = 5


def trainer_options(model_args: ModelArguments) -> dict[str, Any]:
    """Options of a trainer that follow from the machine and from the precision of the base."""
    options = {
        "report_to": "none",
        "activation_checkpointing": model_args.is_quantized,  # costs time; a small model has room without it
        **machine_defaults(),
    }
    if model_args.dtype not in (None, "auto"):
        # Mixed precision follows the base: an fp32 base computes in fp32.
        dtype = resolve_dtype(model_args.dtype)
        options["bf16"] = dtype == torch.bfloat16
        options["fp16"] = dtype == torch.float16
    return options


def model_options(model_args: ModelArguments, name: str, revision: str | None = None) -> ModelArguments:
    """The options of the model for another name: same precision, same size of a new adapter."""
    values = dict(vars(model_args))
    values["model_name_or_path"] = name
    values["model_revision"] = revision or "main"
    return ModelArguments(**values)


def warmup_steps(n_rows: int, n_epochs: float, batch: int) -> int:
    """Steps of warm-up: at most a tenth of all, so that a few rows are learned from at all."""
    n_steps = math.ceil(n_rows / batch) * n_epochs
    return min(MOST_WARMUP_STEPS, int(n_steps // 10))

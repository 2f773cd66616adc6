"""Moves a model to the device of its run before `Trainer` does, for forward passes that come earlier."""

from torch import nn
from transformers import TrainingArguments

from .engines import Engine, asked_engine


def move_before_probes(model: nn.Module, args: TrainingArguments) -> None:
    """Moves a model to the device of the run, so that checks of what it computes do not compute on the CPU.

    Only where `Trainer` moves it anyway: not a model that is quantized or spread over devices, and not one that an
    engine places, or that is not to be placed at all.

    Args:
        model: the model to train, also inside PEFT.
        args: options of the run.
    """
    is_placed_already = (
        getattr(model, "quantization_method", None) is not None
        or getattr(model, "hf_device_map", None) is not None
        or getattr(model, "is_distributed_loading_by_transformers", False)
    )
    is_placed_later = asked_engine(args) is not Engine.DDP or args.fp16_full_eval or args.bf16_full_eval
    if is_placed_already or is_placed_later or args.place_model_on_device is False:
        return
    model.to(args.device)

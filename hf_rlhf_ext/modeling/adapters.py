"""Switching, copying, saving and loading of adapters that share one base.

PEFT's `set_adapter` and `disable_adapter` keep `requires_grad` for the active adapter only, and PyTorch silently drops
the gradients of parameters whose flag is off in the backward pass. Every function here therefore restores all flags.
"""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments

from ..compat import use_adapter
from ..errors import UserError


def bare_model(model: nn.Module) -> nn.Module:
    """Returns the Transformers model inside DDP and PEFT wrappers."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def active_adapter(model: PeftModel, name: str | None):
    """Inside the context, the model computes with adapter `name`; afterward the previous adapter is active again.

    All `requires_grad` flags stay the same, also inside the context, so that a role can be trained there.

    Args:
        model: model with adapters.
        name: name of the adapter; `None` means the base without an adapter.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    try:
        with use_adapter(model, name):
            restore()
            yield
    finally:
        restore()


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Adds a frozen copy of an adapter. The active adapter stays the same.

    Args:
        model: model with adapters.
        source: name of the adapter to copy, of any PEFT type.
        target: name of the copy.

    Raises:
        UserError: if PEFT supports only one adapter of this type per model.
    """
    # `add_adapter` and `set_adapter` change the flags of other adapters. They are restored at the end.
    flags_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    active = model.active_adapter
    try:
        model.add_adapter(target, copy.deepcopy(model.peft_config[source]))
    except (ValueError, TypeError) as error:
        kind = model.peft_config[source].peft_type.value
        raise UserError(
            f"PEFT does not support two adapters of type {kind} on one base, so the frozen reference cannot be added: "
            f"merge the adapter into the base, or use LoRA ({str(error).splitlines()[0]})"
        ) from error
    state = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    copied_weights = {key: value.clone() for key, value in state.items()}
    set_peft_model_state_dict(model, copied_weights, adapter_name=target)
    model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags_before.get(name, False))


def save_adapter(model: PeftModel, name: str, folder: str | Path) -> None:
    """Writes one adapter as an ordinary PEFT folder with safetensors, which `PeftModel.from_pretrained` can load.

    Args:
        model: model with adapters.
        name: name of the adapter.
        folder: folder to write; it is created if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {}
    for key, value in state.items():
        # Cloned, as safetensors does not accept tied tensors, which share storage.
        tensors[key] = value.detach().cpu().clone().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    # An adapter that is loaded from the folder starts frozen. The adapter in memory does not change.
    config = model.peft_config[name]
    was_inference = config.inference_mode
    config.inference_mode = True
    # An adapter that was created in memory may not name its base yet.
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path
    config.save_pretrained(str(folder))
    config.inference_mode = was_inference


def load_adapter_weights(model: PeftModel, name: str, folder: str | Path) -> None:
    """Reads an adapter folder into an existing adapter, in place.

    Args:
        model: model with adapters.
        name: name of the existing adapter.
        folder: folder of the saved adapter.

    Raises:
        UserError: if names or shapes of the weights do not match.
    """
    # Loaded on the CPU, and then copied into the existing weights on their device.
    weights = load_peft_weights(str(folder), device="cpu")
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: this adapter does not fit the model: {str(error).splitlines()[-1].strip()}"
        ) from error
    if result.unexpected_keys:
        raise UserError(f"{folder}: the adapter has weights that the model lacks, first {result.unexpected_keys[0]!r}.")
    # PEFT does not report weights that are missing in the file.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing = state.keys() - weights.keys()
    if missing:
        raise UserError(f"{folder}: the adapter lacks weights that the model has, first {min(missing)!r}.")


@contextmanager
def evaluating(model: nn.Module):
    """Inside the context, the model is in eval mode; afterward the previous mode is restored."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapters_in_autocast_dtype(model: nn.Module, *, enabled: bool = True):
    """Inside the context, autocast computes fp32 adapters in its dtype, and PEFT does not cast activations to fp32.

    This saves the memory of fp32 activations, while the fp32 weights keep small updates. The backward pass must be
    inside the context too, as gradient checkpointing computes the adapters again there.
    """
    with disable_input_dtype_casting(model, active=enabled):
        yield


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of the options `bf16` and `fp16`, for `mixed_precision`; `None` if both are off."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    return None


@contextmanager
def mixed_precision(model: nn.Module, dtype: torch.dtype | None):
    """Inside the context, the model computes with autocast to `dtype`, and so do its adapters.

    Do not use it around an optimizer step: autocast keeps its casts of fp32 weights until the outermost context ends,
    so that later forward passes would use the old weights.

    Args:
        model: the model.
        dtype: dtype of autocast; `None` changes nothing.
    """
    device = next(model.parameters()).device.type
    active = dtype is not None
    with torch.autocast(device, dtype=dtype, enabled=active), adapters_in_autocast_dtype(model, enabled=active):
        yield


@contextmanager
def merged_adapter(model: nn.Module, *, enabled: bool):
    """Inside the context, the active adapter is merged into its base, which makes generation faster.

    Afterward the base is restored exactly, from copies of the changed weights, as subtracting the update would leave
    rounding errors in bf16. Nothing is merged if the model has no adapter that can be merged, or if the base is
    quantized, as merging would quantize it again.

    Args:
        model: the model.
        enabled: `False` merges nothing.
    """
    layers = []
    if enabled:
        layers = _mergeable_layers(model)
    if not layers:
        yield
        return

    originals = []
    for layer in layers:
        for parameter in layer.get_base_layer().parameters(recurse=False):
            originals.append((parameter, parameter.detach().clone()))
    try:
        for layer in layers:
            layer.merge(adapter_names=[model.active_adapter])
        yield
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        with torch.no_grad():
            for parameter, original in originals:
                parameter.data.copy_(original)


def _mergeable_layers(model: nn.Module) -> list[BaseTunerLayer]:
    # Prompt learning changes the input instead of the weights.
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return []
    if getattr(model.get_base_model(), "is_quantized", False):
        return []
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "merge")]

"""Adapters of one shared base as roles: switch, copy, save and load them without losing a flag or a bit.

PEFT's `set_adapter` and `disable_adapter` leave `requires_grad` on for the active adapter only, and PyTorch silently
drops the gradients of leaves whose flag is off when the backward pass arrives; so every switch here restores all flags.
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
    """The Transformers model under DDP and PEFT wrappers."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def active_adapter(model: PeftModel, name: str | None):
    """Computes with adapter `name` (None: the bare base) inside; restores what was active after.

    Every `requires_grad` flag stays as it was, inside too, so that a role can be trained there.
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
    """Adds adapter `target`, a frozen copy of `source`, of whatever PEFT type; the active adapter stays the same.

    Raises:
        UserError: a PEFT type of which one model can hold only one adapter.
    """
    # `add_adapter` and `set_adapter` change flags of other adapters: they are put back at the end.
    flags_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    active = model.active_adapter
    try:
        model.add_adapter(target, copy.deepcopy(model.peft_config[source]))
    except (ValueError, TypeError) as error:
        kind = model.peft_config[source].peft_type.value
        raise UserError(
            f"peft type {kind} cannot be held twice on one base, so there is no room for the frozen reference: merge "
            f"the adapter into the base, or use LoRA ({str(error).splitlines()[0]})"
        ) from error
    state = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    copied_weights = {key: value.clone() for key, value in state.items()}
    set_peft_model_state_dict(model, copied_weights, adapter_name=target)
    model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags_before.get(name, False))


def save_adapter(model: PeftModel, name: str, folder: str | Path) -> None:
    """Writes one adapter as an ordinary PEFT folder, safetensors only, which `PeftModel.from_pretrained` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {}
    for key, value in state.items():
        # A clone: tied tensors share storage, which safetensors refuses.
        tensors[key] = value.detach().cpu().clone().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    # What is loaded from a folder starts frozen; the adapter in memory goes on as it was.
    config = model.peft_config[name]
    was_inference = config.inference_mode
    config.inference_mode = True
    # An adapter made in memory may not name its base yet.
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path
    config.save_pretrained(str(folder))
    config.inference_mode = was_inference


def load_adapter_weights(model: PeftModel, name: str, folder: str | Path) -> None:
    """Reads an adapter folder into the existing adapter `name`; raises `UserError` where keys or shapes do not fit."""
    # On the CPU first: it is copied into weights that are on their device already.
    weights = load_peft_weights(str(folder), device="cpu")
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: this adapter does not fit the model: {str(error).splitlines()[-1].strip()}"
        ) from error
    if result.unexpected_keys:
        raise UserError(f"{folder}: the adapter has weights that the model lacks, first {result.unexpected_keys[0]!r}.")
    # PEFT says nothing about weights that the file lacks.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing = state.keys() - weights.keys()
    if missing:
        raise UserError(f"{folder}: the adapter lacks weights that the model has, first {min(missing)!r}.")


@contextmanager
def evaluating(model: nn.Module):
    """Puts the model in eval mode inside and back in the mode it had after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapters_in_autocast_dtype(model: nn.Module, *, enabled: bool = True):
    """Lets autocast compute fp32 master adapters in its dtype, instead of PEFT casting activations up to fp32.

    No fp32 activations, and no update is lost. Enter it around the backward pass too: checkpointing computes the
    adapters again there.
    """
    with disable_input_dtype_casting(model, active=enabled):
        yield


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """What `bf16` and `fp16` ask for, as `mixed_precision` takes it."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    return None


@contextmanager
def mixed_precision(model: nn.Module, dtype: torch.dtype | None):
    """Autocast to `dtype` with the adapters computed in it; None changes nothing.

    Never around an optimizer step: autocast keeps its casts of fp32 weights until the outermost context ends, so every
    later forward inside would see the old weights.
    """
    device = next(model.parameters()).device.type
    active = dtype is not None
    with torch.autocast(device, dtype=dtype, enabled=active), adapters_in_autocast_dtype(model, enabled=active):
        yield


@contextmanager
def merged_adapter(model: nn.Module, *, enabled: bool):
    """Merges the active adapter into its base inside (faster generation); restores the base to the bit after.

    Subtracting the update again would leave rounding errors in bf16, so the touched weights are kept as copies. Does
    nothing for models without a mergeable adapter, and on quantized bases, where merging would re-quantize the weights.
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
    # Prompt learning changes the input, not the weights.
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return []
    if getattr(model.get_base_model(), "is_quantized", False):
        return []
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "merge")]

"""Switching, copying, saving and loading of adapters that share one base.

PEFT's `set_adapter` and `disable_adapter` keep `requires_grad` for the active adapter only, and PyTorch silently drops
the gradients of parameters whose flag is off in the backward pass. Every function here therefore restores all flags.
"""

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..compat import use_adapter
from ..errors import UserError, first_line, last_line
from .adapter_files import refuse_lost_weights
from .adapter_kinds import (
    config_of_copy,
    config_without_start,
    merging_layers,
    shared_weight,
    split_start,
    without_start,
)
from .embeddings import embeddings_to_save, load_embeddings
from .locations import is_only_known_here
from .ownership import adapter_state
from .resizing import was_resized
from .shards import whole, whole_state
from .source import requested_revision_of

logger = logging.getLogger(__name__)

_unmerged: WeakSet[PeftModel] = WeakSet()
"""Models of which a warning said that their adapter cannot be merged."""

_said_only_here: set[str] = set()
"""Bases of which a message said that other libraries do not find them."""

PROMPT_ENCODER_FILE = "prompt_encoder.safetensors"
"""Encoder of virtual tokens (P-tuning), which a checkpoint needs; PEFT itself saves only the tokens."""


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
        UserError: if PEFT supports only one adapter of this type per model, or makes a copy that lacks weights.
    """
    # `add_adapter` and `set_adapter` change the flags of other adapters. They are restored at the end.
    flags_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    active = model.active_adapter
    try:
        model.add_adapter(target, config_of_copy(model.peft_config[source]))
    except (ValueError, TypeError) as error:
        kind = model.peft_config[source].peft_type.value
        raise UserError(
            f"PEFT does not support two adapters of type {kind} on one base, so that the frozen reference or the "
            f"critic cannot be added: merge the adapter into the base, or use LoRA ({first_line(error)})"
        ) from error
    if model.peft_config[source].is_prompt_learning:
        # PEFT's state has only the virtual tokens, without the encoder that makes them (P-tuning).
        model.prompt_encoder[target].load_state_dict(model.prompt_encoder[source].state_dict())
    else:
        state = adapter_state(model, source)
        copied_weights = {key: value.clone() for key, value in state.items()}
        result = set_peft_model_state_dict(model, copied_weights, adapter_name=target)
        if result.unexpected_keys:
            kind = model.peft_config[source].peft_type.value
            raise UserError(
                f"PEFT cannot hold a copy of this adapter of type {kind} on the same base, which the reference and the "
                f"critic need, as the copy has no place for {result.unexpected_keys[0]}: merge the adapter into the "
                "base, or use LoRA on other layers."
            )
    model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags_before.get(name, False))


def save_adapter(
    model: PeftModel,
    name: str,
    folder: str | Path,
    *,
    start: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    writes: bool = True,
) -> None:
    """Writes one adapter as an ordinary PEFT folder with safetensors, which `PeftModel.from_pretrained` can load.

    Embeddings that were resized or trained are saved too, see `embeddings_to_save`.

    Args:
        model: model with adapters.
        name: name of the adapter.
        folder: folder to write; it is created if missing.
        start: name of the adapter that an initialization such as PiSSA took out of the base. What is written is then an
            ordinary LoRA of twice the rank for the original base.
        state_dict: the weights of the model by name, where they are gathered from several devices.
        writes: whether this process writes the files. If the weights are in shards, every process must call this.
    """
    state = _file_state(model, name, start, state_dict)
    prompt_encoder = whole_state(model.prompt_encoder[name].state_dict()) if _has_prompt_encoder(model, name) else None
    if not writes:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[name]
    if start is not None and start != name:
        config = config_without_start(config)
    tensors = {}
    for key, value in state.items():
        # Cloned, as safetensors does not accept tied tensors, which share storage.
        tensors[key] = value.detach().cpu().clone().contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    # What makes the virtual tokens, if that is more than PEFT saves (P-tuning).
    if prompt_encoder is not None:
        save_file(prompt_encoder, folder / PROMPT_ENCODER_FILE)

    # An adapter that is loaded from the folder starts frozen. The adapter in memory does not change.
    was_inference = config.inference_mode
    config.inference_mode = True
    # An adapter that was created in memory may not name its base yet, and PEFT does not know the base's revision.
    base = model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or base.name_or_path
    if config.base_model_name_or_path == base.name_or_path:
        config.revision = config.revision or requested_revision_of(base)
    config.save_pretrained(str(folder))
    config.inference_mode = was_inference
    _say_how_others_open(folder, config.base_model_name_or_path)


def _file_state(
    model: PeftModel, name: str, start: str | None, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The weights in the file of one adapter, on their devices. The arguments are those of `save_adapter`."""
    state = whole_state(adapter_state(model, name, state_dict))
    if start is not None and start != name:
        state = without_start(state, whole_state(adapter_state(model, start, state_dict)))
    resized = was_resized(model, name)
    return state | embeddings_to_save(model, name, resized=resized, start=start, state_dict=state_dict)


def adapter_tensors(model: PeftModel, name: str, *, start: str | None = None) -> dict[str, torch.Tensor]:
    """All weights that `save_adapter` writes for one adapter, by name and on their devices.

    Args:
        model: model with adapters.
        name: name of the adapter.
        start: as in `save_adapter`.
    """
    tensors = _file_state(model, name, start)
    if _has_prompt_encoder(model, name):
        for key, value in model.prompt_encoder[name].state_dict().items():
            tensors[f"prompt_encoder.{key}"] = whole(value)
    return tensors


def _say_how_others_open(folder: Path, base: str) -> None:
    """Says once how Transformers alone opens an adapter whose base only this library finds."""
    in_checkpoint = any(part.startswith(f"{PREFIX_CHECKPOINT_DIR}-") for part in folder.parts)
    if in_checkpoint or base in _said_only_here or not is_only_known_here(base):
        return
    _said_only_here.add(base)
    logger.warning(
        "Only this library finds the base of %s (%s). For Transformers or PEFT alone, `hf-rlhf merge %s` writes one "
        "plain model.",
        folder,
        base,
        folder,
    )


def load_adapter_weights(model: PeftModel, name: str, folder: str | Path, *, start: str | None = None) -> None:
    """Reads an adapter folder into an existing adapter, in place.

    Args:
        model: model with adapters.
        name: name of the existing adapter.
        folder: folder of the saved adapter.
        start: as in `save_adapter`.

    Raises:
        UserError: if names or shapes of the weights do not match, or if the adapter was trained on a base that was
            changed in another way.
    """
    # Loaded on the CPU, and then copied into the existing weights on their device.
    weights = load_peft_weights(str(folder), device="cpu")
    if start == name:  # also of another start, the weights would fit, but not the base
        _check_same_start(model, start, weights, folder)
    elif start is not None:
        weights, start_weights = split_start(weights)
        _check_same_start(model, start, start_weights, folder)
    load_embeddings(model, weights, name, start=start)
    refuse_lost_weights(folder, model, name, weights)
    has_prompt_encoder = _has_prompt_encoder(model, name)
    if has_prompt_encoder:
        # The saved virtual tokens are the output of the encoder, which may have another shape than its input. PEFT gets
        # the present input, and the whole encoder is read below.
        weights["prompt_embeddings"] = model.prompt_encoder[name].embedding.weight.detach().clone()
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise UserError(f"{folder}: this adapter does not fit the model: {last_line(error)}.") from error
    if model.peft_config[name].is_prompt_learning:
        result.unexpected_keys.remove("prompt_embeddings")  # loaded under another name
    if result.unexpected_keys:
        raise UserError(f"{folder}: the adapter has weights that the model lacks, first {result.unexpected_keys[0]!r}.")
    if has_prompt_encoder:
        _load_prompt_encoder(model, name, folder)


def _has_prompt_encoder(model: PeftModel, name: str) -> bool:
    """Whether more than the virtual tokens is trained: layers that compute them, or with CPT a change of them."""
    return model.peft_config[name].is_prompt_learning and len(model.prompt_encoder[name].state_dict()) > 1


def _load_prompt_encoder(model: PeftModel, name: str, folder: str | Path) -> None:
    path = Path(folder) / PROMPT_ENCODER_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: lacks {PROMPT_ENCODER_FILE}, without which its virtual tokens cannot be trained further: start "
            "without a checkpoint."
        )
    model.prompt_encoder[name].load_state_dict(load_file(path))


@contextmanager
def saved_as_one_adapter(model: nn.Module):
    """Inside the context, `save_pretrained` of a `PeftModel` writes its active adapter as `save_adapter` does.

    PEFT's own would write every adapter, those with another name than `default` in folders of their own, and it asks
    the Hub whether the embeddings were resized. It would also leave an empty form as `README.md`, which whoever wants
    to add a line would take for the card. `Trainer` calls it when it saves.

    Args:
        model: the model of a trainer, also inside wrappers. Models without adapters are not changed.
    """
    peft_model = extract_model_from_parallel(model)
    if not isinstance(peft_model, PeftModel):
        yield
        return

    def save_pretrained(folder, state_dict=None, is_main_process=True, **kwargs) -> None:
        if is_main_process:
            save_adapter(peft_model, peft_model.active_adapter, folder, state_dict=state_dict)

    peft_model.save_pretrained = save_pretrained
    try:
        yield
    finally:
        del peft_model.save_pretrained


def _check_same_start(model: PeftModel, start: str, saved: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Raises `UserError` if an initialization such as PiSSA took another adapter out of the base than the saved one."""
    present = adapter_state(model, start)
    for key, value in saved.items():
        if key not in present or not torch.allclose(present[key].float().cpu(), value.float(), rtol=1e-3, atol=1e-4):
            raise UserError(
                f"{folder}: the base was decomposed in another way when this adapter was initialized "
                f"(init_lora_weights={model.peft_config[start].init_lora_weights!r}): start with the same base, "
                "peft_config and seed."
            )


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
    quantized, as merging would quantize it again. If the adapter cannot be merged into this base, a warning says so
    once.

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
    try:
        try:
            for layer in layers:
                for parameter in layer.get_base_layer().parameters(recurse=False):
                    originals.append((parameter, parameter.detach().clone()))
            for layer in layers:
                layer.merge(adapter_names=[model.active_adapter])
        except Exception as error:  # each kind of adapter refuses in its own way, and memory may run out
            _restore(layers, originals)
            originals.clear()  # a copy of the base, which generation may need the memory of
            _say_unmerged(model, first_line(error))
        yield
    finally:
        _restore(layers, originals)


def _restore(layers: list[BaseTunerLayer], originals: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for layer in layers:
        if not layer.merged:
            continue
        try:
            layer.unmerge()
        except RuntimeError:  # it computes the update again, for which there may be no memory after such an error
            layer.merged_adapters.clear()
    with torch.no_grad():
        for parameter, original in originals:
            parameter.data.copy_(original)


def _mergeable_layers(model: nn.Module) -> list[BaseTunerLayer]:
    # Prompt learning changes the input instead of the weights.
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return []
    if model in _unmerged or getattr(model.get_base_model(), "is_quantized", False):
        return []
    layers = merging_layers(model)
    shared = shared_weight(model, layers)
    if shared is not None:
        _say_unmerged(model, f"{shared} is shared (tied) with another layer, which merging would change too")
        return []
    return layers


def _say_unmerged(model: PeftModel, reason: str) -> None:
    """Warns once for each model, and does not try again."""
    _unmerged.add(model)
    logger.warning(
        "merge_for_generation: the adapter cannot be merged into its base (%s): completions are sampled with the "
        "unmerged adapter, which is slower.",
        reason,
    )

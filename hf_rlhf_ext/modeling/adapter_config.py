"""Compares the configuration of an adapter in memory with that of a saved one."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from ..errors import UserError
from .adapter_kinds import config_without_start
from .ownership import adapter_state

NOT_COMPARED = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",  # the weights are loaded, so how they would start does not matter
        "lora_dropout",  # may be changed between two parts of a run
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
        # Which modules have an adapter is compared by the names of the weights, as it can be said in several ways.
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
    )
)
"""Fields of an adapter's configuration that may differ when a run resumes."""

_FILLED_IN = frozenset(
    ("encoder_hidden_size", "num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim")
)
"""Fields of virtual tokens that PEFT reads from the base if they are `None`, some only after the adapter is made."""


def check_same_adapter(model: nn.Module, name: str | None, folder: Path, *, start: str | None = None) -> None:
    """Refuses to resume from a checkpoint whose adapter has another configuration than that of the model.

    Weights of equal shape would be loaded without an error, and then mean something else: with another `lora_alpha`,
    an adapter is another one.

    Args:
        model: The model that is trained, with or without an adapter.
        name: Name of its adapter.
        folder: Folder of the checkpoint.
        start: As in `save_adapter`: if it is given, the checkpoint holds a LoRA of twice the rank.

    Raises:
        UserError: The configurations differ, or only one of the two has an adapter.
    """
    has_adapter = isinstance(model, PeftModel) and name is not None
    is_saved = (folder / "adapter_config.json").is_file()
    if has_adapter and not is_saved:
        raise UserError(
            f"resume_from_checkpoint: {folder} has no adapter, but the model has one: leave out peft_config, or give a "
            "checkpoint of this adapter."
        )
    if is_saved and not has_adapter:
        raise UserError(
            f"resume_from_checkpoint: {folder} is a checkpoint of an adapter, but the whole model is trained: pass the "
            "peft_config of that run, or give another checkpoint."
        )
    if not has_adapter:
        return
    config = model.peft_config[name]
    if start is not None:
        config = config_without_start(config)
    now = config.to_dict()
    saved = PeftConfig.from_pretrained(str(folder)).to_dict()
    for field in sorted(now.keys() - NOT_COMPARED):
        if field not in saved or (field in _FILLED_IN and None in (saved[field], now[field])):
            continue
        if _comparable(saved[field]) != _comparable(now[field]):
            raise UserError(
                f"resume_from_checkpoint: the adapter in {folder} has {field}={_shown(saved[field])}, but peft_config "
                f"has {_shown(now[field])}: use the configuration of that run, or start without a checkpoint."
            )
    _check_modules(model, name, folder)


def _check_modules(model: PeftModel, name: str, folder: Path) -> None:
    """Compares the modules that have an adapter in memory and in a saved adapter."""
    prefix = getattr(model.base_model, "prefix", None)  # of the names of an adapter's weights, such as `lora_`
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if prefix is None or not path.is_file():
        return
    with safe_open(path, framework="pt") as weights:
        saved = {key for key in weights.keys() if prefix in key}
    state = adapter_state(model, name)
    differing = saved ^ {key for key in state if prefix in key}
    if differing:
        key = min(differing)
        has, lacks = (folder, "the model") if key in saved else ("the model", folder)
        module = key.partition(f".{prefix}")[0].removeprefix("base_model.model.")
        raise UserError(
            f"resume_from_checkpoint: {has} has an adapter on {module}, and {lacks} has none there: use the "
            "target_modules of that run, or start without a checkpoint."
        )


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple | set):
        # A saved tuple is read as a list, also inside another one.
        return sorted(str(_as_saved(item)) for item in value)
    # PEFT reads an empty record where none was set.
    return value or None


def _as_saved(value: Any) -> Any:
    """A value as it is in a JSON file."""
    if isinstance(value, list | tuple):
        return [_as_saved(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_saved(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple | set):
        return ", ".join(sorted(map(str, value)))
    return repr(value)

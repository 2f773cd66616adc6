"""Where the config of a model comes from: an object, a folder or a Hub id, of which only `config.json` is read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ...errors import UserError, first_line
from ..adapters import bare_model
from ..families import check_config
from ..locations import resolve_location
from ..lookup import base_and_revision, found_or_refused
from ..quantization import quantization_kind, quantization_record, stored_quantization

_KINDS = {"off": "none", "4-bit": "4bit", "8-bit": "8bit"}


@dataclass(frozen=True)
class Source:
    """A model as its config says.

    Attributes:
        config: config of the model, or of the base of an adapter.
        name: what the plan calls it.
        is_adapter: whether it is an adapter.
        quantization: `none`, `4bit` or `8bit` if the model or its checkpoint is quantized; `None` if it is not.
        dtype: dtype of its weights; `None` if the options of the run decide on it.
    """

    config: PretrainedConfig
    name: str
    is_adapter: bool = False
    quantization: str | None = None
    dtype: torch.dtype | None = None


def find_source(
    model: Any, *, stage: str, option: str = "model", revision: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Finds the config of a model. No weights are read.

    Args:
        model: a config, a loaded model, a folder, a Hub id, or what this function returned. An adapter stands for its
            base with the adapter.
        stage: `sft`, `reward` or `ppo`.
        option: name of the argument, for messages.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether to run Python code from the repository.

    Raises:
        UserError: if there is no config, or for a model that cannot be trained here, such as an encoder-decoder.
    """
    if isinstance(model, Source):  # such as a base with an adapter that will be trained later
        return model
    if isinstance(model, PretrainedConfig):
        _refuse_encoder_decoder(model, option)
        return Source(model, model.name_or_path or model.model_type, quantization=_of_config(model))
    if isinstance(model, nn.Module):
        base = bare_model(model)
        record = quantization_record(base)
        kind = None if record is None else _kind(record, option)
        return Source(base.config, base.name_or_path or type(base).__name__, isinstance(model, PeftModel), kind)
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"{option}: got {type(model).__name__}: pass a config, a loaded model, a folder or a Hub id.")
    return _by_name(os.fspath(model), stage, option, revision, trust_remote_code)


def _by_name(name: str, stage: str, option: str, revision: str | None, trust_remote_code: bool) -> Source:
    if name.endswith(".gguf"):
        return Source(_gguf_config(name, option), Path(name).name)
    base, base_revision = base_and_revision(name, revision)
    is_adapter = base is not None
    if is_adapter and not base:
        raise UserError(f"{option}: {name} is an adapter that names no base model: pass the base model.")
    try:
        path, location = resolve_location(base or name, base_revision if is_adapter else revision)
    except UserError as error:
        if not is_adapter:
            raise
        raise UserError(
            f"{option}: {name} is an adapter whose base {base} is not there: put the base there, or correct "
            f"base_model_name_or_path in {name}/adapter_config.json."
        ) from error
    task = "reward" if stage == "reward" or option == "reward_model" else "causal_lm"
    with found_or_refused(option, base or name):
        check_config(path, name=base or name, task=task, trust_remote_code=trust_remote_code, **location)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **location)
        record = stored_quantization(path, **location)
    shown = Path(name).name if os.path.isdir(os.path.expanduser(name)) else name
    return Source(config, shown, is_adapter, None if record is None else _kind(record, option))


def _gguf_config(name: str, option: str) -> PretrainedConfig:
    """The config in a GGUF file. A run unpacks the whole file, which takes time and four times its size of the disk."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{option}: no GGUF file at {name}: check the path.")
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever the reader stumbles over in a damaged file
        raise UserError(
            f"{option}: {name} cannot be read as GGUF ({first_line(error)}): download it again, or give a folder or a "
            "Hub id."
        ) from error


def _of_config(config: PretrainedConfig) -> str | None:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return _kind(stored if isinstance(stored, dict) else stored.to_dict(), "model")


def _kind(record: dict[str, Any], option: str) -> str:
    kind = quantization_kind(record)
    if kind not in _KINDS:
        raise UserError(
            f"{option}: a checkpoint in {kind} cannot be planned: give the unquantized model, with load_in_4bit if "
            "it should be in 4 bits."
        )
    return _KINDS[kind]


def _refuse_encoder_decoder(config: PretrainedConfig, option: str) -> None:
    architecture = (config.architectures or [""])[0]
    if getattr(config, "is_encoder_decoder", False) and not architecture.endswith("ForCausalLM"):
        raise UserError(
            f"{option}: {config.model_type} is an encoder-decoder, which is not supported: use a decoder-only model, "
            "such as Llama, Qwen, Gemma or Mistral."
        )

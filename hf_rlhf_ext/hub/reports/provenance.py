"""What a model was made from and how, for its report and card: base, adapter, data, options, energy."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState, PartialState
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import TrainingArguments

from ...data.origin import DataOrigin
from ...modeling.adapters import bare_model
from ...modeling.embeddings import n_rows
from ...modeling.locations import EMBEDDED_MODEL, LOCAL_PREFIXES
from ...modeling.resizing import was_resized
from ...modeling.source import revision_of
from ..privacy import strip_local_paths

NOT_ABOUT_TRAINING = (
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "overwrite",
    "resume_from_checkpoint",
    "lora_task_type",
    "verbose",
)
"""Options that are not stated, as they say nothing of the model."""
_OF_THE_MACHINE = re.compile(
    r"disable_tqdm|report_to|project|trackio_.*|run_name|log_.*|logging_.*|num_completions_to_print|save_.*|hub_.*"
    r"|output_dir|use_cpu|local_rank|ddp_.*|debug|skip_memory_metrics|dataset_num_proc"
    r"|include_num_input_tokens_seen|enable_jit_checkpoint"
    r"|dataloader_(num_workers|pin_memory|prefetch_factor|persistent_workers|multiprocessing_context)"
)
"""Options that a rerun may need, but that say nothing of the training: where it ran, and what it wrote."""

_NOT_OF_THE_ADAPTER = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "megatron_config",
    "megatron_core",
)
"""Fields of a PEFT configuration that are stated elsewhere, or that change nothing."""
_ALWAYS_STATED = ("r", "lora_alpha", "target_modules")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


# Options


def options_yaml(*options: Any) -> str:
    """Returns the options that differ from their defaults as YAML for `--config`, without tokens and local paths.

    Args:
        options: Dataclasses of options, such as the arguments of a trainer.
    """
    values = {}
    for name, value in changed_options(*options).items():
        if name not in NOT_ABOUT_TRAINING:
            values[name] = value.value if isinstance(value, Enum) else value
    plain = json.loads(json.dumps(values, default=str))  # values of other types become text
    return strip_local_paths(yaml.safe_dump(plain, sort_keys=False))


def training_options_yaml(*options: Any) -> str:
    """Returns what `options_yaml` does, as a card lists it: without logging, saving, the Hub and the machine.

    Args:
        options: Dataclasses of options, such as the arguments of a trainer.
    """
    return without_machine_options(options_yaml(*options))


def without_machine_options(config: str) -> str:
    """Returns options as YAML without those of `options_yaml` that say nothing of the training."""
    values = yaml.safe_load(config) or {}
    stated = {name: value for name, value in values.items() if not _OF_THE_MACHINE.fullmatch(name)}
    return yaml.safe_dump(stated, sort_keys=False) if stated else ""


def changed_options(*options: Any) -> dict[str, Any]:
    """Returns the options of dataclasses that differ from their defaults."""
    changed: dict[str, Any] = {}
    for dataclass_options in options:
        changed |= _changed_options(dataclass_options)
    return changed


def _changed_options(options: Any) -> dict[str, Any]:
    if isinstance(options, TrainingArguments):
        # `__post_init__` changes options, so the defaults are those of an instance, not of the class. Without these
        # four options, it would refuse some machines.
        machine = {name: getattr(options, name) for name in ("output_dir", "use_cpu", "bf16", "fp16")}
        values = options.to_dict()
        with _kept_accelerator():
            defaults = type(options)(**machine).to_dict()
    else:
        values = vars(options)
        defaults = {field.name: _default(field) for field in fields(options)}

    changed = {}
    for name, default in defaults.items():
        value = values[name]
        if isinstance(default, list) and isinstance(value, str):
            value = [value]  # `report_to: none` for ["none"]
        if value != default:
            changed[name] = value
    return changed


@contextmanager
def _kept_accelerator() -> Iterator[None]:
    """Keeps the state of Accelerate, which new training arguments reset, so that a trainer can go on."""
    states = [(cls._shared_state, dict(cls._shared_state)) for cls in (PartialState, AcceleratorState)]
    try:
        yield
    finally:
        for state, values in states:
            state.clear()
            state.update(values)


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


# Data


def data_record(
    dataset: Any, role: str, *, name: str | None = None, sha256: str | None = None, rows: int | None = None
) -> dict[str, Any]:
    """Returns an entry of `CardOptions.data`, without what is not known.

    Args:
        dataset: A `datasets.Dataset`, a list of rows, or a `DataOrigin`.
        role: What the rows were for, such as "comparisons".
        name: Name of the data, if the dataset does not know it.
        sha256: Digest of a local file.
        rows: Number of rows that were used; the default is the number of rows of the dataset.
    """
    origin = dataset if isinstance(dataset, DataOrigin) else DataOrigin.of(dataset) or DataOrigin()
    record = {"role": role, **asdict(origin), "sha256": sha256}
    record.pop("columns")
    record["name"] = origin.name or name
    record["rows"] = origin.rows if rows is None else rows
    return {key: value for key, value in record.items() if value is not None}


def datasets_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the card options `datasets` and `dataset_revision` of data on the Hub. Empty if there are none.

    Args:
        records: Entries of `CardOptions.data`. Those of the role "evaluation" are no training data.
    """
    found: dict[str, str] = {}
    for record in records:
        # Only what was read from the Hub has a commit. The name of a file may look like an id.
        if record.get("revision") and record["role"] != "evaluation":
            found.setdefault(record["name"], record["revision"])
    if not found:
        return {}
    return {"datasets": list(found), "dataset_revision": next(iter(found.values()))}


# Base and adapter


def is_hub_id(name: str | None) -> bool:
    """Whether a name is that of a model on the Hub, and not of a folder or file, and not empty."""
    if not name or name.startswith(LOCAL_PREFIXES) or name.endswith(".gguf"):
        return False
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def base_source(model: nn.Module) -> dict[str, Any]:
    """Returns the card options `base_model`, `base_revision` and `relation` of a model that was trained.

    `base_model` is None for a base that is not on the Hub, as others would not find it by its name.

    Args:
        model: The model, also inside DDP. With an adapter, its base is meant.
    """
    base = bare_model(model)
    config = _config_of_adapter(model)
    name = base.config.name_or_path or (config.base_model_name_or_path if config is not None else None)
    if name == EMBEDDED_MODEL:
        revision = None
    elif is_hub_id(name):
        revision = revision_of(base) or (config.revision if config is not None else None)
    else:
        name = revision = None
    source = {"base_model": name, "relation": "finetune" if config is None else "adapter"}
    return source if revision is None else source | {"base_revision": revision}


def adapter_record(model: nn.Module | PeftConfig, adapter: str | None = None) -> dict[str, Any] | None:
    """Returns the kind of adapter for `CardOptions.adapter`: its type, and each option that is not the default.

    `vocabulary` is the number of tokens of a base that was resized for the adapter. None for a model without adapters.

    Args:
        model: A model, or the configuration of an adapter.
        adapter: Name of the adapter; the default is the active one.
    """
    if isinstance(model, PeftConfig):
        return _adapter_options(model)
    config = _config_of_adapter(model, adapter)
    if config is None:
        return None
    record = _adapter_options(config)
    peft_model = peft_model_of(model)
    if was_resized(peft_model, adapter or _active_adapter(peft_model)):
        record["vocabulary"] = n_rows(peft_model)
    return record


def _adapter_options(config: PeftConfig) -> dict[str, Any]:
    record: dict[str, Any] = {"type": config.peft_type.value}
    for spec in fields(config):
        value = _as_json(getattr(config, spec.name))
        if spec.name in _NOT_OF_THE_ADAPTER or value in (None, {}, []):
            continue
        if spec.name in _ALWAYS_STATED or value != _as_json(_default(spec)):
            record[spec.name] = value
    return record


def _as_json(value: Any) -> Any:
    """The value as JSON has it, without local paths."""
    if isinstance(value, Enum):
        return _as_json(value.value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    return strip_local_paths(str(value))


def _config_of_adapter(model: nn.Module, adapter: str | None = None) -> PeftConfig | None:
    peft_model = peft_model_of(model)
    return None if peft_model is None else peft_model.peft_config[adapter or _active_adapter(peft_model)]


def peft_model_of(model: nn.Module) -> PeftModel | None:
    """Returns the model with its adapters, also from inside DDP; None without adapters."""
    while not isinstance(model, PeftModel) and hasattr(model, "module"):  # DDP
        model = model.module
    return model if isinstance(model, PeftModel) else None


def _active_adapter(model: PeftModel) -> str:
    active = model.active_adapter
    return active if isinstance(active, str) else active[0]


# Energy


def emissions_of(callbacks: Iterable[Any]) -> dict[str, Any] | None:
    """Returns what `CodeCarbonCallback` measured, for `CardOptions.emissions`. None without it.

    Args:
        callbacks: The callbacks of a trainer.
    """
    for callback in callbacks:
        tracker = getattr(callback, "tracker", None) if type(callback).__name__ == "CodeCarbonCallback" else None
        measured = getattr(tracker, "final_emissions_data", None)  # set when training has ended
        if measured is not None:
            return {
                "energy_kwh": float(measured.energy_consumed),
                "emissions_g": 1000 * float(measured.emissions),  # codecarbon has kg
                "source": "codecarbon",
            }
    return None

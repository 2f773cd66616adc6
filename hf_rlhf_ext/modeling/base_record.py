"""What base an adapter was trained on: its precision and a few of its weights, in a file beside the adapter."""

import json
import logging
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import cached_file

from ..errors import UserError
from .adapter_files import adapter_weight_names
from .adapter_kinds import base_change
from .adapters import bare_model
from .ownership import adapter_prefixes, is_attached, is_below, plain_name
from .quantization import describe_quantization, quantization_differs, quantization_kind, quantization_record
from .shards import whole

logger = logging.getLogger(__name__)

BASE_RECORD_FILE = "base_record.json"
"""File beside a saved adapter."""

_MATRICES, _VECTORS = 16, 2
"""At most how many weights of the base are recorded. Norms are vectors, and many are still ones."""
_VALUES = 4
"""How many values of each."""
_SHOWN = {
    "4-bit": ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
    "8-bit": ("load_in_8bit", "llm_int8_threshold"),
}
"""The options of `BitsAndBytesConfig` that a message names."""
_LOAD_IN_4BIT = dict(zip(_SHOWN["4-bit"], (True, "nf4", True, "bfloat16"), strict=True))
"""Those that the option `load_in_4bit` stands for."""


@dataclass(frozen=True)
class BaseRecord:
    """The content of `base_record.json`.

    Attributes:
        dtype: dtype of the weights of the base, such as `bfloat16`.
        autocast: dtype of autocast in training; `None` without autocast.
        quantization: the whole quantization configuration, see `quantization_record`; `None` if it was not quantized.
        weights: shape and first values (of the middle row) of a few frozen weights, by name.
    """

    dtype: str
    autocast: str | None = None
    quantization: dict[str, Any] | None = None
    weights: dict[str, dict[str, list]] = field(default_factory=dict)

    @classmethod
    def of_model(cls, model: nn.Module, autocast: torch.dtype | None = None) -> Self | None:
        """The record of the base of a model with adapters; `None` if the whole model is trained."""
        if not isinstance(model, PeftModel):
            return None
        weights = {}
        for name, parameter in _chosen(_frozen_weights(model)):
            weights[name] = _sample(parameter)
        return cls(
            dtype=_dtype_name(bare_model(model).dtype),
            autocast=None if autocast is None else _dtype_name(autocast),
            quantization=quantization_record(model),
            weights=weights,
        )

    def save(self, folder: str | Path) -> None:
        """Writes `base_record.json` into `folder`."""
        (Path(folder) / BASE_RECORD_FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder_or_repo: str | Path, revision: str | None = None) -> Self | None:
        """Reads the file of a local folder or a repository on the Hub; `None` if there is none."""
        path = Path(folder_or_repo) / BASE_RECORD_FILE
        if not Path(folder_or_repo).is_dir():
            path = cached_file(
                str(folder_or_repo),
                BASE_RECORD_FILE,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        if path is None or not Path(path).is_file():
            return None
        content = json.loads(Path(path).read_text())
        known = {entry.name: content[entry.name] for entry in fields(cls) if entry.name in content}
        return cls(**known)


def check_same_base(model: nn.Module, folder: Path) -> None:
    """Refuses to resume an adapter on another base, or on one that is quantized in another way.

    Args:
        model: The model that is trained. Nothing happens without an adapter.
        folder: Folder of the checkpoint. Nothing happens if it has no record.

    Raises:
        UserError: The base is another one.
    """
    record = BaseRecord.load(folder)
    if record is None or not isinstance(model, PeftModel):
        return
    present = quantization_record(model)
    if quantization_differs(record.quantization, present):
        raise UserError(
            f"resume_from_checkpoint: {folder} was trained on a base with {describe_quantization(record.quantization)}"
            f", here {describe_quantization(present)}: load the model as in that run, or start without a checkpoint."
        )
    dtype = _dtype_name(bare_model(model).dtype)
    if dtype != record.dtype:
        logger.warning(
            "resume_from_checkpoint: %s was trained on %s weights, here %s, so that the run does not go on exactly: "
            "load the model with dtype=%r.",
            folder,
            record.dtype,
            dtype,
            record.dtype,
        )
    difference = _difference(record, model, folder, tolerance=1e-5 if dtype == record.dtype else 1e-2)
    if difference is not None:
        raise UserError(
            f"resume_from_checkpoint: {folder} was trained on another base ({difference}): give the base of that run, "
            "or start without a checkpoint."
        )


def warn_of_other_precision(model: nn.Module, folder_or_repo: str, revision: str | None = None) -> None:
    """Logs a warning if an adapter was loaded on a base in another precision than it was trained on.

    Weights in fp32 are not another precision, as those of a base in bf16 or fp16 are exact in it.

    Args:
        model: the model with the adapter.
        folder_or_repo: local folder or Hub id of the adapter.
        revision: branch, tag or commit on the Hub.
    """
    record = BaseRecord.load(folder_or_repo, revision)
    if record is None:
        return
    present = quantization_record(model)
    dtype = _dtype_name(bare_model(model).dtype)
    if quantization_differs(record.quantization, present):
        trained, here = describe_quantization(record.quantization), describe_quantization(present)
        remedy = _as_trained(record.quantization)
    elif present is None and dtype not in (record.dtype, "float32"):
        trained, here = f"{record.dtype} weights", f"{dtype} weights"
        remedy = f"dtype={record.dtype!r} (--dtype {record.dtype})"
    else:
        return
    logger.warning(
        "%s was trained on a base with %s, here %s: its log-probabilities differ. Load it as trained: load_policy with "
        "%s.",
        folder_or_repo,
        trained,
        here,
        remedy,
    )


def _as_trained(quantization: dict[str, Any] | None) -> str:
    """The options of `load_policy` that quantize the base as in training."""
    if quantization is None:
        return "an unquantized base, without load_in_4bit and quantization_config"
    kind = quantization_kind(quantization)
    if kind not in ("4-bit", "8-bit"):
        return "the checkpoint that was quantized like this"
    options = {name: quantization[name] for name in _SHOWN[kind] if name in quantization}
    if options == _LOAD_IN_4BIT:
        return "load_in_4bit=True (--load_in_4bit true)"
    shown = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return f"quantization_config=BitsAndBytesConfig({', '.join(shown)})"


def _frozen_weights(model: PeftModel) -> dict[str, nn.Parameter]:
    """The weights of the base that neither training nor an adapter changes, without quantized ones, by name."""
    prefixes = set()
    for adapter in model.peft_config:
        prefixes.update(adapter_prefixes(model, adapter))
    attached = tuple(f"{name}." for name, child in model.named_modules() if is_attached(child))
    changes_base = any(base_change(config) is not None for config in model.peft_config.values())
    weights = {}
    for name, parameter in model.named_parameters():
        is_readable = parameter.is_floating_point() and parameter.numel() > 0 and not parameter.is_meta
        if getattr(parameter, "quant_state", None) is not None:
            is_readable = False  # packed 4-bit weights may be stored in a floating-point dtype
        if parameter.requires_grad or not is_readable or name.startswith(attached) or is_below(name, prefixes):
            continue
        if changes_base and ".base_layer." in name:
            continue  # what such an adapter took out of the base is compared elsewhere
        weights[plain_name(name)] = parameter
    return weights


def _chosen(weights: dict[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """One matrix of each kind of layer, as an earlier adapter may have been merged into one kind; and two vectors."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    vectors = []
    for name, parameter in weights.items():
        if parameter.ndim == 1:
            vectors.append(name)
        else:
            words = [part for part in name.split(".")[:-1] if not part.isdigit()]
            kinds.setdefault(tuple(words[-2:]), []).append(name)  # such as `self_attn`, `q_proj`
    names = []
    for index, group in enumerate(list(kinds.values())[:_MATRICES]):
        names.append(group[index * len(group) // len(kinds)])  # from the first to the last layer
    names += vectors[:: max(1, len(vectors) // _VECTORS)][:_VECTORS]
    return [(name, weights[name]) for name in names]


def _sample(parameter: nn.Parameter) -> dict[str, list]:
    part = parameter.detach()
    while part.ndim > 1:
        part = part[part.shape[0] // 2]
    return {"shape": list(parameter.shape), "values": whole(part[:_VALUES]).float().tolist()}


def _difference(record: BaseRecord, model: PeftModel, folder: Path, *, tolerance: float) -> str | None:
    """How the base differs from the recorded one, in a few words; `None` if it does not."""
    present = _frozen_weights(model)
    restored = {plain_name(name) for name in adapter_weight_names(folder)}  # from the checkpoint itself
    for name, recorded in record.weights.items():
        if name not in present or name in restored:
            continue
        found = _sample(present[name])
        shown = name.removeprefix("base_model.").removeprefix("model.")
        if found["shape"] != recorded["shape"]:
            return f"{shown} has the shape {tuple(recorded['shape'])} there, and {tuple(found['shape'])} here"
        for here, there in zip(found["values"], recorded["values"], strict=True):
            if not math.isclose(here, there, rel_tol=tolerance, abs_tol=1e-7):
                return f"{shown} has other values"
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

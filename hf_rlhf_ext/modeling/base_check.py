"""Whether the base in memory is the one that a saved adapter names, from which it will be loaded again."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..errors import UserError
from .adapter_kinds import sharing_problem
from .adapters import bare_model
from .checkpoint_files import is_head
from .locations import resolve_location
from .ownership import plain_name
from .source import requested_revision_of

logger = logging.getLogger(__name__)

_MAX_TENSORS = 64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def warn_of_changed_base(option: str, model: nn.Module, peft_config: PeftConfig | None) -> None:
    """Logs a warning if an adapter is trained on weights that are not those of the base of its name.

    The base was trained as a whole, or an adapter was merged into it, and it was not saved since: the saved adapter
    would be loaded on the original weights. A few rows of some weights are compared with the safetensors files of the
    base, in a folder or in the cache of the Hub. Embeddings are not, as resized ones are saved with the adapter.

    Args:
        option: name of the argument that the model comes from.
        model: the base, or a model with an adapter.
        peft_config: configuration of the new adapter; `None` without one.
    """
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    if peft_config is None and not configs:
        return  # the whole model is trained and saved
    if any(sharing_problem(config) is not None for config in configs):
        return  # these adapters change the base, and do so again when they are loaded
    if not PartialState().is_main_process:
        return
    base = bare_model(model)
    name, revision = _name_of_base(base, peft_config or model.active_peft_config)
    changed = _first_changed_weight(base, name, revision) if name else None
    if changed is not None:
        logger.warning(
            "%s: its weights (%s) are not those of %s, which the saved adapter will name as its base: save the changed "
            "model with save_pretrained, and load it from that folder, before an adapter is trained on it.",
            option,
            changed,
            name,
        )


def _name_of_base(base: PreTrainedModel, config: PeftConfig) -> tuple[str | None, str | None]:
    """Name and revision of the base that the saved adapter will have."""
    name = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    # Without a revision of its own, the configuration is saved with the one that the base was loaded with.
    return name, config.revision or requested_revision_of(base)


def _first_changed_weight(base: PreTrainedModel, name: str, revision: str | None) -> str | None:
    """Name of a weight that differs from the files of the base; `None` if none does, or if there are no files."""
    files = _weight_files(name, revision)
    chosen: dict[Path, list[tuple[str, str, Tensor]]] = {}
    for weight, key, value in _spread(list(_comparable(base, files))):
        chosen.setdefault(files[key], []).append((weight, key, value))
    try:
        for path, weights in chosen.items():
            with safe_open(path, framework="pt") as file:
                for weight, key, value in weights:
                    if _differs(file.get_slice(key), value):
                        return weight
    except (OSError, SafetensorError):  # a file was removed, or is incomplete: loading it again will say so
        return None
    return None


def _weight_files(name: str, revision: str | None) -> dict[str, Path]:
    """The file of each weight of a checkpoint, by its name there; empty if no safetensors files are found offline."""
    try:
        path, location = resolve_location(name, revision)
        single = _local_file(path, SAFE_WEIGHTS_NAME, location)
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        index = _local_file(path, SAFE_WEIGHTS_INDEX_NAME, location)
        if index is None:
            return {}
        return {key: index.parent / part for key, part in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, SafetensorError, UserError):
        return {}


def _local_file(path: str, file: str, location: dict[str, str]) -> Path | None:
    found = cached_file(
        path,
        file,
        **location,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _comparable(base: PreTrainedModel, files: dict[str, Path]) -> Iterator[tuple[str, str, Tensor]]:
    """Weights that the files hold as they are in memory: name, name in the files, and value."""
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    embedding_weights = {id(weight) for layer in embeddings if layer is not None for weight in layer.parameters()}
    converted = _converted_patterns(base)
    prefix = f"{base.base_model_prefix}."
    for name, value in base.named_parameters():
        plain = plain_name(name)
        is_plain = value.dtype in _FLOATS and value.device.type != "meta" and not hasattr(value, "quant_state")
        if not is_plain or id(value) in embedding_weights or is_head(plain) or value.dim() == 0:
            continue
        if any(pattern.search(plain) for pattern in converted):
            continue
        for key in (plain, plain.removeprefix(prefix), prefix + plain):
            if key in files:
                yield plain, key, value
                break


def _converted_patterns(base: PreTrainedModel) -> list[re.Pattern]:
    """Names of weights whose values Transformers converts when it loads them, such as for rotary embeddings."""
    patterns = []
    for conversion in getattr(base, "_weight_conversions", None) or ():
        if not getattr(conversion, "operations", None):
            continue  # a new name only
        for pattern in conversion.target_patterns:
            try:
                patterns.append(re.compile(pattern))
            except re.error:
                patterns.append(re.compile(re.escape(pattern)))
    return patterns


def _spread(weights: list[tuple[str, str, Tensor]]) -> list[tuple[str, str, Tensor]]:
    """A choice of weights of every kind, from layers all over the model, as an adapter may be on some kinds only."""
    kinds: dict[str, list[tuple[str, str, Tensor]]] = {}
    for weight in weights:
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", weight[0]), []).append(weight)
    share = max(1, _MAX_TENSORS // max(1, len(kinds)))
    chosen = []
    for of_kind in kinds.values():
        step = max(1, -(-len(of_kind) // share))
        chosen += of_kind[step // 2 :: step]
    return chosen[:_MAX_TENSORS]


def _differs(stored, value: Tensor) -> bool:
    """Whether some rows differ from those in the file, in the dtype of the model or after rounding to 16 bits.

    Args:
        stored: slice of a safetensors file.
        value: the weight in memory.
    """
    if tuple(stored.get_shape()) != tuple(value.shape):
        return False  # loaded in another way
    rows = {1: slice(0, 64), 2: slice(0, 4)}.get(value.dim(), (slice(0, 1), slice(0, 4)))
    in_file = stored[rows]
    if in_file.dtype not in (*_FLOATS, torch.float64):
        return False
    in_memory = value.detach()[rows].cpu()
    # A model may be loaded in 16 bits and be cast to fp32 afterward, as for training on a quantized base.
    roundings = (value.dtype, torch.bfloat16, torch.float16)
    return not any(torch.equal(in_file.to(dtype).to(value.dtype), in_memory) for dtype in roundings)

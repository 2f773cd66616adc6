"""How a base is quantized: its record as JSON, its comparison with another one, and how it is loaded the same again."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError, first_line
from .adapters import bare_model

logger = logging.getLogger(__name__)

_NOT_COUNTED = {"lm_head", "score", "classifier", "embed_out", "embed_tokens", "wte"}
"""Last parts of names that `llm_int8_skip_modules` may list without a difference: heads and embeddings."""

_DECIDES_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_DECIDES_8BIT = ("llm_int8_threshold", "llm_int8_has_fp16_weight")
_DECIDES_CALIBRATED = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "zero_point": True}
"""What decides the outputs of GPTQ and AWQ, with the defaults; the kernel and how weights were found are left out."""
_BITSANDBYTES = "bitsandbytes"
CALIBRATED_METHODS = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}
"""Methods that quantize with data, before a checkpoint is published, and the packages that load it."""


def quantization_record(model: nn.Module) -> dict[str, Any] | None:
    """Returns the whole quantization configuration of a model as JSON values; `None` if it is not quantized.

    Args:
        model: the model, also inside DDP or PEFT.
    """
    base = bare_model(model)
    if not getattr(base, "is_quantized", False):
        return None
    config = getattr(base.config, "quantization_config", None)
    if config is None:  # of a model with several parts, such as one for text and images
        config = getattr(base.config.get_text_config(), "quantization_config", None)
    if config is None:
        return None
    return as_record(config)


def stored_quantization(path: str, **location: Any) -> dict[str, Any] | None:
    """Returns the quantization configuration in a checkpoint's `config.json`; `None` if its weights are not quantized.

    Args:
        path: local folder or Hub id.
        location: further arguments of `from_pretrained`, such as `revision`.
    """
    config, _ = PretrainedConfig.get_config_dict(path, **location)
    stored = config.get("quantization_config")
    if stored is None:
        stored = (config.get("text_config") or {}).get("quantization_config")
    if stored is None:
        return None
    return as_record(stored)


def as_record(config: QuantizationConfigMixin | dict[str, Any]) -> dict[str, Any]:
    """The values of a quantization configuration as JSON values."""
    values = config if isinstance(config, dict) else config.to_dict()
    public = {name: value for name, value in values.items() if not name.startswith("_")}
    return json.loads(json.dumps(public, default=_as_json))


def _as_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value)


def as_quantization_config(
    requested: QuantizationConfigMixin | dict[str, Any], option: str = "quantization_config"
) -> QuantizationConfigMixin:
    """Returns the configuration object of a record or of an option.

    Args:
        requested: a configuration of Transformers, such as `BitsAndBytesConfig`, or its values.
        option: name of the option, for the message.

    Raises:
        UserError: if the values are not a configuration, or if bitsandbytes is needed and not installed.
    """
    config = requested
    if isinstance(requested, dict):
        try:
            config = AutoQuantizationConfig.from_dict(requested)
        except (TypeError, ValueError, AttributeError, ImportError) as error:
            raise UserError(f"{option}: Transformers cannot use this quantization: {first_line(error)}.") from error
    if not isinstance(config, QuantizationConfigMixin):
        raise UserError(
            f"{option}: got {type(config).__name__}: pass a configuration of Transformers, such as "
            "BitsAndBytesConfig(load_in_8bit=True)."
        )
    if isinstance(config, BitsAndBytesConfig):
        if not config.is_quantizable():
            raise UserError(f"{option}: quantizes nothing: pass load_in_4bit=True or load_in_8bit=True in it.")
        if config.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise UserError(f"{option}: bnb_4bit_quant_type is {config.bnb_4bit_quant_type!r}: choose 'nf4' or 'fp4'.")
        require_bitsandbytes(option)
    return config


def require_bitsandbytes(option: str) -> None:
    """Raises `UserError` if bitsandbytes is not installed. `option` is the name of the option that needs it."""
    if find_spec(_BITSANDBYTES) is None:
        raise UserError(f"{option} needs bitsandbytes: pip install bitsandbytes (or leave {option} off).")


def refuse_unloadable(name: str, stored: dict[str, Any] | None) -> None:
    """Refuses a checkpoint whose weights are quantized with a method whose package is missing, before they are read.

    Args:
        name: folder or Hub id of the checkpoint, for the message.
        stored: its quantization, see `stored_quantization`; `None` for none.

    Raises:
        UserError: if a package is missing.
    """
    kind = quantization_kind(stored)
    needed = (_BITSANDBYTES,) if kind in ("4-bit", "8-bit") else CALIBRATED_METHODS.get(kind, ())
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        raise UserError(
            f"model_name_or_path: the weights of {name} are quantized ({kind}), which needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}, or give the unquantized model, with load_in_4bit."
        )


def refuse_trained_checkpoint(name: str, stored: dict[str, Any] | None) -> None:
    """Refuses a checkpoint whose quantized weights are to be trained themselves, before they are read.

    Methods that may be trained are left to `refuse_trained_quantized`, which sees the model.

    Args:
        name: folder or Hub id of the checkpoint, for the message.
        stored: its quantization, see `stored_quantization`; `None` for none.

    Raises:
        UserError: for 4-bit and 8-bit weights of bitsandbytes, GPTQ and AWQ.
    """
    kind = quantization_kind(stored)
    if kind in ("4-bit", "8-bit", *CALIBRATED_METHODS):
        raise UserError(
            f"model_name_or_path: the weights of {name} are quantized ({kind}) and cannot be trained themselves: leave "
            "out --use_peft false (in Python, pass peft_config) to train an adapter, or give the unquantized model."
        )


def with_trainable_kernels(stored: dict[str, Any]) -> QuantizationConfigMixin | None:
    """The configuration that loads GPTQ and AWQ weights with kernels through which gradients pass.

    The kernels that gptqmodel chooses by itself may be for inference only, such as those for CPUs with AVX512.

    Args:
        stored: the quantization of a checkpoint, see `stored_quantization`.

    Returns:
        The configuration; `None` for other methods.
    """
    if quantization_kind(stored) not in CALIBRATED_METHODS:
        return None
    return AutoQuantizationConfig.from_dict(stored | {"backend": "auto_trainable"})


def with_head_left_alone(config: QuantizationConfigMixin) -> QuantizationConfigMixin:
    """Returns the configuration, or a copy of it that leaves the score head alone, which is trained in fp32.

    Without `llm_int8_skip_modules`, Transformers leaves the last layer alone itself.
    """
    skipped = getattr(config, "llm_int8_skip_modules", None)
    if skipped is None or "score" in skipped:
        return config
    values = as_record(config)
    values["llm_int8_skip_modules"] = [*skipped, "score"]
    return BitsAndBytesConfig(**values)


def quantization_kind(record: dict[str, Any] | None) -> str:
    """The kind of quantization in one word: `"off"`, `"4-bit"`, `"8-bit"`, or the name of another method."""
    if record is None:
        return "off"
    if record.get("load_in_4bit"):
        return "4-bit"
    if record.get("load_in_8bit"):
        return "8-bit"
    return str(record.get("quant_method", "another method"))


def describe_quantization(record: dict[str, Any] | None) -> str:
    """The quantization in a few words, such as `4-bit NF4 with double quantization (computed in bfloat16)`."""
    kind = quantization_kind(record)
    if kind == "off":
        return "no quantization"
    if kind == "4-bit":
        words = f"4-bit {str(record.get('bnb_4bit_quant_type', 'fp4')).upper()}"
        if record.get("bnb_4bit_use_double_quant"):
            words += " with double quantization"
        words += f" (computed in {record.get('bnb_4bit_compute_dtype', 'float32')})"
    elif kind == "8-bit":
        words = f"8-bit (threshold {record.get('llm_int8_threshold', 6.0)})"
    else:
        return kind
    skipped = _skipped(record)
    if skipped:
        words += f" without {' and '.join(skipped)}"
    return words


def quantization_differs(first: dict[str, Any] | None, second: dict[str, Any] | None) -> bool:
    """Whether two quantizations give different weights or outputs.

    Not compared are options of memory and storage, and whether heads are quantized, as a score head is always fp32.
    """
    return _deciding(first) != _deciding(second)


def _deciding(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options that decide the outputs."""
    if record is None:
        return None
    kind = quantization_kind(record)
    if kind in CALIBRATED_METHODS:
        return {"kind": kind} | {name: record.get(name, default) for name, default in _DECIDES_CALIBRATED.items()}
    if kind not in ("4-bit", "8-bit"):
        return record
    defaults = as_record(BitsAndBytesConfig(load_in_4bit=True))
    values: dict[str, Any] = {"kind": kind, "skipped": _skipped(record)}
    for name in _DECIDES_4BIT if kind == "4-bit" else _DECIDES_8BIT:
        values[name] = record.get(name, defaults[name])
    return values


def _skipped(record: dict[str, Any]) -> list[str]:
    """The layers that are not quantized, without heads and embeddings, which never are."""
    names = record.get("llm_int8_skip_modules") or ()
    return sorted({name for name in names if name.rsplit(".", 1)[-1] not in _NOT_COUNTED})


def refuse_trained_quantized(model: nn.Module, *, has_adapter: bool) -> None:
    """Raises `UserError` if the weights of a quantized model are to be trained themselves.

    Args:
        model: the model, with or without an adapter.
        has_adapter: whether it has an adapter, or will get one.
    """
    quantizer = getattr(bare_model(model), "hf_quantizer", None)
    if has_adapter or quantization_record(model) is None or getattr(quantizer, "is_qat_trainable", False):
        return
    raise UserError(
        f"model: its weights are quantized ({quantization_kind(quantization_record(model))}) and cannot be trained "
        "themselves: pass peft_config to train an adapter, or give the unquantized model."
    )


def prepare_quantized(model: nn.Module, option: str = "model") -> None:
    """Makes a model that the caller quantized ready for training, before its first forward pass.

    The CPU backend of bitsandbytes repacks 4-bit weights at the first forward pass without gradients, and the backward
    pass of a repacked layer is silently wrong. This is switched off; a model that is repacked already is refused.

    Args:
        model: the model; nothing happens if it is not quantized.
        option: name of the argument, for the message.

    Raises:
        UserError: if 4-bit weights are repacked already.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"{option}: its 4-bit weights were repacked by a forward pass on this CPU, so that gradients would be "
                "wrong: load the model again, and pass it to the trainer before it is used."
            )
    keep_nf4_gradients_right(model)


def keep_nf4_gradients_right(model: nn.Module) -> None:
    """Prevents the CPU backend of bitsandbytes from repacking NF4 weights at the first forward pass without gradients.

    The backward pass of a repacked layer is silently wrong (bitsandbytes 0.50, CPUs with AVX512-BF16): after one call
    of `generate`, the cosine similarity to the right gradient was 0.16. Call this function before the first forward
    pass. It has no effect on other layers and devices.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def each_token_alone(model: nn.Module) -> Iterator[None]:
    """Inside the context, an 8-bit layer of bitsandbytes computes every token for itself, as other layers do.

    LLM.int8 (arXiv:2208.07339) computes the columns of large activations in 16 bits. A column counts as large if it is
    large at any token of the batch, so that a token changes the rounding of the others, in fp32 by a few percent. A
    check of what a model reads must not mistake this for attention.

    Args:
        model: the model; nothing happens if it is not quantized to 8 bits.
    """
    states = []
    for module in model.modules():
        state = getattr(module, "state", None)
        if hasattr(state, "threshold") and hasattr(state, "CB"):  # of `Linear8bitLt`
            states.append((state, state.threshold))
    try:
        for state, _ in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in states:
            state.threshold = threshold

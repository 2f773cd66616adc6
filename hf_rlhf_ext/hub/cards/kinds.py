"""Kinds of models, and what follows from the options of a card for all of its parts."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from ..report import CardOptions

EMBEDDED_BASES = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Name of an embedded model -> its id on the Hub."""
_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""The quantization of `load_in_4bit`, in reports that do not record it."""

# Older reports have these only in their configuration.
_LOAD_IN_4BIT = re.compile(r"^\s*load_in_4bit:\s*true\b", re.MULTILINE | re.IGNORECASE)
_LORA_RANK = re.compile(r"^\s*lora_r:\s*\d", re.MULTILINE)


class Kind(NamedTuple):
    """Properties that all cards for one kind of model share."""

    pipeline_tag: str
    tags: tuple[str, ...]
    stages: tuple[str, ...]  # names of the training stage in `seconds` of a report
    citations: tuple[str, ...]


KINDS = {
    "policy": Kind("text-generation", ("ppo",), ("policy", "ppo"), ("instructgpt", "ppo")),
    "dpo": Kind("text-generation", ("dpo",), ("dpo",), ("dpo",)),
    "reward_model": Kind(
        "text-classification",
        ("reward-model",),
        ("reward_model",),
        ("instructgpt", "bradley_terry"),
    ),
    "sft": Kind("text-generation", ("sft",), ("sft",), ("instructgpt",)),
    "model": Kind("text-generation", (), (), ()),  # how it was trained is not known
}


def config_text(options: CardOptions) -> str:
    """Returns the options of the run as YAML."""
    if isinstance(options.config, str):
        return options.config
    if not options.config:
        return ""
    return yaml.safe_dump(dict(options.config), sort_keys=False)


def reads_messages(options: CardOptions) -> bool:
    """Whether prompts are messages for the chat template, and not plain text."""
    if options.prompt_form == "text":
        return False
    return options.chat or options.prompt_form == "messages"


def adapter_type(options: CardOptions) -> str | None:
    """Returns the type of the adapter in PEFT, such as `LORA`. None if it is not known."""
    if options.adapter:
        return str(options.adapter.get("type") or "") or None
    return "LORA" if _LORA_RANK.search(config_text(options)) else None


# Quantization


def bits(options: CardOptions) -> int | None:
    """Returns 4 or 8 if bitsandbytes quantized the base in training, and None otherwise."""
    if options.load_in_4bit or (options.quantization or {}).get("load_in_4bit"):
        return 4
    if (options.quantization or {}).get("load_in_8bit"):
        return 8
    return 4 if _LOAD_IN_4BIT.search(config_text(options)) else None


def quantization(options: CardOptions) -> Mapping[str, Any]:
    """Returns the recorded quantization, or that of `load_in_4bit` in reports that do not record it."""
    return options.quantization or _NF4


def quantization_name(options: CardOptions) -> str:
    """Returns the name of the quantization, such as "NF4 with double quantization"."""
    if bits(options) == 8:
        return "LLM.int8"
    recorded = quantization(options)
    name = str(recorded.get("bnb_4bit_quant_type", "fp4")).upper()
    return f"{name} with double quantization" if recorded.get("bnb_4bit_use_double_quant") else name


def is_load_in_4bit(options: CardOptions) -> bool:
    """Whether the quantization is the one that the option `load_in_4bit` of this library stands for."""
    recorded = quantization(options)
    return bits(options) == 4 and all(recorded.get(name) == value for name, value in _NF4.items())

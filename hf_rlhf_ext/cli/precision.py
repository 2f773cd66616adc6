"""The options of a recipe that quantize the base model or make its adapter: what contradicts itself is refused."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import BitsAndBytesConfig

from ..errors import UserError
from ..modeling.loading import adapter_base, eight_bit_config, four_bit_config
from ..modeling.quantization import describe_quantization, quantization_record

if TYPE_CHECKING:
    from .options import ModelArguments

QUANT_TYPES = ("nf4", "fp4")
"""Values of `bnb_4bit_quant_type`; the first one is the default."""
STORAGE_TYPES = ("uint8", "bfloat16", "float16", "float32")
"""Values of `bnb_4bit_quant_storage`; the first one is the default."""

_OF_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
"""Options that belong to `load_in_4bit`."""
OF_NEW_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
"""Options of an adapter that is made; one that is loaded has its own values."""


def check_quantization(options: "ModelArguments") -> None:
    """Refuses options of the quantization that contradict each other, or that cannot be trained.

    Raises:
        UserError: for two kinds of quantization, for an option of 4 bits without 4 bits, for an unknown value, or if
            the quantized weights themselves should be trained.
    """
    if options.load_in_8bit and options.load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit are both given: leave one of them out.")
    for name in _OF_4BIT:
        if getattr(options, name) is not None and not options.load_in_4bit:
            raise UserError(f"{name} is a part of 4 bits: add --load_in_4bit true, or leave it out.")
    for name, known in (("bnb_4bit_quant_type", QUANT_TYPES), ("bnb_4bit_quant_storage", STORAGE_TYPES)):
        value = getattr(options, name)
        if value not in (None, *known):
            raise UserError(f"{name}: {value!r} is not known: choose one of {', '.join(known)}.")
    if options.is_quantized and not options.use_peft:
        option = "load_in_8bit" if options.load_in_8bit else "load_in_4bit"
        raise UserError(
            f"{option}: quantized weights cannot be trained themselves: leave out --use_peft false, which trains an "
            f"adapter, or leave out --{option}."
        )


def quantization_config(options: "ModelArguments") -> BitsAndBytesConfig | None:
    """The quantization of the base that the options ask for; None for none.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    if options.load_in_8bit:
        return eight_bit_config()
    if not options.load_in_4bit:
        return None
    return four_bit_config(
        options.bnb_4bit_quant_type or QUANT_TYPES[0],
        double_quant=options.use_bnb_nested_quant is not False,
        storage=options.bnb_4bit_quant_storage,
    )


def print_quantization(model: nn.Module) -> None:
    """Prints how the base of a model is quantized; nothing if it is not."""
    record = quantization_record(model)
    if record is not None:
        print(f"The base is in {describe_quantization(record)}.")


def refuse_options_of_a_new_adapter(options: "ModelArguments") -> None:
    """Refuses options of a new adapter where the model is an adapter already, which is trained further.

    Raises:
        UserError: for `--use_peft false`, or for the first option of a new adapter.
    """
    name = options.model_name_or_path
    if adapter_base(name, options.revision) is None:
        return
    if not options.use_peft:
        raise UserError(
            f"use_peft: {name} is an adapter, which is what is trained further: leave out --use_peft false, or merge "
            "the adapter into its base first (hf-rlhf merge)."
        )
    defaults = type(options)()
    for option in OF_NEW_ADAPTER:
        if getattr(options, option) != getattr(defaults, option):
            raise UserError(
                f"{option}: {name} is an adapter, which is trained further as it is: leave --{option} out, or give a "
                "base model, which gets a new adapter."
            )

"""Options that belong to another one, such as `hub_model_id` to `push_to_hub`: a line says so where that one is off."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from .precision import OF_NEW_ADAPTER


class Part(NamedTuple):
    """Options that have an effect only while another one is on."""

    needs: str
    is_on: Callable[[Any], bool]
    options: tuple[str, ...]


def _strategy(event: str) -> Part:
    name = f"{event}_strategy"
    return Part(f"--{name} steps", lambda value: getattr(value, "value", value) == "steps", (f"{event}_steps",))


PARTS = {
    "push_to_hub": Part(
        "--push_to_hub true",
        bool,
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    ),
    "use_peft": Part("--use_peft true", bool, OF_NEW_ADAPTER),
    "eval_strategy": _strategy("eval"),
    "save_strategy": _strategy("save"),
    "logging_strategy": _strategy("logging"),
    "activation_checkpointing": Part("--activation_checkpointing true", bool, ("activation_checkpointing_kwargs",)),
    "packing": Part("--packing true", bool, ("packing_strategy",)),
    "members": Part("--members 2 or more", lambda members: members > 1, ("combine", "penalty")),
    "kl_target": Part("--kl_target", bool, ("kl_horizon",)),
    "length_penalty": Part("--length_penalty", bool, ("length_target",)),
    "ptx_coef": Part("--ptx_coef", bool, ("ptx_batch_size",)),
    "log_completions": Part("--log_completions true", bool, ("num_completions_to_print",)),
    "importance_sampling_correction": Part("--importance_sampling_correction true", bool, ("importance_sampling_cap",)),
}
"""The option that must be on -> how it is turned on, whether a value is on, and the options that depend on it."""


def idle_options(*dataclasses: Any) -> list[str]:
    """Lines that name options which were given, but have no effect because another option is off.

    Args:
        dataclasses: the options of a recipe. Options that none of them has are skipped.
    """
    values, defaults = {}, {}
    for options in dataclasses:
        for field in fields(options):
            values[field.name] = getattr(options, field.name)
            defaults[field.name] = _default(options, field)
    lines = []
    for name, part in PARTS.items():
        if name not in values or part.is_on(values[name]):
            continue
        given = [option for option in part.options if option in values and values[option] != defaults[option]]
        if given:
            lines.append(f"not used without {part.needs}: {', '.join(given)}")
    return lines


def say_idle_options(*dataclasses: Any) -> None:
    """Prints the lines of `idle_options`."""
    for line in idle_options(*dataclasses):
        print(line)


def _default(options: Any, field: Any) -> Any:
    """The default of an option as it is after `__post_init__`, which makes one name out of a list of one."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(value, list) and len(value) == 1 and isinstance(getattr(options, field.name), str):
        return value[0]
    return value

"""Reward functions that a program or another model computes, with TRL's signature `f(prompts, completions, **columns)`.

Each factory takes plain arguments and returns a function for `reward_funcs` of `PPOTrainer` and of TRL's trainers. A
factory is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .named import FACTORIES

if TYPE_CHECKING:
    from .code_tests import code
    from .math_answers import math
    from .model_judge import judge
    from .trl_rewards import repetition_penalty
    from .verifiable import exact_match, multiple_choice, number, regex, think_format

__all__ = [
    "code",
    "exact_match",
    "judge",
    "math",
    "multiple_choice",
    "number",
    "regex",
    "repetition_penalty",
    "think_format",
]


def __getattr__(name: str) -> Any:
    if name not in FACTORIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{FACTORIES[name]}", __name__), name)

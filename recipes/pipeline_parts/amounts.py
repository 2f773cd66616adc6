"""What the pipeline chooses where a section says nothing: passes, batches, updates, lengths, learning rates."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 1024
"""Tokens of prompt and answer in SFT and reward model, unless the section says otherwise."""
SMALL = 1024
"""A base with fewer hidden units (about 0.4B parameters) is trained with the larger learning rates."""
LEARNING_RATES = {
    "small": {"sft": 1e-3, "reward": 3e-4, "ppo": 3e-4},  # of the configs for SmolLM2-135M
    "large": {"sft": 2e-4, "reward": 1e-4, "ppo": 5e-5},  # of the configs for Qwen2.5
}
"""Learning rates of adapters; without an adapter, a tenth of them."""
ROLLOUT = 32
"""Completions of a PPO update, unless the section says otherwise."""
LENGTHS = (32, 256)
"""Smallest and largest `max_completion_length` that is chosen from the answers in the data, in tokens."""
AMOUNTS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "max_completion_length",
    "kl_coef",
)
"""Options that are named when the pipeline chooses them."""
USUAL_LENGTH = 64
"""`max_completion_length` without answers in the data, in tokens."""


def epochs_of(n_rows: int) -> int:
    """Passes over the rows of SFT and of the reward model: 3 of fewer than 100 rows, 2 of fewer than 300, else 1."""
    if n_rows < 100:
        return 3
    return 2 if n_rows < 300 else 1


def batch_of(n_rows: int) -> int:
    """Rows of an optimizer step: 8, or 4 of fewer than 64 rows, so that there are some steps."""
    return 8 if n_rows >= 64 else 4


def updates_of(n_prompts: int, rollout: int = ROLLOUT) -> int:
    """PPO updates: one pass over the prompts, `rollout` of them in each, but at least 8 updates and at most 32."""
    return min(max(math.ceil(n_prompts / rollout), 8), 32)


def completion_length_of(answers: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """A length in tokens, a multiple of 16, that 95 % of the answers fit into, within `LENGTHS`."""
    if not answers:
        return USUAL_LENGTH
    lengths = sorted(len(tokenizer(answer)["input_ids"]) for answer in answers)
    long = lengths[min(math.ceil(0.95 * len(lengths)), len(lengths)) - 1] + 1  # with the stop token
    smallest, largest = LENGTHS
    return min(max(math.ceil(long / 16) * 16, smallest), largest)


def say_what_is_chosen(name: str, given: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Prints the amounts that the user's section left open."""
    amounts = []
    for option in AMOUNTS:
        if option in chosen and option not in given:
            amounts.append(f"{option} {chosen[option]:g}")  # rounded: a tenth of 3e-4 is 2.9999999999999997e-05
    if "max_steps" in given:  # it comes first
        amounts = [amount for amount in amounts if not amount.startswith("num_train_epochs")]
    if amounts:
        change = f"to change {'it' if len(amounts) == 1 else 'one'}, set it under `{name}:` in the config"
        print(f"chosen for these rows: {', '.join(amounts)} ({change})")

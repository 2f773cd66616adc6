"""Mistakes put into the library on purpose, to show that the pretend device finds them: `MISTAKES`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForSequenceClassification

from hf_rlhf_ext.ppo import experience, rollout
from hf_rlhf_ext.ppo.advantages import completion_mask
from hf_rlhf_ext.ppo.losses import masked_mean
from hf_rlhf_ext.ppo.rewards import RewardFunctions
from tests.devices.paths import base_of, ppo_trainer


def run_for_mistakes(folder: Path, device: torch.device) -> dict[str, Any]:
    reward_model = AutoModelForSequenceClassification.from_pretrained(base_of(folder), num_labels=1, dtype="float32")
    ppo_trainer(folder, rewards=reward_model, max_steps=1, num_mini_batches=1, max_completion_length=3).train()
    return {}


@contextmanager
def mask_on_the_cpu() -> Iterator[None]:
    """A mask made with `torch.arange(n)` instead of `torch.arange(n, device=…)`."""

    def mask(lengths, width):
        return completion_mask(lengths.cpu(), width)

    with patch.object(rollout, "completion_mask", mask):
        yield


@contextmanager
def mean_on_the_cpu() -> Iterator[None]:
    """A mean that is computed on the CPU and moved back: the right number, slowly."""

    def mean(values, mask, *others):
        return masked_mean(values.cpu(), mask.cpu(), *others).to(values.device)

    with patch.object(experience, "masked_mean", mean):
        yield


@contextmanager
def reward_model_on_the_cpu() -> Iterator[None]:
    """A reward model that the trainer forgets to move: it takes texts, so that nothing meets a tensor of the device."""
    with patch.object(RewardFunctions, "to", lambda self, *args, **options: self):
        yield


MISTAKES: dict[str, Callable] = {
    "mistake: a mask on the CPU": mask_on_the_cpu,
    "mistake: a mean computed on the CPU": mean_on_the_cpu,
    "mistake: a reward model on the CPU": reward_model_on_the_cpu,
}

"""The memory of a run in one line, beside that of its device. Sizes are in GB of 10^9 bytes."""

import logging
import os
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import TrainingArguments

from ..modeling.memory.plan import MemoryPlan
from .engines import Engine, asked_engine

logger = logging.getLogger(__name__)

GB = 10**9

GPUS = ("cuda", "xpu")
"""Devices with a memory of their own that PyTorch can tell. All are planned as CUDA's."""


def in_gb(n_bytes: int) -> str:
    """A size for people, such as `7.9 GB`; sizes below 0.1 GB have two decimals."""
    size = n_bytes / GB
    return f"{size:.2f} GB" if abs(size) < 0.095 else f"{size:.1f} GB"


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device, whether in use or free; None if the system does not say.

    For a CPU, and for a GPU that has no memory of its own (`mps`), it is the memory of the machine.
    """
    if device.type in GPUS:
        return getattr(torch, device.type).mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def memory_line(plan: MemoryPlan, n_bytes: int | None) -> str:
    """What a run needs of the memory of its device, and when.

    Args:
        plan: the plan of the run.
        n_bytes: memory of the device, in bytes; None if it is not known.
    """
    peak = plan.peak
    largest = max(peak.parts, key=lambda part: part.n_bytes)
    of_device = "" if n_bytes is None else f" of {in_gb(n_bytes)}"
    return (
        f"Memory: about {in_gb(plan.n_bytes)}{of_device}, peak at {peak.name} ({largest.name} {in_gb(largest.n_bytes)})"
    )


def can_be_planned(args: TrainingArguments) -> bool:
    """Whether a plan holds for each device of the run: engines that shard weights or optimizer are not planned."""
    return asked_engine(args) is Engine.DDP


def log_memory(
    model: nn.Module,
    stage: str,
    args: TrainingArguments,
    *,
    peft_config: PeftConfig | None = None,
    reward_funcs: Any = (),
) -> None:
    """Logs the line of `memory_line` for a trainer on a GPU, as a warning if the run does not fit.

    It does nothing on other devices, and nothing if a recipe has planned the run already (`args.memory_is_planned`). A
    model that cannot be planned is not an error.

    Args:
        model: the model to train, loaded.
        stage: `sft`, `reward` or `ppo`.
        args: options of the trainer.
        peft_config: configuration of a new adapter; `None` without one.
        reward_funcs: what `PPOTrainer` takes.
    """
    if args.device.type not in GPUS or getattr(args, "memory_is_planned", False) or not can_be_planned(args):
        return
    from ..modeling.memory.planner import plan_memory  # only here, as most runs on a CPU do without

    options: dict[str, Any] = {"model_args": _model_options(model, peft_config), "device": "cuda"}
    if stage == "ppo":
        options["reward_model"] = _first_reward_model(reward_funcs)
    try:
        plan = plan_memory(model, stage, args, **options)
        n_bytes = device_memory(args.device)
        line = memory_line(plan, n_bytes)
    except Exception as error:  # an estimate must not stop a run that may well fit
        logger.info("Memory: not planned (%s: %s)", type(error).__name__, error)
        return
    if n_bytes is None or plan.fits(n_bytes):
        logger.info(line)
    else:
        logger.warning("%s: it does not fit. `hf-rlhf plan` says what to change.", line)


def _model_options(model: nn.Module, peft_config: PeftConfig | None) -> SimpleNamespace:
    """The options of model and adapter as the commands have them, from the model itself."""
    if peft_config is None and isinstance(model, PeftModel):
        peft_config = model.active_peft_config
    options = SimpleNamespace(use_peft=peft_config is not None)
    dtype = getattr(model, "dtype", None)
    if dtype is not None:
        options.dtype = str(dtype).removeprefix("torch.")
    options.lora_r = getattr(peft_config, "r", None)
    options.lora_target_modules = getattr(peft_config, "target_modules", None)
    return options


def _first_reward_model(reward_funcs: Any) -> Any:
    """The first reward of PPO that is a model, loaded or by name; False if all are functions."""
    given = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    return next((reward for reward in given if isinstance(reward, str | os.PathLike | nn.Module)), False)

"""The memory of a run in one line, beside that of its device. Sizes are in GB of 10^9 bytes."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import TrainingArguments

from ..errors import first_line
from ..modeling.memory.plan import MemoryPlan
from .auto_batch import Sizes
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


def card_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU, whether in use or free.

    It is None for other devices, for which a trainer plans nothing, and for a GPU whose driver does not say it.
    """
    if device.type not in GPUS:
        return None
    try:
        return device_memory(device)
    except RuntimeError as error:  # an estimate must not stop a run
        logger.info("Memory: not planned (%s: %s)", type(error).__name__, first_line(error))
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


@dataclass(frozen=True)
class RunMemory:
    """What the memory of a run on a GPU depends on.

    Attributes:
        request: the run, a `PlanRequest`.
        n_bytes: memory of the GPU, in bytes.
        plan: the plan of the run, if its line was logged.
    """

    request: Any
    n_bytes: int
    plan: MemoryPlan | None = None

    def sizes(self, **options: Any) -> Sizes:
        """The sizes with which `auto_batch` begins, see `planned_sizes`; nothing if the run cannot be planned.

        Args:
            options: fields of `Setup` that are known only now, such as the lengths of the texts.
        """
        from .planned_sizes import planned_sizes  # as below

        try:
            setup = replace(self.request.setup, **options)
            plan = self.plan if setup == self.request.setup else None
            return planned_sizes(replace(self.request, setup=setup), self.n_bytes, plan)
        except Exception as error:  # as below: after an out-of-memory error, passes become smaller anyway
            logger.info("auto_batch: not planned (%s: %s)", type(error).__name__, first_line(error))
            return {}


def log_memory(
    model: nn.Module,
    stage: str,
    args: TrainingArguments,
    *,
    peft_config: PeftConfig | None = None,
    reward_funcs: Sequence[Any] = (),
    value_model: Any = None,
    prompt_tokens: int | None = None,
) -> RunMemory | None:
    """Logs the line of `memory_line` for a trainer on a GPU, as a warning if the run does not fit.

    It does nothing on other devices. It logs nothing if a recipe has planned the run already
    (`args.memory_is_planned`). A model that cannot be planned is not an error.

    Args:
        model: the model to train, loaded.
        stage: `sft`, `reward` or `ppo`.
        args: options of the trainer.
        peft_config: configuration of a new adapter; `None` without one.
        reward_funcs: what `PPOTrainer` takes as `reward_funcs` and `eval_reward_funcs`.
        value_model: what `PPOTrainer` takes.
        prompt_tokens: longest prompt in tokens; `None` if it is not known.

    Returns:
        What `auto_batch` plans with; `None` where nothing is planned.
    """
    n_bytes = card_memory(args.device)
    is_logged = not getattr(args, "memory_is_planned", False)
    if n_bytes is None or not can_be_planned(args) or not (is_logged or getattr(args, "auto_batch", False)):
        return None
    from ..modeling.memory.planner import plan_of, plan_request  # only here, as most runs on a CPU do without

    try:
        options: dict[str, Any] = {"model_args": _model_options(model, peft_config), "device": "cuda"}
        if stage == "ppo":
            options |= {"reward_model": _reward_models(reward_funcs), "value_model": value_model}
        request = plan_request(model, stage, args, prompt_tokens=prompt_tokens, **options)
        plan = plan_of(request) if is_logged else None
        if plan is not None:
            _log(plan, n_bytes)
        return RunMemory(request, n_bytes, plan)
    except Exception as error:  # an estimate must not stop a run that may well fit
        logger.info("Memory: not planned (%s: %s)", type(error).__name__, first_line(error))
        return None


def _log(plan: MemoryPlan, n_bytes: int) -> None:
    line = memory_line(plan, n_bytes)
    if plan.fits(n_bytes):
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


def _reward_models(reward_funcs: Sequence[Any]) -> list[Any]:
    """For each reward of PPO the model, loaded or by name; False for a function."""
    models: list[Any] = []
    for reward in reward_funcs:
        for scorer in getattr(reward, "members", [reward]):  # of a `RewardEnsemble`
            model = scorer if isinstance(scorer, nn.Module) else getattr(scorer, "model", scorer)  # of a `RewardScorer`
            models.append(model if isinstance(model, str | os.PathLike | nn.Module) else False)
    return models

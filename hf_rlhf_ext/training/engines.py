"""What shares out a model over several processes: which engine is asked for, which one runs, and which are supported.

An engine arrives in several ways: by an option (`fsdp`, `deepspeed`, `parallelism_config`), by `accelerate launch
--config_file`, which sets environment variables and leaves the options empty, or by an `Accelerator` of the user.
"""

import json
import os
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available

from ..errors import UserError


class Engine(StrEnum):
    """How a model lies on the processes of a run."""

    DDP = "ddp"
    """Each process has the whole model; also a run of one process."""
    FSDP1 = "fsdp1"
    FSDP2 = "fsdp2"
    XLA = "FSDP on XLA"
    ZERO0 = "zero0"
    """DeepSpeed that shards nothing."""
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    MEGATRON = "Megatron-LM"
    PARALLELISM = "parallelism_config"
    """Tensor, context or sequence parallelism, or replicas of sharded models."""


ALL_ENGINES = frozenset(Engine)
SHIPPED = (Engine.DDP, Engine.FSDP2, Engine.ZERO2, Engine.ZERO3)
"""Engines with a configuration in `recipes/accelerate`, by its name."""
_DEEPSPEED = (Engine.ZERO0, Engine.ZERO1, Engine.ZERO2, Engine.ZERO3)


def asked_engine(args: TrainingArguments) -> Engine:
    """The engine that the options, `accelerate launch` or an existing `Accelerator` ask for; DDP if none does.

    It looks at nothing but settings, also before `TrainingArguments.__post_init__`: `active_engine` says what
    accelerate made of them.
    """
    # An accelerator that was made after the options is the one that the trainer gets. Making options resets older ones.
    if hasattr(args, "deepspeed_plugin") and is_initialized():
        active = _engine_of(AcceleratorState())
        if active is not Engine.DDP:
            return active
    if args.parallelism_config is not None or _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return Engine.PARALLELISM
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        return Engine.MEGATRON
    if args.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        return _zero_of_settings(args)
    # An option of the trainer replaces the settings of the launcher.
    if args.fsdp:
        config = _as_dict(args.fsdp_config)
        return Engine.XLA if config.get("xla") else _fsdp(config.get("version", config.get("fsdp_version", 2)))
    if _is_set("ACCELERATE_USE_FSDP"):
        return _fsdp(os.environ.get("FSDP_VERSION", "1"))
    return Engine.DDP


def engine_of_config(config: Mapping[str, Any]) -> Engine:
    """The engine of a configuration of accelerate, before `accelerate launch` reads it.

    Args:
        config: its content. What accelerate itself refuses counts as DDP.
    """
    kind = str(config.get("distributed_type")).upper()
    if kind == "FSDP":
        return _fsdp(_as_dict(config.get("fsdp_config")).get("fsdp_version", 1))
    if kind == "MEGATRON_LM":
        return Engine.MEGATRON
    if kind == "DEEPSPEED":
        settings = _as_dict(config.get("deepspeed_config"))
        stage = settings.get("zero_stage", 2)
        return _zero(settings.get("deepspeed_config_file"), stage if str(stage) in "0123" else 2)
    return Engine.DDP


def active_engine(accelerator: Accelerator) -> Engine:
    """The engine that runs. Call it after `Trainer.__init__`, which makes the accelerator."""
    return _engine_of(accelerator.state)


def require_engine(trainer: str, engine: Engine, supported: Collection[Engine]) -> None:
    """Refuses an engine that a trainer does not support.

    Args:
        trainer: name of the trainer, for the message.
        engine: the engine that is asked for, or runs.
        supported: engines that the trainer supports.

    Raises:
        UserError: with the engines that are supported.
    """
    if engine not in supported:
        names = " or ".join(name for name in SHIPPED if name in supported)
        raise UserError(f"{engine} is not supported by {trainer}: use --accelerate_config {names}, or leave it out.")


def check_active_engine(
    args: TrainingArguments, accelerator: Accelerator, trainer: str, supported: Collection[Engine]
) -> Engine:
    """Refuses the engine that runs if the trainer does not support it, or if another one was asked for.

    Call it after `Trainer.__init__`. The options were checked before, but not a model that is sharded already, or an
    `Accelerator` that the user made.

    Returns:
        The engine that runs.

    Raises:
        UserError: with the remedy.
    """
    engine = require_active(args, accelerator)
    require_engine(trainer, engine, supported)
    return engine


def require_active(args: TrainingArguments, accelerator: Accelerator) -> Engine:
    """Refuses an engine that was asked for and that accelerate did not turn on, as on a CPU.

    Returns:
        The engine that runs.

    Raises:
        UserError: if it is another one than the settings say.
    """
    asked, active = asked_engine(args), active_engine(accelerator)
    if asked is not active:
        raise UserError(
            f"{asked} is asked for, but accelerate runs {active} on this device ({accelerator.device.type}): {asked} "
            "needs GPUs: use --accelerate_config ddp, or leave it out."
        )
    return active


def check_asked_engine(args: TrainingArguments, trainer: str, supported: Collection[Engine]) -> None:
    """Refuses an engine that a trainer does not support, and DeepSpeed without its package.

    Call it before `TrainingArguments.__post_init__`, which imports DeepSpeed.

    Args:
        args: options of the run.
        trainer: name of the trainer.
        supported: engines that it supports.

    Raises:
        UserError: with the remedy.
    """
    engine = asked_engine(args)
    require_engine(trainer, engine, supported)
    if engine in _DEEPSPEED and not is_deepspeed_available():
        raise UserError(
            "deepspeed: the package is not installed: pip install deepspeed, or leave the option out "
            "(--accelerate_config ddp)."
        )


def check_launched(args: TrainingArguments) -> None:
    """Refuses an engine in a process that no launcher has started, and a launcher that asks for another precision.

    Call it after `TrainingArguments.__post_init__`.

    Raises:
        UserError: with the remedy.
    """
    if args.fsdp and args.world_size == 1:
        raise UserError("fsdp: it needs several processes, and there is one: leave it out, or use accelerate launch.")
    # Without these variables, DeepSpeed looks for MPI.
    if args.deepspeed and "LOCAL_RANK" not in os.environ:
        raise UserError("deepspeed: it needs a launcher, also for one process: leave it out, or use accelerate launch.")
    of_options = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    of_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if of_launcher not in ("no", of_options):
        raise UserError(
            f"mixed_precision: the accelerate configuration says {of_launcher}, but bf16={args.bf16} and "
            f"fp16={args.fp16}: set mixed_precision to 'no' there, and choose with the options."
        )


def refuse_loading_in_one_process(args: TrainingArguments) -> None:
    """Refuses a setting of FSDP with which only the first process loads weights, and the others get them from it.

    The trainers of this library look at a model before that: they compare the outputs of two layouts, copy roles, and
    record the base. Call it after `TrainingArguments.__post_init__`.

    Raises:
        UserError: with the remedy.
    """
    settings = args.fsdp_plugin_args or {"cpu_ram_efficient_loading": _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")}
    if asked_engine(args) is Engine.FSDP2 and settings["cpu_ram_efficient_loading"]:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading: each process needs the weights before training: set it to false, or use "
            "--accelerate_config fsdp2."
        )


def _engine_of(state: AcceleratorState) -> Engine:
    # Most of these attributes are there only if accelerate has turned the engine on.
    if getattr(state, "parallelism_config", None) is not None:
        return Engine.PARALLELISM
    if state.distributed_type == DistributedType.MEGATRON_LM:
        return Engine.MEGATRON
    if state.distributed_type == DistributedType.DEEPSPEED:
        return Engine(f"zero{state.deepspeed_plugin.zero_stage}")
    if getattr(state, "fsdp_plugin", None) is not None:
        return _fsdp(state.fsdp_plugin.fsdp_version)
    return Engine.DDP


def _fsdp(version: int | str) -> Engine:
    return Engine.FSDP1 if str(version) == "1" else Engine.FSDP2


def _zero_of_settings(args: TrainingArguments) -> Engine:
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return Engine(f"zero{plugin.zero_stage}")
    file = args.deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return _zero(file, os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))


def _zero(file: Any, stage: int | str) -> Engine:
    """The engine of settings of DeepSpeed, as `DeepSpeedPlugin` reads them; `stage` is for a file that has none."""
    in_file = _as_dict(_as_dict(file).get("zero_optimization")).get("stage")
    return Engine(f"zero{in_file if in_file in (0, 1, 2, 3) else stage}")


def _as_dict(given: Any) -> dict[str, Any]:
    """An option that is a dict, JSON text, or the path of a JSON file; {} if it cannot be read, which others refuse."""
    if isinstance(given, dict):
        return given
    if not isinstance(given, str) or not given:
        return {}
    try:
        content = json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t")

"""What `BradleyTerryTrainer` refuses, and how it saves, where an engine shards the model (FSDP2, DeepSpeed)."""

import copy
from typing import Any

from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments

from ..errors import UserError
from ..training.engines import Engine, active_engine, asked_engine

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that change each value of a weight by itself, so that they may have a part of the weights."""


def check_sharded_run(args: TrainingArguments, optimizers: tuple[Any, Any]) -> None:
    """Refuses options that an engine does not support. Call it before the model is loaded.

    Args:
        args: the options of the trainer.
        optimizers: the optimizer and the scheduler of the user, `None` each if there is none.

    Raises:
        UserError: with the option and the remedy.
    """
    if not args.accelerator_config.even_batches and args.world_size > 1:
        raise UserError(
            "accelerator_config: even_batches=False is not supported with several processes, as they would wait for "
            "each other at the end of an epoch: leave it out, as repeated rows have weight 0."
        )
    engine = asked_engine(args)
    if engine is Engine.DDP:
        return
    if engine is Engine.FSDP2 and any(part is not None for part in optimizers):
        raise UserError("optimizers: fsdp2 shards the model before its optimizer is made: use the options optim_*.")
    if args.fp16:
        raise UserError(f"fp16: not supported with {engine}, whose loss scale is another one: use bf16=True.")
    if args.optim not in _OPTIMIZERS:
        names = ", ".join(_OPTIMIZERS)
        raise UserError(f"optim={args.optim.value!r}: with {engine}, it would get parts of weights: use {names}.")
    if args.save_only_model and args.load_best_model_at_end:
        raise UserError(
            f"save_only_model: with {engine}, load_best_model_at_end needs whole checkpoints: leave one of them out."
        )
    plugin = args.deepspeed_plugin
    if engine is Engine.ZERO3 and plugin is not None and not _saves_whole(plugin):
        raise UserError(
            "zero3_save_16bit_model: without it no model is saved that can be loaded: set it to true in the accelerate "
            "configuration, or use --accelerate_config zero3."
        )


def _saves_whole(plugin: Any) -> bool:
    settings = plugin.deepspeed_config.get("zero_optimization", {})
    return bool(settings.get("stage3_gather_16bit_weights_on_model_save"))


def keep_own_precision(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Leaves mixed precision to autocast, so that the weights of heads and adapters stay fp32, as under DDP.

    Engines would round all weights to bf16 for the forward pass, also those of the head, and DeepSpeed for good. Call
    it before the model is prepared.
    """
    state = accelerator.state
    if active_engine(accelerator) is Engine.FSDP2:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    elif state.deepspeed_plugin is not None:
        plugin = state.deepspeed_plugin
        config = plugin.deepspeed_config
        uses_bf16 = accelerator.mixed_precision == "bf16"  # which accelerate reads in the configuration
        config["bf16"] = {"enabled": False}
        if uses_bf16:
            # DeepSpeed turns the trainer's autocast off inside its forward pass. No module is named whose gradients
            # it would send in bf16.
            # The gradients of ZeRO-3's own linear layer are rounded otherwise than those of autocast.
            config.setdefault("zero_optimization", {})["memory_efficient_linear"] = False
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            # `Trainer` would round targets, weights and margins to the dtype that this object has noted.
            without_bf16 = copy.copy(args)
            without_bf16.bf16 = False
            plugin.hf_ds_config.trainer_config_process(without_bf16)


def require_prepared(trainer: Trainer, method: str) -> None:
    """Refuses to use a model before training where an engine shards it together with its optimizer.

    Args:
        trainer: the trainer.
        method: name of the method that was called, for the message.

    Raises:
        UserError: if training has not started.
    """
    engine = active_engine(trainer.accelerator)
    if engine is Engine.DDP or trainer.is_in_train or trainer.state.global_step > 0:
        return
    raise UserError(
        f"{method}: {engine} prepares the model when training starts: call train() first, pass eval_on_start=True, or "
        "run it on one process."
    )


def saves_in_shards(accelerator: Accelerator) -> bool:
    """Whether the configuration asks FSDP for checkpoints in shards, with which `Trainer.save_model` saves no model."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)

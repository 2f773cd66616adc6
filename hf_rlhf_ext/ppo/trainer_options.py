"""Which options of `transformers.TrainingArguments` PPO uses, and what is wrong with the other ones."""

from transformers import TrainingArguments

from ..errors import UserError
from ..training.engines import Engine, asked_engine
from ..training.refused_options import (
    AUTO_BATCH_SIZE,
    COMPILE,
    FOR_SCRIPTS,
    LENGTH_COLUMN,
    PARALLELISM,
    TOKEN_COUNT,
    refuse_options,
    refuse_separate_counts,
)

ENGINES = (Engine.DDP, Engine.FSDP2)
"""Engines that `PPOTrainer` supports; FSDP2 for adapters only."""

_PRECISION = "an evaluation has the precision of rollouts: leave it out"
_SAMPLED_EVALUATION = "an evaluation samples completions and has no labels: leave it out"

REFUSED_OPTIONS = {
    "auto_find_batch_size": AUTO_BATCH_SIZE,
    "batch_eval_metrics": _SAMPLED_EVALUATION,
    "bf16_full_eval": _PRECISION,
    "enable_jit_checkpoint": "PPOTrainer saves a checkpoint at SIGTERM without it: leave it out",
    "eval_accumulation_steps": _SAMPLED_EVALUATION,
    "eval_do_concat_batches": _SAMPLED_EVALUATION,
    "eval_use_gather_object": _SAMPLED_EVALUATION,
    "fp16_full_eval": _PRECISION,
    "ignore_data_skip": "the prompts of a rollout depend on its number, so a resumed run skips nothing: leave it out",
    "include_for_metrics": _SAMPLED_EVALUATION,
    "include_num_input_tokens_seen": TOKEN_COUNT.format("episode"),
    "label_names": _SAMPLED_EVALUATION,
    "label_smoothing_factor": "the loss has no labels: leave it out",
    "length_column_name": LENGTH_COLUMN,
    "liger_kernel_config": "the layers of the policy are not replaced: leave it out",
    "parallelism_config": PARALLELISM,
    "prediction_loss_only": _SAMPLED_EVALUATION,
    "torch_compile": COMPILE,
    "use_liger_kernel": "its forward pass replaces the one that PPO reads hidden states from: leave it out",
}
"""Options whose default is the only value, each with the reason and the remedy."""

_NO_LOADER = "no data loader reads prompts"
_OWN_SUM = "PPO sums the gradients of all processes itself"

UNUSED_OPTIONS = FOR_SCRIPTS | {
    "average_tokens_across_devices": "the loss always counts the tokens of all processes",
    "dataloader_drop_last": "every rollout is full: prompts of the next pass complete it",
    "dataloader_in_order": _NO_LOADER,
    "dataloader_multiprocessing_context": _NO_LOADER,
    "dataloader_num_workers": "prompts are tokenized once at the start",
    "dataloader_persistent_workers": _NO_LOADER,
    "dataloader_pin_memory": _NO_LOADER,
    "dataloader_prefetch_factor": _NO_LOADER,
    "ddp_broadcast_buffers": _OWN_SUM,
    "ddp_bucket_cap_mb": _OWN_SUM,
    "ddp_find_unused_parameters": _OWN_SUM,
    "ddp_static_graph": _OWN_SUM,
    "remove_unused_columns": "all columns are passed to the reward functions",
    "use_cache": "generation has a cache of its own, and training needs none",
}
"""Options that change nothing, each with the reason. `hf-rlhf ppo` neither lists nor takes them."""


def check_ppo_options(args: TrainingArguments) -> None:
    """Refuses the options of `TrainingArguments` that PPO cannot use.

    Raises:
        UserError: if an option is set that has no effect, or another one than its name says.
    """
    refuse_options(args, REFUSED_OPTIONS, "PPO")
    refuse_separate_counts(args)
    if args.neftune_noise_alpha is not None:
        raise UserError(
            "neftune_noise_alpha: the noise of NEFTune is on in training only, so that the policy that is trained "
            "would not be the one that is sampled and scored: leave it out."
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            steps = name.replace("strategy", "steps")
            raise UserError(f"{name}='epoch' is not supported by PPO: set {name}='steps' and {steps}.")
    if args.metric_for_best_model in ("loss", "eval_loss"):
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model!r}: PPO's evaluation has no loss: choose "
            "objective/scores, or rewards/NAME/mean of a reward function."
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise UserError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not supported by PPO: choose random or "
            "sequential; generation_batch_size batches prompts of similar length."
        )
    _check_accelerator(args)
    _check_offload(args)


def _check_offload(args: TrainingArguments) -> None:
    """Refuses `offload_reward_model` and `offload_optimizer` where something else places weights or states."""
    asked = [name for name in ("offload_reward_model", "offload_optimizer") if getattr(args, name)]
    engine = asked_engine(args)
    if asked and engine is not Engine.DDP:
        raise UserError(f"{asked[0]}: {engine} places weights and optimizer states itself: leave it out.")
    if args.offload_optimizer and args.optim.value.startswith(("paged_", "schedule_free_")):
        raise UserError(
            f"offload_optimizer with optim={args.optim.value!r}: paged optimizers move their states themselves, and "
            "schedule-free ones read them outside of steps: leave it out, or choose another, such as adamw_8bit."
        )


def _check_accelerator(args: TrainingArguments) -> None:
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise UserError(
                f"accelerator_config: {name}=True is not supported by PPO, which has no data loader: leave it out."
            )
    if args.accelerator_config.gradient_accumulation_kwargs:
        raise UserError(
            "accelerator_config: gradient_accumulation_kwargs is not supported by PPO: set gradient_accumulation_steps."
        )

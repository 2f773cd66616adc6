"""Options of `TrainingArguments` and TRL's `RewardConfig` with which reward training cannot do what they say."""

import os
from collections.abc import Collection

from transformers.utils import is_liger_kernel_available
from trl import RewardConfig

from ..errors import UserError
from ..training.engines import Engine
from ..training.refused_options import (
    AUTO_BATCH_SIZE,
    COMPILE,
    FOR_SCRIPTS,
    FULL_EVAL,
    LENGTH_COLUMN,
    LOADED_MODEL,
    PARALLELISM,
    TOKEN_COUNT,
    refuse_options,
    refuse_separate_counts,
)

ENGINES = (Engine.DDP, Engine.FSDP2, Engine.ZERO1, Engine.ZERO2, Engine.ZERO3)
"""Engines that `BradleyTerryTrainer` supports."""

REFUSED_OPTIONS = {
    "auto_find_batch_size": AUTO_BATCH_SIZE,
    "batch_eval_metrics": "metrics are computed over the whole evaluation set: leave it false",
    "bf16_full_eval": FULL_EVAL,
    "fp16_full_eval": FULL_EVAL,
    "include_for_metrics": "compute_metrics gets scores and labels, which is all there is: leave it out",
    "include_num_input_tokens_seen": TOKEN_COUNT.format("num_tokens"),
    "label_names": "the labels are those of comparisons: leave it out",
    "length_column_name": LENGTH_COLUMN,
    "parallelism_config": PARALLELISM,
    "prediction_loss_only": "the loss of an evaluation is computed from its scores: leave it false",
    "torch_compile": COMPILE,
}
"""Options whose default is the only value, each with the reason and the remedy."""

UNUSED_OPTIONS = FOR_SCRIPTS | {"model_init_kwargs": LOADED_MODEL}
"""Options that change nothing in `hf-rlhf reward`, each with the reason. It neither lists nor takes them."""


def check_reward_options(args: RewardConfig) -> None:
    """Refuses the options that `BradleyTerryTrainer` cannot use.

    Raises:
        UserError: if an option is set that has no effect, or another one than its name says.
    """
    refuse_options(args, REFUSED_OPTIONS, "BradleyTerryTrainer")
    refuse_separate_counts(args)
    if args.train_sampling_strategy == "batch_rebalance":
        raise UserError(
            "train_sampling_strategy='batch_rebalance' is not supported by BradleyTerryTrainer: choose random, "
            "sequential or group_by_length."
        )
    if args.accelerator_config.dispatch_batches:
        raise UserError(
            "accelerator_config: dispatch_batches=True is not supported by BradleyTerryTrainer, as its batches are no "
            "rows that one process could share out: leave it out."
        )
    if args.accelerator_config.split_batches and args.world_size > 1:
        raise UserError(
            "accelerator_config: split_batches=True is not supported by BradleyTerryTrainer: leave it out, and set "
            "per_device_train_batch_size to the prompts of one process."
        )
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise UserError(
            "dataloader_persistent_workers=True needs dataloader_num_workers above 0: set it, or leave it out."
        )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel=True needs a package: pip install liger-kernel, or leave it out.")
    if args.activation_offloading and args.device.type == "cpu":
        raise UserError(
            "activation_offloading=True moves activations from a GPU to the CPU, but this run has no GPU: leave it out."
        )
    _check_template_file(args.chat_template_path)


def _check_template_file(path: str | None) -> None:
    if path is None:
        return
    if path.endswith((".jinja", ".j2")):
        if not os.path.isfile(path):
            raise UserError(f"chat_template_path: there is no file {path}: check the path.")
        return
    # Otherwise it is a tokenizer, whose template and added tokens are taken.
    is_local = os.path.exists(path) or path.startswith((".", "/", "~"))
    if is_local and not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
        raise UserError(
            f"chat_template_path={path!r} is neither a file that ends in .jinja or .j2 nor the folder of a tokenizer: "
            "give one of these, or pass processing_class with the chat_template."
        )


def check_special_token_options(args: RewardConfig, vocabulary: Collection[str]) -> None:
    """Refuses `eos_token` and `pad_token` that are not in the vocabulary of the tokenizer.

    Raises:
        UserError: if a token is not in the vocabulary.
    """
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is not None and token not in vocabulary:
            raise UserError(
                f"{name}: the tokenizer has no token {token!r}: choose one of its vocabulary, or leave it out."
            )

"""Values of `transformers.TrainingArguments` that no run can use: numbers out of range, missing packages and files."""

import inspect
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from ..errors import UserError
from .option_types import read_numbers

_AT_LEAST_1 = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "dataset_num_proc",
    "max_length",
    "pad_to_multiple_of",
    "eval_accumulation_steps",
    "max_tokens_per_batch",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "adam_epsilon",
    "dataloader_num_workers",
    "eval_delay",
    "center_rewards_coefficient",
)
_SEEDS = ("seed", "data_seed")
_LARGEST_SEED = 2**32 - 1  # of numpy
_INTERVALS = {"logging": "logging_steps", "save": "save_steps", "eval": "eval_steps"}
_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
_RECORDS = (*_CHECKPOINTING, "lr_scheduler_kwargs", "model_init_kwargs")
_AS_JSON = "write it as in '{\"name\": 1}'"
_NOT_IN_LIST = ("flyte",)
"""Trackers that Transformers leaves out where it lists those that are installed."""


def check_option_values(args: TrainingArguments, remedies: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuses values that would end in an error of another library, or would be ignored, in the middle of a run.

    Call it before `TrainingArguments.__post_init__`, which reads some of the values. Options that a trainer's config
    does not have, and options that are None, are not looked at. Numbers that were given as text become numbers.

    Args:
        args: options of a trainer, also of TRL's; changed in place.
        remedies: what to do instead of an infinite value, by option.

    Raises:
        UserError: for the first such value; the message names the option and the range.
    """
    read_numbers(args, remedies)
    check_ranges(args, at_least_1=_AT_LEAST_1, not_negative=_NOT_NEGATIVE)
    for name in _SEEDS:
        _check(args, name, lambda value: 0 <= value <= _LARGEST_SEED, f"must be between 0 and {_LARGEST_SEED}")
    for name in ("adam_beta1", "adam_beta2"):
        _check(args, name, lambda value: 0 <= value < 1, "must be at least 0 and below 1")
    _check(args, "label_smoothing_factor", lambda value: 0 <= value < 1, "must be at least 0 and below 1")
    _check(args, "neftune_noise_alpha", lambda value: value > 0, "must be positive", "leave it out for no noise")
    _check(args, "save_total_limit", lambda value: value >= 1, "must be at least 1", "leave it out to keep all")
    _check_steps(args)
    _check_records(args)
    _check_checkpointing_options(args)
    _check_accelerator_config(args)
    _check_folder_and_logs(args)
    _check_trackers(args)
    _check_deepspeed(args)


def check_ranges(
    args: TrainingArguments,
    *,
    at_least_1: Collection[str] = (),
    not_negative: Collection[str] = (),
    fractions: Collection[str] = (),
    positive: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuses numbers out of range. Options that the config does not have, and options that are None, are skipped.

    Args:
        args: options of a trainer.
        at_least_1: options that are at least 1.
        not_negative: options that are 0 or positive, and finite.
        fractions: options from 0 to 1.
        positive: options above 0, each with the remedy, or "".

    Raises:
        UserError: for the first such value; the message names the option and the range.
    """
    for name in at_least_1:
        _check(args, name, lambda value: value >= 1, "must be at least 1")
    for name in not_negative:
        _check(args, name, lambda value: value >= 0, "must not be negative")
        _check(args, name, lambda value: value < math.inf, "must not be infinite")
    for name in fractions:
        _check(args, name, lambda value: 0 <= value <= 1, "must be between 0 and 1")
    for name, remedy in positive.items():
        _check(args, name, lambda value: value > 0, "must be positive", remedy)


def _check(args: TrainingArguments, name: str, is_right, rule: str, remedy: str = "") -> None:
    value = getattr(args, name, None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not is_right(value):
        raise UserError(f"{name} {rule}, got {value}{remedy and f': {remedy}'}.")


def _check_steps(args: TrainingArguments) -> None:
    """Checks how long a run is, and the steps between two logs, saves and evaluations."""
    if args.max_steps < 1 and args.max_steps != -1:
        raise UserError(
            f"max_steps must be at least 1, got {args.max_steps}: leave it out (-1) to count by num_train_epochs."
        )
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise UserError(f"num_train_epochs must be positive, got {args.num_train_epochs:g}: or set max_steps.")
    for event, name in _INTERVALS.items():
        strategy = getattr(args, f"{event}_strategy")
        value = getattr(args, name)
        if str(getattr(strategy, "value", strategy)) != "steps" or value is None:
            continue
        # Below 1, it is a fraction of the run.
        if not value > 0:
            raise UserError(f"{name} must be positive, got {value:g}: to turn it off, set {event}_strategy='no'.")


def _check_records(args: TrainingArguments) -> None:
    for name in _RECORDS:
        value = getattr(args, name, None)
        if value is not None and not isinstance(value, Mapping | str):
            raise UserError(f"{name} must be a dict, got {type(value).__name__}.")
        # On the command line it is JSON, which Transformers reads if it begins with a brace.
        if isinstance(value, str) and value.strip() and not value.strip().startswith("{"):
            raise UserError(f"{name} must be a dict, got the text {value!r}: {_AS_JSON}.")
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if not isinstance(value, str) or not value.startswith("{"):
            continue
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: {value!r} is not valid JSON ({error}): {_AS_JSON}.") from None


def _check_checkpointing_options(args: TrainingArguments) -> None:
    """Checks the arguments of `torch.utils.checkpoint.checkpoint`, which would fail in the first backward pass."""
    known = ["preserve_rng_state"]  # which is not in its signature
    for name, parameter in inspect.signature(checkpoint).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            known.append(name)
    for option in _CHECKPOINTING:
        for name in _fields_of(getattr(args, option, None)):
            if name not in known:
                raise UserError(
                    f"{option}: {name!r} is no argument of torch.utils.checkpoint: choose from {', '.join(known)}."
                )


def _fields_of(record: Any) -> list[str]:
    """The names in an option that is a dict or JSON text; none if it is something else, such as a path."""
    if isinstance(record, str) and record.startswith("{"):
        record = json.loads(record)
    return list(record) if isinstance(record, Mapping) else []


def _check_accelerator_config(args: TrainingArguments) -> None:
    config: Any = args.accelerator_config
    if isinstance(config, str) and not config.startswith("{"):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"accelerator_config: {config} cannot be read ({reason}): check the path.") from None
        except ValueError as error:
            raise UserError(f"accelerator_config: {config} is not valid JSON ({error}): correct the file.") from None
    known = [option.name for option in fields(AcceleratorConfig)]
    for name in _fields_of(config):
        if name not in known:
            raise UserError(f"accelerator_config has no field {name!r}: choose from {', '.join(known)}.")


def _check_folder_and_logs(args: TrainingArguments) -> None:
    if args.output_dir is not None and not str(args.output_dir).strip():
        raise UserError("output_dir is empty: give a folder, or leave it out for trainer_output.")
    for name in ("log_level", "log_level_replica"):
        value = getattr(args, name)
        if value not in trainer_log_levels:
            raise UserError(f"{name}: {value!r} is not known: choose one of {', '.join(trainer_log_levels)}.")


def _check_trackers(args: TrainingArguments) -> None:
    """Checks that the trackers of `report_to` are installed. None means no tracker, which Transformers refuses."""
    if args.report_to is None or args.report_to == [None]:
        args.report_to = "none"
    chosen = args.report_to
    if isinstance(chosen, str):
        chosen = [chosen]
    chosen = [name for name in chosen if name not in ("all", "none")]
    if not chosen:
        return
    installed = [*get_available_reporting_integrations(), *_NOT_IN_LIST]
    for name in chosen:
        if name not in INTEGRATION_TO_CALLBACK:
            nearest = get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1)
            known = f"choose none or {', '.join(INTEGRATION_TO_CALLBACK)}."
            meant = f"did you mean {nearest[0]}?" if nearest else known
            raise UserError(f"report_to: {name!r} is not known: {meant}")
        if name not in installed:
            raise UserError(
                f"report_to: the package of {name} is not installed: pip install {name}, or choose another tracker "
                f"(installed: {', '.join(get_available_reporting_integrations()) or 'none'}), or none."
            )


def _check_deepspeed(args: TrainingArguments) -> None:
    config: Any = args.deepspeed
    if not config:
        return
    if isinstance(config, str) and not config.strip().startswith("{") and not Path(config).is_file():
        raise UserError(f"deepspeed: there is no file {config}: check the path.")

"""The end of a recipe: writes options, report and model card, and pushes them if asked to."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import PreTrainedConfig, TrainingArguments
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..compat import versions
from ..errors import UserError
from ..hub.card import hardware, write_card
from ..hub.privacy import strip_local_paths
from ..hub.publisher import push_options
from ..hub.push import check_access, try_push
from ..modeling.loading import adapter_base
from ..modeling.locations import resolve_location
from .options import ModelArguments
from .program import command_line

NOT_ABOUT_TRAINING = (
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "overwrite",
    "resume_from_checkpoint",
    "lora_task_type",
    "verbose",
)
"""Options that `training_config.yaml` leaves out."""


def check_push(args: TrainingArguments, model_args: ModelArguments) -> None:
    """Checks `--push_to_hub` before anything is loaded, so that it does not fail after training.

    Sets `args.hub_model_id` to the full id.

    Raises:
        UserError: no write access, a local base model (nobody else could load the adapter), or a model with code of
            its own.
    """
    if not args.push_to_hub:
        return
    name = model_args.model_name_or_path
    # Only the adapter is pushed. Users load the base model by its id.
    adapters_base = adapter_base(name, model_args.revision)
    pushes_whole_model = adapters_base is None and not model_args.use_peft
    base = adapters_base or name
    if not pushes_whole_model and Path(base).expanduser().exists():
        raise UserError(
            f"push_to_hub: the base model {base} is a local folder, so nobody else could load the adapter: push the "
            "base model first, and train from its Hub id."
        )
    # Trainer uses the same default.
    repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
    args.hub_model_id = check_access(repo_id, args.hub_token)
    if args.trust_remote_code or _brings_code(name, model_args.revision, whole_model=pushes_whole_model):
        raise UserError(
            f"push_to_hub: {name} brings code of its own (trust_remote_code, auto_map), which is not pushed unless you "
            "allow it: train without push_to_hub, then run `hf-rlhf push`, which says what to --allow."
        )


def _brings_code(name: str, revision: str | None, *, whole_model: bool) -> bool:
    """Returns whether the configuration that would be pushed refers to code of the model."""
    path, location = resolve_location(name, revision)
    config = get_tokenizer_config(path, **location)
    if whole_model:  # otherwise config.json of the base model is not pushed
        model_config, _ = PreTrainedConfig.get_config_dict(path, **location)
        config = config | model_config
    return "auto_map" in config


def finish_run(
    args: TrainingArguments,
    kind: str,
    report: Mapping[str, Any],
    options: tuple[Any, ...],
    *,
    seconds: float,
    card: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes `training_config.yaml`, `report.json` and the card into `args.output_dir`, and pushes them if asked to.

    Call it on every process: the process of rank 0 writes and pushes. Returns the report.

    Args:
        kind: kind of card, see `hub.card.KINDS`.
        report: measured values by section.
        options: the recipe's dataclasses of options.
        seconds: duration of the run.
        card: arguments of `write_card`, with plots as file names in the folder. None writes no card.
    """
    folder = Path(args.output_dir)
    config = training_config(*options)
    report = {
        **report,
        "seed": args.seed,
        "seconds": {kind: round(seconds, 1)},
        "hardware": hardware(),
        "versions": versions(),
        "command": command_line(),
    }
    if args.process_index == 0:
        (folder / "training_config.yaml").write_text(config, encoding="utf-8")
        if card is not None:
            card = {"kind": kind, "config": config, **card}
        report = write_report_and_card(folder, report, card)
    PartialState().wait_for_everyone()  # before the push, which may take longer than their timeout
    if args.process_index == 0 and args.push_to_hub:
        try_push(folder, args.hub_model_id, **push_options(args))
    return report


def write_report_and_card(
    folder: str | Path, report: Mapping[str, Any], card: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Writes `report.json` and the card, and returns the report. The report holds all that the card needs.

    Args:
        card: arguments of `write_card` and the `kind`, with plots as file names in the folder. None writes no card.
    """
    folder = Path(folder)
    report = dict(report)
    if card is not None:
        report["card"] = {**card, "config": strip_local_paths(card.get("config", ""))}
        # The report has the plot's name, so that the folder can be moved. `write_card` needs the path.
        arguments = dict(report["card"])
        if arguments.get("plot"):
            arguments["plot"] = folder / arguments["plot"]
        write_card(folder, report=report, **arguments)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def training_config(*options: Any) -> str:
    """The options that differ from their defaults, as YAML for `--config`, without tokens and local paths."""
    changed: dict[str, Any] = {}
    for dataclass_options in options:
        changed.update(_changed_options(dataclass_options))

    values = {}
    for name, value in changed.items():
        if name in NOT_ABOUT_TRAINING:
            continue
        if isinstance(value, Enum):
            value = value.value
        values[name] = value
    plain = json.loads(json.dumps(values, default=str))  # values of other types become text
    return strip_local_paths(yaml.safe_dump(plain, sort_keys=False))


def _changed_options(options: Any) -> dict[str, Any]:
    """The options of one dataclass that differ from their defaults."""
    if isinstance(options, TrainingArguments):
        # `__post_init__` changes options, so the defaults are those of an instance, not of the class. Without these
        # four options, it would refuse some machines.
        machine = {name: getattr(options, name) for name in ("output_dir", "use_cpu", "bf16", "fp16")}
        values = options.to_dict()
        defaults = type(options)(**machine).to_dict()
    else:
        values = vars(options)
        defaults = {field.name: _default(field) for field in fields(options)}

    changed = {}
    for name, default in defaults.items():
        value = values[name]
        if isinstance(default, list) and isinstance(value, str):
            value = [value]  # `report_to: none` for ["none"]
        if value != default:
            changed[name] = value
    return changed


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default

"""What a recipe leaves at the end: options, report, card, and a push where asked."""

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
from ..modeling.loading import adapter_base, resolve_location
from .options import ModelArguments
from .program import command_line

SAYS_NOTHING_OF_TRAINING = (
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "overwrite",
    "resume_from_checkpoint",
    "lora_task_type",
)
"""Options that `training_config.yaml` leaves out."""


def check_push(args: TrainingArguments, model_args: ModelArguments) -> None:
    """Refuses `--push_to_hub` before anything is loaded where it could only fail at the end.

    `args.hub_model_id` becomes the full id.

    Raises:
        UserError: no right to write there, a local base model, with which nobody could load the adapter, or one that
            brings code of its own.
    """
    if not args.push_to_hub:
        return
    name = model_args.model_name_or_path
    # Of an adapter only the adapter is pushed; whoever loads it fetches the base by its id.
    adapters_base = adapter_base(name, model_args.revision)
    pushes_whole_model = adapters_base is None and not model_args.use_peft
    base = adapters_base or name
    if not pushes_whole_model and Path(base).expanduser().exists():
        raise UserError(
            f"push_to_hub: the base model {base} is a local folder, with which nobody could load the adapter: push it "
            "first, and train from its Hub id."
        )
    # The same name that Trainer would take.
    repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
    args.hub_model_id = check_access(repo_id, args.hub_token)
    if args.trust_remote_code or _brings_code(name, model_args.revision, whole_model=pushes_whole_model):
        raise UserError(
            f"push_to_hub: {name} brings code of its own (trust_remote_code, auto_map), which is not published "
            "unasked: train without push_to_hub, then `hf-rlhf push` says what to --allow."
        )


def _brings_code(name: str, revision: str | None, *, whole_model: bool) -> bool:
    """True where the configuration that would be pushed names code of the model's own."""
    path, location = resolve_location(name, revision)
    config = get_tokenizer_config(path, **location)
    if whole_model:  # otherwise the base's config.json stays where it is
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
    """Writes `training_config.yaml`, `report.json` and the card into `args.output_dir`, and pushes it where asked.

    Call it on every process: that of rank 0 writes and pushes. Returns the report.

    Args:
        kind: of the card, see `hub.card.KINDS`.
        report: what was measured, by section.
        options: the dataclasses that the recipe was given.
        seconds: how long it took.
        card: arguments of `write_card`, plots as names of files in the folder; None writes no card.
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
    PartialState().wait_for_everyone()  # before the push, which may take longer than they would wait
    if args.process_index == 0 and args.push_to_hub:
        try_push(folder, args.hub_model_id, **push_options(args))
    return report


def write_report_and_card(
    folder: str | Path, report: Mapping[str, Any], card: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Writes `report.json`, which holds all that its card needs, and the card; returns the report.

    `card` are arguments of `write_card` with the `kind`, plots as names of files in the folder; None writes no card.
    """
    folder = Path(folder)
    report = dict(report)
    if card is not None:
        report["card"] = {**card, "config": strip_local_paths(card.get("config", ""))}
        # The report names the plot, so that it can be moved with its folder; the card's writer needs the path.
        arguments = dict(report["card"])
        if arguments.get("plot"):
            arguments["plot"] = folder / arguments["plot"]
        write_card(folder, report=report, **arguments)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def training_config(*options: Any) -> str:
    """The options that differ from their defaults, as YAML that `--config` takes; without tokens and local paths."""
    changed: dict[str, Any] = {}
    for dataclass_options in options:
        changed.update(_changed_options(dataclass_options))

    values = {}
    for name, value in changed.items():
        if name in SAYS_NOTHING_OF_TRAINING:
            continue
        if isinstance(value, Enum):
            value = value.value
        values[name] = value
    plain = json.loads(json.dumps(values, default=str))  # what YAML has no name for becomes text
    return strip_local_paths(yaml.safe_dump(plain, sort_keys=False))


def _changed_options(options: Any) -> dict[str, Any]:
    """Options of one dataclass that differ from their defaults."""
    if isinstance(options, TrainingArguments):
        # Its `__post_init__` rewrites options, so the defaults are those of an instance, not of the class; these four
        # it must be given, or it would refuse the machine.
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

"""The end of a recipe: writes options, report and model card, and pushes them if asked to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedConfig, TrainingArguments
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..compat import versions
from ..errors import UserError
from ..hub.card import EMBEDDED_BASES, hardware, write_card
from ..hub.licenses import license_of_base
from ..hub.privacy import strip_local_paths
from ..hub.publisher import push_options
from ..hub.push import check_access, try_push
from ..hub.refusals import check_before_training
from ..hub.reports.provenance import options_yaml, training_options_yaml
from ..hub.visibility import warn_private_base
from ..modeling.loading import adapter_base
from ..modeling.locations import resolve_location
from .options import DataArguments, ModelArguments
from .program import command_line


def check_push(args: TrainingArguments, model_args: ModelArguments, data: DataArguments | None = None) -> None:
    """Checks `--push_to_hub` before anything is loaded, so that it does not fail after training.

    Sets `args.hub_model_id` to the full id. Warns of a public adapter on a private base.

    Raises:
        UserError: a name that no repository can have, no write access, a local base model (nobody else could load the
            adapter), a model with code of its own, or a header of the card that the Hub refuses.
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
    check_before_training(args.hub_model_id, header=_known_header(base, data, args.hub_token), token=args.hub_token)
    if args.process_index == 0 and not pushes_whole_model:
        warn_private_base(base, args.hub_private_repo, args.hub_token, repo_id=args.hub_model_id)
    if args.trust_remote_code or _brings_code(name, model_args.revision, whole_model=pushes_whole_model):
        raise UserError(
            f"push_to_hub: {name} brings code of its own (trust_remote_code, auto_map), which is not pushed unless you "
            "allow it: train without push_to_hub, then run `hf-rlhf push`, which says what to --allow."
        )


def _known_header(base: str, data: DataArguments | None, token: str | None) -> dict[str, Any]:
    """The header of the card as far as it is known before training."""
    header: dict[str, Any] = {"tags": ["trl", "hf_rlhf_ext"]}
    base = EMBEDDED_BASES.get(base, base)
    if not Path(base).expanduser().exists():
        header["base_model"] = base
        license = license_of_base(base, token)
        if license is not None:
            fields = {"license": license.id, "license_name": license.name, "license_link": license.link}
            header |= {name: value for name, value in fields.items() if value is not None}
    if data is not None and not Path(data.dataset_name).expanduser().exists():
        header["datasets"] = [data.dataset_name]
    return header


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
    config = options_yaml(*options)
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
            card = {**card, "kind": kind, "config": training_options_yaml(*options)}
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


def recorded_report(folder: str | Path) -> dict[str, Any]:
    """The report in a folder, as the mapping that `report.json` is; empty without one."""
    path = Path(folder) / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def recorded_card(folder: str | Path) -> dict[str, Any]:
    """The card options in the report of a folder, such as what its trainer knew; empty without a report or a card."""
    return recorded_report(folder).get("card") or {}

"""What a trainer knows of the model that it makes, as options of its card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn

from ...data.origin import DataOrigin, origins_of
from ...data.prompt_form import TEXT, template_digest
from ...errors import UserError
from ...modeling.adapters import bare_model
from ...modeling.heads import is_encoder
from ...modeling.loading import load_tokenizer
from ...modeling.locations import EMBEDDED_MODEL
from ...modeling.source import source_of
from ...training.loop import was_trained_before
from ..report import base_precision
from .provenance import (
    adapter_record,
    base_source,
    data_record,
    datasets_of,
    emissions_of,
    peft_model_of,
    training_options_yaml,
)

_KINDS_OF_TRL = {"DPO": "dpo", "Reward": "reward_model"}
"""Name of a trainer of TRL -> kind of model. All others are taken for SFT."""

_ROLES = {"policy": "prompts", "reward_model": "comparisons", "dpo": "comparisons", "sft": "demonstrations"}
"""Kind of model -> what the rows of training are."""
_OTHER_ROLES = {"normalization": "normalization of rewards", "ptx": "texts for PPO-ptx"}
"""Further datasets of a trainer -> what their rows are for."""
_COLUMNS_OF_PROMPTS = {"prompt", "messages", "conversations"}
"""Columns of SFT, one of which demonstrations have."""


def kind_of(trainer: Any) -> str:
    """The kind of model that a trainer of this library or of TRL makes, as in `CardOptions.kind`."""
    return getattr(trainer, "card_kind", None) or _KINDS_OF_TRL.get(getattr(trainer, "_name", None), "sft")


def trainer_card_options(trainer: Any) -> dict[str, Any]:
    """Returns the options of a card that a trainer knows, without those that it does not know.

    No network is needed. The values fit into JSON.

    Args:
        trainer: A trainer of this library or of TRL.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    kind = kind_of(trainer)
    base = base_source(model)
    revision = (getattr(trainer.args, "model_init_kwargs", None) or {}).get("revision")
    if base["base_model"] is not None and revision is not None:
        base = {"base_revision": revision} | base
    data = _data(trainer, kind)
    normalization = getattr(trainer, "normalization", None)  # only for reward models
    options = {
        "kind": kind,
        **base,
        "chat": _template_of(trainer) is not None,
        **base_precision(model),
        "autocast": normalization.autocast if normalization is not None else None,
        "encoder": is_encoder(bare_model(model)) if kind == "reward_model" else None,
        "adapter": adapter_record(model, _adapter_of(trainer)),
        "lineage": _lineage(model, kind, base),
        "max_length": _max_length(trainer, kind),
        "prompt_form": _prompt_form(trainer),
        "chat_template": _chat_template(trainer, base),
        "data": data,
        **datasets_of(data),
        "rows_read": _rows_read(trainer),
        "config": training_options_yaml(trainer.args),
        "only_text": (kind == "sft" and _is_only_text(trainer)) or None,
        "emissions": None if _is_in_parts(trainer) else emissions_of(trainer.callback_handler.callbacks),
    }
    always = ("base_model", "load_in_4bit", "chat")
    return {name: value for name, value in options.items() if name in always or value not in (None, [], "")}


def _lineage(model: nn.Module, kind: str, base: Mapping[str, Any]) -> dict[str, str] | None:
    """The policy that was trained further, if it is not the base. PPO has it as `start` in its own section."""
    start = source_of(peft_model_of(model) or bare_model(model))
    if kind == "policy" or start is None or start.split("@")[0] == base["base_model"]:
        return None
    return {"start": start}


def _adapter_of(trainer: Any) -> str | None:
    """Name of the adapter that is trained: PPO has several on one base."""
    stack = getattr(trainer, "stack", None)
    return None if stack is None else stack.roles["policy"].adapter


def _is_in_parts(trainer: Any) -> bool:
    """Whether a part of training was in another process or call, of which the energy is not known here."""
    return getattr(trainer, "_initial_global_step", 0) > 0 or was_trained_before(trainer)


def _max_length(trainer: Any, kind: str) -> int | None:
    """Longest sequence of training, in tokens; None without a limit."""
    args = trainer.args
    if kind != "policy":
        return getattr(trainer, "max_length", getattr(args, "max_length", None))
    if args.max_prompt_length is None:
        return None
    return args.max_prompt_length + args.max_completion_length


def _is_only_text(trainer: Any) -> bool:
    """Whether the rows of SFT are text, without prompts and messages."""
    origin = (getattr(trainer, "data_origins", None) or origins_of(trainer.train_dataset)).get("train")
    columns = None if origin is None else origin.columns
    if columns is None:  # of a stream, they may not be known before it is read
        columns = getattr(trainer.train_dataset, "column_names", None) or ()
    if _COLUMNS_OF_PROMPTS & set(columns):
        return False
    return getattr(trainer.args, "dataset_text_field", "text") in columns


def _data(trainer: Any, kind: str) -> list[dict[str, Any]]:
    """What each dataset of training and evaluation was."""
    origins: dict[str, DataOrigin] = getattr(trainer, "data_origins", None) or origins_of(
        trainer.train_dataset, trainer.eval_dataset
    )
    records = []
    for name, origin in origins.items():
        set_name = name.removeprefix("eval").removeprefix("_") if name.startswith("eval") else None
        if set_name is None:
            role = _ROLES.get(kind, "rows") if name == "train" else _OTHER_ROLES.get(name, name)
        else:
            role = "evaluation"
        record = data_record(origin, role, rows=_rows_used(trainer, name))
        if set_name:
            record["set"] = set_name
        if len(record) > 1:  # more than the role
            records.append(record)
    return records


def _rows_used(trainer: Any, name: str) -> int | None:
    """The number of rows that were left after unusable ones were dropped; None if the trainer does not count them."""
    reports = getattr(trainer, "data_reports", {})
    report = reports.get(name) or reports.get(name.removeprefix("eval_"))
    return None if report is None else report.kept


def _rows_read(trainer: Any) -> list[str]:
    """One line for each dataset of which rows were dropped or flagged, or columns were not read."""
    reports = getattr(trainer, "data_reports", {}).values()
    return [report.summary() for report in reports if report.dropped or report.flagged or report.unread]


# The form of the prompts


def _prompt_form(trainer: Any) -> str | None:
    form = getattr(trainer, "prompt_form", None)
    return None if form is None else form.prompt_form


def _template_of(trainer: Any) -> Any:
    tokenizer = trainer.processing_class
    return getattr(getattr(tokenizer, "tokenizer", tokenizer), "chat_template", None)


def _chat_template(trainer: Any, base: Mapping[str, Any]) -> str | None:
    """Whether the messages were rendered by the chat template of the base ("base") or another one ("own")."""
    form = getattr(trainer, "prompt_form", None)
    if form is None or form.prompt_form in (None, TEXT) or form.chat_template_sha256 is None:
        return None
    digest = _digest_of_base(base.get("base_model"), base.get("base_revision"))
    if digest is None:
        return None
    return "base" if digest == form.chat_template_sha256 else "own"


def _digest_of_base(name: str | None, revision: str | None) -> str | None:
    """Digest of the chat template of a base, "" if it has none. None if its tokenizer is not on this machine."""
    if name is None:
        return None
    if name != EMBEDDED_MODEL:  # nothing is fetched for a statement
        found = try_to_load_from_cache(name, "tokenizer_config.json", revision=revision)
        if not isinstance(found, str):
            return None
        name = str(Path(found).parent)
    try:
        return template_digest(load_tokenizer(name)) or ""
    except (UserError, OSError, ValueError):
        return None

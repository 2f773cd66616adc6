"""The report of a model whose folder has none: what its configuration files record, and nothing of its training."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..card import EMBEDDED_BASES
from ..hub_names import public_base
from ..report import REPORT_FILE, CardOptions, RewardModelSection, RunReport, recorded_precision

_ADAPTER = "adapter_config.json"
_MODEL = "config.json"
_BASE_RECORD = "base_record.json"  # the modules of these three import torch, which a push does not need
_NORMALIZATION = "reward_normalization.json"
_ENSEMBLE = "ensemble.json"
_FORM = "prompt_form.json"


def report_of_folder(folder: str | Path, *, with_adapter: bool = True) -> RunReport | None:
    """Makes a report for the folder of a model that was saved without one.

    It has what `adapter_config.json`, `config.json`, `base_record.json`, `reward_normalization.json` and
    `prompt_form.json` record: base, precision, form of the prompts, adapter and versions. It has no numbers.

    Args:
        folder: Folder of an adapter or of a whole model.
        with_adapter: Whether to describe the adapter, for which PEFT is imported.

    Returns:
        The report; of an ensemble, what the reports of all members say. None if the folder holds no model, or if it is
        a classifier of which it is not known what its scores are.
    """
    folder = Path(folder)
    if (folder / _ENSEMBLE).is_file():
        return _report_of_ensemble(folder)
    adapter = _object(folder / _ADAPTER)
    model = _object(folder / _MODEL)
    if not (adapter or model):
        return None
    kind = "model"
    if (folder / _NORMALIZATION).is_file():
        kind = "reward_model"
    elif not _is_language_model(adapter, model):
        return None
    relation = "adapter" if adapter else "finetune"
    form = _object(folder / _FORM).get("prompt_form")
    card = CardOptions(kind, relation=relation, chat=_is_chat(folder), prompt_form=form)
    card.is_foreign = not _is_of_this_library(folder)
    if adapter:
        base = adapter.get("base_model_name_or_path")
        card.base_model = base if base in EMBEDDED_BASES else public_base(base)
        card.base_revision = adapter.get("revision") if card.base_model else None
        card.adapter = _adapter_record(folder) if with_adapter else None
    elif kind == "model":  # this library would load it in another precision than Transformers
        card.base_dtype = model.get("dtype") or model.get("torch_dtype")
    for name, value in (_precision(folder) | recorded_precision(folder, relation)).items():
        setattr(card, name, value)
    return RunReport(versions=_versions(adapter, model), card=card)


def _report_of_ensemble(folder: Path) -> RunReport | None:
    """What is the same in the reports of all members, and the metrics of each."""
    record = _object(folder / _ENSEMBLE)
    reports = []
    for name in record.get("members", ()):
        member = folder / name
        report = RunReport.load(member) if (member / REPORT_FILE).is_file() else report_of_folder(member)
        if report is None or report.card is None:
            return None
        reports.append(report)
    if not reports:
        return None
    section = RewardModelSection(
        members=[report.reward_model.metrics for report in reports], combine=record.get("combine")
    )
    common = {}
    for spec in fields(CardOptions):
        values = [getattr(report.card, spec.name) for report in reports]
        if all(value == values[0] for value in values) and spec.name not in ("plot", "caption", "samples"):
            common[spec.name] = values[0]
    common["is_foreign"] = any(report.card.is_foreign for report in reports)
    if "kind" not in common or "relation" not in common:  # of another kind, or an adapter beside a whole model
        return None
    first = reports[0]
    is_same = all(report.versions == first.versions for report in reports)
    return RunReport(versions=first.versions if is_same else {}, reward_model=section, card=CardOptions(**common))


def _is_language_model(adapter: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether the files say that the model writes text."""
    if adapter:
        return adapter.get("task_type") in (None, "CAUSAL_LM")
    return any(name.endswith("ForCausalLM") for name in model.get("architectures") or ())


def _is_of_this_library(folder: Path) -> bool:
    """Whether a trainer of this library saved the folder: other libraries do not write these files."""
    if (folder / _BASE_RECORD).is_file() or (folder / _FORM).is_file():
        return True
    # Of a reward model that another library trained, the user may have saved mean and standard deviation.
    return _object(folder / _NORMALIZATION).get("base_dtype", "auto") != "auto"


def _is_chat(folder: Path) -> bool:
    """Whether the tokenizer has a chat template; without a tokenizer, whether the model was trained on messages."""
    if (folder / "chat_template.jinja").is_file():
        return True
    if (folder / "tokenizer_config.json").is_file():
        return _object(folder / "tokenizer_config.json").get("chat_template") is not None
    return _object(folder / _FORM).get("prompt_form") in ("messages", "mixed")


def _adapter_record(folder: Path) -> dict[str, Any] | None:
    from peft import PeftConfig

    from .provenance import adapter_record

    try:
        return adapter_record(PeftConfig.from_pretrained(str(folder)))
    except Exception:  # a kind that this version of PEFT does not know
        return None


def _precision(folder: Path) -> dict[str, Any]:
    """The precision of the base of an adapter in training, as card options; empty if it is not recorded."""
    recorded = _object(folder / _BASE_RECORD)
    if "dtype" not in recorded:
        return {}
    quantization = recorded.get("quantization")
    return {
        "base_dtype": recorded["dtype"],
        "load_in_4bit": bool((quantization or {}).get("load_in_4bit")),
        "quantization": quantization,
    }


def _versions(adapter: dict[str, Any], model: dict[str, Any]) -> dict[str, str]:
    """Versions of the libraries that saved the files."""
    found = {"peft": adapter.get("peft_version"), "transformers": model.get("transformers_version")}
    return {name: version for name, version in found.items() if version}


def _object(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none. A broken one is refused where it is pushed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

"""Model cards with measured results, from one Jinja template per kind of model, without local paths or names."""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError
from .markdown import escape_markdown, format_interval, template_environment
from .privacy import strip_local_paths
from .report import CardOptions, RunReport, as_report, hardware, recorded_precision
from .results import Result, collect_results

__all__ = ["KINDS", "card_from_report", "escape_markdown", "hardware", "render_card", "write_card"]

EMBEDDED_BASES = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Name of an embedded model -> its id on the Hub."""
_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""The quantization of `load_in_4bit`, in reports that do not record it."""

_QUANTIZATION_NAMES = {4: "four_bit", 8: "eight_bit"}
"""The variable of the quantization in code snippets."""

_LOAD_IN_4BIT = re.compile(r"^\s*load_in_4bit:\s*true\b", re.MULTILINE | re.IGNORECASE)


class Kind(NamedTuple):
    """Properties that all cards for one kind of model share."""

    title: str
    pipeline_tag: str
    tags: tuple[str, ...]
    stages: tuple[str, ...]  # names of the training stage in `seconds` of a report
    citations: tuple[str, ...]


KINDS = {
    "policy": Kind("PPO policy", "text-generation", ("ppo",), ("policy", "ppo"), ("instructgpt", "ppo")),
    "dpo": Kind("DPO policy", "text-generation", ("dpo",), ("dpo",), ("dpo",)),
    "reward_model": Kind(
        "Bradley-Terry reward model",
        "text-classification",
        ("reward-model",),
        ("reward_model",),
        ("instructgpt", "bradley_terry"),
    ),
    "sft": Kind("SFT policy", "text-generation", ("sft",), ("sft",), ("instructgpt",)),
}


# Public functions


def write_card(folder: str | Path, kind: str, report: RunReport | Mapping[str, Any], **options: Any) -> Path:
    """Writes a model card to `folder/README.md`.

    Args:
        folder: Folder of the model. It is created if it does not exist.
        kind: Kind of model: `"policy"` (by PPO), `"dpo"` (a policy by DPO), `"reward_model"` or `"sft"`.
        report: What was measured, as a `RunReport` or as a mapping with the content of `report.json`.
        **options: Options of the card, such as `base_model`, `repo_id` or `limits`, see
            `hf_rlhf_ext.hub.report.CardOptions`. The PNG given as `plot` is copied into `folder`.

    Returns:
        The path of the card.

    Raises:
        UserError: The kind is unknown, or a measured number is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot = options.get("plot")
    if plot is not None:
        target = folder / Path(plot).name
        # Copying a file onto itself is an error.
        if Path(plot).resolve() != target.resolve():
            shutil.copyfile(plot, target)
    # The caller's options for the precision of the base override those recorded in the folder.
    options = recorded_precision(folder, options.get("relation", "adapter")) | options
    path = folder / "README.md"
    ModelCard(render_card(kind, report, **options)).save(path)
    return path


def card_from_report(report: RunReport | Mapping[str, Any], **changes: Any) -> str | None:
    """Renders the card of a report that has card options (`report.card`), as reports of recipes do.

    Args:
        report: A `RunReport`, or a mapping with the content of `report.json`.
        **changes: Options of `CardOptions` that override those in the report.

    Returns:
        The text of the card, or None if the report has no card options.
    """
    report = as_report(report)
    if report.card is None:
        return None
    return _render(replace(report.card, **changes), report)


def render_card(kind: str, report: RunReport | Mapping[str, Any], **options: Any) -> str:
    """Renders a model card, without network access.

    Args:
        kind: Kind of model: `"policy"` (by PPO), `"dpo"` (a policy by DPO), `"reward_model"` or `"sft"`.
        report: What was measured, as a `RunReport` or as a mapping with the content of `report.json`. `command`,
            `versions`, `hardware`, `seconds` (by stage) and `license` are shown if they are known.
        **options: Options of the card, see `hf_rlhf_ext.hub.report.CardOptions`.

    Returns:
        The text of the card, with its YAML header.

    Raises:
        UserError: The kind is unknown, or a measured number is not finite.
    """
    return _render(CardOptions(kind, **options), as_report(report))


# The header


def card_data(
    kind: str,
    results: Sequence[Result],
    *,
    base_model: str,
    model_name: str,
    datasets: Sequence[str],
    revision: str | None = None,
    relation: str = "adapter",
    library: str = "peft",
    license: str | None = None,
) -> ModelCardData:
    """Builds the YAML header: relation to `base_model`, tags, license, datasets, and the results as a model index."""
    spec = KINDS[kind]
    evaluations = [_model_index_entry(result, spec, datasets, revision) for result in results]
    tags = ["trl", "rlhf", "hf_rlhf_ext", *spec.tags]
    if relation == "adapter":
        tags.append("lora")
    language = None
    if base_model in EMBEDDED_BASES.values():  # for other bases, the report has the license of the base
        license = license or "apache-2.0"
        language = "en"
    return ModelCardData(
        base_model=base_model,
        base_model_relation=relation,
        library_name=library,
        pipeline_tag=spec.pipeline_tag,
        tags=tags,
        license=license,
        language=language,
        datasets=list(datasets) or None,
        model_name=model_name if evaluations else None,
        eval_results=evaluations or None,  # an empty model index is not valid
    )


def _model_index_entry(result: Result, spec: Kind, datasets: Sequence[str], revision: str | None) -> EvalResult:
    return EvalResult(
        task_type=spec.pipeline_tag,
        dataset_type=datasets[0] if datasets else "custom",
        dataset_name=f"{result.of} of the run",
        dataset_split="heldout",
        dataset_revision=revision,
        metric_type=result.key,
        metric_name=result.name + _count_and_interval(result),
        metric_value=round(result.value, 4),
    )


def _count_and_interval(result: Result) -> str:
    """Formats n and the interval for the metric's name, since the model index has no other field for them."""
    parts = []
    if result.n:
        parts.append(f"n = {result.n}")
    if result.ci95:
        parts.append(f"95 % CI {format_interval(result.ci95)}")
    return f" ({', '.join(parts)})" if parts else ""


# The body


def _render(options: CardOptions, report: RunReport) -> str:
    if options.kind not in KINDS:
        raise UserError(f"write_card: kind {options.kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    # Embedded models have a different name on the Hub.
    base_model = EMBEDDED_BASES.get(options.base_model, options.base_model)
    results = collect_results(options.kind, report)
    model_name = strip_local_paths(options.model_name or _usual_name(base_model, options.kind))
    header = card_data(
        options.kind,
        results,
        base_model=base_model,
        model_name=model_name,
        datasets=options.datasets,
        revision=options.dataset_revision,
        relation=options.relation,
        library=_library(options, report),
        license=report.license,
    )
    template = template_environment().get_template(f"{options.kind}.md.jinja")
    body = template.render(
        report=report,
        results=results,
        base_model=base_model,
        embedded=options.base_model in EMBEDDED_BASES,
        title=_title(options.kind, model_name, report),
        **_shown_options(options, report),
        **_provenance(options, report),
    )
    return f"---\n{header.to_yaml()}\n---\n\n{body}"


def _usual_name(base_model: str, kind: str) -> str:
    """Returns the default name, made from base and kind, such as `SmolLM2-135M-Instruct-reward-model`."""
    base = base_model.rsplit("/", 1)[-1]
    suffix = kind.replace("_", "-")
    return f"{base}-{suffix}"


def _title(kind: str, model_name: str, report: RunReport) -> str:
    title = f"{model_name}: {KINDS[kind].title}"
    if report.reward_model.members:
        title += f", ensemble of {len(report.reward_model.members)}"
    return title


def _library(options: CardOptions, report: RunReport) -> str:
    """Returns the name of the library that loads the model."""
    if report.reward_model.members:  # only this library loads ensembles
        return "hf_rlhf_ext"
    return "peft" if options.relation == "adapter" else "transformers"


def _shown_options(options: CardOptions, report: RunReport) -> dict[str, Any]:
    """Returns the card options that the templates use.

    Values that may contain local paths or names are cleaned by `strip_local_paths` here and in `_provenance`.
    """
    return {
        "kind": options.kind,
        "relation": options.relation,
        "repo_id": options.repo_id,
        "samples": options.samples,
        "plot": Path(options.plot).name if options.plot else None,
        "plot_caption": options.caption,
        "limits": [strip_local_paths(limit) for limit in options.limits],
        "notes": [strip_local_paths(note) for note in options.notes],
        "system_prompt": options.system_prompt,
        "chat": options.chat,
        "base_dtype": options.base_dtype,
        "autocast": options.autocast,
        "bits": _bits(options),
        "quantization_name": _QUANTIZATION_NAMES.get(_bits(options)),
        "quantization_type": _quantization_type(options),
        "quantization_arguments": _quantization_arguments(options),
        "base_options": _base_options(options),
    }


def _provenance(options: CardOptions, report: RunReport) -> dict[str, Any]:
    """Returns how the model was made: lineage, command, versions, configuration, hardware and time."""
    return {
        "lineage": _stripped(options.lineage or {}),
        "rows_read": [strip_local_paths(line) for line in options.rows_read],
        "versions": _stripped(report.versions),
        "command": strip_local_paths(str(report.command or "not recorded")),
        "config": strip_local_paths(_config_text(options)),
        "hardware": strip_local_paths(str(report.hardware or hardware())),
        "seconds": _stage_seconds(report.seconds, KINDS[options.kind].stages),
        "citations": citations(options, report),
    }


def _stripped(values: Mapping[str, Any]) -> dict[str, str]:
    """Converts values to text without local paths and names."""
    return {name: strip_local_paths(str(value)) for name, value in values.items()}


def _config_text(options: CardOptions) -> str:
    """Returns the options of the run as YAML."""
    if isinstance(options.config, str):
        return options.config
    if not options.config:
        return ""
    return yaml.safe_dump(dict(options.config), sort_keys=False)


def _stage_seconds(seconds: Mapping[str, float], stages: Sequence[str]) -> float | None:
    """Returns the duration of the stage that made this model. Older reports have other names for stages."""
    for name, value in seconds.items():
        if name in stages:
            return value
    return None


def _base_options(options: CardOptions) -> str:
    """Returns arguments of `from_pretrained`, as source code, that load the base as it was in training.

    By default, Transformers loads the base in its stored dtype, and scores then differ by about a percent.
    """
    arguments = ""
    if options.base_dtype is not None:
        arguments += f', dtype="{options.base_dtype}"'
    if _bits(options) is not None:
        arguments += f", quantization_config={_QUANTIZATION_NAMES[_bits(options)]}"
    return arguments


def _bits(options: CardOptions) -> int | None:
    """4 or 8 if bitsandbytes quantized the base in training; None otherwise."""
    if _is_4bit(options):
        return 4
    if (options.quantization or {}).get("load_in_8bit"):
        return 8
    return None


def _quantization(options: CardOptions) -> Mapping[str, Any]:
    """The recorded quantization, or that of `load_in_4bit` in reports that do not record it."""
    return options.quantization or _NF4


def _quantization_type(options: CardOptions) -> str:
    if _bits(options) == 8:
        return "LLM.int8"
    return f"{str(_quantization(options).get('bnb_4bit_quant_type', 'fp4')).upper()}, QLoRA"


def _quantization_arguments(options: CardOptions) -> list[str]:
    """Returns arguments of `BitsAndBytesConfig`, as source code, that quantize the base as it was in training."""
    recorded = _quantization(options)
    # The heads are never quantized in this library.
    skipped = ["lm_head", "score"]
    for name in recorded.get("llm_int8_skip_modules") or ():
        if name not in skipped:
            skipped.append(name)
    if _bits(options) == 8:
        arguments = ["load_in_8bit=True"]
        if recorded.get("llm_int8_threshold", 6.0) != 6.0:
            arguments.append(f"llm_int8_threshold={recorded['llm_int8_threshold']}")
    else:
        arguments = ["load_in_4bit=True", f'bnb_4bit_quant_type="{recorded.get("bnb_4bit_quant_type", "fp4")}"']
        if recorded.get("bnb_4bit_use_double_quant"):
            arguments.append("bnb_4bit_use_double_quant=True")
        arguments.append(f"bnb_4bit_compute_dtype=torch.{recorded.get('bnb_4bit_compute_dtype', 'float32')}")
    arguments.append(f"llm_int8_skip_modules={json.dumps(skipped)}")
    return arguments


def _is_4bit(options: CardOptions) -> bool:
    """True if the base was in 4 bits in training. Older reports have this only in their configuration."""
    if options.load_in_4bit:
        return True
    return _LOAD_IN_4BIT.search(_config_text(options)) is not None


def citations(options: CardOptions, report: RunReport) -> tuple[str, ...]:
    """Returns what to cite: the method, VADER if it was the gold reward, and QLoRA if the base was in 4 bits."""
    papers = list(KINDS[options.kind].citations)
    if report.gold_reward == "vader":
        papers.append("vader")
    if _is_4bit(options):
        papers.append("qlora")
    return tuple(papers)


def main(folders: Sequence[str]) -> None:
    """Runs `python -m hf_rlhf_ext.hub.card FOLDER …`, which rewrites the card in each folder from its `report.json`."""
    for folder in folders:
        report = RunReport.load(folder)
        card = card_from_report(report)
        ModelCard(card).save(Path(folder) / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])

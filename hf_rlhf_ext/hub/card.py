"""Model cards with measured results: one Jinja template a kind of model, and no trace of the machine that made them."""

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
"""Embedded models and what they are on the Hub."""
_LOAD_IN_4BIT = re.compile(r"^\s*load_in_4bit:\s*true\b", re.MULTILINE | re.IGNORECASE)


class Kind(NamedTuple):
    """What cards of one kind of model share."""

    title: str
    pipeline_tag: str
    tags: tuple[str, ...]
    stages: tuple[str, ...]  # names that a report's `seconds` may have for it
    citations: tuple[str, ...]


KINDS = {
    "policy": Kind("PPO policy", "text-generation", ("ppo",), ("policy", "ppo"), ("instructgpt", "ppo")),
    "reward_model": Kind(
        "Bradley-Terry reward model",
        "text-classification",
        ("reward-model",),
        ("reward_model",),
        ("instructgpt", "bradley_terry"),
    ),
    "sft": Kind("SFT policy", "text-generation", ("sft",), ("sft",), ("instructgpt",)),
}


# What others call


def write_card(folder: str | Path, kind: str, report: RunReport | Mapping[str, Any], **options: Any) -> Path:
    """Writes `folder/README.md` from a report (the quickstart's `report.json`) and returns its path.

    `options` are those of `CardOptions`; `plot`, a PNG, is copied into `folder` so that the link also holds on the Hub.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot = options.get("plot")
    if plot is not None:
        target = folder / Path(plot).name
        # Copying a file onto itself is an error.
        if Path(plot).resolve() != target.resolve():
            shutil.copyfile(plot, target)
    # What the caller says of the base's precision counts more than what the folder has recorded.
    options = recorded_precision(folder, options.get("relation", "adapter")) | options
    path = folder / "README.md"
    ModelCard(render_card(kind, report, **options)).save(path)
    return path


def card_from_report(report: RunReport | Mapping[str, Any], **changes: Any) -> str | None:
    """The card of a report that says under `card` what its card needs, as the recipes' do; None of another report.

    `changes` are options of `CardOptions` that replace the report's.
    """
    report = as_report(report)
    if report.card is None:
        return None
    return _render(replace(report.card, **changes), report)


def render_card(kind: str, report: RunReport | Mapping[str, Any], **options: Any) -> str:
    """A model card's text.

    Args:
        kind: "policy", "reward_model" or "sft".
        report: what was measured, with `command`, `versions`, `hardware`, `seconds` (by stage), `license` where known.
        options: see `CardOptions`.

    Asks no network.

    Raises:
        UserError: an unknown kind, or a number that is not finite.
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
    """The YAML header: what it is to `base_model`, found by its tags, with the results as a model index."""
    spec = KINDS[kind]
    evaluations = [_model_index_entry(result, spec, datasets, revision) for result in results]
    tags = ["trl", "rlhf", "hf_rlhf_ext", *spec.tags]
    if relation == "adapter":
        tags.append("lora")
    language = None
    if base_model in EMBEDDED_BASES.values():  # of other bases their own, which a derivative inherits
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
        eval_results=evaluations or None,  # an empty model index is not a valid one
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
    """They stand in the metric's name, as huggingface_hub makes one data set of those that differ in the name only."""
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
    # The Hub knows embedded models by another name.
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
    """`SmolLM2-135M-Instruct-reward-model`, of base and kind."""
    base = base_model.rsplit("/", 1)[-1]
    suffix = kind.replace("_", "-")
    return f"{base}-{suffix}"


def _title(kind: str, model_name: str, report: RunReport) -> str:
    title = f"{model_name}: {KINDS[kind].title}"
    if report.reward_model.members:
        title += f", ensemble of {len(report.reward_model.members)}"
    return title


def _library(options: CardOptions, report: RunReport) -> str:
    """What loads it."""
    if report.reward_model.members:  # several adapters and how to combine them: nobody else reads that
        return "hf_rlhf_ext"
    return "peft" if options.relation == "adapter" else "transformers"


def _shown_options(options: CardOptions, report: RunReport) -> dict[str, Any]:
    """What templates show of the card's options.

    What varies from machine to machine goes through `strip_local_paths` here and in `_provenance`; the templates' own
    prose does not need to.
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
        "four_bit": _is_4bit(options),
        "base_options": _base_options(options),
    }


def _provenance(options: CardOptions, report: RunReport) -> dict[str, Any]:
    """How the model was made: from what, by which command, with which versions, on what machine."""
    return {
        "lineage": _stripped(options.lineage or {}),
        "versions": _stripped(report.versions),
        "command": strip_local_paths(str(report.command or "not recorded")),
        "config": strip_local_paths(_config_text(options)),
        "hardware": strip_local_paths(str(report.hardware or hardware())),
        "seconds": _stage_seconds(report.seconds, KINDS[options.kind].stages),
        "citations": citations(options, report),
    }


def _stripped(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as text without what only this machine knows."""
    return {name: strip_local_paths(str(value)) for name, value in values.items()}


def _config_text(options: CardOptions) -> str:
    """The options of the run as YAML."""
    if isinstance(options.config, str):
        return options.config
    if not options.config:
        return ""
    return yaml.safe_dump(dict(options.config), sort_keys=False)


def _stage_seconds(seconds: Mapping[str, float], stages: Sequence[str]) -> float | None:
    """How long the stage took that made this model; older reports have other names for stages."""
    for name, value in seconds.items():
        if name in stages:
            return value
    return None


def _base_options(options: CardOptions) -> str:
    """Arguments of `from_pretrained`, as source, that load an adapter's base as it was in training.

    By itself Transformers loads it in the dtype in which it is stored, in which scores are off by a percent.
    """
    arguments = ""
    if options.base_dtype is not None:
        arguments += f', dtype="{options.base_dtype}"'
    if _is_4bit(options):
        arguments += ", quantization_config=four_bit"
    return arguments


def _is_4bit(options: CardOptions) -> bool:
    """Whether the base was in 4 bits in training; cards of older reports have that in their configuration only."""
    if options.load_in_4bit:
        return True
    return _LOAD_IN_4BIT.search(_config_text(options)) is not None


def citations(options: CardOptions, report: RunReport) -> tuple[str, ...]:
    """What to cite: the method always, VADER where it was the gold reward, QLoRA where the base was in 4 bits."""
    papers = list(KINDS[options.kind].citations)
    if report.gold_reward == "vader":
        papers.append("vader")
    if _is_4bit(options):
        papers.append("qlora")
    return tuple(papers)


def main(folders: Sequence[str]) -> None:
    """`python -m hf_rlhf_ext.hub.card FOLDER …` writes each folder's card again from the `report.json` beside it."""
    for folder in folders:
        report = RunReport.load(folder)
        card = card_from_report(report)
        ModelCard(card).save(Path(folder) / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])

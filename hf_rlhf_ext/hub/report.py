"""`report.json`: what a run measured and how it was made, as dataclasses; all that a card needs."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from ..compat import versions

REPORT_FILE = "report.json"
FROM_PYTHON = "# started from Python, not by a recipe"
"""The `command` of a run without a recipe: such a report is written anew at every push."""

_NORMALIZATION_FILE = "reward_normalization.json"  # of `reward.normalization`, which loads torch: a card does not


Groups = dict[str, dict[str, dict[str, float]]]
"""Held-out metrics by grouping and group: `{"length_gap": {"0 to 2": {"accuracy": 0.7, "n": 21}}}`."""


# The sections: what each stage measured


@dataclass
class Section:
    """What one stage measured.

    `metrics` holds numbers by name; beside some, `NAME_ci95` ([low, high], a 95 % confidence interval) and `NAME_n`
    (of how many).
    """

    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Self:
        """The section of a `report.json`, where structure and numbers stand side by side."""
        structure = {}
        metrics = {}
        # Names of rewards are part of keys (`judge_before`), so that only the structure has a fixed list of names.
        for name, value in section.items():
            if name in cls.structure_names():
                structure[name] = value
            else:
                metrics[name] = value
        return cls(metrics=metrics, **structure)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `report.json`; what is not known is left out."""
        section = dict(self.metrics)
        for name in self.structure_names():
            value = getattr(self, name)
            if value is not None:
                section[name] = value
        return section

    @classmethod
    def structure_names(cls) -> list[str]:
        """Fields beside the numbers."""
        return [spec.name for spec in fields(cls) if spec.name != "metrics"]


@dataclass
class SFTSection(Section):
    """Metrics: `eval_loss`, `eval_mean_token_accuracy`, `heldout_rows`, and what the trainer logs."""


@dataclass
class RewardModelSection(Section):
    """Metrics: `pairs` (trained on), `heldout_pairs`, `decided_pairs` (no ties), `accuracy`, `nll`, `gain`, ….

    Attributes:
        groups: held-out accuracy by group.
        members: of an ensemble, the metrics of each one.
        combine: how an ensemble's scores become one.
    """

    groups: Groups | None = None
    members: list[dict[str, Any]] | None = None
    combine: str | None = None


@dataclass
class PPOSection(Section):
    """Metrics: `kl` (nats per completion), `kl_coef`, `updates`, and `REWARD_before`, `REWARD_after`, `REWARD_gain`.

    REWARD is `proxy` (what PPO maximized), `gold`, or one of `eval_rewards`.

    Attributes:
        start: what PPO started from ("the SFT policy").
        rewards: names of the rewards that PPO maximized.
        eval_rewards: names of rewards that it did not see.
        stop_reason: why a guard stopped the run; None where none did.
    """

    start: str | None = None
    rewards: list[str] | None = None
    eval_rewards: list[str] | None = None
    stop_reason: str | None = None

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Self:
        section = dict(section)
        if "stopped_by" in section:  # its name in older reports
            section.setdefault("stop_reason", section.pop("stopped_by"))
        return super().from_dict(section)


# What is known beside the numbers


@dataclass
class CardOptions:
    """What a card says beside what was measured.

    Args:
        kind: "policy", "reward_model" or "sft".
        base_model: id on the Hub of the base, or the embedded model's name, which is translated.
        model_name: title of the card; default is made of base and kind.
        repo_id: where the adapter lives, on the Hub or, with two or more slashes, in a folder that is not published;
            the snippet shows a placeholder when it is None.
        config: options of the run, as a mapping or as YAML.
        datasets: ids on the Hub only; local data belong into `lineage`.
        dataset_revision: commit of the first of `datasets`.
        samples: rows of `prompt`, `before`, `after`; their markdown is escaped.
        plot: a PNG in the card's folder.
        caption: what it shows, where that is not what plots of this kind show.
        limits: further sentences beside those that are derived from the report.
        lineage: what this model was made from (`{"reward model": "alice/reward"}`); ids on the Hub become links.
        relation: to the base: "adapter", "merge" (the adapter is merged into it), or "finetune" (all weights).
        notes: how it was measured, in sentences.
        system_prompt: with which it was trained, for the snippet.
        chat: whether its tokenizer has a chat template; the snippet asks in plain text where it has none.
        base_dtype: of the base's weights in training ("bfloat16"), for the snippet; None where it is not known.
        load_in_4bit: whether the base was in 4 bits in training.
        autocast: dtype that a reward model computes its scores in, None for that of the weights.
    """

    kind: str
    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model_name: str | None = None
    repo_id: str | None = None
    config: Mapping[str, Any] | str | None = None
    datasets: Sequence[str] = ()
    dataset_revision: str | None = None
    samples: Sequence[Mapping[str, str]] = ()
    plot: str | Path | None = None
    caption: str | None = None
    limits: Sequence[str] = ()
    lineage: Mapping[str, str] | None = None
    relation: str = "adapter"
    notes: Sequence[str] = ()
    system_prompt: str | None = None
    chat: bool = True
    base_dtype: str | None = None
    load_in_4bit: bool = False
    autocast: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `report.json`: the options that were given, and those that others look up there."""
        options = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name in _ALWAYS_WRITTEN or value != spec.default:
                options[spec.name] = value
        return options


@dataclass
class MergeRecord:
    """How an adapter was merged: `dtype` of the weights, into which `base`, how far a reward model's scores moved."""

    dtype: str
    base: str
    max_score_difference: float | None = None


@dataclass
class RunReport:
    """`report.json`. Reads those of earlier versions, which lack much.

    Attributes:
        seconds: that each stage took.
        hardware: that it ran on, without the machine's name.
        license: of the model; None: the base's.
        gold_reward: "vader" where the simulated annotator judged by that.
        categories: by use case: `n` held-out prompts, `gold_before`, `gold_after`.
        card: what the card says; None: there is no card.
        other: whatever else the file holds.
    """

    seed: int | str | None = None
    command: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    gold_reward: str | None = None
    reward_model: RewardModelSection = field(default_factory=RewardModelSection)
    sft: SFTSection = field(default_factory=SFTSection)
    ppo: PPOSection = field(default_factory=PPOSection)
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    card: CardOptions | None = None
    merge: MergeRecord | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> Self:
        known = {spec.name for spec in fields(cls)} - {"other"}
        values: dict[str, Any] = {"other": {}}
        for name, value in report.items():
            if name not in known:  # the quickstart's, or a later version's: kept, so that a merge does not lose it
                values["other"][name] = value
            elif name in _SECTIONS:
                values[name] = _SECTIONS[name].from_dict(value)
            elif name in _RECORDS and value:
                values[name] = _RECORDS[name](**value)
            else:
                values[name] = value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `report.json`; what is not known is left out."""
        report: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name in _SECTIONS or isinstance(value, CardOptions):
                value = value.to_dict()
            elif isinstance(value, MergeRecord):
                value = asdict(value)
            if spec.name != "other" and value not in (None, {}):  # a seed of 0 is known
                report[spec.name] = value
        return report | self.other

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The `report.json` of a run's folder, its card with what the folder knows of the base's precision."""
        folder = Path(folder)
        text = (folder / REPORT_FILE).read_text(encoding="utf-8")
        report = cls.from_dict(json.loads(text))
        if report.card is not None:
            precision = recorded_precision(folder, report.card.relation)
            report.card = replace(report.card, **precision)
        return report

    def save(self, folder: str | Path) -> None:
        """Writes `folder/report.json`."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / REPORT_FILE).write_text(text, encoding="utf-8")


_ALWAYS_WRITTEN = ("kind", "base_model", "relation", "chat")
_SECTIONS: dict[str, type[Section]] = {
    "reward_model": RewardModelSection,
    "sft": SFTSection,
    "ppo": PPOSection,
}
_RECORDS = {"card": CardOptions, "merge": MergeRecord}


def as_report(report: RunReport | Mapping[str, Any]) -> RunReport:
    """The report itself, or what a mapping like `report.json` says."""
    if isinstance(report, RunReport):
        return report
    return RunReport.from_dict(report)


# What is known of the base and the machine


def base_precision(model: Any) -> dict[str, Any]:
    """`base_dtype` and `load_in_4bit` of a loaded model's base, for its card."""
    from ..reward.normalization import dtype_name, is_4bit  # loads torch, which the model did already

    return {"base_dtype": dtype_name(model), "load_in_4bit": is_4bit(model)}


def recorded_precision(folder: Path, relation: str) -> dict[str, Any]:
    """`base_dtype`, `load_in_4bit` and `autocast` as a reward adapter's `reward_normalization.json` has them."""
    path = folder / _NORMALIZATION_FILE
    if relation != "adapter" or not path.is_file():
        return {}
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if recorded.get("base_dtype", "auto") == "auto":  # of a model that this library did not train
        return {}
    names = ("base_dtype", "load_in_4bit", "autocast")
    return {name: recorded[name] for name in names if name in recorded}


def hardware() -> str:
    """What the run had to compute with, without the machine's name."""
    description = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    torch = sys.modules.get("torch")  # never imported for the sake of a card
    if torch is not None and torch.cuda.is_available():
        description += f", {torch.cuda.get_device_name()}"
    return description


# The report of a run without a recipe

_SECTION_OF = {"policy": "ppo", "reward_model": "reward_model", "sft": "sft"}

_LOGGED: dict[str, dict[str, str]] = {
    "policy": {
        "objective/kl": "kl",
        "objective/scores": "proxy_after",
        "completions/mean_length": "mean_length_after",
    },
    "reward_model": {
        "pairs": "heldout_pairs",
        "accuracy": "accuracy",
        "nll": "nll",
        "brier": "brier",
        "ece": "ece",
        "longer_wins_baseline": "longer_wins_baseline",
        "gain": "gain",
    },
    "sft": {"loss": "eval_loss", "mean_token_accuracy": "eval_mean_token_accuracy"},
}
"""By kind: what an evaluation logs (without `eval_`), and what it is called in the report."""

_CARD_CONFIG = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "kl_coef",
    "temperature",
)
"""Options that the card of a run without a recipe shows."""


def trainer_report(trainer: Any) -> RunReport:
    """The report of a run without a recipe: what the trainer's last evaluation logged, and what its card needs."""
    kind = getattr(trainer, "card_kind", "sft")
    name = _SECTION_OF[kind]
    metrics = _last_evaluation(trainer.state.log_history, kind)
    section = _SECTIONS[name](metrics)
    if kind == "reward_model":
        _add_judged(section, trainer.judged)
    elif kind == "policy":
        _add_count(section, trainer.eval_dataset, "n")
        _add_ppo_state(section, trainer)
    else:
        _add_count(section, trainer.eval_dataset, "heldout_rows")
    return RunReport(
        seed=trainer.args.seed,
        command=FROM_PYTHON,
        hardware=hardware(),
        versions=versions(),
        card=_trainer_card(trainer, kind),
        **{name: section},
    )


def _last_evaluation(log_history: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """Metrics of the newest evaluation under the report's names, with their intervals; empty where there was none."""
    logged: dict[str, Any] = {}
    for log in log_history:  # oldest first: the last one stays
        evaluated = {name: value for name, value in log.items() if name.startswith("eval_")}
        if evaluated:
            logged = evaluated
    metrics = {}
    for name, reported in _LOGGED[kind].items():
        if f"eval_{name}" not in logged:
            continue
        metrics[reported] = logged[f"eval_{name}"]
        low = logged.get(f"eval_{reported}_low")
        high = logged.get(f"eval_{reported}_high")
        if low is not None:
            metrics[f"{reported}_ci95"] = [low, high]
    return metrics


def _add_judged(section: RewardModelSection, judged: Any) -> None:
    """What the last evaluation's pairs (`JudgedPairs`) say beside the logged metrics."""
    if judged is None:
        return
    # A tie has no winner to find, so that accuracy counts the others only.
    section.metrics["decided_pairs"] = int((judged.targets != 0.5).sum())
    section.groups = judged.groups()


def _add_count(section: Section, eval_dataset: Any, name: str) -> None:
    if hasattr(eval_dataset, "column_names"):  # one data set, not several by name
        section.metrics[name] = len(eval_dataset)


def _add_ppo_state(section: PPOSection, trainer: Any) -> None:
    """How far PPO came, and why a guard stopped it."""
    for name in ("kl_coef", "updates"):
        value = getattr(trainer, name, None)
        if value is not None:
            section.metrics[name] = value
    section.stop_reason = getattr(trainer, "stop_reason", None)


def _trainer_card(trainer: Any, kind: str) -> CardOptions:
    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    # The same object where there is no adapter: then all weights were trained.
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    config = {}
    for name in _CARD_CONFIG:  # each kind of trainer has some of them
        if hasattr(args, name):
            config[name] = getattr(args, name)
    base_model = base.config.name_or_path
    if Path(base_model).exists():
        base_model = Path(base_model).resolve().name  # of a local folder only its own name
    normalization = getattr(trainer, "normalization", None)  # a reward model's
    return CardOptions(
        kind=kind,
        config=config,
        base_model=base_model,
        relation="finetune" if base is model else "adapter",
        chat=trainer.processing_class.chat_template is not None,
        autocast=normalization.autocast if normalization is not None else None,
        **base_precision(model),
    )

"""Dataclasses for `report.json`: what a run measured and how it was made, which is all that a card needs."""

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
"""The `command` of a run without a recipe. Its report is rewritten at every push."""

_NORMALIZATION_FILE = "reward_normalization.json"  # not imported from `reward.normalization`, which imports torch


Groups = dict[str, dict[str, dict[str, float]]]
"""Held-out metrics by type of group and group, such as `{"length_gap": {"0 to 2": {"accuracy": 0.7, "n": 21}}}`."""


# Sections: what each stage measured


@dataclass
class Section:
    """What one stage measured.

    Attributes:
        metrics: Numbers by name. For some of them, `NAME_ci95` is a 95 % confidence interval ([low, high]) and `NAME_n`
            is the number of samples.
    """

    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Self:
        """Reads a section of `report.json`, which has structure and numbers in one mapping."""
        structure = {}
        metrics = {}
        # Keys of numbers may contain names of rewards (`judge_before`), so only the structure has fixed names.
        for name, value in section.items():
            if name in cls.structure_names():
                structure[name] = value
            else:
                metrics[name] = value
        return cls(metrics=metrics, **structure)

    def to_dict(self) -> dict[str, Any]:
        """Returns the section as in `report.json`, without unknown values."""
        section = dict(self.metrics)
        for name in self.structure_names():
            value = getattr(self, name)
            if value is not None:
                section[name] = value
        return section

    @classmethod
    def structure_names(cls) -> list[str]:
        """Returns the names of all fields other than `metrics`."""
        return [spec.name for spec in fields(cls) if spec.name != "metrics"]


@dataclass
class SFTSection(Section):
    """Section for SFT.

    Its metrics are `eval_loss`, `eval_mean_token_accuracy`, `heldout_rows` and what the trainer logs.
    """


@dataclass
class RewardModelSection(Section):
    """Section for a reward model.

    Its metrics are `pairs` (in training), `heldout_pairs`, `decided_pairs` (without ties), `accuracy`, `nll`, `gain`
    and others.

    Attributes:
        groups: Held-out accuracy by group.
        members: Metrics of each member of an ensemble.
        combine: How the scores of an ensemble are combined.
    """

    groups: Groups | None = None
    members: list[dict[str, Any]] | None = None
    combine: str | None = None


@dataclass
class PPOSection(Section):
    """Section for PPO.

    Its metrics are `kl` (nats per completion), `kl_coef`, `updates`, `REWARD_before`, `REWARD_after` and `REWARD_gain`,
    where `REWARD` is `proxy` (what PPO maximized), `gold`, or one of `eval_rewards`.

    Attributes:
        start: What PPO started from, such as "the SFT policy".
        rewards: Names of the rewards that PPO maximized.
        reward_formula: Their weighted sum, such as "1 × reward_model + 0.5 × short". None for one reward of weight 1.
        reward_warnings: What the run said of rewards that do not differ between completions.
        eval_rewards: Names of rewards that were only used for evaluation.
        stop_reason: Why a guard stopped the run. None if no guard did.
    """

    start: str | None = None
    rewards: list[str] | None = None
    reward_formula: str | None = None
    reward_warnings: list[str] | None = None
    eval_rewards: list[str] | None = None
    stop_reason: str | None = None

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Self:
        section = dict(section)
        if "stopped_by" in section:  # its name in older reports
            section.setdefault("stop_reason", section.pop("stopped_by"))
        return super().from_dict(section)


@dataclass
class DPOSection(Section):
    """Section for DPO.

    Its metrics are `pairs` (in training), `loss`, `beta`, and those of `PPOSection` on held-out prompts: `n`, `kl`,
    `gold_before`, `gold_after`, `gold_gain`, `mean_length_before` and `mean_length_after`.

    Attributes:
        start: What DPO started from, which is its reference too, such as "the SFT policy".
    """

    start: str | None = None


# Other information


@dataclass
class CardOptions:
    """Options of a model card, in addition to the measured numbers.

    Args:
        kind: Kind of model: `"policy"` (by PPO), `"dpo"` (a policy by DPO), `"reward_model"` or `"sft"`.
        base_model: Hub id of the base, or the name of an embedded model.
        model_name: Title of the card; the default is made from base and kind.
        repo_id: Hub id of the model, for the code snippet. An id with two or more slashes is a folder that is not
            published. If None, the snippet has a placeholder.
        config: Options of the run, as a mapping or as YAML.
        datasets: Hub ids of the training data. Local data belong in `lineage`.
        dataset_revision: Commit of the first of `datasets`.
        samples: Rows with `prompt`, `before` and `after`. Markdown in them is escaped.
        plot: A PNG in the folder of the card.
        caption: Caption of the plot; the default describes the usual plot of this kind of model.
        limits: Additional sentences for the section "Limits".
        lineage: What the model was made from, such as `{"reward model": "alice/reward"}`. Hub ids become links.
        rows_read: How the training data were read, one line per source: `LoadReport.summary()`.
        relation: Relation to the base: `"adapter"`, `"merge"` (a merged adapter) or `"finetune"` (all weights).
        notes: Sentences on how the model was measured.
        system_prompt: System message that the model was trained with, for the code snippet.
        chat: Whether the tokenizer has a chat template. If not, the code snippet uses plain text.
        base_dtype: Data type of the base in training, such as `"bfloat16"`, for the code snippet. None if not known.
        load_in_4bit: Whether the base was in 4 bits in training.
        quantization: The whole quantization of the base in training, as `reward_normalization.json` has it. None if the
            base was not quantized; in reports of earlier versions, 4 bits were NF4 with double quantization.
        autocast: Data type in which a reward model computes its scores. None means the data type of the weights.
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
    rows_read: Sequence[str] = ()
    relation: str = "adapter"
    notes: Sequence[str] = ()
    system_prompt: str | None = None
    chat: bool = True
    base_dtype: str | None = None
    load_in_4bit: bool = False
    quantization: Mapping[str, Any] | None = None
    autocast: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as in `report.json`: those that are not the default, and some that are always there."""
        options = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name in _ALWAYS_WRITTEN or value != spec.default:
                options[spec.name] = value
        return options


@dataclass
class MergeRecord:
    """How an adapter was merged.

    Attributes:
        dtype: Data type of the merged weights.
        base: The base that the adapter was merged into.
        max_score_difference: Largest change of the scores of a reward model. None for other models.
    """

    dtype: str
    base: str
    max_score_difference: float | None = None


@dataclass
class RunReport:
    """Content of `report.json`. Reports of earlier versions, with fewer fields, can be read too.

    Attributes:
        seed: Seed of the run.
        command: Command that started the run.
        seconds: Duration by stage, in seconds.
        hardware: Hardware of the run, without the name of the machine.
        versions: Versions of the libraries.
        license: License of the model. None means the license of the base.
        gold_reward: `"vader"` if the simulated annotator used VADER.
        reward_model: What the reward model stage measured.
        sft: What the SFT stage measured.
        ppo: What the PPO stage measured.
        dpo: What the DPO stage measured.
        categories: By use case: `n` held-out prompts, `gold_before` and `gold_after`.
        card: Options of the card. None means that there is no card.
        merge: How an adapter was merged. None for models that are not merged.
        other: All other content of the file.
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
    dpo: DPOSection = field(default_factory=DPOSection)
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    card: CardOptions | None = None
    merge: MergeRecord | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> Self:
        known = {spec.name for spec in fields(cls)} - {"other"}
        values: dict[str, Any] = {"other": {}}
        for name, value in report.items():
            if name not in known:  # from the quickstart or a later version; kept, so that a merge does not lose it
                values["other"][name] = value
            elif name in _SECTIONS:
                values[name] = _SECTIONS[name].from_dict(value)
            elif name in _RECORDS and value:
                values[name] = _RECORDS[name](**value)
            else:
                values[name] = value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as in `report.json`, without unknown values."""
        report: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name in _SECTIONS or isinstance(value, CardOptions):
                value = value.to_dict()
            elif isinstance(value, MergeRecord):
                value = asdict(value)
            if spec.name != "other" and value not in (None, {}):  # a seed of 0 is a known value
                report[spec.name] = value
        return report | self.other

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Loads `report.json` from the folder of a run, and adds the precision of the base to the card options."""
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
    "dpo": DPOSection,
}
_RECORDS = {"card": CardOptions, "merge": MergeRecord}


def as_report(report: RunReport | Mapping[str, Any]) -> RunReport:
    """Converts a mapping like `report.json` to a report. A `RunReport` is returned unchanged."""
    if isinstance(report, RunReport):
        return report
    return RunReport.from_dict(report)


# Base and hardware


def base_precision(model: Any) -> dict[str, Any]:
    """Returns `base_dtype`, `load_in_4bit` and `quantization` of a loaded model, for its card."""
    from ..modeling.quantization import quantization_record  # imports torch, which a loaded model needs anyway
    from ..reward.normalization import dtype_name, is_4bit

    return {
        "base_dtype": dtype_name(model),
        "load_in_4bit": is_4bit(model),
        "quantization": quantization_record(model),
    }


def recorded_precision(folder: Path, relation: str) -> dict[str, Any]:
    """Returns the precision of a reward adapter's training, from its `reward_normalization.json`, as card options."""
    path = folder / _NORMALIZATION_FILE
    if relation != "adapter" or not path.is_file():
        return {}
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if recorded.get("base_dtype", "auto") == "auto":  # a model that was not trained with this library
        return {}
    names = ("base_dtype", "load_in_4bit", "quantization", "autocast")
    return {name: recorded[name] for name in names if name in recorded}


def hardware() -> str:
    """Returns the hardware of this machine, without its name."""
    description = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    torch = sys.modules.get("torch")  # not imported only for a card
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
"""Kind of model -> logged name of each evaluation metric (without `eval_`) -> name in the report."""

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
    """Makes the report of a run without a recipe from the last evaluation that the trainer logged."""
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
    """Returns the metrics of the last evaluation, under their names in the report and with intervals."""
    logged: dict[str, Any] = {}
    for log in log_history:  # from oldest to newest, so the last one is kept
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
    """Adds the number of decided pairs and the groups of the last evaluation (`JudgedPairs`)."""
    if judged is None:
        return
    # Ties have no winner, so accuracy only counts the other pairs.
    section.metrics["decided_pairs"] = int((judged.targets != 0.5).sum())
    section.groups = judged.groups()


def _add_count(section: Section, eval_dataset: Any, name: str) -> None:
    if hasattr(eval_dataset, "column_names"):  # a single dataset, not a dict of datasets
        section.metrics[name] = len(eval_dataset)


def _add_ppo_state(section: PPOSection, trainer: Any) -> None:
    """Adds the number of updates, the KL coefficient, and why a guard stopped the run."""
    for name in ("kl_coef", "updates"):
        value = getattr(trainer, name, None)
        if value is not None:
            section.metrics[name] = value
    section.stop_reason = getattr(trainer, "stop_reason", None)


def _trainer_card(trainer: Any, kind: str) -> CardOptions:
    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Without an adapter, all weights were trained, and base and model are the same object.
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    config = {}
    for name in _CARD_CONFIG:  # each trainer has some of these options
        if hasattr(args, name):
            config[name] = getattr(args, name)
    base_model = base.config.name_or_path
    if Path(base_model).exists():
        base_model = Path(base_model).resolve().name  # only the name of a local folder, not its path
    normalization = getattr(trainer, "normalization", None)  # only for reward models
    return CardOptions(
        kind=kind,
        config=config,
        base_model=base_model,
        relation="finetune" if base is model else "adapter",
        chat=trainer.processing_class.chat_template is not None,
        autocast=normalization.autocast if normalization is not None else None,
        **base_precision(model),
    )

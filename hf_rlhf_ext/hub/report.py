"""Dataclasses for `report.json`: what a run measured and how it was made, which is all that a card needs."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

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
        evaluation_sets: Metrics of several evaluation sets, by the name of the set. None if there is only one without a
            name.
        weights_step: Step of the weights that are published and that the metrics are of. None if it is not recorded.
        total_steps: Number of steps that training made, which is larger if the best checkpoint was loaded at the end.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation_sets: dict[str, dict[str, Any]] | None = None
    weights_step: int | None = None
    total_steps: int | None = None

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
        reward_formula: What is maximized, such as "1 × reward_model + 0.5 × short". None for one reward of weight 1, as
            it is.
        reward_warnings: What the run said of rewards that do not differ between completions.
        eval_rewards: Names of rewards that were only used for evaluation.
        stop_reason: Why a guard stopped the run. None if no guard did.
        critic: Kind of critic, `none` for the leave-one-out baseline of RLOO. None if it is not recorded.
        num_generations: Number of completions of a prompt in a rollout. None for one, or if it is not recorded.
    """

    start: str | None = None
    rewards: list[str] | None = None
    reward_formula: str | None = None
    reward_warnings: list[str] | None = None
    eval_rewards: list[str] | None = None
    stop_reason: str | None = None
    critic: str | None = None
    num_generations: int | None = None

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
        base_model: Hub id of the base, or the name of an embedded model. None if the base is not on the Hub, as of a
            whole model that was trained from a local folder.
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
        encoder: Whether a reward model is an encoder, such as BERT, whose head has layers of its own. None if it is not
            known.
        base_revision: Branch, tag or commit of the base in training; the commit if that is known. None if nothing is
            known.
        revision: Branch of the repository of the model, for the code snippet. None means `main`.
        data: What each dataset of training and evaluation was: mappings with some of `role` ("comparisons", "prompts",
            "demonstrations", "evaluation"), `name` (Hub id, or file name), `revision` (commit), `config`, `split`,
            `rows`, `sha256` (of a local file) and `set` (name of an evaluation set, if there are several).
        max_length: Longest sequence in training, in tokens: `max_length`, or prompt and completion of PPO.
        prompt_form: What the model was trained on: "text", "messages", "mixed" (both). None if it is not known.
        chat_template: Which chat template rendered the messages: "base" (that of the base), "own" (another one, which
            is saved with the tokenizer). None without messages, or if it is not known.
        adapter: Kind of adapter, such as `{"type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": [...]}`, and
            `vocabulary`, the number of tokens of a base that was resized for it.
        tags: Additional tags of the repository.
        language: Language of the texts, as a code such as "en".
        license_name: Name of a license that is `other`.
        license_link: Address, or file in the repository, of a license that is `other`.
        emissions: Energy and emissions as codecarbon measured them: `energy_kwh`, `emissions_g`, and perhaps `source`.
        only_text: Whether the rows of SFT were text without prompts.
        is_foreign: Whether it is not known that this library trained the model. Its card then says nothing of training.
    """

    kind: str
    base_model: str | None = None
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
    encoder: bool | None = None
    base_revision: str | None = None
    revision: str | None = None
    data: Sequence[Mapping[str, Any]] = ()
    max_length: int | None = None
    prompt_form: str | None = None
    chat_template: str | None = None
    adapter: Mapping[str, Any] | None = None
    tags: Sequence[str] = ()
    language: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    emissions: Mapping[str, Any] | None = None
    only_text: bool = False
    is_foreign: bool = False

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
        mean_logprob_difference: Mean absolute difference of a policy's log-probabilities on probe texts, in nats per
            token, between the merged weights and the adapter. None for reward models.
    """

    dtype: str
    base: str
    max_score_difference: float | None = None
    mean_logprob_difference: float | None = None


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
        gold_reward: `"vader"` if the simulated annotator used VADER, `"on_topic"` if it used `OnTopicGold`.
        reward_model: What the reward model stage measured.
        sft: What the SFT stage measured.
        ppo: What the PPO stage measured.
        dpo: What the DPO stage measured.
        categories: By use case: `n` held-out prompts, `gold_before` and `gold_after`.
        card: Options of the card. None means that there is no card.
        merge: How an adapter was merged. None for models that are not merged.
        benchmarks: By benchmark, what `hf-rlhf bench-reward` measured of a reward model, and on which rows.
        comparison: What `hf-rlhf compare` measured of a policy and of the systems that it was compared with: table and
            verdict. Empty if it was not compared.
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
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
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

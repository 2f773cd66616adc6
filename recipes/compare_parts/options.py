"""The options of `hf-rlhf compare`: the data, what all systems share, and a mapping of systems."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli.options import check_at_least
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.compare_parts.systems import SystemSpec, read_systems
from hf_rlhf_ext.recipes.pipeline_parts.options import section_of

CLOCKS = ("wall", "cpu")
SECTIONS = ("sft", "reward", "dpo", "grpo", "rloo", "ppo")
"""Options of a kind of training, for all systems of that kind."""


@dataclass
class CompareArguments:
    """What is compared, on which data, and the folder of the run."""

    _argument_group_name = "compare"

    systems: str | None = field(
        default=None,
        metadata={
            "help": "The systems by their name, each with its options, as YAML: '{base: {}, sft: {}, best_of_4: {}, "
            "ppo: {kl_coef: 0.1}}'. A name says the kind (`base`, `sft`, `sft_top_rated`, `best_of_N`, "
            "`rejection_sampling`, `dpo`, `grpo`, `rloo`, `ppo`, `ppo_adaptive`, `ppo_ptx`), or the option `kind` does."
        },
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "Folder for data, models and the report."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of training and sampling. Each trains all systems; other seeds may be added later."},
    )
    data_seed: int = field(
        default=0, metadata={"help": "Seed by which prompts and comparisons are held out, the same ones for all seeds."}
    )
    demonstrations: str | None = field(
        default=None, metadata={"help": "Demonstrations for SFT: file (csv, json, jsonl, parquet), folder or Hub id."}
    )
    comparisons: str | None = field(
        default=None,
        metadata={"help": "Comparisons for the reward model, for DPO and for `labels`: file, folder or Hub id."},
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to train on and to hold out: file, folder or Hub id with a column `prompt`. If `None`, "
            "those of the comparisons, else of the demonstrations."
        },
    )
    heldout_prompts: str | None = field(
        default=None, metadata={"help": "Prompts to compare on. If `None`, `eval_prompts` of `prompts` are held out."}
    )
    eval_prompts: int = field(
        default=200,
        metadata={"help": "Number of held-out prompts. Those that are in the training data too are left out."},
    )
    heldout_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of the comparisons, from 0 to 0.5, on which the accuracy of the reward model is measured "
            "and which nothing is trained on."
        },
    )
    labels: int | None = field(
        default=None,
        metadata={
            "help": "Budget of labels: number of judged pairs that reward model and DPO get, and of rated "
            "demonstrations that are looked at. If `None`, all."
        },
    )
    ratings_column: str | None = field(
        default=None, metadata={"help": "Column of the demonstrations with their ratings, for `sft_top_rated`."}
    )
    plain_text: str | None = field(
        default=None,
        metadata={"help": "Plain text: for the language-model loss of `ppo_ptx`, and to measure the perplexity on."},
    )
    exact_match: str | None = field(
        default=None,
        metadata={"help": "Items of the exact-match task: yaml, json or jsonl. If `None`, those of the library."},
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained reward model, instead of training one."}
    )
    reward_funcs: str | None = field(
        default=None,
        metadata={"help": "Reward function of training, as rewards.py:short, instead of a reward model."},
    )
    judges: str | None = field(
        default=None,
        metadata={
            "help": "Judges that nothing is trained on, as YAML: '[{gold: rewards.py:gold}, {reward_model: folder, "
            "trained_on: pairs.jsonl}, {function: judges.py:judge}, {people: [anna, tom]}]'."
        },
    )
    clock: str = field(
        default="wall",
        metadata={
            "help": "Time by which snapshots are taken and systems are compared: `wall` time, or `cpu` time of the "
            "process, which other work on the machine does not change.",
            "choices": list(CLOCKS),
        },
    )
    snapshot_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Seconds of training between two snapshots of a policy, for comparisons at equal time and equal "
            "KL. A system may have its own; SFT from the base has none. If `None`, only the last policy is kept."
        },
    )
    equal_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Seconds of training at which systems are compared. If `None`, those of the quickest system."
        },
    )
    save_seconds: float = field(
        default=600.0, metadata={"help": "Seconds between two checkpoints, from which a stopped stage goes on."}
    )
    temperature: float = field(
        default=0.8, metadata={"help": "Temperature of all sampling: the scale that logits are divided by."}
    )
    max_completion_length: int = field(
        default=64, metadata={"help": "Maximum length of a completion in tokens, in training and for all answers."}
    )
    max_tokens_per_batch: int = field(
        default=4096, metadata={"help": "Maximum number of tokens per forward pass, including padding."}
    )
    sft: str | None = field(
        default=None, metadata={"help": "Options of `hf-rlhf sft` for all systems with SFT, as YAML."}
    )
    reward: str | None = field(
        default=None, metadata={"help": "Options of `hf-rlhf reward` for the reward model, as YAML."}
    )
    dpo: str | None = field(default=None, metadata={"help": "Options of TRL's DPOConfig for all systems with DPO."})
    grpo: str | None = field(default=None, metadata={"help": "Options of TRL's GRPOConfig for all systems with GRPO."})
    rloo: str | None = field(default=None, metadata={"help": "Options of TRL's RLOOConfig for all systems with RLOO."})
    ppo: str | None = field(default=None, metadata={"help": "Options of `hf-rlhf ppo` for all systems with PPO."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of a model's repository. Only use it if you have read the code."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Start from the beginning and delete finished stages."})

    def __post_init__(self):
        check_at_least(self, data_seed=0, eval_prompts=1, heldout_share=0, labels=1)
        check_at_least(self, max_completion_length=1, max_tokens_per_batch=1)
        for name in ("temperature", "snapshot_seconds", "equal_seconds", "save_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive, got {value}.")
        if self.heldout_share > 0.5:
            raise UserError(f"heldout_share must be at most 0.5, got {self.heldout_share}: it is a share of the pairs.")
        self._check_seeds()
        for name in SECTIONS:
            setattr(self, name, section_of(getattr(self, name), name))
        self.judges = judges_of(self.judges)
        self._check_names()
        self.specs: dict[str, SystemSpec] = read_systems(systems_of(self.systems), self)
        self._check_sources()

    def _check_seeds(self) -> None:
        if isinstance(self.seeds, int):
            self.seeds = [self.seeds]
        if not self.seeds:
            raise UserError("seeds: none is given: write [0, 1, 2].")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {self.seeds} has a seed twice: give each once.")
        if min(self.seeds) < 0:
            raise UserError(f"seeds: {min(self.seeds)} is negative: give 0 or more.")
        if max(self.seeds) >= 2**32:
            raise UserError(f"seeds: {max(self.seeds)} is too large: give less than 2^32.")

    def _check_names(self) -> None:
        """Raises `UserError` where a list or a mapping is given in place of a name."""
        names = ("demonstrations", "comparisons", "prompts", "heldout_prompts", "plain_text", "exact_match")
        for name in (*names, "ratings_column", "reward_model", "reward_funcs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{name}: {value!r} is no name: give one, as text.")

    def _check_sources(self) -> None:
        """Raises `UserError` where what the systems need is not given."""
        if self.demonstrations is None:
            raise UserError("demonstrations: the system sft needs them: give a file, a folder or a Hub id.")
        if self.reward_model and self.reward_funcs:
            raise UserError("reward_funcs: reward_model is given too: give one of the two.")
        needs_reward = sorted(spec.name for spec in self.specs.values() if spec.needs_reward)
        if needs_reward and not (self.comparisons or self.reward_model or self.reward_funcs):
            raise UserError(
                f"comparisons: {', '.join(needs_reward)} need a reward: give comparisons (a reward model is trained on "
                "them), reward_model or reward_funcs."
            )
        needs_pairs = [spec.name for spec in self.specs.values() if spec.needs_comparisons(self)]
        if needs_pairs and self.comparisons is None:
            raise UserError(f"comparisons: {', '.join(needs_pairs)} is trained on them: give a file.")
        needs_text = [spec.name for spec in self.specs.values() if spec.needs_plain_text]
        if needs_text and self.plain_text is None:
            raise UserError(f"plain_text: {needs_text[0]} has a language-model loss on it: give a file of texts.")
        if self.labels is not None and not (self.comparisons or self.ratings_column):
            raise UserError("labels: there are neither comparisons nor ratings to cut: leave it out.")

    # ---- What is given ----

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def trains_reward_model(self) -> bool:
        """Whether a reward model is trained on the comparisons."""
        given = self.reward_model or self.reward_funcs
        return not given and any(spec.needs_reward for spec in self.specs.values())

    def section(self, kind: str) -> dict[str, Any]:
        """The shared options of a kind of training: `sft`, `reward`, `dpo`, `grpo`, `rloo` or `ppo`."""
        return dict(getattr(self, kind))

    def unused(self) -> list[str]:
        """Lines that name options which were given, but have no effect."""
        lines = []
        trained = {spec.section for spec in self.specs.values() if spec.section is not None}
        if self.trains_reward_model:
            trained.add("reward")
        for name in SECTIONS:
            if getattr(self, name) and name not in trained:
                lines.append(f"not used: the section {name}, as no system is trained with it")
        if self.ratings_column and not any(spec.options.uses_ratings(self) for spec in self.specs.values()):
            lines.append("not used: ratings_column, as no system is trained on rated demonstrations")
        if self.comparisons and not self.trains_reward_model:
            if not any(spec.needs_comparisons(self) for spec in self.specs.values()):
                lines.append("not used: comparisons, as no system is trained on them")
        if self.heldout_prompts and self.is_changed("data_seed") and not self.comparisons:
            lines.append("not used: data_seed, as heldout_prompts are given")
        return lines

    def is_changed(self, name: str) -> bool:
        """Whether an option differs from its default."""
        (spec,) = [spec for spec in fields(self) if spec.name == name]
        default = spec.default if spec.default is not MISSING else spec.default_factory()
        return getattr(self, name) != default


def systems_of(given: Any) -> dict[str, Any]:
    """The systems: a mapping in the config file, YAML text, or the path of a YAML file."""
    try:
        return section_of(given, "systems")
    except UserError:
        if isinstance(given, str) and Path(given).suffix in (".yaml", ".yml"):
            raise
        raise UserError(
            f"systems: {given!r} is no mapping of names to options: write {{base: {{}}, sft: {{}}, ppo: {{}}}}."
        ) from None


def judges_of(given: Any) -> list[dict[str, Any]]:
    """The judges: a list of mappings in the config file, YAML text, or one mapping."""
    if given is None:
        return []
    if not isinstance(given, list):
        given = section_of(f"judges: {given}" if isinstance(given, str) else {"judges": given}, "judges")["judges"]
    judges = given if isinstance(given, list) else [given]
    for judge in judges:
        if not isinstance(judge, Mapping):
            raise UserError(f"judges: {judge!r} is no mapping: write [{{gold: rewards.py:gold}}].")
    return [dict(judge) for judge in judges]

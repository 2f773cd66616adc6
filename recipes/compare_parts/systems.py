"""The systems of `hf-rlhf compare`: which kind each one is, what it needs, and its options, checked."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_rlhf_ext.cli.options import ModelArguments, check_at_least
from hf_rlhf_ext.cli.parsing import did_you_mean, parse_recipe
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.pipeline_parts.options import naming_section
from hf_rlhf_ext.study.styles import STYLES

if TYPE_CHECKING:
    from hf_rlhf_ext.recipes.compare_parts.options import CompareArguments

SFT = "sft"
"""The SFT policy: the start of other systems, and the reference of the KL of all."""
REWARD_MODEL = "reward_model"
"""Name of the stage that trains the reward model."""
KINDS = ("base", "sft", "best_of_n", "rejection_sampling", "dpo", "grpo", "rloo", "ppo")
NAMES = (
    "base",
    "sft",
    "sft_top_rated",
    "best_of_4",
    "rejection_sampling",
    "dpo",
    "grpo",
    "rloo",
    "ppo",
    "ppo_adaptive",
    "ppo_ptx",
)
"""Names with a meaning, for messages."""
SECTION_OF_KIND = {
    "sft": "sft",
    "rejection_sampling": "sft",
    "dpo": "dpo",
    "grpo": "grpo",
    "rloo": "rloo",
    "ppo": "ppo",
}
"""Whose options the training of a kind has."""
RATED = ("lima", "feedme", "guanaco")
"""Styles that choose by ratings."""
WITH_REWARD = ("best_of_n", "rejection_sampling", "grpo", "rloo", "ppo")
DEFAULT_TARGET_KL = 6.0
"""Target of `ppo_adaptive`, nats per completion, as in Ziegler et al. 2019 (arXiv:1909.08593)."""
DEFAULT_N = 4
"""Completions of a prompt for rejection sampling."""

SHARED = "all systems share it: give it outside of the systems"
REFUSED = {
    "output_dir": SHARED,
    "overwrite": SHARED,
    "seed": "give seeds outside of the systems",
    "data_seed": SHARED,
    "trust_remote_code": SHARED,
    "reward_model": SHARED,
    "reward_funcs": SHARED,
    "resume_from_checkpoint": "a stopped stage goes on by itself when the command is repeated",
    "save_strategy": "checkpoints are saved by time: give save_seconds outside of the systems",
    "save_steps": "checkpoints are saved by time: give save_seconds outside of the systems",
    "save_total_limit": "the last checkpoint is kept, until the stage is finished",
    "eval_strategy": "all systems are evaluated in the same way at the end",
    "load_best_model_at_end": "all systems are evaluated in the same way at the end",
    "model_init_kwargs": "the model is loaded already: give its options outside of the systems",
    "env": "set environment variables in the shell",
}
"""Options of trainers that no system takes, with the remedy."""


@dataclass
class SystemOptions:
    """Options of a system beside those of its trainer."""

    kind: str | None = field(
        default=None, metadata={"help": "What the system is. If `None`, its name says it.", "choices": list(KINDS)}
    )
    start: str | None = field(
        default=None,
        metadata={
            "help": "System that training starts from, or whose completions are sampled. If `None`, `base` for SFT, "
            "else `sft`."
        },
    )
    n: int | None = field(
        default=None,
        metadata={"help": "Completions of a prompt, of which the reward picks the best. If `None`, by the name, or 4."},
    )
    demonstrations: str | None = field(
        default=None, metadata={"help": "Demonstrations of this system. If `None`, those of all."}
    )
    style: str | None = field(
        default=None,
        metadata={"help": "Rule that selects demonstrations. If `None`, by a name such as `sft_lima_style`, or all."},
    )
    rule: str | None = field(
        default=None, metadata={"help": "Source and selection of `demonstrations` in a sentence, for the report."}
    )
    top_rated: str | None = field(
        default=None,
        metadata={
            "help": "Train on top-rated answers only, by `ratings` of demonstrations or by the `labels` of "
            "comparisons. If `None`, only `sft_top_rated` does, by ratings if there is a ratings_column.",
            "choices": ["ratings", "labels"],
        },
    )
    min_rating: float | None = field(
        default=None,
        metadata={
            "help": "Smallest rating of a top-rated answer, or of a style that chooses by rating. If `None`, the "
            "highest rating in the data, or that of the style."
        },
    )
    size: int | None = field(default=None, metadata={"help": "Rows that a style chooses at most."})
    min_words: int | None = field(default=None, metadata={"help": "Fewest words of an answer that a style chooses."})
    n_prompts: int | None = field(
        default=None, metadata={"help": "Number of prompts that rejection sampling uses. If `None`, all."}
    )
    snapshot_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Seconds of training between two snapshots of this system. If `None`, those of all systems, and "
            "none for SFT from the base."
        },
    )
    max_seconds: float | None = field(
        default=None,
        metadata={"help": "Seconds of training, by `clock`, after which it ends. If `None`, the trainer's own end."},
    )

    def __post_init__(self):
        check_at_least(self, n=1, n_prompts=1)
        for name in ("max_seconds", "snapshot_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive, got {value}.")

    def uses_ratings(self, args: "CompareArguments") -> bool:
        """Whether demonstrations are selected by their ratings."""
        return self.top_rated == "ratings" or (self.style in RATED and args.ratings_column is not None)


OPTIONS = tuple(spec.name for spec in fields(SystemOptions))
OF_SELECTION = ("min_rating", "size", "min_words")
OF_TRAINING = ("snapshot_seconds", "max_seconds")
OPTIONS_OF_KIND = {
    "base": ("kind",),
    "sft": ("kind", "start", "demonstrations", "style", "rule", "top_rated", *OF_SELECTION, *OF_TRAINING),
    "best_of_n": ("kind", "start", "n"),
    "rejection_sampling": ("kind", "start", "n", "n_prompts", *OF_TRAINING),
    "dpo": ("kind", "start", *OF_TRAINING),
    "grpo": ("kind", "start", *OF_TRAINING),
    "rloo": ("kind", "start", *OF_TRAINING),
    "ppo": ("kind", "start", *OF_TRAINING),
}
"""Options of `SystemOptions` that have an effect."""


@dataclass(frozen=True)
class SystemSpec:
    """A system as the YAML file describes it.

    Attributes:
        name: its name.
        kind: one of `KINDS`.
        options: its own options, with what the name says filled in.
        training: options of its trainer, as the user gave them: the section of the kind, and the system's own.
    """

    name: str
    kind: str
    options: SystemOptions
    training: Mapping[str, Any]

    @property
    def section(self) -> str | None:
        """The section of options that its training has; None if it trains nothing."""
        return SECTION_OF_KIND.get(self.kind)

    @property
    def needs_reward(self) -> bool:
        return self.kind in WITH_REWARD

    @property
    def needs_plain_text(self) -> bool:
        return self.kind == "ppo" and float(self.training.get("ptx_coef") or 0) > 0

    def snapshot_seconds(self, args: "CompareArguments") -> float | None:
        """Seconds of training between two snapshots; None without snapshots.

        By default, SFT from the base has none: it is compared by its last policy, and each snapshot is evaluated.
        """
        if self.section is None or self.options.snapshot_seconds is not None:
            return self.options.snapshot_seconds
        return None if self.options.start == "base" and self.kind == "sft" else args.snapshot_seconds

    def needs_comparisons(self, args: "CompareArguments") -> bool:
        """Whether the system itself is trained on comparisons, not only its reward model."""
        return self.kind == "dpo" or self.options.top_rated == "labels"

    def needs(self, args: "CompareArguments") -> tuple[str, ...]:
        """Names of the stages that it builds on directly."""
        needed = []
        if self.options.start not in (None, "base"):
            needed.append(self.options.start)
        if self.needs_reward and args.trains_reward_model:
            needed.append(REWARD_MODEL)
        return tuple(needed)

    def describe(self) -> str:
        """What the stage does, in a few words."""
        start = self.options.start
        selection = self.options.style or (self.options.top_rated and "top-rated") or "all"
        return {
            "base": "the base model, without training",
            "sft": f"SFT from {start} on {selection} demonstrations",
            "best_of_n": f"the best of {self.options.n} completions of {start}, without training",
            "rejection_sampling": f"SFT from {start} on the best of {self.options.n} of its completions",
            "dpo": f"DPO (TRL) from {start} on the comparisons",
            "grpo": f"GRPO (TRL) from {start}",
            "rloo": f"RLOO (TRL) from {start}",
            "ppo": f"PPO from {start}",
        }[self.kind]


# ---- Reading ----


def read_systems(systems: Mapping[str, Any], args: "CompareArguments") -> dict[str, SystemSpec]:
    """The systems by name, in an order in which each comes after what it builds on.

    Raises:
        UserError: a name or an option is unknown, has a wrong value or no effect, or `sft` is missing.
    """
    if not systems:
        raise UserError("systems: none is given: write systems: {base: {}, sft: {}, ppo: {}}, or --config FILE.")
    specs = {}
    for name, given in systems.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name)):
            raise UserError(f"systems: {name!r} is no name of a folder: use letters, digits, `_`, `-` and `.`.")
        if name in (REWARD_MODEL, "data", "evaluate"):
            raise UserError(f"systems: {name} is the name of another stage: give the system another name.")
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise UserError(f"systems: {name}: {given!r} is no mapping of options: write `{name}: {{}}`.")
        specs[str(name)] = read_system(str(name), given, args)
    if SFT not in specs:
        raise UserError(
            "systems: sft is missing, the start of other systems and the reference of the KL of all: add `sft: {}`."
        )
    if specs[SFT].kind != "sft" or specs[SFT].options.start != "base":
        raise UserError("systems: sft is the reference of all others, and must be SFT from the base: rename this one.")
    return _in_order(specs)


def read_system(name: str, given: Mapping[str, Any], args: "CompareArguments") -> SystemSpec:
    """A system with its options checked, except for those of its trainer, see `training_options`."""
    for option in given:
        refuse_shared(f"systems: {name}", option)
    kind, named = kind_of(name, given.get("kind"))
    own = {option: value for option, value in given.items() if option in OPTIONS}
    idle = [option for option in own if option not in OPTIONS_OF_KIND[kind]]
    if idle:
        raise UserError(f"systems: {name}: `{idle[0]}` has no effect on a system of kind {kind}: leave it out.")
    training = {option: value for option, value in given.items() if option not in OPTIONS}
    if kind not in SECTION_OF_KIND and training:
        option = next(iter(training))
        raise UserError(
            f"systems: {name}: `{option}` has no effect, as {kind} trains nothing"
            f"{did_you_mean(str(option), OPTIONS_OF_KIND[kind])}"
        )
    (options,) = parse_options(f"systems: {name}", [SystemOptions], own)
    for option, value in named.items():
        if option in OPTIONS and getattr(options, option) is None:
            setattr(options, option, value)
        elif option == "n" and options.n != value:
            raise UserError(f"systems: {name}: its name says n is {value}, and `n` {options.n}: leave one out.")
    if options.n is not None and options.n < 1:
        raise UserError(f"systems: {name}: the best of {options.n} is nothing: give at least 1.")
    options.kind = kind
    _complete(name, options, args)
    section = SECTION_OF_KIND.get(kind)
    shared = getattr(args, section) if section is not None else {}
    for option in shared:
        refuse_shared(section, option)
    of_trainer = {option: value for option, value in named.items() if option not in OPTIONS}
    return SystemSpec(name, kind, options, {**of_trainer, **shared, **training})


def kind_of(name: str, given: str | None) -> tuple[str, dict[str, Any]]:
    """The kind of a system, and the options that its name stands for.

    Raises:
        UserError: neither the name nor the option `kind` says it.
    """
    if given is not None and given not in KINDS:
        raise UserError(f"systems: {name}: kind {given!r} is unknown{did_you_mean(str(given), KINDS)}")
    by_name, named = _named(name)
    if given is not None and given != by_name and (name in NAMES or named):
        raise UserError(f"systems: {name} is the name of a system of kind {by_name}, not {given}: give another name.")
    kind = given or by_name
    if kind is None:
        known = did_you_mean(name, NAMES).removesuffix(": see --help for all")
        raise UserError(
            f"systems: {name} is no known system{known or ':'} Use a known name, or give its kind, as in `kind: ppo` "
            f"(one of {', '.join(KINDS)})."
        )
    if given is not None and given != by_name:
        named = {}
    return kind, named


def _named(name: str) -> tuple[str | None, dict[str, Any]]:
    """The kind that a name says, and the options that it stands for."""
    best_of = re.fullmatch(r"best_of_(\d+)", name)
    if best_of:
        return "best_of_n", {"n": int(best_of[1])}
    style = re.fullmatch(r"sft_(\w+)_style", name)
    if style:
        return "sft", {"style": style[1]}
    if name == "sft_top_rated":
        return "sft", {"top_rated": "given"}
    if name == "ppo_adaptive":
        return "ppo", {"kl_target": DEFAULT_TARGET_KL}
    if name == "ppo_ptx":
        return "ppo", {"ptx_coef": 1.0}
    for kind in KINDS:
        if name == kind or name.startswith(f"{kind}_"):
            return kind, {}
    return None, {}


def _complete(name: str, options: SystemOptions, args: "CompareArguments") -> None:
    """Fills in what follows from the kind, in place, and refuses options that contradict each other."""
    kind = options.kind
    if options.start is None and kind != "base":
        options.start = "base" if kind == "sft" else SFT
    if kind == "best_of_n" and options.n is None:
        raise UserError(f"systems: {name}: `n` is missing: give it, or name the system best_of_16.")
    if kind == "rejection_sampling" and options.n is None:
        options.n = DEFAULT_N
    if options.rule is not None:
        options.style = None  # the file is the selection already
    if options.top_rated == "given":
        options.top_rated = "ratings" if args.ratings_column else "labels"
        if options.top_rated == "labels" and args.comparisons is None:
            raise UserError(
                f"ratings_column: {name} needs demonstrations with ratings, or comparisons: name the column of the "
                "ratings, or give comparisons."
            )
    if options.top_rated == "ratings" and args.ratings_column is None:
        raise UserError(f"ratings_column: {name} needs the ratings of demonstrations: name their column.")
    if options.style is not None and options.style not in STYLES:
        raise UserError(f"systems: {name}: style {options.style!r} is unknown{did_you_mean(options.style, STYLES)}")
    _check_selection(name, options)
    if options.rule is not None and options.demonstrations is None:
        raise UserError(f"systems: {name}: `rule` describes demonstrations of its own: give them, or leave it out.")


def _check_selection(name: str, options: SystemOptions) -> None:
    """Raises `UserError` for options of a selection where there is none."""
    if options.style is not None and options.top_rated is not None:
        raise UserError(f"systems: {name}: `top_rated` and `style` both select demonstrations: leave one out.")
    needed = {"min_rating": options.style or options.top_rated == "ratings", "size": options.style}
    needed["min_words"] = options.style
    for option, is_used in needed.items():
        if getattr(options, option) is not None and not is_used:
            raise UserError(f"systems: {name}: `{option}` has no effect without `style`: give one, or leave it out.")


def refuse_shared(where: str, option: Any) -> None:
    """Raises `UserError` for an option of a system or section that the run sets itself."""
    remedy = REFUSED.get(option)
    if option in {spec.name for spec in fields(ModelArguments)}:
        remedy = SHARED
    if str(option).startswith(("push_to_hub", "hub_")):
        remedy = "push when the run is finished: hf-rlhf push"
    if remedy is not None:
        raise UserError(f"{where}: `{option}` is not an option of a system: {remedy}.")


def _in_order(specs: Mapping[str, SystemSpec]) -> dict[str, SystemSpec]:
    """The systems with each after its start.

    Raises:
        UserError: a start is no system of this run, trains no policy, or builds on the system itself.
    """
    ordered: dict[str, SystemSpec] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in ordered:
            return
        if name in above:
            circle = " → ".join([*above, name])
            raise UserError(f"systems: {name}: `start` goes round in a circle ({circle}): change one of them.")
        spec = specs[name]
        start = spec.options.start
        if start is not None and start != "base":
            if start not in specs:
                raise UserError(f"systems: {name}: start {start!r} is no system{did_you_mean(start, specs)}")
            if specs[start].kind == "best_of_n":
                raise UserError(f"systems: {name}: start {start} has no policy of its own: name a trained system.")
            add(start, (*above, name))
        ordered[name] = spec

    for name in ("base", SFT, *specs):
        if name in specs:
            add(name, ())
    return ordered


# ---- Options of trainers ----


def parse_options(where: str, types: list[type], given: Mapping[str, Any], **defaults: Any) -> tuple[Any, ...]:
    """Dataclasses of options, read and checked as a command reads its config file.

    Args:
        where: beginning of messages, such as `systems: ppo`.
        types: the dataclasses.
        given: the user's options.
        defaults: replace the defaults of the dataclasses.

    Raises:
        UserError: an option is unknown or has a wrong value.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "options.yaml"
        path.write_text(yaml.safe_dump(dict(given), sort_keys=False), encoding="utf-8")
        with naming_section(where, path):
            return parse_recipe(types, ["--config", str(path)], defaults=defaults)


@cache
def config_of(section: str) -> type:
    """The config of the trainer of a section."""
    from trl import DPOConfig, GRPOConfig, RLOOConfig

    from hf_rlhf_ext import BradleyTerryConfig, PPOConfig
    from hf_rlhf_ext.training.sft_config import CheckedSFTConfig

    return {
        "sft": CheckedSFTConfig,
        "reward": BradleyTerryConfig,
        "dpo": DPOConfig,
        "grpo": GRPOConfig,
        "rloo": RLOOConfig,
        "ppo": PPOConfig,
    }[section]


def amount(where: str, given: Mapping[str, Any], option: str, default: float) -> Any:
    """A number among the user's options, from which defaults of other options follow.

    Raises:
        UserError: it is no number, or not positive.
    """
    if option not in given:
        return default
    value = given[option]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: `{option}` needs a number, got {value!r}") from None
    if not number > 0:
        raise UserError(f"{where}: `{option}` must be positive, got {value}.")
    return int(number) if number.is_integer() else number


def training_options(where: str, section: str, given: Mapping[str, Any], **defaults: Any) -> Any:
    """The config of a trainer with the user's options, and else `defaults`. See `parse_options`."""
    (config,) = parse_options(where, [config_of(section)], given, **defaults)
    return config

"""The options of `hf-rlhf pipeline`: what is given, and a section of options for each stage."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_rlhf_ext.cli.config_file import read_config
from hf_rlhf_ext.cli.lineage import lineage_of
from hf_rlhf_ext.cli.options import ModelArguments, check_at_least
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes import ppo, reward, sft
from hf_rlhf_ext.reward_functions.named import texts_of

SECTIONS = {"sft": sft.ARGUMENTS, "reward": reward.ARGUMENTS, "ppo": ppo.ARGUMENTS}
"""The command whose options a section takes, by the name of the section."""

AT_THE_TOP = "give it outside of the sections"
SHARED = "it is shared by all stages: give it outside of the sections"
REFUSED = {
    "dataset_name": "give demonstrations, comparisons or prompts outside of the sections",
    "dataset_test_split": "rows are held out by heldout_share, outside of the sections",
    "eval_rows": "rows are held out by heldout_share, outside of the sections",
    "output_dir": SHARED,
    "overwrite": SHARED,
    "seed": SHARED,
    "trust_remote_code": SHARED,
    "verbose": SHARED,
    "check_memory": "`hf-rlhf plan` says whether a stage fits",
    "reward_model": AT_THE_TOP,
    "reward_funcs": AT_THE_TOP,
    "reward_weights": AT_THE_TOP,
    "resume_from_checkpoint": "a stopped stage goes on by itself when the command is repeated",
    "env": "set environment variables in the shell",
}
"""Options of the three commands that no section takes, with the remedy."""

NOT_SETTINGS = ("logging_steps", "logging_strategy", "report_to", "save_steps", "save_total_limit", "run_name")
"""Options of sections that change no result, so that they may differ when a run goes on."""

MODELS_IN_SECTIONS = ("eval_reward_model", "value_model")
FILES_IN_SECTIONS = ("ptx_dataset", "mix", "category_rules", "columns")
"""Options of sections that may name local folders or files, whose content a stage depends on."""


@dataclass
class PipelineArguments:
    """What is given, and the folder of the run."""

    _argument_group_name = "pipeline"

    output_dir: str = field(default="runs/pipeline", metadata={"help": "Folder for data, models, report and cards."})
    seed: int = field(default=0, metadata={"help": "Seed for the split, sampling and training."})
    demonstrations: str | None = field(
        default=None, metadata={"help": "Demonstrations for SFT: file (csv, json, jsonl, parquet), folder or Hub id."}
    )
    sft_policy: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the policy that PPO starts from, instead of demonstrations: an adapter or a "
            "whole model."
        },
    )
    comparisons: str | None = field(
        default=None, metadata={"help": "Comparisons for the reward model: file, folder or Hub id."}
    )
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a reward model, instead of training one; several as a,b. Comparisons are then "
            "used to check it."
        },
    )
    reward_funcs: str | None = field(
        default=None,
        metadata={
            "help": "Reward functions, as rewards.py:short or package.module.function, or built-in ones such as "
            "'exact_match(column=answer)'; several as a,b."
        },
    )
    reward_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weight of each reward in the sum, as 1.0,0.5: the reward models first, then reward_funcs. If "
            "`None`, each weight is 1."
        },
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts for PPO: file (.txt with one a line, or rows with `prompt`), folder or Hub id. If `None`, "
            "those of the comparisons, else of the demonstrations."
        },
    )
    heldout_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of the rows of each file, from 0 to 0.5, that nothing is trained on; at most 200 rows, and "
            "none of fewer than 8. Rows are held out by prompt, over all files."
        },
    )
    require_ready: bool = field(
        default=False, metadata={"help": "Stop before PPO if the check finds that the reward model is not ready."}
    )
    sft: str | None = field(
        default=None,
        metadata={"help": "Options of `hf-rlhf sft` for this stage, as YAML: '{num_train_epochs: 2}'."},
    )
    reward: str | None = field(
        default=None,
        metadata={"help": "Options of `hf-rlhf reward`, as YAML: '{columns: {prompt: question, verdict: winner}}'."},
    )
    ppo: str | None = field(default=None, metadata={"help": "Options of `hf-rlhf ppo`, as YAML: '{max_steps: 64}'."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of a model's repository. Only use it if you have read the code."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Start from the beginning and delete finished stages."})

    def __post_init__(self):
        check_at_least(self, seed=0, heldout_share=0)
        if self.heldout_share > 0.5:
            raise UserError(f"heldout_share must be at most 0.5, got {self.heldout_share}: it is a share of the rows.")
        self.reward_model = split_names(self.reward_model, "reward_model")
        self.reward_funcs = split_names(self.reward_funcs, "reward_funcs")
        self.reward_weights = split_numbers(self.reward_weights)
        for name in SECTIONS:
            section = section_of(getattr(self, name), name)
            refuse_options_of_the_pipeline(name, section, self.output_dir)
            setattr(self, name, section)
        self._check_what_is_given()
        self._check_rewards()

    def _check_what_is_given(self) -> None:
        if self.demonstrations and self.sft_policy:
            raise UserError("sft_policy: demonstrations would train another one: give one of the two.")
        if not (self.demonstrations or self.comparisons or self.has_reward):
            raise UserError(
                "nothing to train on: give demonstrations (for SFT), comparisons (for a reward model), or reward_model "
                "or reward_funcs with prompts (for PPO)."
            )
        if self.has_reward and not (self.prompts or self.comparisons or self.demonstrations):
            raise UserError("prompts: PPO needs prompts: give a file with one prompt a line (--prompts prompts.txt).")

    def _check_rewards(self) -> None:
        names = self.reward_names()
        for option in ("reward_model", "reward_funcs"):
            given = getattr(self, option)
            twice = [name for name in given if given.count(name) > 1]
            if twice:
                raise UserError(f"{option}: {twice[0]} is given twice: give it once, with a larger weight.")
        if self.reward_weights is not None and len(self.reward_weights) != len(names):
            raise UserError(
                f"reward_weights: {len(self.reward_weights)} for {len(names)} rewards ({', '.join(names) or 'none'}): "
                "give one each, in this order."
            )
        if self.require_ready and not (self.comparisons and (self.trains_reward_model or self.reward_model)):
            raise UserError("require_ready: only comparisons show whether a reward model is ready: give comparisons.")

    @property
    def trains_reward_model(self) -> bool:
        return self.comparisons is not None and not self.reward_model

    @property
    def has_reward(self) -> bool:
        """Whether there is a reward, so that PPO runs."""
        return bool(self.comparisons or self.reward_model or self.reward_funcs)

    def reward_names(self) -> list[str]:
        """The rewards in the order of their weights, by the names under which they were given."""
        models = self.reward_model or (["the reward model"] if self.comparisons else [])
        return [*models, *self.reward_funcs]

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def stages(self) -> list[str]:
        """The stages of this run in their order."""
        names = ["data"]
        if self.demonstrations:
            names.append("sft")
        if self.trains_reward_model:
            names.append("reward_model")
        if self.comparisons:
            names.append("check")
        if self.has_reward:
            names.append("ppo")
        return [*names, "report"]

    def unused(self) -> list[str]:
        """Lines that name sections without a stage."""
        lines = []
        for name, needed in {"sft": "demonstrations", "reward": "comparisons"}.items():
            if getattr(self, name) and not getattr(self, needed):
                lines.append(f"not used: the section {name}, as there are no {needed}")
        if not self.has_reward and self.prompts:
            lines.append(f"not used: prompts ({self.prompts}), as PPO needs a reward")
        return lines

    def as_config(self) -> dict[str, Any]:
        """The options that differ from their defaults, as in a config file."""
        values = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name != "overwrite" and value != spec.default and value not in ([], {}):
                values[spec.name] = value
        return values


def split_names(given: Any, option: str) -> list[str]:
    """Names of an option: a list in the config file, or text with commas."""
    if given is None:
        return []
    if option in ("reward_funcs", "eval_reward_funcs"):  # whose arguments have commas too
        return texts_of(given, option)
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{option}: {given!r} is no list of names: write [first, second].")
    return [name.strip() for name in names if name.strip()]


def split_numbers(given: Any) -> list[float] | None:
    """Numbers of an option: a list or a number in the config file, or text with commas."""
    if given is None:
        return None
    parts = given if isinstance(given, list) else str(given).split(",")
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        raise UserError(f"reward_weights: {given!r} is no list of numbers: write [1.0, 0.5].") from None


# --- sections --------------------------------------------------------------------------------------------------------


def section_of(given: Any, name: str) -> dict[str, Any]:
    """The options of a section: a mapping in the config file, YAML text, or the path of a YAML file."""
    if given is None:
        return {}
    if isinstance(given, str) and Path(given).suffix in (".yaml", ".yml"):
        return read_config(given)
    section = given
    if isinstance(given, str):
        try:
            section = yaml.safe_load(given)
        except yaml.YAMLError:
            section = None
    if not isinstance(section, dict):
        raise UserError(f"{name}: {given!r} is no mapping of options: write '{{learning_rate: 1.0e-4}}'.")
    return section


def refuse_options_of_the_pipeline(name: str, section: Mapping[str, Any], output_dir: str) -> None:
    """Raises `UserError` for an option in a section that the pipeline sets itself."""
    of_the_model = {spec.name for spec in fields(ModelArguments)}
    for option in section:
        remedy = REFUSED.get(option)
        if option in of_the_model:
            remedy = SHARED
        if str(option).startswith(("push_to_hub", "hub_")):
            remedy = f"push when the run is finished: hf-rlhf push {output_dir}/policy"
        if remedy is not None:
            raise UserError(f"{name}: `{option}` is not an option of a stage: {remedy}.")


def parse_section(name: str, section: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Any, ...]:
    """The dataclasses of options of a stage's command, as the command itself reads them.

    Args:
        name: `sft`, `reward` or `ppo`.
        section: the user's options.
        defaults: what the pipeline sets. An option of the user comes first.

    Raises:
        UserError: an option is unknown or has a wrong value; the line begins with the name of the section.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(section), sort_keys=False), encoding="utf-8")
        with naming_section(name, path):
            return parse_recipe(SECTIONS[name], ["--config", str(path)], defaults=defaults)


@contextmanager
def naming_section(name: str, path: Path | None = None) -> Iterator[None]:
    """Inside the context, a line of `UserError` begins with the name of the section, in place of a path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix(f'{path}: ')}") from None


def settings_of(args: PipelineArguments) -> dict[str, Any]:
    """The options of all sections that stages depend on, as `ppo.learning_rate`, and the rewards of PPO.

    Files and folders that they name are followed by a digest.
    """
    settings: dict[str, Any] = {}
    for name in SECTIONS:
        for option, value in getattr(args, name).items():
            if option in NOT_SETTINGS:
                continue
            if option in MODELS_IN_SECTIONS:
                value = [with_digest(model) for model in split_names(value, option)]
            elif option in FILES_IN_SECTIONS:
                value = with_digest(value, dataset=True)
            settings[f"{name}.{option}"] = value
    if args.reward_weights is not None:
        settings["ppo.reward_weights"] = args.reward_weights
    return settings


def with_digest(given: Any, *, dataset: bool = False) -> Any:
    """What an option names: of a local file or folder, the name and a digest. Other values are returned as they are."""
    # `Path.exists` raises for a text that is too long for a name, such as roles of columns as YAML.
    is_local = isinstance(given, str) and os.path.exists(os.path.expanduser(given))
    return lineage_of(given, dataset=dataset) if is_local else given


def section_named_by(message: str) -> str | None:
    """The sections that take an option which the top level refused as unknown, from the message; None if none does."""
    for word in message.split("`")[1:2]:
        option = word.removeprefix("--").replace("-", "_")
        names = [name for name, types in SECTIONS.items() if any(_has_option(kind, option) for kind in types)]
        if names and "unknown" in message:
            section = names[0]
            return (
                f"`{option}` is an option of a stage: put it into a section ({' or '.join(names)}), as in "
                f"`{section}: {{{option}: …}}`"
            )
    return None


def _has_option(kind: Callable, option: str) -> bool:
    return any(spec.name == option for spec in fields(kind))

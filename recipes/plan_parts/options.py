"""The options of `hf-rlhf plan`: its own, and all of the stage that is planned."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.config_file import read_config
from hf_rlhf_ext.cli.help import wants_help
from hf_rlhf_ext.cli.memory_table import card_bytes
from hf_rlhf_ext.cli.options import ModelArguments, check_at_least, machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.cli.shipped import find_config
from hf_rlhf_ext.errors import UserError

STAGES = ("sft", "reward", "ppo")

NOT_GIVEN = "not-given"
"""Stands for the data and the reward, which the commands need and a plan does not."""
_PLACEHOLDERS = {
    "sft": {"dataset_name": NOT_GIVEN},
    "reward": {"dataset_name": NOT_GIVEN},
    "ppo": {"dataset_name": NOT_GIVEN, "reward_funcs": [NOT_GIVEN]},
}


@dataclass
class PlanArguments:
    """What is planned, for which memory, and where the plan goes."""

    _argument_group_name = "plan"

    stage: str | None = field(
        default=None,
        metadata={
            "help": "The command that is planned, all of whose options may be given. If `None`, the name of the config "
            "file says it, as in llama-3.2-3b/ppo.yaml.",
            "choices": list(STAGES),
        },
    )
    card: str = field(
        default="auto",
        metadata={
            "help": "Memory of the GPU, such as 12GB (10^9 bytes) or 11.7GiB. `auto`: the GPU of this machine; if it "
            "has none, a GPU of any size. `cpu`: a run without a GPU, on this machine."
        },
    )
    prompt_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the longest prompt. If `None`, a number is assumed, and said."}
    )
    completion_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the longest completion. If `None`, as many as `max_completion_length` (PPO) or "
            "`max_length` allow."
        },
    )
    completions_per_prompt: int = field(
        default=2, metadata={"help": "Completions of each prompt of a reward model's comparisons; pairs have 2."}
    )
    advice: bool = field(
        default=True,
        metadata={
            "help": "Look for the largest batch and length that fit, and for options to change, by further plans. If "
            "false, the answer comes sooner."
        },
    )
    json: str | None = field(
        default=None, metadata={"help": "File for the plan as JSON, in bytes. `-` prints it, and nothing else."}
    )
    plot: str | None = field(default=None, metadata={"help": "PNG file for a plot of the plan."})

    def __post_init__(self):
        check_at_least(self, prompt_tokens=1, completion_tokens=1, completions_per_prompt=2)
        if self.card.lower() in ("auto", "cpu"):
            self.card = self.card.lower()
        else:
            card_bytes(self.card)  # refuses what is no size
        if self.json not in (None, "-"):
            check_file("json", self.json)
        if self.plot is not None:
            check_file("plot", self.plot, suffix=".png")


def check_file(option: str, name: str, *, suffix: str | None = None) -> None:
    """Refuses a name under which no file can be written, before the plan is made.

    Args:
        option: The option that names the file.
        name: The file. Missing folders are no problem.
        suffix: How the name must end. None for any end.

    Raises:
        UserError: It cannot be written.
    """
    example = f"--{option} plan{suffix or '.json'}"
    path = Path(name)
    if not name or path.is_dir():
        raise UserError(f"{option}: {name!r} is no file: give the name of one, such as {example}.")
    if suffix is not None and path.suffix.lower() != suffix:
        raise UserError(f"{option}: {name} does not end in {suffix}, which is what is written: {example}.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{option}: {name} cannot be written, as {folder} is a file: choose another folder.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option}: {name} cannot be written (permission denied): choose another folder.")


@dataclass(frozen=True)
class Planned:
    """The run that is planned.

    Attributes:
        stage: `sft`, `reward` or `ppo`.
        args: options of its trainer.
        model_args: model, precision and adapter.
        reward_models: reward models of PPO: names of folders or on the Hub.
        eval_reward_models: those that only evaluations of PPO use.
        value_model: the model from which a critic of PPO starts; None without one.
        evaluates: whether the run evaluates. PPO does it before and after training too, if rows are held out.
        config: file of `--config`; None without one.
        given: names of all options that the command line or the file has.
    """

    stage: str
    args: TrainingArguments
    model_args: ModelArguments
    reward_models: tuple[str, ...]
    config: Path | None
    given: frozenset[str]
    eval_reward_models: tuple[str, ...] = ()
    value_model: str | None = None
    evaluates: bool | None = None


def parse(words: Sequence[str], description: str | None = None) -> tuple[PlanArguments, Planned]:
    """Reads the options of the plan and those of its stage.

    Raises:
        UserError: the stage is not given or not known, or as in `parse_recipe`.
    """
    config = _config_of(words)
    stage = _stage_of(words, config)
    if stage is None and not wants_help(words):
        if config is not None:
            read_config(config)  # says it where the file is not there
        raise UserError("stage is required: --stage sft, reward or ppo, or the config of one (--config my/ppo.yaml).")
    types: tuple[type, ...] = (PlanArguments,)
    shown: Mapping[str, Mapping[str, str]] = main_options.PLAN
    defaults: dict[str, Any] = {}
    if stage is not None:
        types += import_module(f"hf_rlhf_ext.recipes.{stage}").ARGUMENTS
        shown = {**shown, **{f"{stage}: {title}": group for title, group in _main_options_of(stage).items()}}
        defaults = machine_defaults() | _PLACEHOLDERS[stage] | {"stage": stage}
    parsed = parse_recipe(types, words, description=description, defaults=defaults, main_options=shown)
    owners = {kind: options for options in parsed for kind in type(options).__mro__}
    rewards = [options for options in parsed if hasattr(options, "reward_funcs")]
    planned = Planned(
        stage=stage,
        args=parsed[-1],
        model_args=owners[ModelArguments],
        reward_models=tuple(rewards[0].reward_model) if rewards else (),
        config=config,
        given=_given(words, config),
        **_of_ppo(parsed, rewards[0]) if rewards else {},
    )
    return parsed[0], planned


def _of_ppo(parsed: Sequence[Any], rewards: Any) -> dict[str, Any]:
    """What only PPO has, see `Planned`."""
    (data,) = [options for options in parsed if hasattr(options, "eval_rows")]
    return {
        "eval_reward_models": tuple(rewards.eval_reward_model),
        "value_model": rewards.value_model,
        "evaluates": data.holds_rows_out,
    }


def _main_options_of(stage: str) -> Mapping[str, Mapping[str, str]]:
    """What the help of the stage's own command shows, without what does not matter here."""
    groups = getattr(main_options, stage.upper())
    return {title: group for title, group in groups.items() if title in ("model and adapter", "training")}


def _value_of(words: Sequence[str], name: str) -> str | None:
    """The value of an option that is read before all others; the last one, as in the parser, if it is given twice."""
    found = None
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            found = value if equals else next(iter(words[position + 1 : position + 2]), None)
    return found


def _config_of(words: Sequence[str]) -> Path | None:
    name = _value_of(words, "config")
    return None if name is None else find_config(name)


def _stage_of(words: Sequence[str], config: Path | None) -> str | None:
    """The stage by its option or by the name of the config file; None if neither says it."""
    given = _value_of(words, "stage")
    if given is not None:
        if given not in STAGES:
            raise UserError(f"stage: {given!r} is not planned: choose one of {', '.join(STAGES)}.")
        return given
    return config.stem if config is not None and config.stem in STAGES else None


def _given(words: Sequence[str], config: Path | None) -> frozenset[str]:
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    keys = set() if config is None else set(read_config(config))
    return frozenset(names | keys)

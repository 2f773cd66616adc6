"""Writes the YAML of the pipeline: the options that matter, what they mean, and values that follow from the rows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.recipes.init_parts.files import Found
from hf_rlhf_ext.recipes.init_parts.machine import Base
from hf_rlhf_ext.recipes.pipeline_parts.data import FEWEST_ROWS, MOST_HELD_OUT
from hf_rlhf_ext.recipes.pipeline_parts.training import (
    LEARNING_RATES,
    LENGTHS,
    MAX_LENGTH,
    ROLLOUT,
    batch_of,
    epochs_of,
    updates_of,
)

COMMENT_AT = 44
"""Column at which comments begin, if the value is shorter."""
RULE_OF_PASSES = "3 of under 100 rows, 2 of under 300, else 1"
RULE_OF_BATCHES = "8, or 4 of under 64 rows"
STEPS_PER_UPDATE = 4
"""Optimizer steps of a PPO update: 2 passes over the rollout in 2 batches."""
FEW_ROWS = 100
"""Of files with fewer rows, a larger share is held out, so that more than a handful is measured on."""


@dataclass(frozen=True)
class Plan:
    """What the YAML is written from.

    Attributes:
        files: Role -> the file, of demonstrations, comparisons, prompts, and models that were given.
        functions: Names of reward functions.
        base: The base model.
        output_dir: Folder of the run.
        command: How to run the YAML.
    """

    files: Mapping[str, Found]
    functions: Sequence[str]
    base: Base
    output_dir: str
    command: str

    @property
    def has_reward(self) -> bool:
        return bool(self.functions or "comparisons" in self.files or "reward_model" in self.files)

    @property
    def heldout_share(self) -> float:
        """A tenth; a fifth if the smallest file has few rows."""
        sizes = [found.n_rows for found in self.files.values() if found.n_rows]
        return 0.2 if sizes and min(sizes) < FEW_ROWS else 0.1

    def n_train(self, *roles: str) -> int:
        """Rows to train on of the first of these roles that has a file; 0 without one."""
        for role in roles:
            if role in self.files:
                n_rows = self.files[role].n_rows
                if n_rows < FEWEST_ROWS:
                    return n_rows
                return n_rows - min(MOST_HELD_OUT, math.ceil(n_rows * self.heldout_share))
        return 0


def config_text(plan: Plan) -> str:
    """The text of the YAML. Keys without a value for these files are comments."""
    lines = [
        "# Written by `hf-rlhf init`. Change what you like, then run it:",
        as_comment(f"  {plan.command}"),
        "# The same command goes on after a stop. `hf-rlhf pipeline --help-all` lists all options outside of sections,",
        "# and `hf-rlhf sft|reward|ppo --help` those of a section.",
        "",
        option("output_dir", plan.output_dir, "folder for data, models, report and cards"),
        option("seed", 0, "of the split, sampling and training"),
        "",
        *_model(plan),
        "",
        *_given(plan),
        "",
        *_sft(plan),
        "",
        *_reward(plan),
        "",
        *_ppo(plan),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def option(name: str, value: Any, comment: str = "", *, used: bool = True, indent: int = 0) -> str:
    """One line of YAML with a comment. An option that is not used is a comment as a whole."""
    text = " " * indent + ("" if used else "# ") + f"{name}: {as_yaml(value)}"
    return f"{text:<{COMMENT_AT}}  # {comment}" if comment else text


def as_yaml(value: Any) -> str:
    """A value on one line, as YAML."""
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.1e}".replace("e-0", "e-")  # without the point, YAML would read text
        return f"{value:g}" if value != int(value) else f"{value:.1f}"
    if "\n" in str(value) or "\\n" in repr(value):  # YAML's own would be several lines; JSON is YAML too
        return json.dumps(value, ensure_ascii=True)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").strip()


def as_comment(text: str) -> str:
    """A line of a comment. Characters that YAML takes for line breaks or refuses, even in comments, become spaces."""
    return "# " + "".join(character if character.isprintable() else " " for character in text)


def _model(plan: Plan) -> list[str]:
    base = plan.base
    lines = [
        "# The base of all models",
        option("model_name_or_path", base.name, "Hub id, folder or .gguf file"),
    ]
    if base.others:
        lines.append(f"#   others, with the memory of the GPU: {', '.join(base.others)}")
    lines += [
        option("load_in_4bit", True, "NF4; a quarter of the memory for weights, needs a GPU", used=base.in_4bit),
        option("lora_r", 16, "rank of the adapters: their width"),
        option("lora_alpha", 32, "adapters are scaled by lora_alpha / lora_r"),
    ]
    return lines


MISSING = {
    "demonstrations": ("demos.jsonl", "none given: PPO starts from the base"),
    "comparisons": ("pairs.csv", "none given: no reward model is trained"),
    "prompts": ("prompts.txt", "none given: those of the comparisons, else of the demonstrations"),
}


def _given(plan: Plan) -> list[str]:
    """Lines on the user's files."""
    lines = ["# Your files"]
    for role, (example, what) in MISSING.items():
        found = plan.files.get(role)
        if found is None:
            lines.append(option(role, example, what, used=False))
        else:
            lines += [as_comment(line) for line in found.lines]
            lines.append(option(role, found.given))
        of_model = {"demonstrations": "sft_policy", "comparisons": "reward_model"}.get(role)
        if of_model in plan.files:
            lines.append(option(of_model, plan.files[of_model].given, f"used instead of {role}"))
    if plan.functions:
        lines.append(option("reward_funcs", list(plan.functions)))
    else:
        lines.append(
            option("reward_funcs", ["rewards.py:short"], "functions of your own, added to the reward", used=False)
        )
    lines += _weights(plan)
    lines.append(
        option(
            "heldout_share",
            plan.heldout_share,
            f"of each file, by prompt, at most {MOST_HELD_OUT} rows: 0.1, and 0.2 of fewer than {FEW_ROWS} rows",
        )
    )
    if "comparisons" in plan.files:
        lines.append(option("require_ready", True, "stop before PPO if the check finds a problem", used=False))
    if not plan.has_reward:
        lines.append("# Without a reward only SFT runs. PPO needs comparisons, reward_model or reward_funcs.")
    return lines


def _weights(plan: Plan) -> list[str]:
    """The weights of the rewards, if there are several."""
    has_model = "comparisons" in plan.files or "reward_model" in plan.files
    names = ["the reward model"] * has_model + list(plan.functions)
    if len(names) < 2:
        return []
    lines = [as_comment(f"The reward is the weighted sum of {', '.join(names)}.")]
    if has_model:
        lines.append("# The reward model has a standard deviation of 1: weigh functions with larger values down.")
    return [
        *lines,
        option("reward_weights", [1.0] * len(names), "one factor each, in this order"),
    ]


def _reading(found: Found | None) -> list[str]:
    """How the file of a section is read."""
    lines = []
    if found is not None and found.columns:
        lines.append(option("columns", found.columns, "role: column", indent=2))
    if found is not None and found.ignore:
        lines.append(option("ignore", list(found.ignore), "columns that are not read", indent=2))
    return lines


def _rate(plan: Plan, stage: str) -> str:
    """The learning rate, as a comment. The size of a base that the user named is not known here."""
    small, large = LEARNING_RATES["small"][stage], LEARNING_RATES["large"][stage]
    rule = f"at its highest; if left out, {as_yaml(small)} for a base of under 0.4B parameters, else {as_yaml(large)}"
    return option("learning_rate", small if plan.base.name == EMBEDDED_MODEL else large, rule, used=False, indent=2)


def _trained(plan: Plan, role: str, stage: str) -> list[str]:
    """Options of SFT and of the reward model."""
    amounts = [
        f"  # num_train_epochs: passes over the rows; if left out, {RULE_OF_PASSES}",
        f"  # per_device_train_batch_size: rows of a step; if left out, {RULE_OF_BATCHES}",
    ]
    if role in plan.files:
        n_rows = plan.n_train(role)
        batch = batch_of(n_rows)
        amounts = [
            option("num_train_epochs", epochs_of(n_rows), f"passes over the rows: {RULE_OF_PASSES}", indent=2),
            option("per_device_train_batch_size", batch, f"rows of a step: {RULE_OF_BATCHES}", indent=2),
        ]
    return [
        *amounts,
        _rate(plan, stage),
        option("max_length", MAX_LENGTH, "tokens of prompt and completion", used=False, indent=2),
    ]


def _section(name: str, title: str, lines: Sequence[str]) -> list[str]:
    """A section. One without options is a comment as a whole, as YAML has no empty mapping in this form."""
    has_options = any(not line.lstrip().startswith("#") for line in lines)
    if has_options:
        return [f"# {title}", f"{name}:", *lines]
    commented = [f"#   {line.lstrip().removeprefix('# ')}" for line in lines]
    return [f"# {title}", f"# {name}:", *commented]


def _sft(plan: Plan) -> list[str]:
    lines = [*_reading(plan.files.get("demonstrations")), *_trained(plan, "demonstrations", "sft")]
    return _section("sft", "Options of `hf-rlhf sft`", lines)


def _reward(plan: Plan) -> list[str]:
    found = plan.files.get("comparisons")
    lines = _reading(found)
    if "reward_model" not in plan.files:
        lines += _trained(plan, "comparisons", "reward")
        lines.append(
            option("members", 1, "reward models; 3 is an ensemble, which is harder to fool", used=False, indent=2)
        )
    return _section("reward", "Options of `hf-rlhf reward`", lines)


def _ppo(plan: Plan) -> list[str]:
    n_prompts = plan.n_train("prompts", "comparisons", "demonstrations")
    updates = updates_of(n_prompts)
    smallest, largest = LENGTHS
    rule = f"prompts / {ROLLOUT}, but at least 8 and at most 32"
    steps = f"optimizer steps, {STEPS_PER_UPDATE} for an update of {ROLLOUT} completions: {updates} updates ({rule})"
    lines = [
        *_reading(plan.files.get("prompts")),
        option(
            "max_steps",
            updates * STEPS_PER_UPDATE,
            steps,
            used=plan.has_reward,
            indent=2,
        ),
        option(
            "kl_coef",
            0.1,
            "reward per nat of KL to the first policy: more keeps it nearer",
            used=plan.has_reward,
            indent=2,
        ),
        option("temperature", 0.8, "of sampling", used=plan.has_reward, indent=2),
        option(
            "max_completion_length",
            64,
            f"tokens; if left out, what 95 % of your answers need, {smallest} to {largest}",
            used=False,
            indent=2,
        ),
        _rate(plan, "ppo"),
    ]
    return _section("ppo", "Options of `hf-rlhf ppo`", lines)

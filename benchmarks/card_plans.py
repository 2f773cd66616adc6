"""Writes the plan of every configuration for a card (`recipes/configs/card-*`) into its comment.

make card-plans

The sizes of the models are in benchmarks/model_configs: the numbers of their public config.json, without a network.
"""

import json
import re
import textwrap
from pathlib import Path

import yaml
from transformers import AutoConfig, PretrainedConfig

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan
from hf_rlhf_ext.recipes.plan_parts.options import parse
from hf_rlhf_ext.recipes.plan_parts.planning import Plans
from hf_rlhf_ext.training.memory_line import GB, in_gb

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("card-*gb/*.yaml"))
MODEL_CONFIGS = ROOT / "benchmarks" / "model_configs"
PROMPT_TOKENS = 512
"""Tokens of the longest prompt of PPO. The other stages have their `max_length`."""
BLOCK = re.compile(r"^# Plan: .*\n(?:# .*\n)*", re.MULTILINE)
SMALLEST_PART = 50_000_000
"""Bytes of the smallest part that a comment names."""
WIDTH = 118


def card_of(path: Path) -> int:
    """The memory of the card that a config is for, in bytes."""
    return int(re.fullmatch(r"card-(\d+)gb", path.parent.name)[1]) * GB


def model_config(name: str) -> PretrainedConfig:
    """The sizes of a public model."""
    content = json.loads((MODEL_CONFIGS / f"{name.partition('/')[2].lower()}.json").read_text(encoding="utf-8"))
    content.pop("source")
    return AutoConfig.for_model(**content)


def plan_config(path: Path) -> MemoryPlan:
    """The plan of a config."""
    _, planned = parse(["--config", str(path), "--card", f"{card_of(path) // GB}GB"])
    base = yaml.safe_load((path.parent / "sft.yaml").read_text(encoding="utf-8"))["model_name_or_path"]
    tokens = PROMPT_TOKENS if planned.stage == "ppo" else None
    config = model_config(base)
    return Plans(planned, "cuda", prompt_tokens=tokens, completions_per_prompt=4, base_config=config).plan()


def block_of(plan: MemoryPlan) -> str:
    """The plan as a comment."""
    lengths = f", prompts of {PROMPT_TOKENS} tokens" if plan.stage == "ppo" else ""
    large = [part for part in plan.peak.parts if part.n_bytes >= SMALLEST_PART]
    parts = ", ".join(f"{part.name} {in_gb(part.n_bytes)}" for part in large)
    phases = ", ".join(f"{phase.name} {in_gb(phase.n_bytes + plan.reserve)}" for phase in plan.phases)
    text = (
        f"Plan: {in_gb(plan.n_bytes)} at the peak, in the phase {plan.peak.name} ({parts}, CUDA and fragments "
        f"{in_gb(plan.reserve)}). All phases: {phases}. By `make card-plans`{lengths}; not measured, not run."
    )
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False))


def with_plan(text: str, plan: MemoryPlan) -> str:
    """The text of a config with the comment of its plan.

    Raises:
        UserError: the text has no such comment.
    """
    found = BLOCK.search(text)
    if found is None:
        raise UserError("the config has no comment that begins with `# Plan: `: add one after its first line.")
    return text[: found.start()] + block_of(plan) + text[found.end() :]


def main() -> None:
    for path in CONFIGS:
        plan = plan_config(path)
        text = path.read_text(encoding="utf-8")
        path.write_text(with_plan(text, plan), encoding="utf-8")
        fits = "fits" if plan.fits(card_of(path)) else "DOES NOT FIT"
        print(f"{path.parent.name}/{path.name}: {in_gb(plan.n_bytes)}, {fits}")


if __name__ == "__main__":
    main()

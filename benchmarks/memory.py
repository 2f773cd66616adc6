"""The plan of `plan_memory` beside the tensors of real runs on a CPU, one fresh process for each run.

make bench-memory                       # all points; those that are measured already are kept
make bench-memory ARGS="--only smol"    # points whose names contain this
make bench-memory ARGS="--again"        # measures all points again

Each point is a run of `SFTTrainer`, `BradleyTerryTrainer` or `PPOTrainer` of two optimizer steps. `LiveBytes` counts
its tensors. Results are in docs/study/memory/, one file a point. The last line is JSON. Errors are relative to what was
measured: positive where the plan says more.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "study" / "memory"
SHAPES = {
    "llama-20m": {"family": "llama", "hidden": 256, "inner": 688, "layers": 6, "heads": 8, "groups": 4, "vocab": 16384},
    "llama-190m": {
        "family": "llama",
        "hidden": 768,
        "inner": 2048,
        "layers": 12,
        "heads": 12,
        "groups": 4,
        "vocab": 49152,
    },
    "llama-1b": {
        "family": "llama",
        "hidden": 2048,
        "inner": 5632,
        "layers": 20,
        "heads": 32,
        "groups": 4,
        "vocab": 49152,
    },
    "qwen2-120m": {
        "family": "qwen2",
        "hidden": 640,
        "inner": 1728,
        "layers": 14,
        "heads": 10,
        "groups": 2,
        "vocab": 49152,
    },
    "qwen3-300m": {
        "family": "qwen3",
        "hidden": 1024,
        "inner": 2816,
        "layers": 18,
        "heads": 16,
        "groups": 8,
        "vocab": 49152,
    },
}
"""Random models by shape."""

SMOL = "smollm2-135m"


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        stage: `sft`, `reward` or `ppo`.
        model: `smollm2-135m`, or a name in `SHAPES`.
        precision: `fp32`, `bf16` (weights and computation), `nf4` or `int8`.
        batch: rows of a micro-batch.
        prompt: tokens of the longest prompt.
        completion: tokens of the longest completion.
        checkpointing: whether activations are computed again in the backward pass.
        layout: of reward training: `plain` or `shared_prefix`.
        generations: completions of each prompt in PPO.
        critic: kind of critic in PPO.
        reward: `none`, `shared` or `model` in PPO.
        accumulation: micro-batches of a step.
        whole: whether all weights are trained.
        budget: most tokens of a forward pass; 0 for no limit.
        dora: whether the adapter is DoRA.
        attention: attention implementation; empty for that of Transformers.
        eval_batch: rows of a batch of evaluation, after each step; 0 for no evaluation.
        chosen_after_freeze: whether the point was chosen after the planner was finished.
    """

    stage: str
    model: str
    precision: str
    batch: int
    prompt: int
    completion: int
    checkpointing: bool = True
    layout: str = "auto"
    generations: int = 1
    critic: str = "adapter"
    reward: str = "none"
    accumulation: int = 1
    whole: bool = False
    budget: int = 0
    dora: bool = False
    attention: str = ""
    eval_batch: int = 0
    chosen_after_freeze: bool = False

    @property
    def name(self) -> str:
        """What the file of the point is called."""
        parts = [self.stage, self.model, self.precision, f"b{self.batch}", f"{self.prompt}+{self.completion}"]
        parts.append("checkpointing" if self.checkpointing else "kept")
        further = {
            "layout": self.layout != "auto",
            "critic": self.stage == "ppo",
            "reward": self.stage == "ppo",
        }
        parts += [str(getattr(self, field)) for field, is_shown in further.items() if is_shown]
        if self.generations > 1:
            parts.append(f"k{self.generations}")
        if self.accumulation > 1:
            parts.append(f"a{self.accumulation}")
        if self.whole:
            parts.append("whole")
        if self.budget:
            parts.append(f"t{self.budget}")
        if self.dora:
            parts.append("dora")
        if self.attention:
            parts.append(self.attention)
        if self.eval_batch:
            parts.append(f"e{self.eval_batch}")
        return "-".join(parts)


BEFORE = [
    Point("sft", SMOL, "fp32", 4, 128, 128),
    Point("sft", SMOL, "bf16", 4, 128, 128, checkpointing=False),
    Point("sft", SMOL, "nf4", 2, 256, 256),
    Point("sft", "qwen2-120m", "fp32", 2, 200, 120, checkpointing=False),
    Point("sft", "llama-190m", "nf4", 4, 96, 64, accumulation=2),
    Point("reward", SMOL, "fp32", 2, 128, 64),
    Point("reward", SMOL, "fp32", 4, 96, 96, checkpointing=False, layout="plain"),
    Point("reward", SMOL, "nf4", 4, 128, 128),
    Point("reward", SMOL, "bf16", 2, 256, 64, checkpointing=False),
    Point("reward", "qwen3-300m", "nf4", 2, 128, 64, layout="plain"),
    Point("reward", "llama-20m", "fp32", 16, 64, 48, checkpointing=False, budget=1024),
    Point("ppo", SMOL, "fp32", 4, 64, 48),
    Point("ppo", SMOL, "nf4", 4, 64, 48, critic="head", reward="shared"),
    Point("ppo", SMOL, "bf16", 4, 96, 32, generations=4, critic="none"),
    Point("ppo", "qwen2-120m", "fp32", 4, 128, 32, generations=2, checkpointing=False),
    Point("ppo", "llama-20m", "fp32", 8, 64, 64, critic="head", whole=True, accumulation=2),
    Point("sft", "llama-20m", "fp32", 4, 96, 96, dora=True),
    Point("sft", "llama-20m", "fp32", 4, 128, 128, checkpointing=False, attention="eager"),
    Point("sft", "llama-20m", "bf16", 1, 64, 64, eval_batch=16),
    Point("reward", "llama-20m", "int8", 4, 128, 64),
    Point("reward", "llama-20m", "fp32", 1, 64, 64, eval_batch=16),
    Point("sft", "llama-1b", "nf4", 1, 128, 128),
    Point("sft", "qwen3-300m", "bf16", 2, 192, 64),
    Point("reward", "llama-1b", "nf4", 1, 96, 64),
    Point("reward", "qwen2-120m", "bf16", 4, 160, 96, checkpointing=False),
    Point("reward", "llama-190m", "fp32", 2, 96, 96, whole=True),
    Point("ppo", "llama-1b", "nf4", 2, 64, 24),
    Point("ppo", "qwen3-300m", "nf4", 4, 96, 32, generations=2, critic="none", reward="none"),
    Point("ppo", SMOL, "fp32", 4, 96, 32, critic="head", reward="model", accumulation=2),
    Point("ppo", "llama-190m", "bf16", 4, 64, 32, critic="adapter", reward="shared", checkpointing=False),
]
"""Points that the planner was made with."""

AFTER = [
    Point("sft", SMOL, "fp32", 2, 64, 192, checkpointing=False, accumulation=4),
    Point("sft", "qwen2-120m", "nf4", 8, 64, 64),
    Point("sft", "llama-190m", "bf16", 2, 128, 96, whole=True),
    Point("sft", "qwen3-300m", "fp32", 1, 300, 200, eval_batch=4),
    Point("sft", "llama-20m", "int8", 6, 100, 50),
    Point("reward", SMOL, "bf16", 8, 64, 32),
    Point("reward", "llama-20m", "fp32", 4, 200, 40, checkpointing=False, eval_batch=8),
    Point("reward", "qwen3-300m", "bf16", 2, 96, 96, dora=True),
    Point("reward", SMOL, "nf4", 1, 384, 128, layout="plain"),
    Point("reward", "qwen2-120m", "fp32", 3, 80, 80, attention="eager"),
    Point("ppo", SMOL, "nf4", 8, 32, 64, generations=4, critic="head"),
    Point("ppo", "qwen2-120m", "bf16", 4, 100, 50, generations=2, critic="none", reward="model", checkpointing=False),
    Point("ppo", "llama-20m", "fp32", 6, 40, 80, generations=2, critic="none", whole=True),
    Point("ppo", "qwen3-300m", "nf4", 4, 120, 40, generations=2, reward="shared"),
    Point("ppo", "llama-190m", "fp32", 4, 48, 48, critic="head", attention="eager"),
    Point("ppo", "llama-1b", "nf4", 1, 128, 32, critic="head", reward="shared"),
]
"""Points that were chosen when it was finished."""

POINTS = [*BEFORE, *(replace(point, chosen_after_freeze=True) for point in AFTER)]


# ---- One run, in its own process ----


def measure(point: Point, folder: Path) -> dict[str, Any]:
    """Runs a point, and plans it.

    Args:
        point: the point.
        folder: a temporary folder for random models and for the run.
    """
    import torch

    torch.manual_seed(0)
    start = time.monotonic()
    model_name = model_of(point, folder)
    runs = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}
    live, plan = runs[point.stage](point, model_name, folder)
    return {
        **asdict(point),
        "name": point.name,
        "measured": live.peak,
        "predicted": plan.n_bytes,
        "error": plan.n_bytes / live.peak - 1,
        "peak_phase": plan.peak.name,
        "phases": {phase["name"]: phase["parts"] for phase in plan.to_dict()["phases"]},
        "resident_size": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": time.monotonic() - start,
    }


def model_of(point: Point, folder: Path) -> str:
    """Name of the model, which is written first if it is random."""
    from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL

    if point.model == SMOL:
        return EMBEDDED_MODEL
    import torch
    from transformers import AutoModelForCausalLM

    from hf_rlhf_ext import load_tokenizer

    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    config = config_of(SHAPES[point.model], tokenizer)
    path = folder / "model"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def config_of(shape: dict[str, Any], tokenizer: Any) -> Any:
    """The config of a random model. Its vocabulary is at least that of the tokenizer."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        shape["family"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        head_dim=shape["hidden"] // shape["heads"],
        vocab_size=max(shape["vocab"], len(tokenizer)),
        tie_word_embeddings=shape["hidden"] < 1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def model_arguments(point: Point) -> Any:
    """Options of the model, as on the command line."""
    from hf_rlhf_ext.cli.options import ModelArguments

    dtype = "bfloat16" if point.precision == "bf16" else "float32"
    return ModelArguments(
        dtype=dtype,
        load_in_4bit=point.precision == "nf4",
        load_in_8bit=point.precision == "int8",
        use_peft=not point.whole,
        use_dora=point.dora,
        attn_implementation=point.attention or None,
    )


def training_options(point: Point, folder: Path) -> dict[str, Any]:
    """Options that all trainers share."""
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": point.batch,
        "gradient_accumulation_steps": point.accumulation,
        "activation_checkpointing": point.checkpointing,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": point.precision == "bf16",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "eval_strategy": "steps" if point.eval_batch else "no",
        "eval_steps": 1,
        "per_device_eval_batch_size": point.eval_batch or point.batch,
    }


def counted(models: list[Any]) -> Any:
    """A counter of bytes that knows the weights of the models already."""
    from hf_rlhf_ext.modeling.memory.live_bytes import LiveBytes, state_tensors

    live = LiveBytes()
    for model in models:
        live.track((tensor for _, tensor in state_tensors(model)), "base weights")
    return live


def words(n: int) -> str:
    """Text of n tokens, for the tokenizer of SmolLM2."""
    return "a" + " a" * (n - 1)


def lengths(longest: int, n: int) -> list[int]:
    """Lengths of n texts: every second one is a little shorter, so that batches have padding."""
    return [longest - 6 * (i % 2) for i in range(n)]


def n_rows(point: Point) -> int:
    """Rows for the steps of a run, which are evaluated on too."""
    return max(2 * point.batch * point.accumulation, point.eval_batch)


def run_sft(point: Point, name: str, folder: Path) -> tuple[Any, Any]:
    """As `train_sft` of the recipe trains."""
    from datasets import Dataset

    from hf_rlhf_ext import load_base_model, load_tokenizer
    from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
    from hf_rlhf_ext.modeling.adapters import adapters_in_autocast_dtype
    from hf_rlhf_ext.modeling.memory.planner import plan_memory
    from hf_rlhf_ext.training.sft_config import CheckedSFTConfig

    model_args = model_arguments(point)
    args = CheckedSFTConfig(**training_options(point, folder), max_length=point.prompt + point.completion)
    n = n_rows(point)
    rows = []
    for prompt, completion in zip(lengths(point.prompt, n), lengths(point.completion, n), strict=True):
        rows.append({"prompt": words(prompt), "completion": " " + words(completion - 1)})
    model = load_base_model(name, **model_args.base_options(args))
    with counted([model]) as live:
        trainer = PublishingSFTTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows) if point.eval_batch else None,
            processing_class=load_tokenizer(name),
            peft_config=model_args.peft_config("CAUSAL_LM"),
        )
        with adapters_in_autocast_dtype(trainer.model, enabled=args.bf16):
            trainer.train()
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    plan = plan_memory(
        name,
        "sft",
        args,
        model_args=model_args,
        prompt_tokens=point.prompt,
        completion_tokens=longest - point.prompt,
        device="cpu",
    )
    return live, plan


def comparisons(point: Point) -> Any:
    """Comparisons of two completions."""
    from datasets import Dataset

    n = n_rows(point)
    rows = []
    for prompt, completion in zip(lengths(point.prompt, n), lengths(point.completion, n), strict=True):
        text = words(completion - 1)
        rows.append({"prompt": words(prompt), "chosen": " " + text, "rejected": " " + text.replace("a", "b", 1)})
    return Dataset.from_list(rows)


def run_reward(point: Point, name: str, folder: Path) -> tuple[Any, Any]:
    """A run of `BradleyTerryTrainer`."""
    from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, load_base_model, load_tokenizer
    from hf_rlhf_ext.modeling.memory.planner import plan_memory

    model_args = model_arguments(point)
    args = BradleyTerryConfig(
        **training_options(point, folder),
        layout=point.layout,
        max_tokens_per_batch=point.budget or None,
    )
    model = load_base_model(name, task="reward", **model_args.base_options(args))
    with counted([model]) as live:
        trainer = BradleyTerryTrainer(
            model,
            args=args,
            train_dataset=comparisons(point),
            eval_dataset=comparisons(point) if point.eval_batch else None,
            processing_class=load_tokenizer(name),
            peft_config=model_args.peft_config("SEQ_CLS"),
        )
        trainer.train()
    prompt = max(len(ids) for ids in trainer.train_dataset["prompt_ids"])
    completion = max(len(ids) for row in trainer.train_dataset["completion_ids"] for ids in row)
    plan = plan_memory(
        name,
        "reward",
        args,
        model_args=model_args,
        prompt_tokens=prompt,
        completion_tokens=completion,
        device="cpu",
    )
    return live, plan


def reward_folder(point: Point, name: str, folder: Path) -> Path:
    """A reward model on the base of the policy, which is hardly trained."""
    from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, load_base_model, load_tokenizer

    model_args = model_arguments(point)
    options = training_options(point, folder) | {"output_dir": str(folder / "reward"), "max_steps": 1}
    args = BradleyTerryConfig(**options)
    BradleyTerryTrainer(
        load_base_model(name, task="reward", **model_args.base_options(args)),
        args=args,
        train_dataset=comparisons(replace(point, prompt=16, completion=8, batch=2, accumulation=1)),
        processing_class=load_tokenizer(name),
        peft_config=model_args.peft_config("SEQ_CLS"),
    ).save_model()
    return folder / "reward"


def run_ppo(point: Point, name: str, folder: Path) -> tuple[Any, Any]:
    """A run of `PPOTrainer` whose completions all have the longest length."""
    from datasets import Dataset

    from hf_rlhf_ext import PPOConfig, PPOTrainer, RewardScorer, load_base_model, load_tokenizer
    from hf_rlhf_ext.modeling.memory.planner import plan_memory

    model_args = model_arguments(point)
    args = PPOConfig(
        **training_options(point, folder),
        num_generations=point.generations,
        max_completion_length=point.completion,
        generation_kwargs={"min_new_tokens": point.completion},
        critic=point.critic,
        num_ppo_epochs=1,
        max_tokens_per_batch=point.budget or None,
    )
    models = []
    reward: Any = lambda prompts, completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    if point.reward != "none":
        reward = str(reward_folder(point, name, folder))
    if point.reward == "model":
        reward = RewardScorer.from_pretrained(reward)
        models.append(reward.model)
    policy = load_base_model(name, **model_args.base_options(args))
    rows = [{"prompt": words(n)} for n in lengths(point.prompt, n_rows(point))]
    with counted([policy, *models]) as live:
        trainer = PPOTrainer(
            policy,
            reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(name),
            peft_config=model_args.peft_config("CAUSAL_LM"),
        )
        trainer.train()
    reward_model: Any = {"none": False, "shared": None, "model": models[-1] if models else None}[point.reward]
    plan = plan_memory(
        name,
        "ppo",
        args,
        model_args=model_args,
        reward_model=reward_model,
        prompt_tokens=point.prompt,
        completion_tokens=point.completion,
        device="cpu",
    )
    return live, plan


# ---- All runs ----


def part_file(point: Point) -> Path:
    """Where the result of a point is kept."""
    return FOLDER / f"{point.name}.json"


def run_in_process(point: Point) -> dict[str, Any] | None:
    """Measures a point in a fresh process; `None` if it failed, with its messages on stderr."""
    command = [sys.executable, __file__, "--point", point.name]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        print(f"{point.name} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
        return None
    return json.loads(part_file(point).read_text())


def table(parts: list[dict[str, Any]]) -> str:
    """The results as Markdown, for the terminal and for docs/results/memory.md."""
    lines = [
        "| run | measured, MB | planned, MB | error | resident, MB | peak | after freeze |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for part in parts:
        error = f"{part['error']:+.1%}".replace("-", "−")
        after = "yes" if part["chosen_after_freeze"] else ""
        lines.append(
            f"| `{part['name']}` | {part['measured'] / 1e6:,.0f} | {part['predicted'] / 1e6:,.0f} | {error} "
            f"| {part['resident_size'] / 1e6:,.0f} | {part['peak_phase']} | {after} |"
        )
    return "\n".join(lines) + "\n"


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all points, as fractions."""
    errors = [part["error"] for part in parts]
    return {
        "points": len(parts),
        "median_error": round(statistics.median(map(abs, errors)), 4),
        "worst_error": round(max(map(abs, errors)), 4),
        "worst_underestimate": round(max(0.0, -min(errors)), 4),
    }


def main() -> int:
    """Measures what is not measured yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="points whose names contain this")
    parser.add_argument("--again", action="store_true", help="measure points again")
    parser.add_argument("--point", help="measure this point in this process")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.point:
        (point,) = [point for point in POINTS if point.name == options.point]
        with tempfile.TemporaryDirectory() as folder:
            part = measure(point, Path(folder))
        part_file(point).write_text(json.dumps(part, indent=1) + "\n")
        return 0
    parts, n_failed = [], 0
    for point in POINTS:
        if options.only not in point.name:
            continue
        if part_file(point).exists() and not options.again:
            parts.append(json.loads(part_file(point).read_text()))
            continue
        part = run_in_process(point)
        if part is None:
            n_failed += 1
            continue
        print(f"{point.name}: {part['error']:+.1%}, {part['seconds']:.0f} s", flush=True)
        parts.append(part)
    if not parts:
        return 1
    from memory_plot import plot_points, read_points

    plot_points(read_points(FOLDER))
    print(table(parts), end="")
    print(json.dumps(summary(parts)))
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())

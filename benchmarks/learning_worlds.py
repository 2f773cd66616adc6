"""The worlds of `learning_study.py`: stories260K with a reward function, and SmolLM2-135M as in the quickstart."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ppo_study
import story_world
from compare_worlds import smollm2
from datasets import Dataset
from learning_grid import STORIES_PPO, STORIES_TRL, TODAY, Setting
from learning_runs import Place, Reward
from peft import LoraConfig

from hf_rlhf_ext import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    RewardScorer,
    load_base_model,
    load_policy,
    load_tokenizer,
)
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.cli.stages import StageRunner
from hf_rlhf_ext.readers.formats import load_rows
from hf_rlhf_ext.recipes.quickstart import (
    NEW_TOKENS,
    TEMPERATURE,
    Quickstart,
    QuickstartArguments,
)

GOLD, SECOND = "gold", "second_gold"
"""Names of the gold rewards in the files: the one that counts, and the one beside it."""


def lora(r: int, task_type: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type=task_type)


# --- stories260K -----------------------------------------------------------------------------------------------------

STORIES_LORA = 8
STORIES_PER_PROMPT = 4
"""Completions of each of the 32 held-out prompts in an evaluation."""
STORIES_PAIRS = 512
"""Comparisons of the reward model of the runs that compare starts of the critic."""


def stories_place(setting: Setting, seed: int, work: Path) -> Place:
    """Openings of children's stories, rewarded by the number of happy words; the second gold reward is VADER's.

    The reward of training is the gold reward itself, so that nothing is over-optimized and the trainers alone differ.
    """
    heldout = [{"prompt": prompt} for prompt in story_world.heldout_prompts() for _ in range(STORIES_PER_PROMPT)]
    return Place(
        load=load_stories,
        lora=lora(STORIES_LORA),
        reward=ppo_study.happy_words,
        reward_model=stories_reward_model(seed, work) if setting.uses_model else None,
        golds={GOLD: ppo_study.happy_words, SECOND: ppo_study.gold},
        prompts=[{"prompt": prompt} for prompt in story_world.train_prompts()],
        heldout=heldout,
        rollouts=60,
        rollout_size=64,
        evaluate_every=4,
        max_tokens=40,
        temperature=1.0,
        ppo=STORIES_PPO,
        trl=STORIES_TRL,
    )


def load_stories() -> tuple[Any, Any]:
    return load_base_model(story_world.STORIES, dtype="float32"), load_tokenizer(story_world.STORIES)


def stories_reward_model(seed: int, work: Path) -> Path:
    """An adapter on the story model, trained on pairs of its stories judged by the number of happy words."""
    folder = work / "stories" / f"seed-{seed}" / "reward_model"
    if (folder / "finished").is_file():
        return folder
    prompts = story_world.train_prompts()
    per_prompt = 2 * -(-STORIES_PAIRS // len(prompts))
    rows = []
    for prompt, texts in zip(prompts, story_world.sample_stories(prompts, per_prompt, 1000 * seed), strict=True):
        for number in range(0, per_prompt, 2):
            pair = texts[number : number + 2]
            first, second = ppo_study.happy_words(pair)
            target = 0.5 if first == second else float(first > second)
            rows.append({"prompt": prompt, "completions": pair, "pairs": [[0, 1]], "targets": [target]})
    args = BradleyTerryConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=32,
        num_train_epochs=4,
        learning_rate=3e-3,
        warmup_steps=5,
        seed=seed,
    )
    trainer = BradleyTerryTrainer(
        load_base_model(story_world.STORIES, task="reward", dtype="float32"),
        args,
        Dataset.from_list(rows),
        processing_class=load_tokenizer(story_world.STORIES),
        peft_config=lora(STORIES_LORA, "SEQ_CLS"),
    )
    trainer.train()
    trainer.save_model()
    (folder / "finished").touch()
    return folder


# --- SmolLM2-135M ----------------------------------------------------------------------------------------------------

STAGES = ("data", "sft", "comparisons", "reward_model")
"""Stages of the quickstart that come before PPO."""
SMOLLM2_DTYPE = "bfloat16"
"""On every machine, so that parts of the study may come from several. The quickstart takes fp32 where bf16 is slow."""
OF_THE_STUDY = ("max_steps", "per_device_train_batch_size")
"""Options that follow from the number and size of rollouts."""


def smollm2_place(setting: Setting, seed: int, work: Path, size: str = "full") -> Place:
    """SFT policy, reward model and prompts of the quickstart, whose first four stages are run once for each seed."""
    quickstart = prepared(seed, work, size)
    n_rollouts, rollout_size = quickstart.size.updates, quickstart.size.rollout
    sft = str(quickstart.folder / "sft")
    reward_model = quickstart.folder / "reward_model"
    first, *others = quickstart.golds
    return Place(
        load=lambda: load_policy(sft, is_trainable=True, dtype=SMOLLM2_DTYPE),
        lora=lora(16),
        reward=reward_of(reward_model),
        reward_model=reward_model if setting.uses_model else None,
        golds={GOLD: first, SECOND: others[0]},
        prompts=rows_of(quickstart, "train")[: n_rollouts * rollout_size],
        heldout=rows_of(quickstart, "test"),
        rollouts=n_rollouts,
        rollout_size=rollout_size,
        evaluate_every=2,
        max_tokens=NEW_TOKENS,
        temperature=TEMPERATURE,
        max_tokens_per_batch=4096,
        bf16=True,
        ppo=TODAY | {name: value for name, value in smollm2.PPO.items() if name not in OF_THE_STUDY},
        trl={"num_iterations": 2, "steps_per_generation": 2, "num_generations": 4, "beta": 0.1},
    )


class SameEverywhere(Quickstart):
    """The quickstart in bf16 on every machine."""

    def __init__(self, args: QuickstartArguments):
        super().__init__(args)
        self.bf16 = True

    def model_args(self, name: str | None = None) -> ModelArguments:
        return replace(super().model_args(name), dtype=SMOLLM2_DTYPE)


def prepared(seed: int, work: Path, size: str = "full") -> Quickstart:
    """The quickstart of a seed, with its stages up to the reward model."""
    folder = work / "smollm2" / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    args = QuickstartArguments(output_dir=str(folder), seed=seed, size=size)
    quickstart = SameEverywhere(args)
    stages = StageRunner(folder, {"seed": seed, "size": size, "gold": getattr(args, "gold", None)}, STAGES)
    about = quickstart.descriptions()
    stages.run("data", about["data"], quickstart.make_data)
    stages.run("sft", about["sft"], quickstart.sft)
    judged = stages.run("comparisons", about["comparisons"], quickstart.compare)

    def reward_model() -> dict[str, Any]:
        return quickstart.reward_model(judged["test_prompts"], judged["test_ceiling"])

    stages.run("reward_model", about["reward_model"], reward_model)
    return quickstart


def rows_of(quickstart: Quickstart, split: str) -> list[dict[str, Any]]:
    return load_rows(str(quickstart.data / "prompts" / f"{split}.jsonl")).to_list()


def reward_of(folder: Path) -> Reward:
    """The reward model as a function, for TRL's trainers. It is loaded with the first call."""

    @cache
    def scorer() -> RewardScorer:
        return RewardScorer.from_pretrained(folder, dtype=SMOLLM2_DTYPE)

    def reward_model(prompts: list, completions: list, **columns: Any) -> list[float]:
        return scorer()(prompts, completions)

    return reward_model


WORLDS = {"stories": stories_place, "smollm2": smollm2_place}

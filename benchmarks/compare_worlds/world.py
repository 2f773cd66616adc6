"""What the worlds share: an SFT policy to sample from, noisy judgments of its completions, and a second judge."""

import fcntl
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import SFTConfig

from hf_rlhf_ext import BradleyTerryConfig, load_policy
from hf_rlhf_ext.cli.options import DataArguments, ModelArguments
from hf_rlhf_ext.collect.simulated import SimulatedAnnotator
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.text import decode_completion, encode_generation_prompt
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine, stop_token_ids
from hf_rlhf_ext.recipes.reward import train_reward
from hf_rlhf_ext.recipes.sft import train_sft

Row = dict[str, Any]
Gold = Callable[..., list[float]]

JUDGE = "judge_reward_model"
JUDGE_ROWS = "judge_comparisons.jsonl"
COMMON = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "logging_steps": 20}
"""Options of all trainers of a world."""


@dataclass(frozen=True)
class World:
    """Files of one seed of a study, written stage by stage.

    Attributes:
        name: "stories" or "smollm2".
        model: options of the base model and its adapters, as in `compare.yaml`.
        sft: options of `SFTConfig` for all systems with SFT and for the policy that is sampled from.
        reward: options of `BradleyTerryConfig` for the reward model and for the second judge.
        temperature: temperature of all sampling.
        max_completion_length: tokens.
        completions: completions that are judged of each prompt.
        noise: noise of the simulated annotator, in units of the gold reward.
        gold: the gold reward.
    """

    name: str
    model: dict[str, Any]
    sft: dict[str, Any]
    reward: dict[str, Any]
    temperature: float
    max_completion_length: int
    completions: int
    noise: float
    gold: Gold

    def model_args(self, location: str | None = None) -> ModelArguments:
        return ModelArguments(**self.model | ({"model_name_or_path": location} if location else {}))

    def train_start(self, data: Path, output: Path, seed: int) -> None:
        """Trains the SFT policy whose completions are judged, as `hf-rlhf compare` trains the system `sft`."""
        arguments = SFTConfig(**COMMON | self.sft, output_dir=str(output), seed=seed, save_strategy="no")
        train_sft(DataArguments(dataset_name=str(data), overwrite=True), self.model_args(), arguments)

    def sample(self, location: str, prompts: Sequence[list[Row]], n: int, seed: int, batch: int) -> list[list]:
        """`n` completions (as messages) of each prompt, in batches of `batch` prompts."""
        model, tokenizer = load_policy(location, dtype=self.model["dtype"])
        sampling = Sampling(
            max_new_tokens=self.max_completion_length,
            stop_ids=stop_token_ids(tokenizer, model, None),
            pad_token_id=tokenizer.pad_token_id,
            temperature=self.temperature,
        )
        engine = TransformersEngine()
        engine.sync(model)
        torch.manual_seed(seed)
        completions = []
        for start in range(0, len(prompts), batch):
            ids = [encode_generation_prompt(tokenizer, prompt) for prompt in prompts[start : start + batch]]
            for completion in engine.generate(ids, sampling, n=n).ids:
                text = decode_completion(tokenizer, completion)
                completions.append([{"role": "assistant", "content": text}])
        return [completions[start : start + n] for start in range(0, len(completions), n)]

    def judge(self, rows: Sequence[Row], completions: Sequence[list], seed: int) -> list[Row]:
        """Comparisons: all pairs of a prompt's completions, judged by the simulated annotator."""
        annotator = SimulatedAnnotator(noise=self.noise, seed=seed, gold=self.gold)
        to_judge = [row | {"completions": of_row} for row, of_row in zip(rows, completions, strict=True)]
        return annotator.judge(to_judge).rows

    def train_judge(self, rows: Sequence[Row], folder: Path, **changes: Any) -> None:
        """Trains the second judge in `folder`, on comparisons that no system sees."""
        write_rows(list(rows), folder / JUDGE_ROWS)
        arguments = BradleyTerryConfig(
            **COMMON | self.reward | changes, output_dir=str(folder / JUDGE), seed=1000, save_strategy="no"
        )
        data = DataArguments(dataset_name=str(folder / JUDGE_ROWS), eval_rows=len(rows) // 10, overwrite=True)
        train_reward(data, self.model_args(), arguments)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Waits while another seed of the study makes the folder that all seeds share."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder that all seeds share. It is made in its place, as adapters name the folder of their base."""
    with only_one(folder):
        finished = folder / "finished"
        if not finished.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


def write_config(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    return random.Random(seed).sample(list(rows), len(rows))

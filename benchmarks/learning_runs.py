"""The runs of `learning_study.py`: one training by PPO, TRL's GRPO or TRL's RLOO, evaluated on the way.

All trainers start from the same policy, and have the same prompts, reward, LoRA and number of completions. Between
rollouts, the policy answers the same held-out prompts with the same seed. Time is CPU time of the process, so that a
pause or other work on the machine does not count; evaluations, logs of them and checkpoints are left out.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from learning_grid import OF_CRITIC, Setting
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_study import Lines
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, set_seed
from trl import GRPOConfig, RLOOConfig

from hf_rlhf_ext import PPOConfig, PPOTrainer
from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.data.text import decode_completion
from hf_rlhf_ext.modeling.probing import unchanged_random_state
from hf_rlhf_ext.recipes.compare_parts.answers import Answers
from hf_rlhf_ext.recipes.compare_parts.snapshots import NEVER, TrainingTimer
from hf_rlhf_ext.recipes.compare_parts.trl_learners import _GRPO, _RLOO, check_prompt_tokens, data_for_trl
from hf_rlhf_ext.recipes.rounds_parts.evaluation import PolicyEvaluator

Reward = Callable[..., list[float]]
SAVE_SECONDS = 1200.0
"""Wall time between two checkpoints of a run, at most: 20 minutes and a rollout."""
EVALUATION_SEED = 2026
EVALUATIONS_FILE = "evaluations.json"
"""File in a checkpoint with the evaluations so far."""
ROUNDED = 4


@dataclass(frozen=True)
class Place:
    """What the runs of a world and a seed share.

    Attributes:
        load: returns the policy at the start and its tokenizer. A base model gets a new adapter; the weights of a
            `PeftModel` are trained further.
        lora: the new adapter.
        reward: the reward of training as a function; TRL's trainers have this one.
        reward_model: folder of the reward model, if PPO gets it as a model, so that its critic can start from it.
        golds: gold rewards by name, of which the first counts.
        prompts: rows with `prompt` to train on.
        heldout: rows with `prompt` for evaluations.
        rollouts: rollouts of a run.
        rollout_size: completions of a rollout.
        evaluate_every: rollouts between two evaluations.
        max_tokens: length of a completion.
        temperature: temperature of sampling.
        max_tokens_per_batch: tokens of a forward pass of an evaluation.
        bf16: whether trainers compute in bf16.
        ppo: options of PPO that all settings share.
        trl: options of GRPO and RLOO that all settings share.
    """

    load: Callable[[], tuple[torch.nn.Module, PreTrainedTokenizerBase]]
    lora: LoraConfig
    reward: Reward
    golds: dict[str, Reward]
    prompts: Sequence[dict[str, Any]]
    heldout: Sequence[dict[str, Any]]
    rollouts: int
    rollout_size: int
    evaluate_every: int
    max_tokens: int
    temperature: float
    reward_model: Path | None = None
    max_tokens_per_batch: int = 16384
    bf16: bool = False
    ppo: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)


# --- evaluation ------------------------------------------------------------------------------------------------------


class HeldoutEvaluation:
    """Answers of a policy to the held-out prompts, with gold rewards and the KL to the policy at the start.

    Args:
        place: the world.
    """

    def __init__(self, place: Place):
        self.place = place
        self.start, self.tokenizer = place.load()
        self.start.eval().requires_grad_(False)
        evaluator = PolicyEvaluator(
            "start",  # is not loaded by name: both models are here
            revision=None,
            base_options={},
            temperature=place.temperature,
            max_new_tokens=place.max_tokens,
            max_tokens=place.max_tokens_per_batch,
            seed=EVALUATION_SEED,
        )
        self.answers = Answers(evaluator, place.heldout)
        self.answers.tokenizer = self.tokenizer

    def __call__(self, model: torch.nn.Module) -> dict[str, Any]:
        """Means over the answers: gold rewards, `kl` in nats per completion (k1), and tokens. Training is not changed.

        The policy of a trainer is evaluated with its adapter as it is.
        """
        evaluator = self.answers.evaluator
        with unchanged_random_state(next(model.parameters()).device):
            ids = self.answers.sample(model)
            own = evaluator.logprobs(model, self.tokenizer, self.answers.prompt_ids, ids)
            before = evaluator.logprobs(self.start, self.tokenizer, self.answers.prompt_ids, ids)
        texts = [decode_completion(self.tokenizer, tokens) for tokens in ids]
        columns = {name: [row[name] for row in self.place.heldout] for name in self.place.heldout[0]}
        prompts = columns.pop("prompt")
        completions = [as_message(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        found: dict[str, Any] = {}
        for name, gold in self.place.golds.items():
            found[name] = round(fmean(gold(prompts=prompts, completions=completions, **columns)), ROUNDED)
        found["kl"] = round(fmean(first - second for first, second in zip(own, before, strict=True)), ROUNDED)
        found["tokens"] = round(fmean(len(tokens) for tokens in ids), 2)
        found["example"] = texts[0]
        return found


def as_message(prompt: Any, text: str) -> Any:
    """A completion in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


class Recorder(TrainingTimer):
    """Measures the time of training, saves checkpoints by wall time, and evaluates the policy between rollouts.

    Args:
        evaluate: measures a policy.
        steps_per_rollout: optimizer steps of a rollout.
        evaluate_every: rollouts between two evaluations.
        rollout_size: completions of a rollout.

    Attributes:
        evaluations: what was measured so far, the start first.
    """

    def __init__(
        self,
        evaluate: Callable[[torch.nn.Module], dict[str, Any]],
        *,
        steps_per_rollout: int,
        evaluate_every: int,
        rollout_size: int,
    ):
        super().__init__(clock="cpu", save_seconds=SAVE_SECONDS, every=steps_per_rollout)
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every
        self.rollout_size = rollout_size
        self.evaluations: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / EVALUATIONS_FILE
        if state.global_step > 0 and path.is_file():
            self.evaluations = json.loads(path.read_text(encoding="utf-8"))
        if not self.evaluations:
            self.add(0, kwargs["model"])
        self._resume_counting()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % (self.every * self.evaluate_every) == 0:
            self.add(state.global_step, kwargs["model"])
        self._resume_counting()

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            (folder / EVALUATIONS_FILE).write_text(json.dumps(self.evaluations), encoding="utf-8")
        self._resume_counting()

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        rollouts = -(-state.global_step // self.every)  # rounded up: a guard may have stopped within a rollout
        if rollouts > self.evaluations[-1]["rollouts"]:
            self.add(state.global_step, kwargs["model"])

    def add(self, step: int, model: torch.nn.Module) -> None:
        rollouts = -(-step // self.every)
        entry = {
            "rollouts": rollouts,
            "completions": rollouts * self.rollout_size,
            "cpu_seconds": round(self.own.cpu_seconds, 2),
        }
        self.evaluations.append(entry | self.evaluate(model))


# --- trainers --------------------------------------------------------------------------------------------------------


def train(setting: Setting, place: Place, seed: int, folder: Path) -> dict[str, Any]:
    """Trains with a setting, from its last checkpoint if it was stopped.

    Args:
        setting: trainer and options.
        place: the world.
        seed: seed of training.
        folder: folder of checkpoints.

    Returns:
        `evaluations`, `explained_variance` by rollout (PPO with a critic), `stopped` (what a guard said, or None),
        `cpu_seconds` with evaluations.
    """
    began = time.process_time()
    place = replace(place, rollouts=setting.rollouts or place.rollouts)
    heard = Lines()
    logging.getLogger("hf_rlhf_ext").addHandler(heard)
    set_seed(seed)
    evaluate = HeldoutEvaluation(place)
    make = ppo_trainer if setting.kind == "ppo" else trl_trainer
    trainer, recorder = make(setting, place, seed, folder, evaluate)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    logging.getLogger("hf_rlhf_ext").removeHandler(heard)
    stopped = None
    if trainer.state.global_step < trainer.state.max_steps:
        stopped = next((line for line in heard.lines if "stops" in line), "stopped before its last step")
        stopped = stopped.replace(f"{folder}/", "")  # the file is the same on every machine
    explained = [log["val/explained_variance"] for log in trainer.state.log_history if "val/explained_variance" in log]
    return {
        "evaluations": recorder.evaluations,
        "explained_variance": [round(value, ROUNDED) for value in explained],
        "stopped": stopped,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def common_options(place: Place, seed: int, folder: Path, steps_per_rollout: int) -> dict[str, Any]:
    """The options of all trainers. There is one log per rollout."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": place.bf16,
        "lr_scheduler_type": "constant",
        "max_steps": place.rollouts * steps_per_rollout,
        "max_completion_length": place.max_tokens,
        "temperature": place.temperature,
        "logging_steps": steps_per_rollout,
        "save_strategy": "steps",
        "save_steps": NEVER,  # the recorder saves by time
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def ppo_config(setting: Setting, place: Place, seed: int, folder: Path) -> PPOConfig:
    """The options of a run of PPO. Options of a setting come before those of the world."""
    options = place.ppo | setting.options
    if options.get("critic") == "none":
        options = {name: value for name, value in options.items() if name not in OF_CRITIC}
    warmup_rollouts = options.pop("critic_warmup_rollouts", 0)
    mini_batches = options.get("num_mini_batches", 1)
    steps = options["num_ppo_epochs"] * mini_batches
    if warmup_rollouts:
        options["critic_warmup_steps"] = warmup_rollouts * steps
    sizes = {"per_device_train_batch_size": place.rollout_size // mini_batches}
    return PPOConfig(
        **common_options(place, seed, folder, steps) | {"activation_checkpointing": False} | sizes | options
    )


def ppo_trainer(
    setting: Setting, place: Place, seed: int, folder: Path, evaluate: HeldoutEvaluation
) -> tuple[Trainer, Recorder]:
    args = ppo_config(setting, place, seed, folder)
    recorder = recorder_of(place, args.steps_per_rollout, evaluate)
    model, tokenizer = place.load()
    has_adapter = isinstance(model, PeftModel)
    trainer = PPOTrainer(
        model,
        str(place.reward_model) if place.reward_model is not None else place.reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in place.prompts]),
        processing_class=tokenizer,
        callbacks=[recorder],
        peft_config=None if has_adapter else place.lora,
    )
    return trainer, recorder


def trl_config(setting: Setting, place: Place, seed: int, folder: Path) -> GRPOConfig | RLOOConfig:
    """The options of a run of GRPO or RLOO."""
    kind = {"grpo": GRPOConfig, "rloo": RLOOConfig}[setting.kind]
    options = place.trl | setting.options
    parts = options.get("steps_per_generation", 1)
    steps = options["num_iterations"] * parts
    of_run = {
        "per_device_train_batch_size": place.rollout_size // parts,
        "steps_per_generation": parts,
        "activation_checkpointing": False,
    }
    return kind(**common_options(place, seed, folder, steps) | of_run | options)


def trl_trainer(
    setting: Setting, place: Place, seed: int, folder: Path, evaluate: HeldoutEvaluation
) -> tuple[Trainer, Recorder]:
    args = trl_config(setting, place, seed, folder)
    recorder = recorder_of(place, args.num_iterations * args.steps_per_generation, evaluate)
    model, tokenizer = place.load()
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, place.lora)
    data = data_for_trl(Dataset.from_list([{"prompt": row["prompt"]} for row in place.prompts]), tokenizer)
    check_prompt_tokens(data, place.prompts, tokenizer)
    trainer = {"grpo": _GRPO, "rloo": _RLOO}[setting.kind](
        model,
        reward_funcs=[place.reward],
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    return trainer, recorder


def recorder_of(place: Place, steps_per_rollout: int, evaluate: HeldoutEvaluation) -> Recorder:
    return Recorder(
        evaluate,
        steps_per_rollout=steps_per_rollout,
        evaluate_every=place.evaluate_every,
        rollout_size=place.rollout_size,
    )

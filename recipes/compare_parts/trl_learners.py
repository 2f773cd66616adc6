"""Trainings of `hf-rlhf compare` with TRL's trainers, which start from the adapter of another policy.

TRL copies the adapter of a `PeftModel` that it gets: the copy `ref` is the reference of the KL, and does not change.
Prompts, stop tokens and rewards are the same as those of this library's PPO.
"""

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase, Trainer, set_seed
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

from hf_rlhf_ext import load_policy
from hf_rlhf_ext.cli.finish import finish_run
from hf_rlhf_ext.cli.lineage import lineage_of
from hf_rlhf_ext.cli.progress import show_progress
from hf_rlhf_ext.cli.stage_options import model_options, warmup_steps
from hf_rlhf_ext.cli.stopping import open_run, stoppable, stopping_callback
from hf_rlhf_ext.data.prompt_form import PromptForm, form_of_model
from hf_rlhf_ext.data.text import encode_generation_prompt, without_start
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.reports.trainer_report import section_steps, trainer_card_options
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.modeling.adapters import save_adapter, saved_as_one_adapter
from hf_rlhf_ext.recipes.compare_parts.learners import (
    GENERATIONS,
    KL_COEF,
    MINI_BATCHES,
    PASSES,
    Learners,
    Place,
    Trained,
    finished,
)
from hf_rlhf_ext.recipes.compare_parts.records import Clock
from hf_rlhf_ext.recipes.compare_parts.snapshots import TrainingTimer
from hf_rlhf_ext.recipes.compare_parts.systems import SystemSpec, amount
from hf_rlhf_ext.recipes.pipeline_parts.amounts import ROLLOUT, batch_of, updates_of
from hf_rlhf_ext.recipes.rounds_parts.data import Row
from hf_rlhf_ext.training.loop import all_steps_are_done

Reward = Callable[..., list[float]]
KIND_OF_CARD = {"sft": "sft", "rejection_sampling": "sft", "dpo": "dpo", "grpo": "model", "rloo": "model"}
CHECKED_PROMPTS = 8
"""Number of prompts whose tokens are compared with those of this library."""


class _SavesTheAdapter:
    """Saves the trained adapter alone, and no card. The reference is copied again from the start when a run resumes."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run has a report of its own."""

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with saved_as_one_adapter(self.model):
            super()._save(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not all_steps_are_done(self):
            super()._run_epoch(*args, **kwargs)


class _DPO(_SavesTheAdapter, DPOTrainer):
    pass


class _GRPO(_SavesTheAdapter, GRPOTrainer):
    pass


class _RLOO(_SavesTheAdapter, RLOOTrainer):
    pass


class TRLLearners:
    """Trains with TRL's trainers. See `Learners`.

    Args:
        learners: options, clocks and folders.
    """

    def __init__(self, learners: Learners):
        self.learners = learners

    # ---- Options ----

    def dpo_options(self, spec: SystemSpec, place: Place, n_pairs: int) -> Any:
        """The options of DPO on so many pairs."""
        where = f"systems: {spec.name}"
        batch = amount(where, spec.training, "per_device_train_batch_size", batch_of(n_pairs))
        epochs = amount(where, spec.training, "num_train_epochs", 1)
        return self.learners.options(
            spec,
            place.policy,
            place.seed,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            learning_rate=self.learners.rate("dpo"),
            warmup_steps=warmup_steps(n_pairs, epochs, batch),
            max_length=None,
            logging_steps=10,
        )

    def online_options(self, spec: SystemSpec, place: Place, n_prompts: int) -> Any:
        """The options of GRPO or RLOO on so many prompts: as many completions and steps as PPO has."""
        given = spec.training
        number = partial(amount, f"systems: {spec.name}", given)
        per_prompt = number("num_generations", GENERATIONS)
        parts = number("steps_per_generation", MINI_BATCHES)
        batch = number("per_device_train_batch_size", max(ROLLOUT // parts, 1))
        rollout = batch * parts
        if given.get("generation_batch_size") is not None:
            rollout = number("generation_batch_size", rollout)
        steps_per_rollout = number("num_iterations", PASSES) * (rollout // batch)
        defaults: dict[str, Any] = {
            "num_generations": per_prompt,
            "per_device_train_batch_size": batch,
            "num_iterations": PASSES,
            "learning_rate": self.learners.rate(spec.kind),
            "beta": KL_COEF,
            "temperature": self.learners.args.temperature,
            "max_completion_length": self.learners.args.max_completion_length,
            "logging_steps": steps_per_rollout,
        }
        if given.get("generation_batch_size") is None:
            defaults["steps_per_generation"] = parts
        if "num_train_epochs" not in given:
            defaults["max_steps"] = updates_of(n_prompts, max(rollout // per_prompt, 1)) * steps_per_rollout
        return self.learners.options(spec, place.policy, place.seed, **defaults)

    # ---- Training ----

    def sft(self, spec: SystemSpec, start: str, rows: Sequence[Row], place: Place) -> Trained:
        """Trains the adapter `start` further on demonstrations."""
        args = self.learners.sft_options(spec, place.policy, place.seed, len(rows))

        def make(model: PeftModel, tokenizer: PreTrainedTokenizerBase, callbacks: list) -> Trainer:
            data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
            data = data_for_trl(data, tokenizer)
            return PublishingSFTTrainer(
                model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
            )

        timer, _ = self._train(spec, start, args, make, place, ("demonstrations", rows))
        return finished(timer, place, args, {"demonstrations": len(rows)})

    def dpo(self, spec: SystemSpec, start: str, pairs: Sequence[Row], place: Place) -> Trained:
        """Trains the adapter `start` further by DPO; the reference is `start`."""
        if not pairs:
            raise UserError("comparisons: every judgment is a tie, and DPO needs decided pairs: judge more prompts.")
        args = self.dpo_options(spec, place, len(pairs))

        def make(model: PeftModel, tokenizer: PreTrainedTokenizerBase, callbacks: list) -> Trainer:
            data = data_for_trl(Dataset.from_list(list(pairs)), tokenizer)
            return _DPO(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)

        timer, measured = self._train(spec, start, args, make, place, ("comparisons", pairs))
        return finished(timer, place, args, {"beta": args.beta, "pairs": len(pairs)}, measured=measured)

    def online(self, spec: SystemSpec, start: str, reward: Reward, prompts: Sequence[Row], place: Place) -> Trained:
        """Trains the adapter `start` further by GRPO or RLOO; the reference of their KL is `start`."""
        args = self.online_options(spec, place, len(prompts))
        steps_per_rollout = args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps

        def make(model: PeftModel, tokenizer: PreTrainedTokenizerBase, callbacks: list) -> Trainer:
            data = data_for_trl(Dataset.from_list([{"prompt": row["prompt"]} for row in prompts]), tokenizer)
            check_prompt_tokens(data, prompts, tokenizer)
            kind = {"grpo": _GRPO, "rloo": _RLOO}[spec.kind]
            return kind(
                model,
                reward_funcs=[named(reward)],
                args=args,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=callbacks,
            )

        steps_per_rollout = max(steps_per_rollout, 1)
        timer, measured = self._train(spec, start, args, make, place, ("prompts", prompts), every=steps_per_rollout)
        more = {"beta": args.beta, "num_generations": args.num_generations, "rollout": args.generation_batch_size}
        more |= {"num_iterations": args.num_iterations, "temperature": args.temperature}
        rollouts = -(-measured["steps"] // steps_per_rollout)  # rounded up
        completions = rollouts * args.generation_batch_size
        return finished(timer, place, args, more, completions=completions, measured=measured)

    def _train(
        self,
        spec: SystemSpec,
        start: str,
        args: Any,
        make: Callable[[PeftModel, PreTrainedTokenizerBase, list], Trainer],
        place: Place,
        data: tuple[str, Sequence[Row]],
        *,
        every: int = 1,
    ) -> tuple[TrainingTimer, dict[str, Any]]:
        """Trains the adapter `start` with the trainer that `make` makes, and saves adapter, tokenizer and report.

        `data` is the role of the rows, and the rows.
        """
        timer = self.learners.timer(place, spec, every)
        measured = _train_further(spec.kind, start, args, make, self.learners, timer, data)
        gc.collect()  # a trainer is in a reference cycle: without it, its model stays in memory
        return timer, measured


@stoppable
def _train_further(
    kind: str,
    start: str,
    args: Any,
    make: Callable[[PeftModel, PreTrainedTokenizerBase, list], Trainer],
    learners: Learners,
    timer: TrainingTimer,
    data: tuple[str, Sequence[Row]],
) -> dict[str, Any]:
    """Trains an adapter further, from its last checkpoint if it was stopped. See `TRLLearners._train`."""
    model_args = model_options(learners.model_args, start)
    checkpoint = open_run(kind, args, (model_args, args), overwrite=args.resume_from_checkpoint is None)
    began = time.monotonic()
    set_seed(args.seed)
    model, tokenizer = load_policy(start, is_trainable=True, **model_args.base_options(args))
    if not isinstance(model, PeftModel):
        model = get_peft_model(
            model, model_args.peft_config("CAUSAL_LM")
        )  # the base, whose new adapter changes nothing
    role, rows = data
    prompt_form = PromptForm.of(rows[0]["prompt"], tokenizer).after(form_of_model(model))
    trainer = make(model, tokenizer, [timer, stopping_callback()])
    trainer.prompt_form = prompt_form  # for the card: TRL's trainers do not keep it
    show_progress(trainer, verbose=learners.verbose)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    save_adapter(trainer.model, "default", args.output_dir)  # without the reference
    tokenizer.save_pretrained(args.output_dir)
    prompt_form.save(args.output_dir)
    measured = {"loss": result.metrics["train_loss"], "steps": trainer.state.global_step, **section_steps(trainer)}
    card = trainer_card_options(trainer) | {
        "lineage": {"start": lineage_of(start)},
        "data": [{"role": role, "rows": len(rows)}],
    }
    seconds = time.monotonic() - began
    finish_run(args, KIND_OF_CARD[kind], {kind: measured}, (model_args, args), seconds=seconds, card=card)
    return measured


# ---- The same prompts and rewards as for PPO ----


def data_for_trl(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows without BOS at the start of prompts of text, which TRL's trainers add themselves."""
    if not isinstance(rows[0]["prompt"], str):
        return rows
    columns = rows.to_dict()
    columns["prompt"] = [without_start(tokenizer, text) for text in columns["prompt"]]
    return Dataset.from_dict(columns)


def check_prompt_tokens(data: Dataset, prompts: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` if TRL's prompts have other tokens than those that all systems are asked with."""
    for row, prompt in zip(list(data.select(range(min(CHECKED_PROMPTS, len(data))))), prompts, strict=False):
        if isinstance(row["prompt"], str):
            ids = tokenizer(row["prompt"])["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        if list(ids) != encode_generation_prompt(tokenizer, prompt["prompt"]):
            raise UserError(
                "model_name_or_path: TRL's GRPO and RLOO read prompts with other tokens than PPO does with this "
                "tokenizer, so they would not be asked the same: leave grpo and rloo out."
            )


def named(reward: Reward) -> Reward:
    """The reward as TRL calls it: with more columns, which it does not get, and under a name for the log."""

    def reward_of_training(prompts: list, completions: list, **columns: Any) -> list[float]:
        with torch.no_grad():
            return reward(prompts, completions)

    return reward_of_training


def with_sampling(trained: Trained, sampling: Clock, completions: int) -> Trained:
    """What a training left, with the time and the completions of the sampling before it."""
    snapshots = []
    for snapshot in trained.snapshots:
        snapshots.append(type(snapshot)(snapshot.step, snapshot.own + sampling, snapshot.location))
    own = trained.own + sampling
    return Trained(own, tuple(snapshots), completions, trained.settings, trained.measured)

"""`PPOTrainer`: PPO with a KL penalty on `transformers.Trainer`'s own loop.

The trainer is the only place that changes state and the only one that decides. Every other object computes and returns:
`Roles` score tokens, a `RolloutEngine` samples, `RewardFunctions` judge, an `ExperienceMaker` makes a rollout of these,
guards give verdicts. The loop, from top to bottom: `training_step` → `_prepare_inputs` → `_next_rollout`, then
`compute_loss` for each role, then `_finish_step`.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from ..checkpointing import resolve_checkpoint
from ..compat import BaseTrainer
from ..errors import UserError
from ..modeling.adapters import adapters_in_autocast_dtype, autocast_dtype
from ..modeling.logprobs import completion_hidden_states, scatter_to_mask
from ..modeling.stack import AdapterStack
from ..publishing import new_publisher, require_publisher
from .assembly import assemble_roles, prepare_inputs
from .batching import budget_chunks
from .callbacks import CompletionTables, HealthWarnings, PPOCallback, SaveOnSignal
from .checkpoints import (
    checkpoint_name,
    is_usable,
    mark_incomplete,
    register_callbacks,
    rotate,
    without_rotation,
)
from .config import PPOConfig
from .engine import RolloutEngine, TransformersEngine, sampling_of
from .evaluation import EvaluatedCompletion, Evaluator, summarize
from .experience import ExperienceMaker, SamplingTools
from .guards import GradientGuard, KLGuard, Verdict, are_finite
from .kl import KL_ESTIMATORS, KLController
from .losses import masked_mean, policy_loss, value_loss
from .meter import Meter
from .optimizer import give_critic_its_groups, restore_optimizer, skip_step, sum_gradients, trained_parameters
from .prompts import Prompts, tick_dataloader
from .ptx import text_loss
from .ranks import Ranks
from .rewards import RewardFunc
from .rollout import MicroBatch, Rollout
from .state import NextRows, PPOState, read_state, steps_in_all

logger = logging.getLogger(__name__)


class PPOTrainer(BaseTrainer):
    """Proximal policy optimization with a KL penalty, as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155).

    Arguments are those of TRL's `GRPOTrainer` where both have them.

    Args:
        model: policy: a `PeftModel` or the path of an adapter (trained further; its frozen copy is the reference), or a
            base model or its path (with `peft_config`: a new adapter, the reference is the bare base).
        reward_funcs: a callable `f(prompts, completions, **columns) -> list[float]`, a reward model or its path, or a
            list of these, weighted by `args.reward_weights`.
        args: options; see `PPOConfig`.
        train_dataset: rows with a column `prompt` (text or messages); other columns go to the reward functions.
        eval_dataset: the same; completions are sampled for it with a fixed seed at every evaluation.
        processing_class: the tokenizer; loaded by the model's name if left out.
        reward_processing_classes: tokenizers of reward models.
        eval_reward_funcs: further rewards that only appear in evaluation, e.g. a gold or second reward.
        callbacks, optimizers: as in `transformers.Trainer`; a `PPOCallback` also hears of rollouts.
        peft_config: any PEFT configuration (LoRA, DoRA, rsLoRA …) for a base model.
        value_model: the critic for `critic="model"`: a causal LM, or a reward model whose score head it starts from.
        ptx_dataset: text for PPO-ptx, with `ptx_coef`: rows of `text`, of `prompt` and `completion`, or of `messages`.
        engine: what samples completions; `TransformersEngine` if left out.

    Attributes:
        roles: policy, reference and critic; `stack` is its `AdapterStack`, with reward where it shares the base.
        ppo: the run's `PPOState`; `kl_coef` (β as it is now), `updates` and `stop_reason` (why a guard ended the last
            `train`, in one line; None where none did) are read from it.
    """

    # `compute_loss` divides by the token count of the whole mini-batch itself.
    loss_is_scaled_for_ga = True
    card_kind = "policy"
    _tag_names = ["trl", "ppo", "rlhf", "hf_rlhf_ext"]
    _name = "PPO"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
        value_model: str | PreTrainedModel | None = None,
        ptx_dataset: Dataset | None = None,
        engine: RolloutEngine | None = None,
    ):
        args = args if args is not None else PPOConfig("ppo")

        # 1. Policy, tokenizer and data: what can be refused is refused before new weights are made.
        inputs = prepare_inputs(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=processing_class,
            peft_config=peft_config,
            ptx_dataset=ptx_dataset,
        )
        args = inputs.args  # a copy, with `max_steps`
        self._max_positions = inputs.max_positions
        self._ptx = inputs.ptx_texts

        # 2. Who computes what.
        set_seed(args.seed)  # new adapters are drawn before Trainer does it
        self.roles, self.rewards, self.eval_rewards = assemble_roles(
            inputs.model,
            args,
            reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes,
            eval_reward_funcs=eval_reward_funcs,
            peft_config=peft_config,
            value_model=value_model,
        )

        # 3. Trainer: loop, checkpoints, logs, callbacks.
        self.publisher = new_publisher()
        self._signal = SaveOnSignal()
        own_callbacks = [HealthWarnings(), CompletionTables(), self._signal]
        super().__init__(
            model=self.policy,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=inputs.tokenizer,
            callbacks=[*(callbacks or []), *own_callbacks],
            optimizers=optimizers,
        )
        self.ranks = Ranks(self.accelerator)
        self.meter = Meter(self.ranks)

        # 4. What makes and judges rollouts.
        engine = engine or TransformersEngine(merge=args.merge_for_generation, autocast=autocast_dtype(args))
        sampling = sampling_of(args, inputs.tokenizer, self.policy)
        self.tools = SamplingTools(self.roles, engine, inputs.tokenizer, sampling, args, self.ranks)
        self.experience = ExperienceMaker(self.tools, self.rewards, inputs.prompts)
        self.evaluator = Evaluator(self.tools, self.rewards, self.eval_rewards)
        self.kl_controller = KLController(args.kl_target, args.kl_horizon)
        self.kl_guard = KLGuard(args.max_kl, args.max_kl_action)
        self.gradient_guard = GradientGuard(args.max_skipped_steps)

        # 5. The state that only this class changes.
        self.ppo = PPOState(kl_coef=args.kl_coef)
        if not self.ranks.alone:
            # Each process samples completions of its own; their weights were drawn from one seed above.
            set_seed(args.seed + self.ranks.index)
        self._move_frozen_models()

    def _move_frozen_models(self) -> None:
        """Moves what Trainer does not see: a reference and reward models of their own."""
        reference = self.stack.roles["reference"].model
        if reference is not None:
            reference.to(self.ranks.device)
        self.rewards.to(self.ranks.device)
        if self.eval_rewards is not None:
            self.eval_rewards.to(self.ranks.device)

    # ---- What others read ----

    @property
    def stack(self) -> AdapterStack:
        """The `AdapterStack` with the roles policy, reference, value, and reward where it shares the base."""
        return self.roles.stack

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The model without wrappers."""
        return self.roles.policy

    @property
    def critic(self) -> str:
        """Kind of critic: adapter, head or model."""
        return self.roles.critic

    @property
    def value_head(self) -> nn.Module:
        """The critic's scalar head."""
        return self.roles.value_head

    @property
    def kl_coef(self) -> float:
        """β as it is now, reward per nat."""
        return self.ppo.kl_coef

    @property
    def updates(self) -> int:
        """Rollouts that the policy has been trained on, the one in use included."""
        return self.ppo.updates

    @property
    def stop_reason(self) -> str | None:
        """Why a guard ended the last `train`, in one line; None where none did."""
        return self.ppo.stop_reason

    @property
    def stopped_by(self) -> str | None:
        """The name of `stop_reason` in version 0.1.0."""
        logger.warning("PPOTrainer.stopped_by is called stop_reason now.")
        return self.ppo.stop_reason

    # ---- The loop: Trainer's, with a rollout in front of every `steps_per_rollout` optimizer steps ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Trains; `resume_from_checkpoint=True` takes the last checkpoint that was written completely."""
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self.ppo.stop_reason is not None:  # by an earlier call, whose rollout is not to be trained on
            self.ppo.stop_reason = None
            self.ppo.leave_rollout(self.args)
        self.ppo.skipped_in_a_row = 0
        with self._signal.listening():
            return super().train(checkpoint, **kwargs)

    def get_train_dataloader(self):
        """Batches that only count micro-steps: the rollouts are the data."""
        return self.accelerator.prepare(tick_dataloader(self.args, self.args.world_size))

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        """Gradients of one micro-batch: one role after the other, in parts of a token budget."""
        self.policy.train()
        # No autocast out here: the rollout's forwards would leave their casts of the weights to the training one.
        with adapters_in_autocast_dtype(self.policy, enabled=self.args.bf16 or self.args.fp16):
            next_rows = self._prepare_inputs(inputs)
            if self.ppo.stop_reason is not None:
                skip_step(trained_parameters(self.optimizer), self.accelerator)
                return torch.zeros((), device=self.ranks.device)
            loss = self._add_gradients(next_rows)
            if self.accelerator.sync_gradients:  # the last micro-batch of an optimizer step
                loss = loss + self._add_ptx_gradients()
                self._finish_step()
        return loss * self.ranks.count  # Trainer averages what are shares here

    def _prepare_inputs(self, inputs: dict[str, Any]) -> NextRows:
        """Rows of the next micro-batch of the rollout, which is made anew when the last one is used up.

        `inputs` is a tick: it only counts.
        """
        if self.ppo.step_in_rollout == steps_in_all(self.args):
            self.ppo.rollout_index += 1
            self.ppo.step_in_rollout = 0
        if self.ppo.step_in_rollout == 0:
            self.ppo.rollout = self._next_rollout()
        return self.ppo.next_micro_batch(self.args, self.ranks)

    def _next_rollout(self) -> Rollout:
        """A rollout that may be trained on; goes back and samples again where the KL guard says so."""
        self._go_back_from_broken_weights()
        while True:
            rollout = self._make_rollout()
            metrics = {name: float(value) for name, value in rollout.metrics.items()}
            self._tell_callbacks_of(rollout, metrics)
            verdict = self.kl_guard.judge(
                metrics,
                kl_coef=self.ppo.kl_coef,
                rollbacks=self.ppo.rollbacks,
                checkpoint=self._checkpoint_to_go_back_to(),
            )
            if verdict.is_good:
                # The newest checkpoint has the weights of this rollout: they are good.
                self.ppo.good_checkpoint = self.ppo.new_checkpoint or self.ppo.good_checkpoint
                return rollout
            self._act_on(verdict)
            if verdict.action != "resample":
                return rollout
            self.ppo.rollout_index += 1  # the next one has prompts of its own

    def _make_rollout(self) -> Rollout:
        """Samples and scores with the weights of now; β and the reward moments go on from what came out."""
        rollout = self.experience.make(self.ppo.rollout_index, self.ppo.kl_coef, self.ppo.moments, self.state)
        self.ppo.moments = rollout.moments
        for name, value in [*rollout.logged, *rollout.metrics.items()]:
            self.meter.observe(name, value)
        if self.kl_controller.target is not None:
            kl = float(rollout.metrics["objective/kl"])
            self.ppo.kl_coef = self.kl_controller.next(self.ppo.kl_coef, kl, len(rollout.completion_lengths))
        return rollout

    def _tell_callbacks_of(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """`on_rollout` of every `PPOCallback`, with what is known of the rollout before only now."""
        previous = {}
        if self.ppo.clip_weight:
            (clip_fraction,) = self.ranks.sum_of(self.ppo.clip_fraction)  # each process has its share
            previous["policy/clipfrac_avg"] = clip_fraction / self.ppo.clip_weight
        self.ppo.clip_fraction = 0.0
        self.ppo.clip_weight = 0.0
        for callback in self._ppo_callbacks():
            callback.on_rollout(
                self.args,
                self.state,
                self.control,
                metrics=metrics,
                rollout_index=self.ppo.rollout_index,
                previous=previous,
                completions=rollout.completions,
                callbacks=self.callback_handler.callbacks,
            )

    def _act_on(self, verdict: Verdict) -> None:
        """Does what the KL guard decided about a rollout above the ceiling."""
        self.ppo.new_checkpoint = None  # its weights are those above the ceiling
        self.ppo.kl_coef = verdict.kl_coef
        if verdict.restore is not None:
            self._restore(verdict.restore)
        if verdict.action == "stop":
            self._halt(verdict.message)
            return
        if verdict.action == "resample":
            self.ppo.rollbacks += 1
        self._warn(verdict.message)

    def _add_gradients(self, next_rows: NextRows) -> Tensor:
        """Forward and backward passes of a micro-batch; returns this process's share of the loss."""
        total = torch.zeros((), device=self.ranks.device)
        parts = self._parts(next_rows.rows)
        share = 1 / (len(parts) * self.args.gradient_accumulation_steps)
        for rows in parts:
            part = self.ppo.rollout.select(rows, minibatch_tokens=next_rows.minibatch_tokens, share=share)
            for role in self.roles.trained:
                # A role's backward pass comes before the next role is switched on: with gradient checkpointing it
                # computes the adapter again.
                with self.roles.activate(role) as module:
                    loss = self.compute_loss(module, part, role=role)
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def _parts(self, rows: Tensor) -> list[Tensor]:
        """The rows of a micro-batch in parts that `max_tokens_per_batch` allows."""
        lengths = self.ppo.rollout.sequences.lengths[rows].tolist()
        chunks = budget_chunks(lengths, max_rows=len(lengths), max_tokens=self.args.max_tokens_per_batch)
        return [rows[torch.tensor(chunk, device=rows.device)] for chunk in chunks]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
        *,
        role: str = "policy",
    ) -> Tensor:
        """One micro-batch's share of a role's loss over the mini-batch."""
        sequences = inputs.sequences
        mask = inputs.mask
        with self.roles.mixed_precision():
            hidden = completion_hidden_states(model, model, sequences.input_ids, sequences.prompt_lengths, mask)
            loss = torch.zeros((), device=mask.device)
            if role == "value" or self.critic == "head":
                values = scatter_to_mask(self.roles.values(hidden), mask)
                loss = loss + self.args.vf_coef * self._value_loss(values, inputs)
            if role == "value":
                return loss
            logprobs, entropies = self.roles.logprobs("policy", hidden, sequences.targets())
            logprobs = scatter_to_mask(logprobs, mask)
            entropies = scatter_to_mask(entropies, mask)

        surrogate = self._surrogate_loss(logprobs, inputs)
        entropy = masked_mean(entropies, mask, inputs.minibatch_tokens)
        self.meter.add("policy/entropy_avg", entropy, inputs.share)
        loss = loss + surrogate - self.args.entropy_coef * entropy
        if self.args.kl_placement == "loss" and self.ppo.kl_coef:
            token_kl = KL_ESTIMATORS[self.args.estimator](logprobs, inputs.ref_logprobs)
            kl = masked_mean(token_kl, mask, inputs.minibatch_tokens)
            self.meter.add("policy/kl_loss", kl, inputs.share)
            loss = loss + self.ppo.kl_coef * kl
        return loss

    def _surrogate_loss(self, logprobs: Tensor, inputs: MicroBatch) -> Tensor:
        loss, stats = policy_loss(
            logprobs,
            inputs.old_logprobs,
            inputs.advantages,
            inputs.mask,
            clip_range=self.args.clip_range,
            denominator=inputs.minibatch_tokens,
            weights=inputs.sampling_weights,
        )
        # Each is a share of the mini-batch's mean.
        self.meter.add("loss/policy_avg", loss, inputs.share)
        self.meter.add("val/ratio", stats["ratio"], inputs.share)
        self.meter.add("policy/clipfrac_avg", stats["clipfrac"], inputs.share)
        self.meter.add("policy/approxkl_avg", stats["approxkl"], inputs.share)
        self.ppo.clip_fraction = self.ppo.clip_fraction + stats["clipfrac"]
        self.ppo.clip_weight += inputs.share
        if self.args.early_stop_kl is not None:
            self.ppo.approx_kl += float(stats["approxkl"])
        return loss

    def _value_loss(self, values: Tensor, inputs: MicroBatch) -> Tensor:
        loss, clip_fraction = value_loss(
            values,
            inputs.values,
            inputs.returns,
            inputs.mask,
            clip_range=self.args.value_clip_range,
            denominator=inputs.minibatch_tokens,
        )
        self.meter.add("loss/value_avg", loss, inputs.share)
        self.meter.add("val/clipfrac_avg", clip_fraction, inputs.share)
        return loss

    def _add_ptx_gradients(self) -> Tensor:
        """PPO-ptx: backward of γ times the mean cross-entropy of this step's texts (nats per token)."""
        total = torch.zeros((), device=self.ranks.device)
        for batch in self._ptx.batches(self.state.global_step, self.args, self.ranks):
            sequences = batch.sequences
            with self.roles.activate("policy") as model, self.roles.mixed_precision():
                hidden = completion_hidden_states(
                    model, model, sequences.input_ids, sequences.prompt_lengths, sequences.mask
                )
                loss = text_loss(self.roles.text_logprobs(hidden, sequences.targets()), batch.n_tokens)
                self.accelerator.backward(self.args.ptx_coef * loss)
            self.meter.add("loss/ptx", loss, batch.share)
            total += self.args.ptx_coef * loss.detach()
        return total

    def _finish_step(self) -> None:
        """After the last backward pass of an optimizer step: judges the gradients, and may leave the rollout."""
        approx_kl, signals = self.ranks.sum_of(self.ppo.approx_kl, self._signal.received)
        self.ppo.approx_kl = 0.0
        self._signal.agree(bool(signals))

        parameters = trained_parameters(self.optimizer)
        sum_gradients(parameters, self.ranks)
        # Summed gradients are the same on all processes, and so is the verdict.
        finite = are_finite(parameter.grad for parameter in parameters if parameter.grad is not None)
        self.meter.observe("guards/skipped_steps", 0.0 if finite else 1.0)
        scaler = self.accelerator.scaler
        verdict = self.gradient_guard.judge(
            finite,
            in_a_row=self.ppo.skipped_in_a_row,
            loss_scale=None if finite or scaler is None else scaler.get_scale(),
        )
        self.ppo.skipped_in_a_row = verdict.in_a_row
        if verdict.skip:
            skip_step(parameters, self.accelerator)
        if verdict.stop_reason is not None:
            self._halt(verdict.stop_reason)
        elif verdict.warning:
            self._warn(verdict.warning)

        if self.args.early_stop_kl is not None:
            moved_too_far = approx_kl > self.args.early_stop_kl
            self.meter.observe("policy/stopped_early", float(moved_too_far))
            if moved_too_far:
                self.ppo.leave_rollout(self.args)

    # ---- Going back, stopping, saying ----

    def _go_back_from_broken_weights(self) -> None:
        """Weights that are not finite cannot sample: back to the last good checkpoint, and no further."""
        if self.roles.are_finite():
            return
        checkpoint = self._checkpoint_to_go_back_to()
        if checkpoint is None:
            raise UserError(
                f"step {self.state.global_step}: the policy's weights are not finite, and there is no checkpoint to go "
                "back to: lower learning_rate, and set save_strategy='steps'."
            )
        self._restore(checkpoint)
        self._halt(f"weights are not finite, those of {checkpoint.name} are back: lower learning_rate")

    def _checkpoint_to_go_back_to(self) -> Path | None:
        """The last checkpoint whose policy kept below the ceiling in the rollout that followed, while it exists."""
        if self.ppo.good_checkpoint is None:
            return None
        folder = Path(self.args.output_dir) / self.ppo.good_checkpoint
        return folder if is_usable(folder) else None

    def _restore(self, checkpoint: Path) -> None:
        """Weights and optimizer of a checkpoint; counters, random states and the schedule go on from where they are."""
        self.roles.load(checkpoint)
        saved = checkpoint / "optimizer.pt"
        if saved.is_file():
            restore_optimizer(self.optimizer, torch.load(saved, map_location="cpu", weights_only=True))

    def _halt(self, reason: str) -> None:
        """Ends training: from here on no step changes a weight, is saved, or counts as the best."""
        if self.ppo.stop_reason is None:
            self.ppo.stop_reason = reason
            self._warn(f"training stops: {reason}")
        self.control.should_training_stop = True

    def _warn(self, line: str) -> None:
        if self.is_world_process_zero():
            logger.warning("step %d, rollout %d: %s.", self.state.global_step, self.ppo.rollout_index, line)

    def _ppo_callbacks(self) -> list[PPOCallback]:
        # Asked anew each time: resuming replaces callbacks by restored ones.
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, PPOCallback)]

    # ---- Optimizer: the critic has its own learning rate and its own clipping ----

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the critic's weights in groups of their own; the value head comes last."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.value_learning_rate
        give_critic_its_groups(optimizer, self.roles, self.args.learning_rate if rate is None else rate)
        return optimizer

    def _clip_grad_norm(self, model) -> Tensor:
        """Clips policy and critic each by itself: together, a large critic gradient would starve the policy."""
        critic = self.roles.parameters_of_critic()
        policy = [parameter for parameter in self.policy.parameters() if parameter not in set(critic)]
        norm = self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)  # also unscales fp16 gradients
        self.meter.observe("value_grad_norm", nn.utils.clip_grad_norm_(critic, self.args.max_grad_norm))
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # inputs are ticks: there is nothing honest to count

    # ---- Logging and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log to a training log; evaluation and the end's summary carry their own."""
        if "loss" in logs:
            logs |= self.meter.means()
            logs["lr_value"] = self.optimizer.param_groups[-1]["lr"]
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Samples a completion for each prompt and returns means of rewards, KL and length (`eval_…`).

        The completions go as a table to the trackers of `report_to`, and with `log_completions` some to the screen.
        The random state of training is untouched: a run with evaluation gives the weights of one without.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise UserError("evaluation needs an eval_dataset: pass one to the trainer, or set eval_strategy='no'.")
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics

        start = time.monotonic()
        rows = self.sample_and_score(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summarize(rows).items()}
        exact_kl = self.evaluator.exact_kl(rows)
        if exact_kl is not None:
            metrics[f"{metric_key_prefix}_objective/kl_exact"] = exact_kl
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - start, 2)
        self.log(metrics)
        for callback in self._ppo_callbacks():
            callback.on_eval_completions(
                self.args,
                self.state,
                self.control,
                rows=rows,
                title=f"{metric_key_prefix}_completions",
                callbacks=self.callback_handler.callbacks,
            )
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sample_and_score(self, dataset: Dataset, *, seed: int | None = None) -> list[EvaluatedCompletion]:
        """Completions of the policy as it is now, with the rewards of `reward_funcs` and `eval_reward_funcs`.

        Args:
            dataset: rows with `prompt`, and the columns that the reward functions take.
            seed: of the sampling; `args.seed` if None, so that two policies are compared on common random numbers.
        """
        prompts = Prompts(dataset, self.processing_class, self.args, split="eval", max_positions=self._max_positions)
        return self.evaluator.sample_and_score(prompts, self.state, seed=seed)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Whether this is the best model so far; never after a guard has stopped the run or above `max_kl`."""
        chosen = self.args.metric_for_best_model
        if chosen is None:
            return False
        chosen = f"eval_{chosen.removeprefix('eval_')}"
        if chosen not in metrics:
            raise UserError(f"metric_for_best_model: evaluation has no {chosen!r}: take one of {', '.join(metrics)}.")
        problem = self.ppo.stop_reason
        if problem is None:
            problem = self._out_of_bounds(metrics, chosen)
        if problem is not None:
            self._warn(f"not a candidate for the best model: {problem}")
            return False
        return super()._determine_best_metric(metrics, trial)

    def _out_of_bounds(self, metrics: dict[str, float], chosen: str) -> str | None:
        """Which metric forbids that this is the best model, in words; None where none does."""
        for name, value in metrics.items():
            if name.endswith("objective/kl") and self.kl_guard.is_exceeded(value):
                return f"{name} is out of bounds"
        if not math.isfinite(metrics[chosen]):
            return f"{chosen} is out of bounds"
        return None

    # ---- Checkpoints ----

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.ppo.stop_reason is not None:
            self.control.should_save = False  # it would hold a rollout that no resumed run may train on
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's, but rotation is ours: beside the newest and the best, the last good one is kept for guards."""
        output_dir = Path(self.args.output_dir)
        newest = checkpoint_name(self.state.global_step)
        if self.args.should_save:
            mark_incomplete(output_dir / newest)
        register_callbacks(self.state, self.callback_handler.callbacks)
        with without_rotation(self.args):
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {newest, best and Path(best).name, self.ppo.good_checkpoint}
            rotate(output_dir, self.args.save_total_limit, keep)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Policy, critic and tokenizer; unlike Trainer's, no other adapter and no pickle of the arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.roles.save(folder, state_dict)
        self.processing_class.save_pretrained(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Called for checkpoints only, on every process, before `trainer_state.json` makes the checkpoint complete."""
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        self.ppo.new_checkpoint = folder.name  # on every process: all must judge alike
        if self.args.should_save:
            self.roles.save_reference(folder)
            self.ppo.save(folder, self.args, self.ranks, critic=self.critic)
        self.ranks.wait()  # a checkpoint is complete with the random state of all

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        self.ppo = PPOState.load(folder, self.args, self.ranks, critic=self.critic)
        self.meter.reset()  # of this process's own training so far
        self.roles.load(folder)
        self.roles.load_reference(folder)
        saved = read_state(folder)
        # Trainer restores callbacks from `trainer_state.json` after this hook; what version 0.1.0 saved is not there.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HealthWarnings):
                callback.take_over(saved["guards"])
        if saved["kl_coef_option"] != self.args.kl_coef:
            was = f"{saved['kl_coef_option']:g} (adapted to {self.ppo.kl_coef:g})"
            self._warn(f"kl_coef was {was} in {folder.name}: it is {self.args.kl_coef:g} from here on, as set now")
            self.ppo.kl_coef = self.args.kl_coef

    def _load_best_model(self) -> None:
        self.roles.load(Path(self.state.best_model_checkpoint))

    # ---- The Hub, through the publisher that the package's root sets ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the right to write and makes the repository, before training."""
        publisher = require_publisher(self.publisher)
        self.hub_model_id = publisher.check_access(self, token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Saves and pushes `output_dir` with its card; returns the commit's URL, None where it failed."""
        publisher = require_publisher(self.publisher)
        return publisher.push_run(self, commit_message, token=token, revision=revision, private=private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        require_publisher(self.publisher).push_checkpoint(self, checkpoint_folder)

    def _finish_current_push(self) -> None:
        if self.publisher is not None:
            self.publisher.finish()

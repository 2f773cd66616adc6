"""`PPOTrainer`: PPO with a KL penalty, in the training loop of `transformers.Trainer`.

Only the trainer changes state. All other objects compute and return a result: `Roles` score tokens, a `RolloutEngine`
samples completions, `RewardFunctions` score completions, an `ExperienceMaker` combines them into a rollout, and guards
return verdicts. One step of the loop: `training_step` → `_prepare_inputs` → `_next_rollout`, then `compute_loss` for
each role, then `_finish_step`.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import PredictionOutput, TrainOutput

from ..checkpointing import resolve_checkpoint
from ..compat import BaseTrainer
from ..data.given import as_dataset, as_datasets
from ..data.origin import origins_of
from ..data.prompt_form import remember_form
from ..errors import UserError
from ..modeling.adapter_config import check_same_adapter
from ..modeling.adapters import adapters_in_autocast_dtype, autocast_dtype
from ..modeling.base_record import BaseRecord, check_same_base
from ..modeling.embeddings import n_rows
from ..modeling.logprobs import scatter_to_mask
from ..modeling.probing import unchanged_random_state
from ..modeling.shards import own_part, whole
from ..modeling.stack import AdapterStack
from ..modeling.takeover import Hold
from ..publishing import (
    create_model_card,
    finish_current_push,
    new_publisher,
    push_from_checkpoint,
    push_to_hub,
    require_publisher,
    save_with_report,
)
from ..training.arguments import check_arguments
from ..training.auto_batch import TOKENS, OptimizerStep, sizes_of_run
from ..training.bars import no_bars
from ..training.best_model import check_evaluated_metric, check_metric_name
from ..training.engines import check_active_engine, refuse_loading_in_one_process
from ..training.leaving import PartLeft, RandomState
from ..training.loop import end_of_training, forget_unscaled_gradients, log_last_steps
from ..training.memory_line import log_memory
from ..training.optimizers import (
    check_lists_of_schedule,
    made_by,
    plain_optimizer,
    use_evaluation_weights,
    use_training_weights,
)
from ..training.shown_table import show_table
from ..training.stopping import SaveOnSignal
from ..training.table import PPO_COLUMNS
from .assembly import Inputs, assemble_roles, prepare_inputs
from .callbacks import CompletionTables, HealthWarnings, PPOCallback
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
from .evaluation import METRIC_FAMILIES, EvaluatedCompletion, Evaluator, may_log_more, metric_names, summarize
from .experience import ExperienceMaker, SamplingTools
from .first_rollout import TrainedTokens, find_problem, is_start_the_reference, is_trained_as_scored
from .guards import GradientGuard, KLGuard, Verdict, are_finite
from .kl import KL_ESTIMATORS, KLController
from .losses import masked_mean, policy_loss, value_loss
from .meter import Meter
from .offload import Offload
from .optimizer import (
    check_warm_up,
    critic_learning_rate,
    give_critic_its_groups,
    has_critic_groups,
    skip_step,
    trained_parameters,
)
from .prompts import Prompts, tick_dataloader
from .ptx import text_loss, texts_per_step
from .ranks import Ranks
from .reference_file import needed_reference, remove_references
from .references import check_reference_answers, said_of_references
from .reward_calls import as_list, check_given
from .reward_spread import RewardSpread, said_of_rewards
from .rewards import RewardFunc, check_calls, check_columns
from .rollout import MicroBatch, Rollout
from .sharding import check_base, check_same_sharding, sharding_of
from .shared_prompts import choose_layouts
from .state import NextRows, PPOState, read_state, sizes_of, steps_in_all
from .stretch import Sizes, said_of_other_sizes, steps_after, stretch_after
from .trainer_options import ENGINES
from .warmup import warm_up_line

logger = logging.getLogger(__name__)


class PPOTrainer(BaseTrainer):
    """Proximal policy optimization with a KL penalty, as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155).

    The arguments have the names of TRL's `GRPOTrainer` where both trainers have them.

    Args:
        model: the policy. A `PeftModel`, or the path of an adapter, is trained further, and a frozen copy of it is the
            reference. A base model, or its path, gets a new adapter if `peft_config` is given, and the base is the
            reference; without `peft_config`, the whole model is trained, and a frozen copy of it is the reference.
        reward_funcs: a function `f(prompts, completions, **columns)` that returns a list with one number per
            completion, a reward model or its path or Hub id, or a list of these, weighted by `args.reward_weights`.
        args: options; `None` means `PPOConfig("ppo")`.
        train_dataset: dataset with a column `prompt`, as text or as messages. Its other columns are passed to the
            reward functions. Instead of a `Dataset`, all datasets may be lists of rows, a `pandas.DataFrame`, or a
            `torch.utils.data.Dataset` of rows.
        eval_dataset: a dataset of the same kind, or a dict of several. Every evaluation samples completions for it
            with a fixed seed.
        processing_class: the tokenizer; loaded with the model if left out.
        reward_processing_classes: tokenizers of the reward models; loaded with them if left out.
        eval_reward_funcs: further reward functions that only evaluation uses, such as a second reward model.
        callbacks: callbacks as in `transformers.Trainer`. A `PPOCallback` also gets rollouts and evaluated completions.
        optimizers: optimizer and learning-rate scheduler, as in `transformers.Trainer`. The weights of the critic are
            added to the optimizer.
        optimizer_cls_and_kwargs: an optimizer class and a dict of its arguments, as in `transformers.Trainer`.
        peft_config: PEFT configuration (LoRA, DoRA, rsLoRA, …) of a new adapter on a base model.
        value_model: the model that the critic starts from with `critic="model"`, or its path or Hub id: a causal LM, or
            a reward model, whose score head is used too. An adapter is merged into its base.
        ptx_dataset: texts for PPO-ptx, with `ptx_coef`: rows with `text`, with `prompt` and `completion`, or with
            `messages`.
        engine: samples completions; `None` means `TransformersEngine`.

    Attributes:
        roles: policy, reference and critic.
        ppo: the state of the run.
        data_origins: where the rows of each dataset come from.
        prompt_form: whether the policy is trained on text or messages, and with which chat template.

    Raises:
        UserError: if an argument or an option is not usable; the message says how to fix it.
    """

    # `compute_loss` divides by the token count of the whole mini-batch itself.
    loss_is_scaled_for_ga = True
    card_kind = "policy"
    _tag_names = ["trl", "ppo", "rlhf", "hf_rlhf_ext"]
    _name = "PPO"

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
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
        value_model: str | Path | PreTrainedModel | None = None,
        ptx_dataset: Dataset | None = None,
        engine: RolloutEngine | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        args = args if args is not None else PPOConfig("ppo")
        if not isinstance(args, PPOConfig):
            raise UserError(f"args: got {type(args).__name__}: pass a PPOConfig.")
        check_arguments(args, eval_dataset, callbacks, optimizers, optimizer_cls_and_kwargs)
        refuse_loading_in_one_process(args)
        check_given(reward_funcs, args.reward_weights, "reward_funcs")
        if eval_reward_funcs is not None:
            check_given(eval_reward_funcs, None, "eval_reward_funcs")

        # 1. Policy, tokenizer and data, with all checks that do not need new weights.
        inputs = prepare_inputs(
            model, args, train_dataset, eval_dataset, ptx_dataset, tokenizer=processing_class, peft_config=peft_config
        )
        self._counts_epochs = args.max_steps <= 0
        args = inputs.args  # a copy, with `max_steps`
        check_reference_answers(args, inputs.train_dataset)
        self.data_origins = origins_of(inputs.train_dataset, inputs.eval_dataset, ptx=ptx_dataset)
        self._max_positions = inputs.max_positions
        self._ptx = inputs.ptx_texts
        memory = log_memory(
            inputs.model,
            "ppo",
            args,
            peft_config=peft_config,
            reward_funcs=as_list(reward_funcs) + as_list(eval_reward_funcs),
            value_model=value_model,
            prompt_tokens=int(inputs.prompts.lengths.max()),
        )

        # 2. Policy, reference, reward models and critic.
        set_seed(args.seed)  # new adapters are initialized before `Trainer` sets the seed
        self.roles, self.rewards, self.eval_rewards = assemble_roles(
            inputs.model,
            args,
            reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes,
            eval_reward_funcs=eval_reward_funcs,
            peft_config=peft_config,
            value_model=value_model,
            tokenizer=inputs.tokenizer,
        )
        check_base(args, self.policy)

        check_columns(self.rewards, self.eval_rewards, inputs.datasets)
        logger.info("reward = %s", self.rewards.formula)
        if args.reward_shaping == "par":
            logger.info("reward_shaping=par compares it with reference answers: %s", said_of_references(args))

        # 3. `Trainer`: loop, checkpoints, logs, callbacks.
        self.publisher = new_publisher()
        given = list(callbacks or [])
        # A recipe brings its own, which also handles Ctrl-C.
        self._signal = next((callback for callback in given if isinstance(callback, SaveOnSignal)), SaveOnSignal())
        given = [callback for callback in given if callback is not self._signal]
        super().__init__(
            model=self.policy,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=inputs.train_dataset,
            eval_dataset=inputs.eval_dataset,
            processing_class=inputs.tokenizer,
            callbacks=[*given, HealthWarnings(), RewardSpread(), CompletionTables(), self._signal],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        check_active_engine(args, self.accelerator, "PPOTrainer", ENGINES)
        show_table(self, PPO_COLUMNS)
        self.ranks = Ranks(self.accelerator)
        self.roles.sharding = sharding_of(self.accelerator, self.ranks, self.policy, self.stack.heads)
        self.meter = Meter(self.ranks)
        self.roles.sizes = sizes_of_run(args, self.accelerator, None if memory is None else memory.sizes)
        self._optimizer_step = OptimizerStep(self.roles.sizes, self.policy, self.ranks.device, self._counters)

        # 4. The objects that make and judge rollouts.
        self.tools = self._make_tools(engine, inputs)
        self.experience = ExperienceMaker(self.tools, self.rewards, inputs.prompts)
        self.evaluator = Evaluator(self.tools, self.rewards, self.eval_rewards)
        self.kl_controller = KLController(args.kl_target, args.kl_horizon)
        self.kl_guard = KLGuard(args.max_kl, args.max_kl_action)
        self.gradient_guard = GradientGuard(args.max_skipped_steps)

        # 5. The state that only this class changes.
        self.ppo = PPOState(kl_coef=args.kl_coef)
        if not self.ranks.alone:
            # From here on each process has its own seed, to sample other completions. New weights were drawn above.
            set_seed(args.seed + self.ranks.index)
        self._offload = Offload(args, self.ranks.device)
        self._move_frozen_models()
        for line in choose_layouts(self.stack, args, inputs.prompts, self.ranks.device):
            if self.is_world_process_zero():
                logger.warning("%s.", line)

        self._base_record = BaseRecord.of_model(self.policy, autocast_dtype(args))
        self.prompt_form = inputs.prompt_form
        remember_form(self.policy, self.prompt_form)

        # 6. Checks of what there is now.
        if self.optimizer is not None:  # that of the user
            self.create_optimizer()
        self._check_metric_name()
        self._starts_at_reference = is_start_the_reference(self.stack, new_adapter=peft_config is not None)
        self._hold = Hold(self.policy)

    def _make_tools(self, engine: RolloutEngine | None, inputs: Inputs) -> SamplingTools:
        """What samples and scores completions, with the engine of the user if there is one."""
        if engine is None:
            engine = TransformersEngine(merge=self.args.merge_for_generation, autocast=autocast_dtype(self.args))
        self.roles.sharding.join_engine(engine)
        sampling = sampling_of(self.args, inputs.tokenizer, self.policy)
        return SamplingTools(self.roles, engine, inputs.tokenizer, sampling, self.args, self.ranks)

    def _check_metric_name(self) -> None:
        """Refuses a `metric_for_best_model` that no evaluation can have."""
        functions_log = may_log_more(self.rewards, self.eval_rewards)
        check_metric_name(
            self.args,
            self.eval_dataset,
            metric_names(self.rewards, self.eval_rewards, self.args),
            may_exist=lambda name: functions_log and not name.startswith(METRIC_FAMILIES),
        )

    def _move_frozen_models(self) -> None:
        """Moves separate reference and reward models to the device, which `Trainer` does not do."""
        reference = self.stack.roles["reference"].model
        if reference is not None:
            reference.to(self.ranks.device)
        functions = [rewards for rewards in (self.rewards, self.eval_rewards) if rewards is not None]
        if self.args.offload_reward_model:
            self._offload.take_rewards(functions, self.policy)
        for rewards in functions:
            if not self.args.offload_reward_model:
                rewards.to(self.ranks.device, besides=self.policy)
            for scorer in rewards.scorers_on(self.policy):
                scorer.passes_of_all = self.roles.sharding.most
            for scorer in rewards.scorers():
                scorer.sizes = self.roles.sizes

    # ---- Properties ----

    @property
    def stack(self) -> AdapterStack:
        """The `AdapterStack` with the roles policy and reference, value if there is a critic, and a shared reward."""
        return self.roles.stack

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The policy without wrappers such as DDP."""
        return self.roles.policy

    @property
    def critic(self) -> str:
        """Kind of critic: `adapter`, `head`, `model` or `none`."""
        return self.roles.critic

    @property
    def value_head(self) -> nn.Module | None:
        """The scalar head of the critic; `None` without a critic."""
        return self.roles.value_head

    @property
    def kl_coef(self) -> float:
        """The current KL coefficient β, reward per nat."""
        return self.ppo.kl_coef

    @property
    def updates(self) -> int:
        """Number of rollouts that were trained on, including the current one. In a warm-up, only the critic was."""
        return self.ppo.updates

    @property
    def stop_reason(self) -> str | None:
        """Why a guard stopped the last `train`, in one line; `None` if none did."""
        return self.ppo.stop_reason

    @property
    def reward_warnings(self) -> list[str]:
        """What was said of rewards that do not differ between completions, one line each."""
        return said_of_rewards(self.callback_handler.callbacks)

    @property
    def stopped_by(self) -> str | None:
        """Deprecated: `stop_reason` under its name in version 0.1.0."""
        logger.warning("PPOTrainer.stopped_by is deprecated: use PPOTrainer.stop_reason.")
        return self.ppo.stop_reason

    # ---- The loop of `Trainer`, with a new rollout before every `steps_per_rollout` optimizer steps ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains the policy, and the critic if there is one.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last complete checkpoint in `output_dir`.
                `None` or `False` starts from the weights as they are, also after an earlier call that was interrupted:
                with a new rollout, and with the optimizer's state and the KL coefficient of that call.
            kwargs: further arguments of `Trainer.train`.

        Returns:
            The result of `Trainer.train`.

        Raises:
            UserError: if the checkpoint is not usable, or if a reward function returns something wrong.
            SystemExit: with status 143 after SIGTERM, once a checkpoint is saved.
        """
        self._hold.take()  # another trainer may have been made on this model since
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            adapter = self.stack.roles["policy"].adapter
            check_same_adapter(self.policy, adapter, Path(checkpoint), start=self.stack.start)
            check_same_base(self.policy, Path(checkpoint))
        # Nothing half done is left of an earlier call, which a guard, an error or Ctrl-C may have ended anywhere.
        self.ppo.begin_again(self.args, self.ranks)
        self._optimizer_step.forget()
        self.meter.reset()
        forget_unscaled_gradients(self.accelerator)
        with self._steps_of_run(checkpoint), end_of_training(self), self._signal.listening():
            try:
                return super().train(checkpoint, **kwargs)
            except PartLeft:  # an evaluation outside of the steps, as with `eval_on_start`
                self._warn("a signal has ended training in an evaluation, without a checkpoint")
                raise SystemExit(self._signal.status) from None

    def _steps_of_run(self, checkpoint: str | None) -> AbstractContextManager:
        """Inside the context, `max_steps` fits a run that goes on from a checkpoint with other batch sizes."""
        stretch = self.ppo.stretch
        sizes = sizes_of(self.args, self.ranks)
        if checkpoint is not None:
            stretch = stretch_after(Path(checkpoint), read_state(Path(checkpoint)), sizes)
        n_prompts = len(self.train_dataset)
        return steps_after(stretch, self.args, n_prompts, sizes, counts_epochs=self._counts_epochs)

    def get_train_dataloader(self):
        """Batches that only count micro-steps. The training data are the rollouts."""
        return self.accelerator.prepare(tick_dataloader(self.args, self.args.world_size))

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        """Computes the gradients of one micro-batch: one role after the other, in parts within the token budget."""
        try:
            return self._train_micro_batch(inputs)
        except PartLeft:  # a rollout at a signal, on all processes
            self._stop_before_rollout()
            raise SystemExit(self._signal.status) from None

    def _train_micro_batch(self, inputs: dict[str, Any]) -> Tensor:
        self.policy.train()
        use_training_weights(self.optimizer)
        self._offload.take_states(self.optimizer)  # those of a checkpoint are on the device after loading
        # No autocast here: it would keep the casts of the weights from the rollout for the training forward.
        with adapters_in_autocast_dtype(self.policy, enabled=self.args.bf16 or self.args.fp16):
            next_rows = self._prepare_inputs(inputs)
            if self.ppo.stop_reason is not None:
                skip_step(trained_parameters(self.optimizer), self.accelerator)
                return torch.zeros((), device=self.ranks.device)
            is_last = self.accelerator.sync_gradients  # the last micro-batch of an optimizer step
            loss = self._optimizer_step.run(partial(self._micro_step, next_rows, is_last), is_last=is_last)
            if is_last:
                self._finish_step()
        interval = self.args.torch_empty_cache_steps
        if interval is not None and self.state.global_step % interval == 0:
            clear_device_cache()
        return loss * self.ranks.count  # `Trainer` averages over processes, but these losses are shares of a sum

    def _micro_step(self, next_rows: NextRows, is_last: bool) -> Tensor:
        """Adds the gradients of a micro-batch, and with the last one those of PPO-ptx; returns the loss."""
        loss = self._add_gradients(next_rows)
        if is_last and not self._is_warm_up:
            loss = loss + self._add_ptx_gradients()
        return loss

    def _counters(self) -> Callable[[], None]:
        """Returns a function that sets what a micro-step changes besides gradients to what it is now."""
        restore_metrics = self.meter.snapshot()
        names = ("approx_kl", "clip_fraction", "clip_weight", "next_text")
        values = {name: getattr(self.ppo, name) for name in names}

        def restore() -> None:
            restore_metrics()
            for name, value in values.items():
                setattr(self.ppo, name, value)

        return restore

    def _prepare_inputs(self, inputs: dict[str, Any]) -> NextRows:
        """Returns the rows of the next micro-batch, and makes a new rollout if the last one is used up.

        `inputs` only counts micro-steps.
        """
        if self.ppo.step_in_rollout == steps_in_all(self.args):
            self.ppo.rollout_index += 1
            self.ppo.step_in_rollout = 0
        if self.ppo.step_in_rollout == 0:
            self.ppo.rollout = self._next_rollout()
        return self.ppo.next_micro_batch(self.args, self.ranks)

    def _next_rollout(self) -> Rollout:
        """Makes a rollout to train on. If the KL guard asks for it, goes back to a checkpoint and samples again."""
        self._go_back_from_broken_weights()
        while True:
            rollout = self._make_rollout()
            if self.ppo.rollout_index == 0 and self.args.check_first_rollout:
                self._check_first_rollout(rollout)
            metrics = {name: float(value) for name, value in rollout.metrics.items()}
            self._tell_callbacks_of(rollout, metrics)
            verdict = self.kl_guard.judge(
                metrics,
                kl_coef=self.ppo.kl_coef,
                rollbacks=self.ppo.rollbacks,
                checkpoint=self._checkpoint_to_go_back_to(),
            )
            if verdict.is_good:
                # The newest checkpoint has the weights that made this rollout, so it is good.
                self.ppo.good_checkpoint = self.ppo.new_checkpoint or self.ppo.good_checkpoint
                return rollout
            self._act_on(verdict)
            if verdict.action != "resample":
                return rollout
            self.ppo.rollout_index += 1  # the next rollout has other prompts
            if self.ppo.random_state is not None:
                self.ppo.random_state = RandomState.now(self.ranks.device)

    def _make_rollout(self) -> Rollout:
        """Makes a rollout with the current weights, and updates the KL coefficient and the running reward moments."""
        with no_bars(when=self._has_no_bars):
            first_prompt = self.ppo.first_prompt(self.args, self.ranks)
            rollout = self.experience.make(
                first_prompt,
                self.ppo.kl_coef,
                self.ppo.moments,
                self.state,
                completions_before=self.ppo.completions_before(self.args, self.ranks),
                critic_only=self._is_warm_up,
            )
        self._say_phase()
        self.ppo.moments = rollout.moments
        for name, value in rollout.logged:
            self.meter.observe(name, value)
        for name, value in rollout.metrics.items():
            if math.isnan(value):  # of this rollout only, such as the explained variance of returns that are all equal
                self.meter.leave_open(name)
            else:
                self.meter.observe(name, value)
        # In a warm-up the KL is not an answer to the coefficient, as the policy does not move.
        if self.kl_controller.target is not None and not self._is_warm_up:
            kl = float(rollout.metrics["objective/kl"])
            self.ppo.kl_coef = self.kl_controller.next(self.ppo.kl_coef, kl, len(rollout.completion_lengths))
        return rollout

    @property
    def _is_warm_up(self) -> bool:
        """Whether the current rollout trains the critic only, see `critic_warmup_steps`."""
        return self.ppo.is_warm_up(self.args)

    def _say_phase(self) -> None:
        """Logs a line where a warm-up of the critic begins, and one where it ends."""
        if self._is_warm_up and self.ppo.rollout_index == 0:
            self._warn(warm_up_line(self.args))
        if self.ppo.follows_warm_up(self.args):
            self._warn("the warm-up of the critic ends: from this rollout on, the policy is trained too")

    @torch.no_grad()
    def _check_first_rollout(self, rollout: Rollout) -> None:
        """Refuses a policy that is not the same model in sampling, scoring and training, see `first_rollout`."""
        trained = None
        if is_trained_as_scored(self.policy, self.args):
            trained = self._trained_tokens(rollout)
        problem = find_problem(rollout, self.tools, trained, starts_at_reference=self._starts_at_reference)
        if problem is not None:
            raise UserError(problem)

    def _trained_tokens(self, rollout: Rollout) -> TrainedTokens:
        """Log-probabilities of the first micro-batch of a rollout from the forward pass of training."""
        return self.roles.sizes.until_it_fits(lambda: self._tokens_of_first_part(rollout))

    def _tokens_of_first_part(self, rollout: Rollout) -> TrainedTokens:
        micro_batch = rollout.order[0][: self.args.per_device_train_batch_size * self.ranks.count]
        rows = self._parts(rollout, self.ranks.share(micro_batch, rollout.per_prompt), self._max_tokens)[0]
        sequences = rollout.sequences.select(rows)
        mask = sequences.mask
        device = self.ranks.device
        # Noise that the model may have in training mode must not change the random state of training.
        with (
            self._bounded("the check of the first rollout", rollout, rows),
            unchanged_random_state(device),
            self.roles.activate("policy") as model,
            self.roles.mixed_precision(),
            self.roles.sharding.inference(),
        ):
            hidden = self.roles.hidden_states("policy", model, sequences)
            logprobs, _ = self.roles.logprobs("policy", hidden, sequences.targets())
        return TrainedTokens(rows, scatter_to_mask(logprobs, mask), mask)

    def _tell_callbacks_of(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Calls `on_rollout` of every `PPOCallback`, also with metrics of training on the previous rollout."""
        previous = {}
        if self.ppo.clip_weight:
            (clip_fraction,) = self.ranks.sum_of(self.ppo.clip_fraction)  # each process has a share
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
        """Does what the KL guard decided about a rollout above `max_kl`."""
        self.ppo.new_checkpoint = None  # its weights made the rollout above `max_kl`
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
        """Runs forward and backward passes of a micro-batch; returns the share of this process in the loss."""
        total = torch.zeros((), device=self.ranks.device)
        parts = self._parts(self.ppo.rollout, next_rows.rows, self._max_tokens)
        share = 1 / (len(parts) * self.args.gradient_accumulation_steps)
        for rows, counts in self.roles.sharding.in_step(parts):
            part = self.ppo.rollout.select(rows, minibatch_tokens=next_rows.minibatch_tokens, share=share)
            if not counts:  # losses and metrics are divided by the number of tokens
                part = replace(part, minibatch_tokens=torch.tensor(math.inf, device=self.ranks.device), share=0.0)
            for role in self._trained_roles:
                # The backward pass comes before the next role is activated: with gradient checkpointing it computes the
                # adapter again.
                with self._bounded("training", self.ppo.rollout, rows), self.roles.activate(role) as module:
                    loss = self.compute_loss(module, part, role=role)
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total

    @property
    def _trained_roles(self) -> tuple[str, ...]:
        """The roles that pass through the model in this step, see `Roles.trained`."""
        return ("value",) if self._is_warm_up else self.roles.trained

    @property
    def _max_tokens(self) -> int | None:
        return self.args.max_tokens_per_batch

    def _parts(self, rollout: Rollout, rows: Tensor, max_tokens: int | None) -> list[Tensor]:
        """Splits the rows of a micro-batch into parts of at most `max_tokens` tokens."""
        if max_tokens is None:
            return [rows]
        sequences = rollout.sequences.select(rows)
        chunks = self.roles.chunks(sequences, self.roles.trained, max_rows=len(rows), max_tokens=max_tokens)
        return [rows[torch.tensor(chunk, device=rows.device)] for chunk in chunks]

    def _bounded(self, what: str, rollout: Rollout, rows: Tensor) -> AbstractContextManager:
        """Around the passes of a part of a micro-batch, which may be split if it does not fit."""
        if not self.roles.sizes.enabled:
            return nullcontext()  # the width would be read from the device
        return self.roles.sizes.one_pass(
            what,
            TOKENS,
            rows=len(rows),
            width=int(rollout.sequences.lengths[rows].max()),
            n_parts=lambda max_tokens: len(self._parts(rollout, rows, max_tokens)),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
        *,
        role: str = "policy",
    ) -> Tensor:
        """Share of a micro-batch in the loss of a role over the mini-batch.

        Args:
            model: the model of the role.
            inputs: the micro-batch.
            return_outputs: not used; `Trainer` passes it.
            num_items_in_batch: not used; `Trainer` passes it.
            role: `policy` or `value`. With a head critic, `policy` includes the value loss, and `value` is its head
                alone.

        Returns:
            A scalar with gradient.
        """
        sequences = inputs.sequences
        mask = inputs.mask
        with self.roles.mixed_precision():
            if role == "value" and self.critic == "head":
                # The value loss must not reach the policy, whose hidden states the head reads.
                with torch.no_grad(), self.roles.sharding.inference():
                    hidden = self.roles.hidden_states(role, model, sequences)
            else:
                hidden = self.roles.hidden_states(role, model, sequences)
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
        entropy = masked_mean(entropies, inputs.loss_mask, inputs.minibatch_tokens)
        self.meter.add("policy/entropy_avg", entropy, inputs.share)
        loss = loss + surrogate - self.args.entropy_coef * entropy
        if self.args.kl_placement == "loss" and self.ppo.kl_coef:
            token_kl = KL_ESTIMATORS[self.args.estimator](logprobs, inputs.ref_logprobs)
            kl = masked_mean(token_kl, inputs.loss_mask, inputs.minibatch_tokens)
            self.meter.add("policy/kl_loss", kl, inputs.share)
            loss = loss + self.ppo.kl_coef * kl
        return loss

    def _surrogate_loss(self, logprobs: Tensor, inputs: MicroBatch) -> Tensor:
        loss, stats = policy_loss(
            logprobs,
            inputs.old_logprobs,
            inputs.advantages,
            inputs.loss_mask,
            clip_range=self.args.clip_range,
            clip_range_high=self.args.clip_range_high,
            denominator=inputs.minibatch_tokens,
            weights=inputs.sampling_weights,
        )
        # Each metric is a share of the mean over the mini-batch.
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
            inputs.loss_mask,
            clip_range=self.args.value_clip_range,
            denominator=inputs.minibatch_tokens,
        )
        self.meter.add("loss/value_avg", loss, inputs.share)
        self.meter.add("val/clipfrac_avg", clip_fraction, inputs.share)
        return loss

    def _add_ptx_gradients(self) -> Tensor:
        """PPO-ptx: backward pass of `ptx_coef` times the mean cross-entropy of the texts (nats per token)."""
        total = torch.zeros((), device=self.ranks.device)
        batches = self._ptx.batches(self.ppo.next_text, self.args, self.ranks)
        self.ppo.next_text += texts_per_step(self.args, self.ranks)
        for batch, counts in self.roles.sharding.in_step(batches):
            if not counts:
                batch = replace(batch, n_tokens=math.inf, share=0.0)
            sequences = batch.sequences
            in_pass = self.roles.sizes.one_pass(
                "training on the texts of PPO-ptx",
                TOKENS,
                rows=len(sequences.input_ids),
                width=sequences.input_ids.shape[1],
                n_parts=batch.n_parts,
            )
            with in_pass, self.roles.activate("policy") as model, self.roles.mixed_precision():
                hidden = self.roles.hidden_states("policy", model, sequences)
                loss = text_loss(self.roles.text_logprobs(hidden, sequences.targets()), batch.n_tokens)
                self.accelerator.backward(self.args.ptx_coef * loss)
            self.meter.add("loss/ptx", loss, batch.share)
            total += self.args.ptx_coef * loss.detach()
        return total

    def _finish_step(self) -> None:
        """Called after the last backward pass of an optimizer step: checks the gradients, and may end the rollout."""
        self.ppo.critic_learning_rate = critic_learning_rate(self.optimizer, self.roles)
        approx_kl, signals = self.ranks.sum_of(self.ppo.approx_kl, self._signal.received)
        self.ppo.approx_kl = 0.0
        self._signal.agree(bool(signals))

        parameters = self._stepped_parameters()
        sharding = self.roles.sharding
        sharding.sum_gradients(parameters, self.ranks)
        # The summed gradients are the same on all processes, so the verdict is the same too.
        gradients = (own_part(parameter.grad) for parameter in parameters if parameter.grad is not None)
        finite = sharding.are_all(are_finite(gradients))
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

        if self.args.early_stop_kl is not None and not self._is_warm_up:
            moved_too_far = approx_kl > self.args.early_stop_kl
            self.meter.observe("policy/stopped_early", float(moved_too_far))
            if moved_too_far:
                self.ppo.leave_rollout(self.args)

    def _stepped_parameters(self) -> list[nn.Parameter]:
        """The parameters that this optimizer step changes: in a warm-up, only those of the critic."""
        parameters = trained_parameters(self.optimizer)
        if not self._is_warm_up:
            return parameters
        critic = set(self.roles.parameters_of_critic())
        for parameter in parameters:
            if parameter not in critic:
                # Without a gradient, an optimizer leaves a weight alone. With zeros it would apply weight decay.
                parameter.grad = None
        return [parameter for parameter in parameters if parameter in critic]

    # ---- Restoring checkpoints, stopping, warning ----

    def _stop_before_rollout(self) -> None:
        """Ends training as at the end of the last step, with a checkpoint, instead of a rollout that a signal has left.

        A resumed run makes the same rollout: weights, counters and random states are those of the last step.
        """
        self._signal.stop(self.args, self.control)
        self.control.should_evaluate = False
        # Before the first step of this call of `train`, nothing has changed since it began.
        if self.ppo.random_state is None:
            self.control.should_save = False
        else:
            self.ppo.random_state.restore()
            self.ppo.forget_next_rollout(self.args)
            # Saving it again would put it at risk: little time may be left.
            if self.ppo.new_checkpoint == checkpoint_name(self.state.global_step):
                self.control.should_save = False
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, self.state.epoch, None, None)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()

    def _go_back_from_broken_weights(self) -> None:
        """If weights are not finite, restores the last good checkpoint and stops training."""
        if self.roles.are_finite():
            return
        checkpoint = self._checkpoint_to_go_back_to()
        if checkpoint is None:
            raise UserError(
                f"step {self.state.global_step}: the weights of the policy are not finite, and there is no checkpoint "
                "to go back to: lower learning_rate, and set save_strategy='steps'."
            )
        self._restore(checkpoint)
        self._halt(f"weights were not finite, those of {checkpoint.name} are restored: lower learning_rate")

    def _checkpoint_to_go_back_to(self) -> Path | None:
        """The last checkpoint whose next rollout was below `max_kl`, if it still exists."""
        if self.ppo.good_checkpoint is None:
            return None
        folder = Path(self.args.output_dir) / self.ppo.good_checkpoint
        return folder if is_usable(folder) else None

    def _restore(self, checkpoint: Path) -> None:
        """Restores weights and optimizer of a checkpoint. Counters, random states and the schedule continue."""
        use_evaluation_weights(self.optimizer)  # those that checkpoints contain
        self.roles.load(checkpoint)
        self.roles.sharding.restore_optimizer(self.optimizer, checkpoint)
        use_training_weights(self.optimizer)

    def _halt(self, reason: str) -> None:
        """Stops training: from now on no step changes the weights, is saved, or counts as the best model."""
        if self.ppo.stop_reason is None:
            self.ppo.stop_reason = reason
            self._warn(f"training stops: {reason}")
        self.control.should_training_stop = True

    def _warn(self, line: str) -> None:
        if self.is_world_process_zero():
            logger.warning("step %d, rollout %d: %s.", self.state.global_step, self.ppo.rollout_index, line)

    def _ppo_callbacks(self) -> list[PPOCallback]:
        # Not cached, as resuming replaces the callbacks by restored ones.
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, PPOCallback)]

    # ---- Optimizer: separate learning rate and gradient clipping for the critic ----

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, with separate parameter groups for a critic. The value head comes last."""
        optimizer, scheduler = made_by(self, lambda: super(PPOTrainer, self).create_optimizer(*args, **kwargs))
        plain = plain_optimizer(optimizer)
        if not has_critic_groups(plain, self.roles):  # it has them in a second call of `train`
            give_critic_its_groups(plain, self.roles, self.args.value_learning_rate, scheduler)
        check_lists_of_schedule(self.args, plain)
        check_warm_up(plain, self.args.critic_warmup_steps)
        self._offload.take_states(plain)
        return optimizer

    def _clip_grad_norm(self, model) -> Tensor:
        """Clips the gradients of policy and critic separately.

        Clipped together, a large gradient of the critic would scale down the gradient of the policy.
        """
        critic = self.roles.parameters_of_critic()
        policy = [parameter for parameter in self.policy.parameters() if parameter not in set(critic)]
        norm = self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)  # also unscales fp16 gradients
        if self.roles.has_critic:
            self.meter.observe("value_grad_norm", self.roles.sharding.clip(critic, self.args.max_grad_norm))
        return whole(norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # not counted, as `inputs` only counts micro-steps

    # ---- Logging and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log to a training log. Other logs are complete already."""
        if "loss" in logs:
            logs |= self.meter.means()
            # As `learning_rate`, that of the last step. The schedule has moved on since.
            rate = self.ppo.critic_learning_rate
            if rate is None:  # before the first step
                rate = critic_learning_rate(self.optimizer, self.roles)
            if rate is not None:
                logs["lr_value"] = rate
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Samples one completion per prompt, and returns means of rewards, KL and length.

        The completions are sent as a table to the trackers in `report_to`; with `log_completions` some are printed. The
        random state of training does not change: a run with evaluations gives the same weights as one without.

        Args:
            eval_dataset: dataset with a column `prompt`, or a dict of several; `None` means that of the trainer.
            ignore_keys: not used; `Trainer` passes it.
            metric_key_prefix: prefix of the names of the metrics.

        Returns:
            The metrics by name, such as `eval_objective/scores`. With several sets, the name of the set follows the
            prefix.

        Raises:
            UserError: if there is no dataset, or if a reward function returns something wrong.
        """
        if isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict):  # a name, as in `Trainer`
            eval_dataset = self.eval_dataset.get(eval_dataset, eval_dataset)
        dataset = as_datasets(eval_dataset if eval_dataset is not None else self.eval_dataset, "eval_dataset")
        if dataset is None:
            raise UserError("evaluation needs eval_dataset: pass one to the trainer, or set eval_strategy='no'.")
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics |= self._evaluate_set(part, f"{metric_key_prefix}_{name}")
        else:
            metrics = self._evaluate_set(dataset, metric_key_prefix)
        if self.is_in_train and eval_dataset is None:
            check_evaluated_metric(self.args, metrics)
        return metrics

    def _evaluate_set(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        """Evaluates one set, logs its metrics, and tells the callbacks."""
        rows, metrics = self._measure(dataset, metric_key_prefix)
        self.ppo.evaluated_rows[metric_key_prefix] = len(rows)
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

    def _measure(self, dataset: Dataset, prefix: str) -> tuple[list[EvaluatedCompletion], dict[str, float]]:
        """Samples and scores one completion per prompt; returns them and their metrics, whose names get the prefix."""
        start = time.monotonic()
        rows = self.sample_and_score(dataset)
        metrics = {f"{prefix}_{name}": value for name, value in summarize(rows).items()}
        exact_kl = self.evaluator.exact_kl(rows)
        if exact_kl is not None:
            metrics[f"{prefix}_objective/kl_exact"] = exact_kl
        metrics[f"{prefix}_runtime"] = round(time.monotonic() - start, 2)
        return rows, metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Samples one completion per prompt, as `evaluate` does, but returns them too and logs nothing.

        Args:
            test_dataset: dataset with a column `prompt`.
            ignore_keys: not used; it is there as in `Trainer`.
            metric_key_prefix: prefix of the names of the metrics.

        Returns:
            `predictions`: the completions as an array of texts, in the order of the rows; `label_ids`: `None`;
            `metrics`: those of `evaluate`.

        Raises:
            UserError: if a prompt is not usable, or if a reward function returns something wrong.
        """
        rows, metrics = self._measure(test_dataset, metric_key_prefix)
        completions = np.array([row.completion for row in rows], dtype=object)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=completions, label_ids=None, metrics=metrics)

    def sample_and_score(self, dataset: Dataset, *, seed: int | None = None) -> list[EvaluatedCompletion]:
        """Samples completions from the current policy and scores them with `reward_funcs` and `eval_reward_funcs`.

        Args:
            dataset: dataset with a column `prompt`, and the columns that the reward functions need.
            seed: seed of the sampling. `None` means `args.seed`, so that two policies are compared with the same random
                numbers.

        Returns:
            The completions with their rewards, in the order of the rows.

        Raises:
            UserError: if a prompt is not usable, or if a reward function returns something wrong.
        """
        if dataset is None:
            raise UserError("the dataset is None: pass a datasets.Dataset with a column 'prompt'.")
        dataset = as_dataset(dataset, "dataset")
        check_calls(self.rewards, self.eval_rewards, dataset.column_names, where="the dataset")
        limits = {"token_rows": n_rows(self.policy), "max_positions": self._max_positions}
        prompts = Prompts(dataset, self.processing_class, self.args, split="eval", **limits)
        if not self.roles.sharding.is_ready:  # an evaluation before training
            self.create_optimizer()
            self.optimizer = self.roles.sharding.prepare(self.optimizer)
        use_evaluation_weights(self.optimizer)
        with no_bars(when=self._has_no_bars):
            return self.evaluator.sample_and_score(prompts, self.state, seed=seed)

    @property
    def _has_no_bars(self) -> bool:
        """Whether this process draws no progress bars."""
        return self.args.disable_tqdm or not self.is_world_process_zero()

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Whether this is the best model so far. Never after a guard has stopped the run, or above `max_kl`."""
        chosen = self.args.metric_for_best_model
        if chosen is None:
            return False
        chosen = f"eval_{chosen.removeprefix('eval_')}"
        check_evaluated_metric(self.args, metrics)
        problem = self.ppo.stop_reason
        if problem is None:
            problem = self._out_of_bounds(metrics, chosen)
        if problem is not None:
            self._warn(f"not a candidate for the best model: {problem}")
            return False
        return super()._determine_best_metric(metrics, trial)

    def _out_of_bounds(self, metrics: dict[str, float], chosen: str) -> str | None:
        """Why the metrics rule this model out as the best one, in words; `None` if they do not."""
        for name, value in metrics.items():
            if name.endswith("objective/kl") and self.kl_guard.is_exceeded(value):
                return f"{name} exceeds max_kl or is not finite"
        if not math.isfinite(metrics[chosen]):
            return f"{chosen} is not finite"
        return None

    # ---- Checkpoints ----

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.ppo.stop_reason is not None:
            self.control.should_save = False  # its rollout must not be trained on by a resumed run
        log_last_steps(self.args, self.control)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except PartLeft:  # an evaluation at a signal, on all processes
            self._signal.stop(self.args, self.control)
            self.control.should_evaluate = False
            self._maybe_log_save_evaluate(*args, **kwargs)
        if self.ppo.is_used_up(self.args):
            self.ppo.random_state = RandomState.now(self.ranks.device)

    def _save_checkpoint(self, model, trial) -> None:
        """As in `Trainer`, but besides the newest and the best checkpoint, the last good one is kept for the guards."""
        output_dir = Path(self.args.output_dir)
        newest = checkpoint_name(self.state.global_step)
        overwritten = needed_reference(output_dir / newest)  # of an earlier run in the same folder
        if self._is_warm_up:
            self.roles.sharding.complete_state(self.optimizer)
        if self.args.should_save:
            mark_incomplete(output_dir / newest)
        register_callbacks(self.state, self.callback_handler.callbacks)
        with without_rotation(self.args):
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {newest, best and Path(best).name, self.ppo.good_checkpoint}
            rotate(output_dir, self.args.save_total_limit, keep)
            remove_references(output_dir, {overwritten})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves policy, a critic and tokenizer. Unlike `Trainer`, saves no other adapters and no pickle files."""
        use_evaluation_weights(self.optimizer)  # on every process, so that their weights stay the same
        writes = self.args.should_save
        folder = Path(output_dir or self.args.output_dir)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        self.roles.save(folder, state_dict, writes=writes)
        if not writes:
            return
        self.prompt_form.save(folder)
        if self._base_record is not None:
            self._base_record.save(folder)
        self.processing_class.save_pretrained(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also saves the reference and the state of PPO.

        `Trainer` calls it for checkpoints only, on every process, before it writes `trainer_state.json`, which makes
        the checkpoint complete.
        """
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        if self.args.should_save:
            self.roles.sizes.save(folder)
        self.ppo.new_checkpoint = folder.name  # on every process, as all must reach the same verdict
        self.ppo.reference = self.roles.save_reference(
            folder, self.ppo.reference, self.ranks, writes=self.args.should_save
        )
        if self.args.should_save:
            self.roles.sharding.tidy(folder)
            self.ppo.save(folder, self.args, self.ranks, critic=self.critic)
        self.ranks.wait()  # a checkpoint needs the random states of all processes

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        check_same_sharding(folder, is_sharded=self.roles.sharding.is_sharded)
        use_evaluation_weights(self.optimizer)  # an optimizer of an earlier call of `train`
        state = PPOState.load(folder, self.args, self.ranks, critic=self.critic)
        self.meter.reset()  # drops metrics of earlier training in this process
        saved = read_state(folder)
        self.roles.load_reference(folder, saved, Path(self.args.output_dir))
        self.ppo = state  # not earlier: it says which reference there is, also to `train` after a refused checkpoint
        self.roles.load(folder)
        self.roles.sizes.load(folder)
        before, now = Sizes.of(saved["geometry"]), sizes_of(self.args, self.ranks)
        if before != now:
            position = self.ppo.stretch.prompt
            self._warn(said_of_other_sizes(before, now, position, self.args, counts_epochs=self._counts_epochs))
        # `Trainer` restores callbacks from `trainer_state.json` after this method. Version 0.1.0 saved theirs
        # elsewhere.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HealthWarnings):
                callback.take_over(saved["guards"])
        if saved["kl_coef_option"] != self.args.kl_coef:
            was = f"{saved['kl_coef_option']:g} (adapted to {self.ppo.kl_coef:g})"
            self._warn(f"kl_coef was {was} in {folder.name}: it is now {self.args.kl_coef:g}, as set in the options")
            self.ppo.kl_coef = self.args.kl_coef
        next_to_train = self.ppo.rollout_index + self.ppo.is_used_up(self.args)
        if self.ppo.is_warm_up(self.args, next_to_train):
            self._warn(warm_up_line(self.args))

    def _load_best_model(self) -> None:
        use_evaluation_weights(self.optimizer)
        self.roles.load(Path(self.state.best_model_checkpoint))

    # ---- The Hub, through the publisher that the package's `__init__.py` sets ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the token and creates the repository, before training."""
        publisher = require_publisher(self.publisher)
        self.hub_model_id = publisher.check_access(self, token=token, private=private)

    # The same for all trainers of this library.
    push_to_hub = push_to_hub
    create_model_card = create_model_card
    _push_from_checkpoint = push_from_checkpoint
    _finish_current_push = finish_current_push

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and `report.json` with what was measured, from which `push_run` makes a card."""
        save = self.roles.sharding.way_to_save(self, super().save_model)
        save_with_report(self, save, output_dir, _internal_call)

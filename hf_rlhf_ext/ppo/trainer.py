"""`PPOTrainer`: PPO with a KL leash on `transformers.Trainer`'s own loop. It wires; the mathematics is next door."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..compat import BaseTrainer, disable_dropout_in_model
from ..errors import UserError
from ..hub.trainer import HubMixin
from ..modeling.adapters import adapters_in_autocast_dtype
from ..modeling.loading import load_base_model, load_tokenizer, refuse_fp16_weights, warn_of_emulated_bf16
from ..modeling.logprobs import (
    check_output_head,
    chunked_logprobs,
    completion_hidden_states,
    final_softcap,
    scatter_to_mask,
)
from ..reward.scorer import NORMALIZATION_FILE
from .advantages import completion_mask
from .batching import budget_chunks
from .checkpoints import CheckpointMixin
from .config import PPOConfig
from .evaluation import EvaluationMixin
from .figures import FiguresMixin, reduced
from .guards import GuardMixin, SaveOnSignal, check_setup
from .kl import KL_ESTIMATORS
from .losses import masked_mean, policy_loss, value_loss
from .ptx import encode_texts
from .roles import attach_critic, build_stack, checkpoint_critic, load_trainable, scale_critic, shared_reward
from .rollout import Rollout, pack_sequences, prompt_indices, stop_token_ids
from .sampling import RolloutMixin
from .scoring import RewardFunc, RewardFunctions
from .setup import check_best_metric, encode_prompts, tick_dataloader, warn_of_other_sampling, with_max_steps
from .shaping import RunningMoments


class PPOTrainer(HubMixin, CheckpointMixin, EvaluationMixin, FiguresMixin, GuardMixin, RolloutMixin, BaseTrainer):
    """Proximal policy optimisation with a KL penalty, as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155).

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
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: any PEFT configuration (LoRA, DoRA, rsLoRA …) for a base model.
        value_model: the critic for `critic="model"`: a causal LM, or a reward model whose score head it starts from.
        ptx_dataset: text for PPO-ptx, with `ptx_coef`: rows of `text`, of `prompt` and `completion`, or of `messages`.

    Attributes:
        stack: the `AdapterStack` with the roles policy, reference, value, and reward where it shares the base.
        kl_coef: β as it is now.
        stopped_by: why a guard ended the last `train`, in one line; None where none did.
    """

    # `compute_loss` divides by the token count of the whole mini-batch itself.
    loss_is_scaled_for_ga = True
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
    ):
        args = args if args is not None else PPOConfig("ppo")
        if train_dataset is None:
            raise UserError("train_dataset is required: rows with a column 'prompt'.")
        check_setup(args)
        warn_of_emulated_bf16(args)
        remote = {"trust_remote_code": args.trust_remote_code}
        if isinstance(model, str):
            model, tokenizer = load_trainable(model, peft_config, **remote)
            processing_class = tokenizer if processing_class is None else processing_class
        elif processing_class is None:
            processing_class = load_tokenizer(model.config.name_or_path, **remote)
        self._max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self._train_prompts = encode_prompts(train_dataset, processing_class, args, "train", self._max_positions)
        self._texts = self._ptx_texts(ptx_dataset, processing_class, args)
        check_output_head(model, self._train_prompts[0])
        warn_of_other_sampling(args)
        check_best_metric(args, eval_dataset)
        set_seed(args.seed)  # new adapters are drawn before Trainer does it
        self.stack = build_stack(model, peft_config)
        loading = {"share": lambda f: shared_reward(self.stack, f), **remote}
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights, reward_processing_classes, **loading)
        self._attach_critic(args, value_model)
        self.eval_rewards = None  # after the critic, which starts from a reward that is trained on
        if eval_reward_funcs is not None:
            self.eval_rewards = RewardFunctions(eval_reward_funcs, option="eval_reward_funcs", **loading)
        if args.fp16:
            refuse_fp16_weights(self.stack.model)
        if args.disable_dropout:
            disable_dropout_in_model(self.stack.model)
        self._stop_ids = stop_token_ids(processing_class, self.stack.model, args.stop_token_ids)
        self._signal = SaveOnSignal()
        super().__init__(
            model=self.stack.model,
            args=with_max_steps(args, len(train_dataset), args.world_size),
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), self._signal],
            optimizers=optimizers,
        )
        self._init_state()
        self._init_guards()
        device = self.accelerator.device
        if self.accelerator.num_processes > 1:
            set_seed(args.seed + self.accelerator.process_index)  # each process samples completions of its own
        if self.stack.roles["reference"].model is not None:
            self.stack.roles["reference"].model.to(device)
        for rewards in (self.rewards, self.eval_rewards):
            if rewards is not None:
                rewards.to(device)

    def _init_state(self) -> None:
        self.kl_coef = self.args.kl_coef
        self.reward_moments = RunningMoments()
        self._needs_reference = self.args.kl_coef > 0 or self.args.max_kl is not None
        self._rollouts = 0  # number of the one in use, or of the next
        self._step_in_rollout = 0  # micro-steps taken on it
        self._rollout: Rollout | None = None
        self._approx_kl = 0.0  # of the mini-batch so far
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._completions: dict[str, Any] | None = None

    def _ptx_texts(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> list:
        if (dataset is None) != (args.ptx_coef == 0):
            raise UserError("PPO-ptx needs both ptx_dataset and a ptx_coef above 0: give the other one, or neither.")
        return [] if dataset is None else encode_texts(dataset, tokenizer, self._max_positions)

    def _attach_critic(self, args: PPOConfig, value_model: str | PreTrainedModel | None) -> None:
        if isinstance(value_model, str):
            is_reward = (Path(value_model) / NORMALIZATION_FILE).is_file()
            kind, remote = "reward" if is_reward else "causal_lm", args.trust_remote_code
            value_model = load_base_model(value_model, task=kind, dtype="float32", trust_remote_code=remote)
        self.critic = attach_critic(self.stack, args.critic, value_model=value_model)
        checkpoint_critic(self.stack, args)
        self.value_head = self.stack.roles["value"].head
        if self.critic == "adapter" and "reward" in self.stack.roles:
            scorer, weight = next(
                pair for pair in self.rewards.weighted() if getattr(pair[0], "head", None) is not None
            )
            scale_critic(self.stack, scorer.mean, scorer.std, weight * args.reward_scale)

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The model without wrappers. PPO's forwards go to it: gradients are summed over processes by ourselves."""
        return self.stack.model

    @property
    def updates(self) -> int:
        """Rollouts that the policy has been trained on, the one in use included."""
        return self._rollouts + (self._step_in_rollout > 0)

    @property
    def _steps_in_all(self) -> int:
        """Micro-steps on one rollout: where `_step_in_rollout` is there, the next one is due."""
        return self.args.steps_per_rollout * self.args.gradient_accumulation_steps

    # ---- The loop: Trainer's, with a rollout in front of every `steps_per_rollout` optimizer steps ----

    def get_train_dataloader(self):
        return self.accelerator.prepare(tick_dataloader(self.args, self.args.world_size))

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        """Gradients of one micro-batch: one role after the other, in parts of a token budget."""
        self.policy.train()
        # No autocast out here: the rollout's forwards would leave their casts of the weights to the training one.
        with adapters_in_autocast_dtype(self.policy, enabled=self.args.bf16 or self.args.fp16):
            inputs = self._prepare_inputs(inputs)
            total = torch.zeros((), device=self.accelerator.device)
            if self.stopped_by is not None:
                self._skip_step()
                return total
            parts = self._parts(inputs["rows"])
            share = 1 / (len(parts) * self.args.gradient_accumulation_steps)
            for rows in parts:
                part = self._rollout.select(rows) | {"minibatch_tokens": inputs["minibatch_tokens"], "share": share}
                for role in ("policy", "value") if self.critic != "head" else ("policy",):
                    with self.stack.activate(role) as module:
                        loss = self.compute_loss(module, part, role=role)
                        self.accelerator.backward(loss)
                    total += loss.detach()
            if self.accelerator.sync_gradients:
                total += self._ptx_gradients()
                self._finish_step()
        return total * self.accelerator.num_processes  # Trainer averages what are shares here

    def _parts(self, rows: Tensor) -> list[Tensor]:
        lengths = (self._rollout.prompt_lengths + self._rollout.completion_lengths)[rows].tolist()
        chunks = budget_chunks(lengths, max_rows=len(lengths), max_tokens=self.args.max_tokens_per_batch)
        return [rows[torch.tensor(chunk, device=rows.device)] for chunk in chunks]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rows of the next micro-batch of the rollout, which is made anew when the last one is used up.

        A mini-batch is drawn from the rollout of all processes; each takes its share of it.
        """
        args, processes, here = self.args, self.accelerator.num_processes, self.accelerator.process_index
        per_epoch = args.num_mini_batches * args.gradient_accumulation_steps  # micro-steps
        if self._step_in_rollout == self._steps_in_all:
            self._rollouts, self._step_in_rollout = self._rollouts + 1, 0
        if self._step_in_rollout == 0:
            self._rollout = self._next_rollout()
        epoch, in_epoch = divmod(self._step_in_rollout, per_epoch)
        self._step_in_rollout += 1
        order = self._rollout.order[epoch]
        minibatch = order.split(args.minibatch_size * processes)[in_epoch // args.gradient_accumulation_steps]
        rows = order.split(args.per_device_train_batch_size * processes)[in_epoch]
        return {"rows": rows[here::processes], "minibatch_tokens": self._rollout.completion_lengths[minibatch].sum()}

    def _finish_step(self) -> None:
        """After the last backward pass of an optimizer step: leaves the rollout where the policy has moved too far."""
        moved = torch.tensor([self._approx_kl, float(self._signal.received)], device=self.accelerator.device)
        reduced([moved], self.accelerator)
        self._approx_kl, self._signal.agreed = 0.0, bool(moved[1])
        self._finish_gradients()
        args = self.args
        if args.target_kl is not None and float(moved[0]) > args.target_kl:
            self._observe("policy/stopped_early", 1.0)
            self._step_in_rollout = self._steps_in_all
        elif args.target_kl is not None:
            self._observe("policy/stopped_early", 0.0)

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None, *, role: str = "policy"
    ) -> Tensor:
        """One micro-batch's share of a role's loss over the mini-batch."""
        args, mask, denominator = self.args, inputs["mask"], inputs["minibatch_tokens"]
        with self._mixed_precision():
            hidden = completion_hidden_states(model, model, inputs["input_ids"], inputs["prompt_lengths"], mask)
            loss = torch.zeros((), device=mask.device)
            if role == "value" or self.critic == "head":
                values = scatter_to_mask(self.value_head(hidden).squeeze(-1), mask)
                loss = loss + args.vf_coef * self._critic_loss(values, inputs)
            if role == "value":
                return loss
            logprobs, entropies = (scatter_to_mask(x, mask) for x in self._logprobs("policy", hidden, inputs))
        surrogate, stats = policy_loss(
            logprobs,
            inputs["old_logprobs"],
            inputs["advantages"],
            mask,
            clip_range=args.clip_range,
            denominator=denominator,
            weights=inputs.get("sampling_weights"),
        )
        entropy = masked_mean(entropies, mask, denominator)
        loss = loss + surrogate - args.entropy_coef * entropy
        if args.kl_placement == "loss" and self.kl_coef:
            kl = masked_mean(KL_ESTIMATORS[args.estimator](logprobs, inputs["ref_logprobs"]), mask, denominator)
            loss = loss + self.kl_coef * kl
            self._record("policy/kl_loss", kl, inputs["share"])
        if args.target_kl is not None:
            self._approx_kl += float(stats["approxkl"])
        self._record_update(surrogate, entropy, stats, inputs["share"])
        return loss

    def _critic_loss(self, values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        loss, clipfrac = value_loss(
            values,
            inputs["values"],
            inputs["returns"],
            inputs["mask"],
            clip_range=self.args.value_clip_range,
            denominator=inputs["minibatch_tokens"],
        )
        self._record("loss/value_avg", loss, inputs["share"])
        self._record("val/clipfrac_avg", clipfrac, inputs["share"])
        return loss

    def _ptx_gradients(self) -> Tensor:
        """PPO-ptx: backward of γ times the mean cross-entropy of this step's texts (nats per token)."""
        args, processes, here = self.args, self.accelerator.num_processes, self.accelerator.process_index
        total = torch.zeros((), device=self.accelerator.device)
        if not self._texts:
            return total
        size = (args.ptx_batch_size or args.minibatch_size) * processes
        texts = [self._texts[row] for row in prompt_indices(self.state.global_step, size, len(self._texts), args.seed)]
        n_tokens = sum(len(targets) for _, targets in texts)
        texts = texts[here::processes]
        chunks = budget_chunks(
            [len(context) + len(targets) for context, targets in texts],
            max_rows=args.per_device_train_batch_size,
            max_tokens=args.max_tokens_per_batch,
        )
        for chunk in chunks:
            contexts, targets = zip(*(texts[i] for i in chunk), strict=True)
            ids, starts, lengths = pack_sequences(
                list(contexts), list(targets), self.processing_class.pad_token_id, total.device
            )
            mask = completion_mask(lengths, int(lengths.max()))
            rows, steps = mask.nonzero(as_tuple=True)
            with self.stack.activate("policy") as model, self._mixed_precision():
                hidden = completion_hidden_states(model, model, ids, starts, mask)
                logprobs, _ = chunked_logprobs(
                    hidden,
                    model.get_output_embeddings(),
                    ids[rows, starts[rows] + steps],
                    softcap=final_softcap(model),
                    chunk_size=args.logprobs_chunk_size,
                )
                loss = -logprobs.sum() / n_tokens
                self.accelerator.backward(args.ptx_coef * loss)
            self._record("loss/ptx", loss, 1 / len(chunks))
            total += args.ptx_coef * loss.detach()
        return total

    # ---- Optimizer: the critic has its own learning rate and its own clipping ----

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the critic's weights in groups of their own; the value head comes last."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if set(optimizer.param_groups[-1]["params"]) == set(self.value_head.parameters()):
            return optimizer  # of an earlier `train`
        rate = self.args.learning_rate if self.args.value_learning_rate is None else self.args.value_learning_rate
        head, critic = set(self.value_head.parameters()), set(self._critic_parameters())
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if p in critic - head]
            group["params"] = [p for p in group["params"] if p not in critic]
            if own:
                options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
                optimizer.add_param_group(options | {"params": own, "lr": rate})
        optimizer.add_param_group({"params": list(self.value_head.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _critic_parameters(self) -> list[nn.Parameter]:
        policy = set(self.stack.parameters("policy"))
        return [parameter for parameter in self.stack.parameters("value") if parameter not in policy]

    def _clip_grad_norm(self, model) -> Tensor:
        """Clips policy and critic each by itself: together, a large critic gradient would starve the policy."""
        critic = self._critic_parameters()
        policy = [p for p in self.policy.parameters() if p not in set(critic)]
        norm = self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)  # also unscales fp16 gradients
        self._observe("value_grad_norm", nn.utils.clip_grad_norm_(critic, self.args.max_grad_norm))
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # inputs are ticks: there is nothing honest to count

"""`PPOTrainer`: PPO with a KL leash on `transformers.Trainer`'s own loop. It wires; the mathematics is next door."""

import sys
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..compat import BaseTrainer, disable_dropout_in_model, print_prompt_completions_sample
from ..data.text import decode_completion
from ..errors import UserError
from ..modeling.adapters import (
    active_adapter,
    adapters_in_autocast_dtype,
    autocast_dtype,
    evaluating,
    merged_adapter,
    mixed_precision,
)
from ..modeling.loading import load_policy, load_tokenizer
from ..modeling.logprobs import (
    check_output_head,
    chunked_logprobs,
    completion_hidden_states,
    final_softcap,
    scatter_to_mask,
)
from .advantages import completion_mask, explained_variance, generalized_advantages, token_rewards, whiten
from .checkpoints import CheckpointMixin
from .config import PPOConfig
from .evaluation import EvaluationMixin
from .kl import KL_ESTIMATORS, adapted_kl_coef, kl_k1, kl_k3
from .losses import masked_mean, policy_loss, value_loss
from .rollout import (
    Rollout,
    generate_completions,
    pack_sequences,
    prompt_indices,
    sampling_config,
    stop_token_ids,
)
from .scoring import RewardFunc, RewardFunctions
from .setup import attach_value_head, build_policy, encode_prompts, tick_dataloader, with_max_steps


class PPOTrainer(CheckpointMixin, EvaluationMixin, BaseTrainer):
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
    ):
        args = args if args is not None else PPOConfig("ppo")
        if train_dataset is None:
            raise UserError("train_dataset is required: rows with a column 'prompt'.")
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError("PPOTrainer runs in one process on one device for now: start it with plain `python`.")
        if isinstance(model, str):
            model, tokenizer = load_policy(model, is_trainable=True)
            processing_class = tokenizer if processing_class is None else processing_class
        elif processing_class is None:
            processing_class = load_tokenizer(model.config.name_or_path)
        self._max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self._train_prompts = encode_prompts(train_dataset, processing_class, args, "train", self._max_positions)
        check_output_head(model, self._train_prompts[0])
        set_seed(args.seed)  # new adapters are drawn before Trainer does it
        model, self.reference = build_policy(model, peft_config)
        self.value_head = attach_value_head(model)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self._stop_ids = stop_token_ids(processing_class, model, args.stop_token_ids)
        super().__init__(
            model=model,
            args=with_max_steps(args, len(train_dataset), args.world_size),
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        device = self.accelerator.device
        if self.reference.model is not None:
            self.reference.model.to(device)
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights, reward_processing_classes, device=device)
        self.eval_rewards = None
        if eval_reward_funcs is not None:
            self.eval_rewards = RewardFunctions(eval_reward_funcs, device=device, option="eval_reward_funcs")
        self.kl_coef = args.kl_coef
        self._micro_step = 0  # within the whole run
        self._rollout: Rollout | None = None
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._sample: dict[str, list] | None = None

    # ---- The loop: Trainer's, with a rollout in front of every `steps_per_rollout` optimizer steps ----

    def get_train_dataloader(self):
        return self.accelerator.prepare(tick_dataloader(self.args, self.args.world_size))

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        # No autocast out here: the rollout's forwards would leave their casts of the weights to the training one.
        with adapters_in_autocast_dtype(self.model, enabled=self.args.bf16 or self.args.fp16):
            return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The next micro-batch of the rollout, which is made anew when the last one is used up."""
        args = self.args
        per_epoch = args.num_mini_batches * args.gradient_accumulation_steps  # micro-steps
        step = self._micro_step % (per_epoch * args.num_ppo_epochs)
        if step == 0:
            self._rollout = self._make_rollout()
        self._micro_step += 1
        epoch, in_epoch = divmod(step, per_epoch)
        order = self._rollout.order[epoch]
        minibatch = order.split(args.minibatch_size)[in_epoch // args.gradient_accumulation_steps]
        rows = order.split(args.per_device_train_batch_size)[in_epoch]
        n_tokens = self._rollout.completion_lengths[minibatch].sum()
        return self._rollout.select(rows) | {"minibatch_tokens": n_tokens}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """One micro-batch's share of the mini-batch's loss."""
        args, mask, denominator = self.args, inputs["mask"], inputs["minibatch_tokens"]
        with self._mixed_precision():
            logprobs, entropies, values = self._forward(model, inputs)
        loss, stats = policy_loss(
            logprobs,
            inputs["old_logprobs"],
            inputs["advantages"],
            mask,
            clip_range=args.clip_range,
            denominator=denominator,
        )
        critic_loss, critic_clipfrac = value_loss(
            values,
            inputs["values"],
            inputs["returns"],
            mask,
            clip_range=args.value_clip_range,
            denominator=denominator,
        )
        entropy = masked_mean(entropies, mask, denominator)
        metrics = {"loss/policy_avg": loss, "loss/value_avg": critic_loss, "policy/entropy_avg": entropy}
        metrics |= {"policy/clipfrac_avg": stats["clipfrac"], "policy/approxkl_avg": stats["approxkl"]}
        metrics |= {"val/ratio": stats["ratio"], "val/clipfrac_avg": critic_clipfrac}
        for name, value in metrics.items():  # each is a share of the mini-batch's mean
            self._record(name, value, 1 / args.gradient_accumulation_steps)
        return loss + args.vf_coef * critic_loss - args.entropy_coef * entropy

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the value head in a group of its own at `value_learning_rate`."""
        optimizer = super().create_optimizer(model)
        head = set(self.value_head.parameters())
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in head]
        args = self.args
        rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        optimizer.add_param_group({"params": list(self.value_head.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _clip_grad_norm(self, model) -> Tensor:
        """Clips policy and value head each by itself: together, a large critic gradient would starve the policy."""
        head = set(self.value_head.parameters())
        policy = [p for p in model.parameters() if p not in head]
        norm = self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)  # also unscales fp16 gradients
        self._record("value_grad_norm", nn.utils.clip_grad_norm_(list(head), self.args.max_grad_norm))
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # inputs are ticks: there is nothing honest to count

    # ---- Rollouts ----

    @torch.no_grad()
    def _make_rollout(self) -> Rollout:
        """Samples completions, scores them, and computes everything that the inner epochs need."""
        args, size = self.args, self.args.rollout_size
        number = self._micro_step // (args.steps_per_rollout * args.gradient_accumulation_steps)
        rows = prompt_indices(number, size, len(self._train_prompts), args.seed)
        examples = [self.train_dataset[row] for row in rows]
        prompt_ids = [self._train_prompts[row] for row in rows]
        completion_ids = self._generate(prompt_ids)
        per_func, scores = self._score(self.rewards, examples, completion_ids, log_metric=self._record)
        batch, stats = self._rescore(prompt_ids, completion_ids)
        mask, lengths = stats["mask"], stats["lengths"]
        stopped = torch.tensor([ids[-1] in self._stop_ids for ids in completion_ids], device=mask.device)
        kl = KL_ESTIMATORS[args.kl_estimator](stats["logprobs"], stats["ref_logprobs"])
        rewards = token_rewards(self._shaped(scores, stopped), kl, lengths, kl_coef=self.kl_coef)
        advantages, returns = generalized_advantages(
            rewards, stats["values"], mask, gamma=args.gamma, gae_lambda=args.gae_lambda
        )
        self._record_rollout(stats, per_func, scores, stopped, kl, returns)
        self._sample = {"examples": examples, "completion_ids": completion_ids, "per_func": per_func}
        if args.kl_target is not None:
            mean_kl = masked_mean(kl_k1(stats["logprobs"], stats["ref_logprobs"]), mask, size).item()
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, mean_kl, kl_target=args.kl_target, kl_horizon=args.kl_horizon, n_sequences=size
            )
        if args.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Rollout(
            **batch,
            completion_lengths=lengths,
            old_logprobs=stats["logprobs"],
            ref_logprobs=stats["ref_logprobs"],
            values=stats["values"],
            advantages=advantages,
            returns=returns,
            order=torch.stack([torch.randperm(size) for _ in range(args.num_ppo_epochs)]).to(mask.device),
        )

    def _generate(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        args = self.args
        config = sampling_config(
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            stop_ids=self._stop_ids,
            pad_token_id=self.processing_class.pad_token_id,
            **(args.generation_kwargs or {}),
        )
        model = self.accelerator.unwrap_model(self.model)
        with (
            evaluating(model),  # eval mode: gradient checkpointing and dropout are off, the cache works
            merged_adapter(model, enabled=args.merge_for_generation),
            self._mixed_precision(),
        ):
            return generate_completions(model, prompt_ids, config, self.accelerator.device)

    def _score(self, rewards: RewardFunctions, examples: list[dict], completion_ids: list[list[int]], **extra: Any):
        """Scores of each function (B, F) and their weighted sum (B,); completions as text, or messages like prompts."""
        prompts = [example["prompt"] for example in examples]
        texts = [decode_completion(self.processing_class, ids) for ids in completion_ids]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {key: [example[key] for example in examples] for key in examples[0] if key != "prompt"}
        per_func = rewards(
            prompts,
            completions,
            completion_ids=completion_ids,
            trainer_state=self.state,
            **{key: value for key, value in columns.items() if key not in ("completion", "completion_ids")},
            **extra,
        ).to(self.accelerator.device)
        return per_func, rewards.combine(per_func)

    def _shaped(self, scores: Tensor, stopped: Tensor) -> Tensor:
        """Scores (B,) after clipping and the penalty for completions without a stop token."""
        if self.args.reward_clip is not None:
            scores = scores.clamp(-self.args.reward_clip, self.args.reward_clip)
        return scores - (self.args.missing_eos_penalty or 0.0) * (~stopped).to(scores.dtype)

    @torch.no_grad()
    def _rescore(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> tuple[dict, dict[str, Tensor]]:
        """Log-probabilities of policy and reference, entropies and values, by the training forward.

        Never those of `generate`: in bf16 they differ by up to 0.3 nats a token, and the first ratio must be 1.
        """
        device = self.accelerator.device
        input_ids, prompt_lengths, lengths = pack_sequences(
            prompt_ids, completion_ids, self.processing_class.pad_token_id, device
        )
        mask = completion_mask(lengths, int(lengths.max()))
        stats = {
            name: torch.zeros(mask.shape, device=device) for name in ("logprobs", "entropies", "values", "ref_logprobs")
        }
        with evaluating(self.model), self._mixed_precision():
            for rows in torch.arange(len(lengths), device=device).split(self.args.per_device_train_batch_size):
                width, length = int(lengths[rows].max()), int((prompt_lengths + lengths)[rows].max())
                micro = {"input_ids": input_ids[rows, :length], "prompt_lengths": prompt_lengths[rows]}
                micro["mask"] = mask[rows, :width]
                for name, values in zip(
                    ("logprobs", "entropies", "values"), self._forward(self.model, micro), strict=True
                ):
                    stats[name][rows, :width] = values
                stats["ref_logprobs"][rows, :width] = self._reference_logprobs(micro)
        return {"input_ids": input_ids, "prompt_lengths": prompt_lengths}, stats | {"mask": mask, "lengths": lengths}

    def _reference_logprobs(self, micro: dict[str, Tensor]) -> Tensor:
        if self.reference.model is not None:
            return self._forward(self.reference.model, micro, with_values=False)[0]
        with active_adapter(self.accelerator.unwrap_model(self.model), self.reference.adapter):
            return self._forward(self.model, micro, with_values=False)[0]

    def _forward(self, model, micro: dict[str, Tensor], *, with_values: bool = True) -> tuple[Tensor, ...]:
        """Log-probabilities, entropies and values of the completion tokens, each (B, T) fp32, zero in the padding."""
        mask, prompt_lengths, input_ids = micro["mask"], micro["prompt_lengths"], micro["input_ids"]
        unwrapped = self.accelerator.unwrap_model(model)
        hidden = completion_hidden_states(model, unwrapped, input_ids, prompt_lengths, mask)
        rows, steps = mask.nonzero(as_tuple=True)
        logprobs, entropies = chunked_logprobs(
            hidden,
            unwrapped.get_output_embeddings(),
            input_ids[rows, prompt_lengths[rows] + steps],
            temperature=self.args.temperature,
            softcap=final_softcap(unwrapped),
            chunk_size=self.args.logprobs_chunk_size,
            entropy_requires_grad=self.args.entropy_coef != 0,
        )
        outputs = [logprobs, entropies, self.value_head(hidden).squeeze(-1)] if with_values else [logprobs, entropies]
        return tuple(scatter_to_mask(output, mask) for output in outputs)

    def _mixed_precision(self):
        return mixed_precision(self.model, autocast_dtype(self.args))

    # ---- Logging ----

    def _record(self, name: str, value: Tensor | float, count: float = 1.0) -> None:
        """Adds `value` to the mean that the next log reports under `name`; `count` is its weight in that mean."""
        self._sums[name] += value.detach() if isinstance(value, Tensor) else value
        self._counts[name] += count

    def _record_rollout(self, stats, per_func, scores, stopped, kl, returns) -> None:
        """The rollout's figures, under the names of TRL's last PPO trainer (`metrics.names` has units)."""
        mask, lengths, logprobs, ref = stats["mask"], stats["lengths"], stats["logprobs"], stats["ref_logprobs"]
        n = len(lengths)
        non_score = -self.kl_coef * masked_mean(kl, mask, n)
        figures = {
            "objective/kl": masked_mean(kl_k1(logprobs, ref), mask, n),
            "objective/kl_k3": masked_mean(kl_k3(logprobs, ref), mask, n),
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": masked_mean(stats["entropies"], mask, n),
            "objective/non_score_reward": non_score,
            "objective/scores": scores.mean(),
            "objective/rlhf_reward": self._shaped(scores, stopped).mean() + non_score,
            "val/num_eos_tokens": stopped.sum(),
            "val/explained_variance": explained_variance(stats["values"], returns, mask),
            "completions/mean_length": lengths.float().mean(),
            "completions/stopped_frac": stopped.float().mean(),
            "episode": self._micro_step // self.args.num_ppo_epochs * self.args.per_device_train_batch_size + n,
        }
        for i, name in enumerate(self.rewards.names):
            given = per_func[:, i][~per_func[:, i].isnan()]
            if len(given):
                figures[f"rewards/{name}/mean"] = given.mean()
                figures[f"rewards/{name}/std"] = given.std(correction=0)
        for name, value in figures.items():
            self._record(name, value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; evaluation and the summary at the end carry their own figures
            logs |= {name: float(total) / self._counts[name] for name, total in self._sums.items()}
            logs["lr_value"] = self.optimizer.param_groups[-1]["lr"]
            self._sums.clear()
            self._counts.clear()
            if self.args.log_completions and self._sample is not None and self.is_world_process_zero():
                self._print_sample(**self._sample)
                self._sample = None
        super().log(logs, start_time)

    def _print_sample(self, examples: list[dict], completion_ids: list[list[int]], per_func: Tensor) -> None:
        print_prompt_completions_sample(
            [example["prompt"] for example in examples],
            [decode_completion(self.processing_class, ids) for ids in completion_ids],
            {name: per_func[:, i].tolist() for i, name in enumerate(self.rewards.names)},
            None,
            self.state.global_step,
            self.args.num_completions_to_print,
        )

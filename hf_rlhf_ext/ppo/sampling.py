"""The rollout stage of `PPOTrainer`: completions are sampled, judged, scored by every role, and made advantages."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from ..data.text import decode_completion
from ..modeling.adapters import autocast_dtype, evaluating, merged_adapter, mixed_precision
from ..modeling.logprobs import chunked_logprobs, final_softcap, scatter_to_mask
from .advantages import completion_mask, generalized_advantages, token_rewards, whiten
from .batching import budget_chunks, concat_rows
from .kl import KL_ESTIMATORS, adapted_kl_coef, kl_k1
from .losses import importance_weights, masked_mean
from .rollout import Rollout, generate_completions, pack_sequences, prompt_indices, sampling_config
from .scoring import RewardFunctions, Scores, extra_columns
from .shaping import length_penalty


class RolloutMixin:
    """Rollouts for `PPOTrainer`."""

    @torch.no_grad()
    def _make_rollout(self) -> Rollout:
        """Samples completions, scores them, and computes everything that the inner epochs need.

        With several processes each samples its share, and all hold the whole rollout: whitening and mini-batches are
        those of one process with as many completions.
        """
        args = self.args
        data = self._gathered(self._sample())
        mask, lengths = data["mask"], data["completion_lengths"]
        ref_logprobs = data.get("ref_logprobs", data["logprobs"])
        kl = KL_ESTIMATORS[args.estimator](data["logprobs"], ref_logprobs)
        in_reward = self.kl_coef if args.kl_placement == "reward" else 0.0
        scores = self._shaped(data)
        dense = args.reward_scale * data["dense"] if "dense" in data else None
        rewards = token_rewards(scores, kl, lengths, kl_coef=in_reward, dense=dense)
        advantages, returns = generalized_advantages(
            rewards, data["values"], mask, gamma=args.gamma, gae_lambda=args.gae_lambda
        )
        self._record_rollout(data, scores, kl, returns)
        if args.kl_target is not None:
            mean_kl = masked_mean(kl_k1(data["logprobs"], ref_logprobs), mask, len(lengths)).item()
            n, horizon = len(lengths), args.kl_horizon or 10 * len(lengths)
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, mean_kl, kl_target=args.kl_target, kl_horizon=horizon, n_sequences=n
            )
        weights = None
        if args.importance_sampling_correction:
            weights = importance_weights(
                data["logprobs"], data["sampled_logprobs"], mask, cap=args.importance_sampling_cap
            )
        return Rollout(
            input_ids=data["input_ids"],
            prompt_lengths=data["prompt_lengths"],
            completion_lengths=lengths,
            old_logprobs=data["logprobs"],
            ref_logprobs=ref_logprobs,
            values=data["values"],
            advantages=whiten(advantages, mask) if args.whiten_advantages else advantages,
            returns=returns,
            order=self._orders(len(lengths)).to(mask.device),
            sampling_weights=weights,
        )

    def _sample(self) -> dict[str, Tensor]:
        """This process's completions as tensors: ids and lengths, scores, and what every role makes of their tokens."""
        size, processes, here = self.args.rollout_size, self.accelerator.num_processes, self.accelerator.process_index
        rows = prompt_indices(self._rollouts, size * processes, len(self._train_prompts), self.args.seed)
        rows = rows[here * size : (here + 1) * size]
        examples = [self.train_dataset[row] for row in rows]
        prompt_ids = [self._train_prompts[row] for row in rows]
        completion_ids, sampled = self._generate(prompt_ids)
        extra, log_extra = extra_columns(len(examples))
        scores = self._score(self.rewards, examples, completion_ids, log_metric=self._observe, log_extra=log_extra)
        data = self._rescore(prompt_ids, completion_ids, reference=self._needs_reference)
        device = data["logprobs"].device
        data["stopped"] = torch.tensor([ids[-1] in self._stop_ids for ids in completion_ids], device=device)
        data["sampled_logprobs"] = torch.zeros_like(data["logprobs"]).masked_scatter(
            data["mask"], torch.tensor([value for row in sampled for value in row], device=device)
        )
        data |= {"per_func": scores.per_func, "scores": self.rewards.combine(scores.per_func)}
        data["sequence"] = scores.sequence
        if scores.dense is not None or processes > 1:  # another process may have token rewards
            data["dense"] = torch.zeros_like(data["logprobs"]) if scores.dense is None else scores.dense
        self._completions = {"examples": examples, "completion_ids": completion_ids, "per_func": scores.per_func}
        self._completions["extra"] = extra
        return data

    def _gathered(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all processes, in the order of their ranks."""
        if self.accelerator.num_processes == 1:
            return data
        parts = gather_object([{name: tensor.cpu() for name, tensor in data.items()}])
        merged = concat_rows(parts, self.processing_class.pad_token_id)
        return {name: tensor.to(self.accelerator.device) for name, tensor in merged.items()}

    def _orders(self, size: int) -> Tensor:
        """(epochs, size) permutations of the inner epochs, the same on every process."""
        orders = torch.stack([torch.randperm(size) for _ in range(self.args.num_ppo_epochs)])
        if self.accelerator.num_processes > 1:
            orders = gather_object([orders])[0]
        return orders

    def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Completions, and the log-probabilities under which their tokens were drawn."""
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
        batch = args.generation_batch_size or len(prompt_ids)
        completion_ids: list[list[int]] = [[]] * len(prompt_ids)
        sampled: list[list[float]] = [[]] * len(prompt_ids)
        order = range(len(prompt_ids))
        if batch < len(prompt_ids):
            order = sorted(order, key=lambda row: -len(prompt_ids[row]))
        with (
            evaluating(self.policy),  # eval mode: gradient checkpointing and dropout are off, the cache works
            merged_adapter(self.policy, enabled=args.merge_for_generation),
            self._mixed_precision(),
        ):
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                found = generate_completions(
                    self.policy, [prompt_ids[row] for row in rows], config, self.accelerator.device
                )
                for row, ids, logprobs in zip(rows, *found, strict=True):
                    completion_ids[row], sampled[row] = ids, logprobs
        return completion_ids, sampled

    def _score(
        self, rewards: RewardFunctions, examples: list[dict], completion_ids: list[list[int]], **extra: Any
    ) -> Scores:
        """What the reward functions say of completions, as text, or as messages where prompts are messages."""
        prompts = [example["prompt"] for example in examples]
        texts = [decode_completion(self.processing_class, ids) for ids in completion_ids]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {key: [example[key] for example in examples] for key in examples[0] if key != "prompt"}
        return rewards.score(
            prompts,
            completions,
            completion_ids=completion_ids,
            trainer_state=self.state,
            **{key: value for key, value in columns.items() if key not in ("completion", "completion_ids")},
            **extra,
        ).to(self.accelerator.device)

    def _shaped(self, data: dict[str, Tensor]) -> Tensor:
        """Rewards (B,): scores after scale, normalisation, clip, and penalties for length and for no stop token."""
        args = self.args
        scores = data["sequence"] * args.reward_scale
        if args.normalize_rewards:
            self.reward_moments = self.reward_moments.update(scores)
            scores = (scores - self.reward_moments.mean) / max(self.reward_moments.std, 1e-8)
        if args.reward_clip is not None:
            data["clipped"] = scores.abs() >= args.reward_clip
            scores = scores.clamp(-args.reward_clip, args.reward_clip)
        if args.length_penalty:
            scores = scores - length_penalty(data["completion_lengths"], args.length_penalty, args.length_target)
        return scores - (args.missing_eos_penalty or 0.0) * (~data["stopped"]).to(scores.dtype)

    # ---- What each role makes of the tokens ----

    @torch.no_grad()
    def _rescore(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], *, reference: bool
    ) -> dict[str, Tensor]:
        """Log-probabilities of policy and reference, entropies and values, by the training forward.

        Never the log-probabilities of `generate`: in bf16 they differ by up to 0.3 nats a token, and the first ratio
        must be 1.
        """
        device, args = self.accelerator.device, self.args
        input_ids, prompt_lengths, lengths = pack_sequences(
            prompt_ids, completion_ids, self.processing_class.pad_token_id, device
        )
        mask = completion_mask(lengths, int(lengths.max()))
        roles = ["policy", "value", *(["reference"] if reference else [])]
        names = ["logprobs", "entropies", "values", *(["ref_logprobs"] if reference else [])]
        data = {name: torch.zeros(mask.shape, device=device) for name in names}
        passes = len({self.stack.roles[role].adapter for role in roles}) if self._mixed_pass and self.stack.mixes else 1
        chunks = budget_chunks(
            (prompt_lengths + lengths).tolist(),
            max_rows=max(1, args.per_device_train_batch_size // passes),
            max_tokens=args.max_tokens_per_batch and max(1, args.max_tokens_per_batch // passes),
        )
        with evaluating(self.policy), self._mixed_precision():
            for chunk in chunks:
                rows = torch.tensor(chunk, device=device)
                width, length = int(lengths[rows].max()), int((prompt_lengths + lengths)[rows].max())
                part = {"input_ids": input_ids[rows, :length], "prompt_lengths": prompt_lengths[rows]}
                part["mask"] = mask[rows, :width]
                hidden = self.stack.hidden_states(roles, **part, mixed=self._mixed_pass)
                found = dict(zip(names, self._logprobs("policy", hidden["policy"], part), strict=False))
                found["values"] = self.stack.roles["value"].head(hidden["value"]).squeeze(-1)
                if reference:
                    found["ref_logprobs"] = self._logprobs("reference", hidden["reference"], part)[0]
                for name, values in found.items():
                    data[name][rows, :width] = scatter_to_mask(values, part["mask"])
        packed = {"input_ids": input_ids, "prompt_lengths": prompt_lengths, "completion_lengths": lengths}
        return data | packed | {"mask": mask}

    def _logprobs(self, role: str, hidden: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (N,) fp32 of the completion tokens, from a role's hidden states (N, H)."""
        model = self.stack.roles[role].model or self.stack.model
        rows, steps = batch["mask"].nonzero(as_tuple=True)
        return chunked_logprobs(
            hidden,
            self._output_head(role),
            batch["input_ids"][rows, batch["prompt_lengths"][rows] + steps],
            temperature=self.args.temperature,
            softcap=final_softcap(model),
            chunk_size=self.args.logprobs_chunk_size,
            entropy_requires_grad=self.args.entropy_coef != 0,
        )

    def _output_head(self, role: str) -> Callable[[Tensor], Tensor]:
        """Hidden states to logits of a role."""
        plain = (self.stack.roles[role].model or self.stack.model).get_output_embeddings()
        if not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in plain.modules()):
            return plain

        # Its adapter trains the head too.
        def head(hidden: Tensor) -> Tensor:
            with self.stack.activate(role) as model:
                return model.get_output_embeddings()(hidden)

        return head

    @property
    def _mixed_pass(self) -> bool:
        asked = self.args.mixed_pass
        return self.accelerator.device.type == "cuda" if asked is None else asked

    def _mixed_precision(self):
        return mixed_precision(self.policy, autocast_dtype(self.args))

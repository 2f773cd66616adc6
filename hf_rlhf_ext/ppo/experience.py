"""Makes rollouts: samples completions, scores them, and computes advantages."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from ..data.text import decode_completion
from ..modeling.embeddings import n_rows
from ..training.leaving import RandomState, agree_to_leave, at_once, check, may_be_left
from .advantages import (
    are_scores_equal,
    explained_variance,
    generalized_advantages,
    lambda_returns,
    leave_one_out_advantages,
    length_adaptive_lambda,
    token_rewards,
    whiten,
)
from .config import PPOConfig
from .engine import RolloutEngine, Samples, Sampling, TransformersEngine, sample_what_fits
from .engine_check import check_engine, checked_samples, takes_n
from .kl import KL_ESTIMATORS, kl_k1, kl_k3
from .losses import importance_weights, masked_mean
from .meter import metric_logger
from .prompts import Prompts, rows_from
from .ranks import Ranks
from .references import ReferenceScores, refuse_token_rewards
from .rewards import RewardFunctions, extra_columns, score_completions
from .roles import Roles
from .rollout import CompletionTable, Rollout, Sequences, pack_sequences
from .shaping import RunningMoments, ShapedScores, preference_as_reward, shape_scores, soft_overlong_penalty


@dataclass
class _Sampled:
    """B completions as tensors, of one process or of all processes.

    Names and shapes are those of `Rollout`. In addition: `mask` (B, T) bool; `entropies` and `sampled_logprobs` (B, T)
    fp32, in nats; `stopped` (B,) bool; `per_func` (B, F) scores of each reward function; `scores` (B,) their weighted
    sum; `sequence_scores` (B,) the weighted sum over functions that score whole completions; `dense` (B, T) token
    rewards; `overlong` (B,) from −1 to 0, see `soft_overlong_penalty`.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    mask: Tensor
    logprobs: Tensor
    entropies: Tensor
    sampled_logprobs: Tensor
    stopped: Tensor
    per_func: Tensor
    scores: Tensor
    sequence_scores: Tensor
    values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    dense: Tensor | None = None
    overlong: Tensor | None = None

    def over_all(self, ranks: Ranks, pad_token_id: int) -> "_Sampled":
        """The completions of all processes, in the order of the processes."""
        if ranks.alone:
            return self
        # Which tensors are present depends on the options only, so it is the same on all processes.
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return _Sampled(**ranks.gather_rows(present, pad_token_id))


@dataclass
class _Judged:
    """The completions of this process as a table, and what reward functions passed to `log_metric`."""

    table: CompletionTable
    logged: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class SamplingTools:
    """The objects that sample and score completions, in training and in evaluation.

    Attributes:
        roles: policy, reference, and critic if there is one.
        engine: samples completions.
        tokenizer: tokenizer of the policy.
        sampling: options of sampling.
        args: options of the run.
        ranks: the processes of the run.
    """

    roles: Roles
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    args: PPOConfig
    ranks: Ranks

    def __post_init__(self):
        check_engine(self.engine)

    def sync(self) -> None:
        """Updates the engine to the current policy. Call it once before several `sample` calls, as it may be slow."""
        self.engine.sync(self.roles.policy)

    def sample(self, prompt_ids: list[list[int]], n: int = 1) -> Samples:
        """Samples `n` completions per prompt from the policy at the last `sync`; those of a prompt are in a row.

        Raises:
            UserError: if the engine returns something that is not usable, see `checked_samples`.
        """
        if isinstance(self.engine, TransformersEngine):
            samples = sample_what_fits(self.engine, prompt_ids, self.sampling, n, self.roles.sizes)
        else:
            samples = self._sample_of_user(prompt_ids, n)
        token_rows = n_rows(self.roles.policy)
        return checked_samples(samples, prompt_ids, self.sampling, token_rows=token_rows, engine=self.engine, n=n)

    def _sample_of_user(self, prompt_ids: list[list[int]], n: int) -> Samples:
        # An engine of the user may take minutes in one call. Ours leaves the rollout itself, between two tokens.
        with at_once():
            if n == 1:  # it need not take `n`
                return self.engine.generate(prompt_ids, self.sampling)
            if takes_n(self.engine):
                return self.engine.generate(prompt_ids, self.sampling, n=n)
            return self.engine.generate([ids for ids in prompt_ids for _ in range(n)], self.sampling)

    def pack(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], per_prompt: int = 1) -> Sequences:
        """Prompts, one for each completion, and completions as one batch on the device of this process."""
        pad_token_id = self.tokenizer.pad_token_id
        return pack_sequences(prompt_ids, completion_ids, pad_token_id, self.ranks.device, per_prompt)

    def is_stopped(self, completion_ids: list[int]) -> bool:
        """Whether a completion ends with a stop token or a stop string, rather than at the maximum length."""
        return self.sampling.is_stopped(completion_ids)


class ExperienceMaker:
    """Makes rollouts. It has no state: a rollout depends on the arguments of `make` only.

    What it remembers of reference answers would be the same if it were computed again.

    Args:
        tools: the objects that sample and score completions.
        rewards: the reward functions.
        prompts: the prompts of the training data.
    """

    def __init__(self, tools: SamplingTools, rewards: RewardFunctions, prompts: Prompts):
        self.tools = tools
        self.rewards = rewards
        self.prompts = prompts
        self.args = tools.args
        self.ranks = tools.ranks
        self.references = ReferenceScores(tools, rewards, prompts) if self.args.reward_shaping == "par" else None

    @property
    def needs_reference(self) -> bool:
        """Whether rollouts need the log-probabilities of the reference."""
        return self.args.kl_coef > 0 or self.args.max_kl is not None

    @torch.no_grad()
    def make(
        self,
        first_prompt: int,
        kl_coef: float,
        moments: RunningMoments,
        trainer_state: TrainerState,
        *,
        completions_before: int,
        critic_only: bool = False,
    ) -> Rollout:
        """Samples completions, scores them, and computes everything that the passes over the rollout need.

        With several processes, each process samples its share and all processes then hold the whole rollout. Whitening
        and mini-batches are therefore the same as on one process with the same number of completions.

        Args:
            first_prompt: position of its first prompt, see `stretch.Stretch`.
            kl_coef: current KL coefficient β, reward per nat.
            moments: running moments of the scores of earlier rollouts.
            trainer_state: state of the trainer, which reward functions get.
            completions_before: number of completions of all earlier rollouts.
            critic_only: whether the rollout trains the critic only. Its returns are then those of λ = 1.

        Returns:
            The rollout.

        Raises:
            UserError: see `RewardFunctions.score`.
            PartLeft: if a signal asks training to stop.
        """
        args = self.args
        # 0. Sample this process's share of the completions, then gather those of all processes.
        own, judged = self._sample_alike(first_prompt, trainer_state)
        references = None
        if self.references is not None:
            references = self.references.of(self._rows(first_prompt), trainer_state)
        sampled = own.over_all(self.ranks, self.tools.tokenizer.pad_token_id)
        mask = sampled.mask
        lengths = sampled.completion_lengths

        # 1. Turn scores into rewards per token, minus β·KL if the KL penalty is part of the reward.
        ref_logprobs = sampled.logprobs if sampled.ref_logprobs is None else sampled.ref_logprobs
        kl = KL_ESTIMATORS[args.estimator](sampled.logprobs, ref_logprobs)
        shaped = self._shaped(sampled, moments, references)
        dense = None if sampled.dense is None else args.reward_scale * sampled.dense
        kl_coef_in_reward = kl_coef if args.kl_placement == "reward" else 0.0
        rewards = token_rewards(shaped.scores, kl, lengths, kl_coef=kl_coef_in_reward, dense=dense)

        # 2. Turn rewards into advantages, whitened over the completions of all processes.
        advantages, returns = self._advantages(rewards, sampled, critic_only=critic_only)
        if args.whiten_advantages:
            advantages = whiten(advantages, self._loss_mask(sampled))
        metrics = self._metrics(completions_before, kl_coef, sampled, shaped, kl, returns)
        metrics |= self._metrics_of_shaping(sampled, references)
        weights = None
        if args.importance_sampling_correction:
            weights = importance_weights(
                sampled.logprobs, sampled.sampled_logprobs, mask, cap=args.importance_sampling_cap
            )
        return Rollout(
            input_ids=sampled.input_ids,
            prompt_lengths=sampled.prompt_lengths,
            completion_lengths=lengths,
            old_logprobs=sampled.logprobs,
            ref_logprobs=ref_logprobs,
            values=sampled.values,
            advantages=advantages,
            returns=returns,
            order=self._orders(len(lengths)).to(mask.device),
            sampling_weights=weights,
            metrics=metrics,
            moments=shaped.moments,
            logged=judged.logged,
            completions=judged.table,
            sampled_logprobs=sampled.sampled_logprobs,
            per_prompt=args.num_generations,
            counted=self._counted(sampled),
        )

    def _rows(self, first_prompt: int) -> list[int]:
        """The row of the prompt of each completion in a rollout of all processes.

        Those of a prompt are next to each other, as in TRL.
        """
        rows = rows_from(
            first_prompt,
            self.args.prompts_per_rollout * self.ranks.count,
            len(self.prompts),
            self.args.prompt_seed,
            shuffled=self.args.train_sampling_strategy == "random",
        )
        return [row for row in rows for _ in range(self.args.num_generations)]

    def _sample_alike(self, first_prompt: int, trainer_state: TrainerState) -> tuple[_Sampled, _Judged]:
        """`_sample` with the same batch sizes on all processes."""
        roles = self.tools.roles
        before = RandomState.now(self.ranks.device)
        while True:
            # With shards, the other processes would wait for one that leaves alone.
            with may_be_left("rollout", when=not roles.sharding.is_sharded), roles.sharding.inference():
                own, judged = self._sample(first_prompt, trainer_state)
            agree_to_leave()
            if not roles.sizes.agree():
                return own, judged
            before.restore()  # memory has run out on another process

    def _sample(self, first_prompt: int, trainer_state: TrainerState) -> tuple[_Sampled, _Judged]:
        """The completions of this process, with their scores and what each role computes for their tokens."""
        ranks = self.ranks
        per_prompt = self.args.num_generations
        rows = self._rows(first_prompt)
        own_rows = [rows[k] for k in ranks.block(len(rows))]  # whole prompts, as each process has equally many
        examples, prompt_ids = self.prompts.rows(own_rows)

        self.tools.sync()
        samples = self.tools.sample(prompt_ids[::per_prompt], n=per_prompt)

        further, log_extra = extra_columns(len(examples))
        logged: list[tuple[str, float]] = []
        scores = score_completions(
            self.rewards,
            self.tools.tokenizer,
            examples,
            samples.ids,
            prompt_ids,
            per_prompt=per_prompt,
            trainer_state=trainer_state,
            log_metric=metric_logger(lambda name, value: logged.append((name, value)), self.rewards.names),
            log_extra=log_extra,
        ).to(ranks.device)
        if self.references is not None:
            refuse_token_rewards(scores)
        check()

        sequences = self.tools.pack(prompt_ids, samples.ids, per_prompt)
        scored = self.tools.roles.score(sequences, reference=self.needs_reference)
        mask = sequences.mask
        dense = scores.dense
        if dense is None and not ranks.alone:  # another process may have token rewards
            dense = torch.zeros_like(scored.logprobs)
        sampled = _Sampled(
            input_ids=sequences.input_ids,
            prompt_lengths=sequences.prompt_lengths,
            completion_lengths=sequences.completion_lengths,
            mask=mask,
            logprobs=scored.logprobs,
            entropies=scored.entropies,
            values=scored.values,
            ref_logprobs=scored.ref_logprobs,
            sampled_logprobs=self._drawn_logprobs(samples.logprobs, mask, scored.logprobs),
            stopped=torch.tensor([self.tools.is_stopped(ids) for ids in samples.ids], device=ranks.device),
            per_func=scores.per_func,
            scores=self.rewards.combine(scores.per_func),
            sequence_scores=scores.sequence,
            dense=dense,
            overlong=self._overlong(samples.ids),
        )
        table = CompletionTable(
            prompts=[example["prompt"] for example in examples],
            completions=[decode_completion(self.tools.tokenizer, ids) for ids in samples.ids],
            rewards={name: scores.per_func[:, i].tolist() for i, name in enumerate(self.rewards.names)},
            further=further,
        )
        return sampled, _Judged(table, logged)

    @staticmethod
    def _drawn_logprobs(rows: list[list[float]] | None, mask: Tensor, rescored: Tensor) -> Tensor:
        """The engine's log-probabilities as (B, T), zero in the padding; `rescored` if the engine returned none."""
        if rows is None:
            return rescored
        flat = torch.tensor([value for row in rows for value in row], device=mask.device)
        return torch.zeros_like(rescored).masked_scatter(mask, flat)

    def _overlong(self, completion_ids: list[list[int]]) -> Tensor | None:
        """(B,) the soft overlong penalty of completions, before its weight; `None` without one."""
        zone = self.args.soft_overlong_tokens
        if zone is None:
            return None
        return soft_overlong_penalty(completion_ids, self.args.max_completion_length, zone).to(self.ranks.device)

    def _counted(self, sampled: _Sampled) -> Tensor | None:
        """(B,) which completions losses count; `None` for all."""
        return sampled.stopped if self.args.mask_truncated_completions else None

    def _loss_mask(self, sampled: _Sampled) -> Tensor:
        """(B, T) True for emitted tokens of completions that losses count."""
        counted = self._counted(sampled)
        return sampled.mask if counted is None else sampled.mask & counted[:, None]

    def _shaped(self, sampled: _Sampled, moments: RunningMoments, references: Tensor | None) -> ShapedScores:
        args = self.args
        scores = sampled.sequence_scores
        if references is not None:
            scores = preference_as_reward(scores, references)
        return shape_scores(
            scores,
            sampled.completion_lengths,
            sampled.stopped,
            moments,
            scale=args.reward_scale,
            normalize=args.normalize_rewards,
            clip=args.reward_clip,
            price_per_token=args.length_penalty,
            free_tokens=args.length_target,
            missing_eos_penalty=args.missing_eos_penalty,
            overlong=sampled.overlong,
            overlong_weight=args.soft_overlong_weight,
        )

    def _advantages(self, rewards: Tensor, sampled: _Sampled, *, critic_only: bool) -> tuple[Tensor, Tensor | None]:
        """Advantages (B, T), and what the critic learns: returns (B, T), or `None` without a critic."""
        args = self.args
        if sampled.values is None:
            counted = self._counted(sampled)
            per_prompt = args.num_generations
            return leave_one_out_advantages(rewards, sampled.mask, per_prompt=per_prompt, counted=counted), None
        gae_lambda = args.gae_lambda
        value_lambda = args.value_gae_lambda
        if args.length_adaptive_lambda is not None:
            gae_lambda = length_adaptive_lambda(sampled.completion_lengths, args.length_adaptive_lambda)
            if value_lambda is None:
                value_lambda = args.gae_lambda
        if critic_only:
            value_lambda = 1.0
        advantages, returns = generalized_advantages(
            rewards, sampled.values, sampled.mask, gamma=args.gamma, gae_lambda=gae_lambda
        )
        if value_lambda is not None:
            returns = lambda_returns(rewards, sampled.values, sampled.mask, gamma=args.gamma, gae_lambda=value_lambda)
        return advantages, returns

    def _orders(self, size: int) -> Tensor:
        """(epochs, size) int64: the order of the rows in each pass over the rollout, the same on every process.

        Prompts are put in a random order. The completions of a prompt stay together, as they pass through the model
        together.

        The orders are drawn from PyTorch's global random state, which a checkpoint stores. Those of the current rollout
        are saved with it.
        """
        per_prompt = self.args.num_generations
        groups = torch.stack([torch.randperm(size // per_prompt) for _ in range(self.args.num_ppo_epochs)])
        orders = (groups[..., None] * per_prompt + torch.arange(per_prompt)).flatten(1)
        return self.ranks.gather(orders)[0]

    def _metrics(
        self,
        completions_before: int,
        kl_coef: float,
        sampled: _Sampled,
        shaped: ShapedScores,
        kl: Tensor,
        returns: Tensor | None,
    ) -> dict[str, float | Tensor]:
        """The metrics of a rollout. Names are those of TRL's last PPO trainer; `metrics.names` has their units."""
        mask = sampled.mask
        lengths = sampled.completion_lengths
        scores = sampled.scores
        n = len(lengths)
        # Sums over tokens, divided by the number of completions: per completion, like the KL target.
        non_score_reward = -kl_coef * masked_mean(kl, mask, n)
        metrics = {
            "objective/kl_coef": kl_coef,
            "objective/entropy": masked_mean(sampled.entropies, mask, n),
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(correction=0),
            "objective/rlhf_reward": shaped.scores.mean() + non_score_reward,
            "objective/non_score_reward": non_score_reward,
            "val/num_eos_tokens": sampled.stopped.sum(),
            "completions/mean_length": lengths.float().mean(),
            "completions/stopped_frac": sampled.stopped.float().mean(),
            "sampling/logprob_mismatch": masked_mean(sampled.sampled_logprobs - sampled.logprobs, mask),
            "episode": completions_before + n,
        }
        if sampled.values is not None:
            # Of the completions that the critic learns from.
            loss_mask = self._loss_mask(sampled)
            metrics["val/explained_variance"] = explained_variance(sampled.values, returns, loss_mask)
        if self.args.num_generations > 1:
            are_equal = are_scores_equal(scores, per_prompt=self.args.num_generations)
            metrics["frac_reward_zero_std"] = are_equal.float().mean()
        if sampled.ref_logprobs is not None:
            metrics["objective/kl"] = masked_mean(kl_k1(sampled.logprobs, sampled.ref_logprobs), mask, n)
            metrics["objective/kl_k3"] = masked_mean(kl_k3(sampled.logprobs, sampled.ref_logprobs), mask, n)
        if shaped.clipped is not None:
            metrics["rewards/clipped_frac"] = shaped.clipped.float().mean()
        for i, name in enumerate(self.rewards.names):
            column = sampled.per_func[:, i]
            scored = column[~column.isnan()]  # a function may return None if another one scores the completion
            if len(scored):
                metrics[f"rewards/{name}/mean"] = scored.mean()
                metrics[f"rewards/{name}/std"] = scored.std(correction=0)
        return metrics

    def _metrics_of_shaping(self, sampled: _Sampled, references: Tensor | None) -> dict[str, Tensor]:
        """The metrics of options that shape scores, or leave completions out of the losses."""
        metrics = {}
        if references is not None:
            metrics["objective/par"] = preference_as_reward(sampled.sequence_scores, references).mean()
            metrics["objective/reference_scores"] = references.nanmean(dim=1).mean()
        if sampled.overlong is not None:
            metrics["objective/overlong_penalty"] = self.args.soft_overlong_weight * sampled.overlong.mean()
        counted = self._counted(sampled)
        if counted is not None:
            metrics["completions/masked_frac"] = 1.0 - counted.float().mean()
        return metrics

"""Evaluation during and after PPO: completions for a fixed set of prompts, sampled with a fixed seed."""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

import torch
from transformers import TrainerState

from ..data.text import decode_completion
from ..modeling.probing import unchanged_random_state
from ..reward.ensemble import RewardEnsemble
from ..reward.scorer import RewardScorer
from ..training.bars import progress_bar
from ..training.leaving import agree_to_leave, check, may_be_left
from .config import PPOConfig
from .experience import SamplingTools
from .kl import kl_k1, kl_k3
from .meter import metric_logger
from .prompts import Prompts
from .rewards import RewardFunctions, extra_columns, score_completions

METRIC_FAMILIES = ("objective/", "completions/")
"""Prefixes of metrics of evaluations that no reward function logs."""


@dataclass
class EvaluatedCompletion:
    """One completion that an evaluation sampled, with its rewards and its KL.

    Attributes:
        prompt: the prompt, as text or as messages.
        completion: the completion, as text.
        score: weighted sum of the training rewards.
        rewards: score of each reward function by its name, including those of evaluation only.
        kl: k1 estimate of KL(policy ‖ reference), in nats, summed over the tokens.
        kl_k3: k3 estimate of the same.
        n_tokens: number of tokens, including the stop token.
        stopped: whether the completion ends with a stop token.
        completion_ids: token ids of the completion.
        logged: what reward functions passed to `log_metric`, averaged over the batch of this completion.
        extra: what reward functions passed to `log_extra`.
        prompt_ids: token ids of the prompt.
    """

    prompt: str | list
    completion: str
    score: float
    rewards: dict[str, float]
    kl: float
    kl_k3: float
    n_tokens: int
    stopped: bool
    completion_ids: list[int] = field(default_factory=list, repr=False)
    logged: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[int] = field(default_factory=list, repr=False)


@dataclass
class _Judged:
    """Scores of a batch of completions: weighted sums, the scores of each function, and what functions logged."""

    scores: list[float] = field(default_factory=list)
    by_function: dict[str, list[float]] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    further: dict[str, list[Any]] = field(default_factory=dict)


class Evaluator:
    """Samples completions from the current policy and scores them.

    Args:
        tools: the objects that sample and score completions, the same as in training.
        rewards: the reward functions of training.
        eval_rewards: reward functions that only evaluation uses; `None` for none.
    """

    def __init__(self, tools: SamplingTools, rewards: RewardFunctions, eval_rewards: RewardFunctions | None):
        self.tools = tools
        self.rewards = rewards
        self.eval_rewards = eval_rewards
        self.args = tools.args
        self.ranks = tools.ranks

    def sample_and_score(
        self, prompts: Prompts, trainer_state: TrainerState, *, seed: int | None = None
    ) -> list[EvaluatedCompletion]:
        """Samples one completion per prompt and scores it. The random state of training does not change.

        Args:
            prompts: the prompts of the evaluation set.
            trainer_state: state of the trainer, which reward functions get.
            seed: seed of the sampling. `None` means `args.seed`, so that two policies are compared with the same random
                numbers.

        Returns:
            The completions of all processes, in the order of the prompts.

        Raises:
            PartLeft: if a signal asks training to stop.
        """
        device = self.ranks.device
        rows: list[EvaluatedCompletion] = []
        own = self.ranks.block(len(prompts))
        self.tools.sync()
        with unchanged_random_state(device):
            torch.manual_seed((self.args.seed if seed is None else seed) + self.ranks.index)
            size = self.args.per_device_eval_batch_size
            starts = range(0, len(own), size)
            sharding = self.tools.roles.sharding
            missing = sharding.most(len(starts)) - len(starts)
            # With shards, the other processes would wait for one that leaves alone, or that has fewer batches.
            may_leave = may_be_left("evaluation", when=not sharding.is_sharded)
            with may_leave, sharding.inference(), progress_bar("evaluation", len(starts)) as advance:
                for start in starts:
                    examples, prompt_ids = prompts.rows(own[start : start + size])
                    rows += self._evaluate_batch(examples, prompt_ids, trainer_state)
                    advance(1)
                    check()
                for _ in range(missing):
                    self._join_batch(prompts.rows(range(1))[1])
            agree_to_leave()
        self.tools.roles.sizes.agree()  # what was evaluated stays; the next step begins with the same sizes
        return self.ranks.concatenate(rows)

    def _evaluate_batch(
        self, examples: list[dict[str, Any]], prompt_ids: list[list[int]], trainer_state: TrainerState
    ) -> list[EvaluatedCompletion]:
        completion_ids = self.tools.sample(prompt_ids).ids
        judged = self._judge(examples, prompt_ids, completion_ids, trainer_state)

        scored = self.tools.roles.score(self.tools.pack(prompt_ids, completion_ids), reference=True)
        # Both log-probabilities are zero in the padding, so the estimates are zero there too.
        kl = kl_k1(scored.logprobs, scored.ref_logprobs).sum(1).tolist()
        k3 = kl_k3(scored.logprobs, scored.ref_logprobs).sum(1).tolist()

        rows = []
        for i, ids in enumerate(completion_ids):
            row = EvaluatedCompletion(
                prompt=examples[i]["prompt"],
                completion=decode_completion(self.tools.tokenizer, ids),
                score=judged.scores[i],
                rewards={name: values[i] for name, values in judged.by_function.items()},
                kl=kl[i],
                kl_k3=k3[i],
                n_tokens=len(ids),
                stopped=self.tools.is_stopped(ids),
                prompt_ids=prompt_ids[i],
                completion_ids=ids,
                logged=dict(judged.logged),
                extra={name: values[i] for name, values in judged.further.items()},
            )
            rows.append(row)
        return rows

    def _join_batch(self, prompt_ids: list[list[int]]) -> None:
        """Takes part in the passes of a batch that other processes evaluate. No function of the user is called."""
        completion_ids = self.tools.sample(prompt_ids).ids
        for rewards in (self.rewards, self.eval_rewards):
            for scorer in rewards.scorers_on(self.tools.roles.policy) if rewards is not None else ():
                scorer.score_ids([])
        self.tools.roles.score(self.tools.pack(prompt_ids, completion_ids), reference=True)

    def _judge(
        self,
        examples: list[dict[str, Any]],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        trainer_state: TrainerState,
    ) -> _Judged:
        """Scores a batch with the reward functions of training and of evaluation."""
        logged: dict[str, list[float]] = defaultdict(list)
        further, log_extra = extra_columns(len(examples))
        judged = _Judged(further=further)
        names = list(self.rewards.names)
        if self.eval_rewards is not None:
            names += self.eval_rewards.names
        log_metric = metric_logger(lambda name, value: logged[name].append(value), names)
        for rewards in (self.rewards, self.eval_rewards):
            if rewards is None:
                continue
            per_func = score_completions(
                rewards,
                self.tools.tokenizer,
                examples,
                completion_ids,
                prompt_ids,
                trainer_state=trainer_state,
                log_metric=log_metric,
                log_extra=log_extra,
            ).per_func
            for i, name in enumerate(rewards.names):
                judged.by_function[name] = per_func[:, i].tolist()
            if rewards is self.rewards:
                judged.scores = rewards.combine(per_func).tolist()
        judged.logged = {name: fmean(values) for name, values in logged.items()}
        return judged

    def exact_kl(self, rows: list[EvaluatedCompletion]) -> float | None:
        """Exact KL(policy ‖ reference) of the first `exact_kl_rows` completions, to check the estimates.

        Args:
            rows: completions that were evaluated.

        Returns:
            The mean in nats per completion, computed over the whole vocabulary at every token; `None` if
            `exact_kl_rows` is 0 or there are no completions.
        """
        checked = rows[: self.args.exact_kl_rows]
        if not checked:
            return None
        sequences = self.tools.pack([row.prompt_ids for row in checked], [row.completion_ids for row in checked])
        return self.tools.roles.exact_kl(sequences) / len(checked)


def metric_names(rewards: RewardFunctions, eval_rewards: RewardFunctions | None, args: PPOConfig) -> list[str]:
    """The names of the metrics of every evaluation, without what reward functions log.

    Args:
        rewards: the reward functions of training.
        eval_rewards: reward functions that only evaluation uses; `None` for none.
        args: the options.
    """
    names = ["objective/scores", "objective/scores_std", "objective/kl", "objective/kl_k3"]
    names += ["completions/mean_length", "completions/stopped_frac", "runtime"]
    if args.exact_kl_rows:
        names.append("objective/kl_exact")
    functions = list(rewards.names)
    if eval_rewards is not None:
        functions += eval_rewards.names
    for name in functions:
        names += [f"rewards/{name}/mean", f"rewards/{name}/std"]
    return names


def may_log_more(rewards: RewardFunctions, eval_rewards: RewardFunctions | None) -> bool:
    """Whether there is a function that may log further metrics; reward models log none."""
    functions = [*rewards.funcs, *(eval_rewards.funcs if eval_rewards is not None else [])]
    return any(not isinstance(function, RewardScorer | RewardEnsemble) for function in functions)


def summarize(rows: list[EvaluatedCompletion]) -> dict[str, float]:
    """Means and standard deviations over completions, under the names that training logs.

    Args:
        rows: completions that were evaluated, at least one.
    """
    means = {
        "objective/scores": fmean(row.score for row in rows),
        "objective/kl": fmean(row.kl for row in rows),
        "objective/kl_k3": fmean(row.kl_k3 for row in rows),
        "completions/mean_length": fmean(row.n_tokens for row in rows),
        "completions/stopped_frac": fmean(row.stopped for row in rows),
    }
    means["objective/scores_std"] = pstdev(row.score for row in rows)
    for name in rows[0].rewards:
        scored = [row.rewards[name] for row in rows if row.rewards[name] == row.rewards[name]]  # NaN: not scored
        means[f"rewards/{name}/mean"] = fmean(scored) if scored else float("nan")
        means[f"rewards/{name}/std"] = pstdev(scored) if scored else float("nan")
    logged_names = dict.fromkeys(name for row in rows for name in row.logged)
    for name in logged_names:
        means[name] = fmean(row.logged[name] for row in rows if name in row.logged)
    return means

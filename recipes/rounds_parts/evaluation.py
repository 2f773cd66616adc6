"""Evaluation of a round's policy: completions of held-out prompts, KL to the SFT policy, rewards and win rates."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rlhf_ext import load_policy
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.text import decode_completion, encode_generation_prompt, plain_text
from hf_rlhf_ext.modeling.logprobs import (
    chunked_logprobs,
    completion_hidden_states,
    logit_transform,
    scatter_to_mask,
)
from hf_rlhf_ext.modeling.probing import evaluating
from hf_rlhf_ext.modeling.quantization import quantization_record
from hf_rlhf_ext.ppo.batching import budget_chunks
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine, stop_token_ids
from hf_rlhf_ext.ppo.rollout import pack_sequences
from hf_rlhf_ext.recipes.rounds_parts.data import Row, read_rows
from hf_rlhf_ext.reward.preference_metrics import bootstrap_mean_ci
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.study.judgments import are_same
from hf_rlhf_ext.study.judgments import as_read as as_on_page

Policy = PreTrainedModel | PeftModel


class PolicyEvaluator:
    """Samples held-out completions of policies, and scores them under the SFT policy.

    Args:
        sft: name of the SFT policy.
        revision: its revision on the Hub.
        base_options: options of `load_policy` for all policies, such as `dtype`.
        temperature: temperature of sampling, at which log-probabilities are computed too.
        max_new_tokens: maximum length of a completion.
        max_tokens: maximum number of tokens in a forward pass.
        seed: seed of sampling, the same for every policy.
    """

    def __init__(
        self,
        sft: str,
        *,
        revision: str | None,
        base_options: Mapping[str, Any],
        temperature: float,
        max_new_tokens: int,
        max_tokens: int,
        seed: int,
    ):
        self.sft = sft
        self.revision = revision
        self.base_options = base_options
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.max_tokens = max_tokens
        self.seed = seed

    def load(self, policy: str) -> tuple[Policy, PreTrainedTokenizerBase]:
        """Loads a policy for evaluation, to the GPU if there is one."""
        revision = self.revision if policy == self.sft else None
        model, tokenizer = load_policy(policy, revision=revision, **self.base_options)
        if torch.cuda.is_available() and quantization_record(model) is None:  # quantized weights are there already
            model.to("cuda")
        return model.eval(), tokenizer

    def completions(self, policy: str, prompts: Sequence[Row], path: Path) -> list[Row]:
        """One completion for each prompt: rows of `prompt`, `completion`, `n_tokens` and `kl`.

        `kl` is log π(completion) - log π_sft(completion) in nats, summed over the tokens; its mean over completions of
        the policy estimates KL(policy ‖ SFT). The rows are kept in `path`: a second call reads them.
        """
        if path.is_file():
            return read_rows(path)
        model, tokenizer = self.load(policy)
        prompt_ids = [encode_generation_prompt(tokenizer, row["prompt"]) for row in prompts]
        completion_ids = self._sample(model, tokenizer, prompt_ids)
        if policy == self.sft:
            kl = [0.0] * len(prompts)
        else:
            own = self.logprobs(model, tokenizer, prompt_ids, completion_ids)
            del model  # two models need twice the memory
            sft, tokenizer = self.load(self.sft)
            under_sft = self.logprobs(sft, tokenizer, prompt_ids, completion_ids)
            kl = [first - second for first, second in zip(own, under_sft, strict=True)]

        rows = []
        for prompt, ids, nats in zip(prompts, completion_ids, kl, strict=True):
            text = decode_completion(tokenizer, ids)
            completion = text if isinstance(prompt["prompt"], str) else [{"role": "assistant", "content": text}]
            rows.append(
                {
                    "prompt": prompt["prompt"],
                    "category": prompt.get("category"),
                    "completion": completion,
                    "n_tokens": len(ids),
                    "kl": nats,
                }
            )
        write_rows(rows, path)
        return rows

    def _sample(
        self, model: Policy, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]]
    ) -> list[list[int]]:
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_token_ids(tokenizer, model, None),
            pad_token_id=tokenizer.pad_token_id,
            temperature=self.temperature,
            batch_size=64,
        )
        engine = TransformersEngine()
        engine.sync(model)
        torch.manual_seed(self.seed)
        return engine.generate(prompt_ids, sampling).ids

    @torch.no_grad()
    def logprobs(
        self,
        model: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
    ) -> list[float]:
        """Log-probability of each completion in nats: the sum over its tokens, at the temperature of sampling."""
        sequences = pack_sequences(prompt_ids, completion_ids, tokenizer.pad_token_id, model.device)
        sums = [0.0] * len(prompt_ids)
        lengths = sequences.lengths.tolist()
        with evaluating(model):
            for chunk in budget_chunks(lengths, max_rows=64, max_tokens=self.max_tokens):
                part = sequences.select(torch.tensor(chunk, device=model.device))
                hidden = completion_hidden_states(model, model, part.input_ids, part.prompt_lengths, part.mask)
                logprobs, _ = chunked_logprobs(
                    hidden,
                    model.get_output_embeddings(),
                    part.targets(),
                    temperature=self.temperature,
                    transform=logit_transform(model),
                )
                of_rows = scatter_to_mask(logprobs, part.mask).sum(1).tolist()
                for row, value in zip(chunk, of_rows, strict=True):
                    sums[row] = value
        return sums


# --- numbers ---------------------------------------------------------------------------------------------------------


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of independent values, with its 95 % bootstrap interval."""
    return {"mean": fmean(values), "ci95": list(bootstrap_mean_ci(values)), "n": len(values)}


def paired_gain(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Mean gain over the same prompts, with its 95 % bootstrap interval. Prompts without a score are left out."""
    gains = []
    for first, second in zip(before, after, strict=True):
        if not math.isnan(first + second):  # NaN is the score of a reward that does not apply to a prompt
            gains.append(second - first)
    if not gains:
        return {"mean": math.nan, "ci95": [math.nan, math.nan], "n": 0}
    return mean_with_interval(gains)


def gold_scores(gold: Callable[..., Sequence[float | None]], rows: Sequence[Row]) -> list[float]:
    """Gold reward of each completion; NaN where it gives none."""
    prompts = [as_on_page(row["prompt"]) for row in rows]
    scores = gold(prompts, [plain_text(row["completion"]) for row in rows])
    return [math.nan if score is None else float(score) for score in scores]


def proxy_scores(reward_model: Path, of_policies: Mapping[str, Sequence[Row]]) -> dict[str, list[float]]:
    """The rewards that a reward model gives to the completions of each policy."""
    scorer = RewardScorer.from_pretrained(reward_model)
    scores = {}
    for policy, rows in of_policies.items():
        scores[policy] = scorer([row["prompt"] for row in rows], [row["completion"] for row in rows])
    return scores


def same_text(first: Row, second: Row) -> bool:
    """Whether two completions differ in white space at most. Such a pair is a tie that nobody needs to judge."""
    return are_same(first["completion"], second["completion"])


def pairs_by_policy(n_prompts: int, earlier: Sequence[str], n_pairs: int) -> dict[str, list[int]]:
    """Which prompts are judged against which earlier policy: `n_pairs` in all, the first prompts of each.

    They are spread evenly. What is left over goes to the last policies, which matter most.
    """
    chosen = {}
    left = n_pairs
    for position, policy in enumerate(earlier):
        n = min(n_prompts, left // (len(earlier) - position))
        chosen[policy] = list(range(n))
        left -= n
    return chosen


def win_rate(outcomes: Sequence[float]) -> dict[str, Any]:
    """Share of the prompts on which a policy wins, with its 95 % bootstrap interval.

    Args:
        outcomes: one value per prompt: P(the policy's completion is better), the mean over people. A tie is 0.5.
    """
    return mean_with_interval(outcomes)


def is_better(rate: Mapping[str, Any]) -> bool:
    """Whether a win rate is above one half by its interval."""
    return rate["ci95"][0] > 0.5

"""Answers of a policy to the held-out prompts, and its KL to the reference policy."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rlhf_ext import load_policy
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.text import decode_completion, encode_generation_prompt
from hf_rlhf_ext.modeling.quantization import quantization_record
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine, stop_token_ids
from hf_rlhf_ext.recipes.rounds_parts.data import Row, read_rows
from hf_rlhf_ext.recipes.rounds_parts.evaluation import Policy, PolicyEvaluator

BATCH_SIZE = 64
"""Completions in a batch of generation."""

Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Any]


class PinnedEvaluator(PolicyEvaluator):
    """A `PolicyEvaluator` that loads each model at its own revision.

    Args:
        revisions: revisions on the Hub, by the name of a model.
        options: arguments of `PolicyEvaluator`.
    """

    def __init__(self, sft: str, *, revisions: Mapping[str, str | None], **options: Any):
        super().__init__(sft, revision=revisions.get(sft), **options)
        self.revisions = revisions

    def load(self, policy: str) -> tuple[Policy, PreTrainedTokenizerBase]:
        """Loads a policy for evaluation, to the GPU if there is one."""
        model, tokenizer = load_policy(policy, revision=self.revisions.get(policy), **self.base_options)
        if torch.cuda.is_available() and quantization_record(model) is None:  # quantized weights are there already
            model.to("cuda")
        return model.eval(), tokenizer


class Answers:
    """Samples answers of policies to the same prompts, with the same tokenizer, seed, temperature and stop tokens.

    All policies are read with the tokenizer of the reference policy: a base model may have no chat template, and its
    answers are to the same tokens as those of the others.

    Args:
        evaluator: loads policies and computes log-probabilities. Its `sft` is the reference policy.
        prompts: the held-out prompts.
    """

    def __init__(self, evaluator: PolicyEvaluator, prompts: Sequence[Row]):
        self.evaluator = evaluator
        self.prompts = list(prompts)

    def of_policy(self, policy: str, path: Path, measure: Measure | None = None) -> tuple[list[Row], Any]:
        """One answer to each prompt: rows of `prompt`, `category`, `completion`, `ids`, `n_tokens` and `kl`.

        `kl` is log π(answer) - log π_reference(answer) in nats, summed over the tokens: the estimate k1, whose mean
        over answers of the policy is KL(policy ‖ reference).

        Args:
            policy: folder or name of the policy.
            path: file that keeps the answers. A second call reads them.
            measure: what else to measure with the loaded policy and its tokenizer.

        Returns:
            The answers, and what `measure` returned; None without it.
        """
        measured = None
        if path.is_file():
            if measure is not None:
                model, _ = self.evaluator.load(policy)
                measured = measure(model, self.tokenizer)
            return read_rows(path), measured
        tokenizer = self.tokenizer
        model, _ = self.evaluator.load(policy)
        completion_ids = self.sample(model)
        own = None
        if policy != self.evaluator.sft:
            own = self.evaluator.logprobs(model, tokenizer, self.prompt_ids, completion_ids)
        if measure is not None:
            measured = measure(model, tokenizer)
        del model  # two models need twice the memory
        kl = self.kl_to_reference(own, completion_ids)
        rows = []
        for number, ids in enumerate(completion_ids):
            rows.append(self.row(number, decode_completion(tokenizer, ids), ids=ids, kl=kl[number]))
        write_rows(rows, path)
        return rows, measured

    def kl_of(self, policy: str, completion_ids: Sequence[list[int]]) -> list[float]:
        """log π(answer) - log π_reference(answer) of one answer to each prompt, in nats."""
        if policy == self.evaluator.sft:
            return [0.0] * len(completion_ids)
        model, _ = self.evaluator.load(policy)
        own = self.evaluator.logprobs(model, self.tokenizer, self.prompt_ids, list(completion_ids))
        del model
        return self.kl_to_reference(own, completion_ids)

    def kl_to_reference(self, own: list[float] | None, completion_ids: Sequence[list[int]]) -> list[float]:
        """The log-ratio of each answer in nats. `own` is its log-probability; None for the reference itself."""
        if own is None:
            return [0.0] * len(completion_ids)
        reference, _ = self.evaluator.load(self.evaluator.sft)
        under_reference = self.evaluator.logprobs(reference, self.tokenizer, self.prompt_ids, list(completion_ids))
        return [first - second for first, second in zip(own, under_reference, strict=True)]

    def sample(self, model: PreTrainedModel) -> list[list[int]]:
        """Samples one completion for each prompt."""
        engine = TransformersEngine()
        engine.sync(model)
        torch.manual_seed(self.evaluator.seed)
        return engine.generate(self.prompt_ids, self.sampling(model)).ids

    def sampling(self, model: PreTrainedModel) -> Sampling:
        """The options of sampling, the same for every system."""
        return Sampling(
            max_new_tokens=self.evaluator.max_new_tokens,
            stop_ids=stop_token_ids(self.tokenizer, model, None),
            pad_token_id=self.tokenizer.pad_token_id,
            temperature=self.evaluator.temperature,
            batch_size=BATCH_SIZE,
        )

    def row(self, number: int, text: str, *, ids: list[int], kl: float) -> Row:
        """The row of an answer to the prompt of this number."""
        prompt = self.prompts[number]["prompt"]
        completion: Any = text
        if not isinstance(prompt, str):
            completion = [{"role": "assistant", "content": text}]
        category = self.prompts[number].get("category")
        answer = {"prompt": prompt, "category": category, "completion": completion}
        return answer | {"ids": ids, "n_tokens": len(ids), "kl": kl}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the reference policy."""
        _, tokenizer = self.evaluator.load(self.evaluator.sft)
        return tokenizer

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of the prompts."""
        return [encode_generation_prompt(self.tokenizer, row["prompt"]) for row in self.prompts]

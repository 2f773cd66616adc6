"""Scores of reference answers, with which PAR compares the scores of completions (Fu et al. 2025, arXiv:2502.18770).

The answers are those of a column, or the reference policy samples them once for each prompt. Nothing of them is stored:
a resumed run samples the same ones again. For that, prompts are sampled in blocks that depend on the data and the seed
only, as rounding, and so a sampled token, may depend on the other rows of a batch.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState, set_seed

from ..data.json_columns import RowsWithoutFill
from ..data.templates import template_options
from ..data.text import Unrenderable, encode_completion, is_messages, make_message, plain_text
from ..errors import UserError
from ..modeling.adapters import autocast_dtype
from ..training.leaving import RandomState, agree_to_leave, check, may_be_left
from .config import PPOConfig
from .engine import TransformersEngine, sample_what_fits
from .meter import metric_logger
from .prompts import Prompts, rows_from
from .rewards import RewardFunctions, Scores, extra_columns, score_completions

if TYPE_CHECKING:  # it imports this module
    from .experience import SamplingTools

logger = logging.getLogger(__name__)

_SEED_STRIDE = 1_000_003
"""Distance of the seeds of two runs, so that blocks of one run do not have the random numbers of another one."""


class ReferenceScores:
    """Scores of the reference answers of prompts, which are computed when a prompt is first used.

    The scores of a prompt depend on the data, the options and the frozen reference only. So they are remembered, and a
    process that has them from another one need not compute them.

    Args:
        tools: the objects that sample and score completions. Its engine is not used, as that of a user may know the
            policy only.
        rewards: the reward functions of training.
        prompts: the prompts of the training data.
    """

    def __init__(self, tools: "SamplingTools", rewards: RewardFunctions, prompts: Prompts):
        self.roles = tools.roles
        self.tokenizer = tools.tokenizer
        self.args = tools.args
        self.ranks = tools.ranks
        self.rewards = rewards
        self.prompts = prompts
        # No more completions at a time than in a rollout.
        self.sampling = replace(tools.sampling, batch_size=tools.sampling.batch_size or self.args.rollout_size)
        self._known: dict[int, list[float]] = {}

    def of(self, rows: list[int], trainer_state: TrainerState) -> Tensor:
        """The scores of the reference answers of prompts. All processes call it with the same rows.

        The random state of training does not change.

        Args:
            rows: B indices of prompts.
            trainer_state: state of the trainer, which reward functions get.

        Returns:
            (B, M) fp32, on the device of this process; NaN where a prompt has fewer than M answers.

        Raises:
            UserError: if an answer cannot be encoded, or see `RewardFunctions.score`.
            PartLeft: if a signal asks training to stop.
        """
        missing = [block for block in dict.fromkeys(map(self._block_of, rows)) if not self._is_known(block)]
        if missing:
            self._say_long_wait(missing)
            for part in self.ranks.gather(self._scores_of_own(missing, trainer_state)):
                self._known.update(part)
        scores = [torch.tensor(self._known[row]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=torch.nan).to(self.ranks.device)

    # ---- Blocks of prompts ----

    @cached_property
    def _order(self) -> list[int]:
        """The rows in the order of the first pass over the data, in which a rollout has as few blocks as possible."""
        n_prompts = len(self.prompts)
        shuffled = self.args.train_sampling_strategy == "random"
        return rows_from(0, n_prompts, n_prompts, self.args.prompt_seed, shuffled=shuffled)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {row: place for place, row in enumerate(self._order)}

    def _block_of(self, row: int) -> int:
        return self._places[row] // self.args.prompts_per_rollout

    def _rows_of(self, block: int) -> list[int]:
        size = self.args.prompts_per_rollout
        return self._order[block * size : (block + 1) * size]

    def _is_known(self, block: int) -> bool:
        return self._rows_of(block)[0] in self._known

    def _say_long_wait(self, missing: list[int]) -> None:
        """Logs that a resumed run computes the scores of many prompts again, as the order of a later pass mixes blocks.

        In a new run, each process has one or two blocks to compute before a rollout.
        """
        if len(missing) <= 2 * self.ranks.count or self.ranks.index > 0:
            return
        n_prompts = sum(len(self._rows_of(block)) for block in missing)
        verb = "sampled and scored" if self._are_sampled else "scored"
        logger.warning(
            "reward_shaping='par': the reference answers of %d prompts are %s for this rollout, as a checkpoint "
            "does not have their scores.",
            n_prompts,
            verb,
        )

    # ---- What this process computes ----

    def _scores_of_own(self, blocks: list[int], trainer_state: TrainerState) -> dict[int, list[float]]:
        """The scores of the blocks that this process computes, by row. The others compute the rest."""
        own = blocks[self.ranks.index :: self.ranks.count]
        found: dict[int, list[float]] = {}
        sharding = self.roles.sharding
        before = RandomState.now(self.ranks.device)
        try:
            # With shards, the other processes would wait for one that leaves alone.
            with may_be_left("reference answers", when=not sharding.is_sharded), sharding.inference():
                for turn in range(sharding.most(len(own))):
                    check()
                    block = own[turn] if turn < len(own) else blocks[0]
                    # Also for reward functions that draw random numbers.
                    set_seed((self.args.seed * _SEED_STRIDE + block) % 2**32)
                    if turn < len(own):
                        found |= self._scores_of_block(block, trainer_state)
                    else:
                        self._join_block(block)
            agree_to_leave()
        finally:
            before.restore()
        return found

    def _scores_of_block(self, block: int, trainer_state: TrainerState) -> dict[int, list[float]]:
        rows = self._rows_of(block)
        examples, prompt_ids = self.prompts.rows(rows)
        answers = self._answers(examples, prompt_ids)
        counts = [len(of_prompt) for of_prompt in answers]
        # With shards, processes that join a block would have to know how its prompts are shared.
        per_prompt = self.args.num_reference_answers if self._are_sampled and not self.roles.sharding.is_sharded else 1
        _, log_extra = extra_columns(sum(counts))
        scores = score_completions(
            self.rewards,
            self.tokenizer,
            [example for example, count in zip(examples, counts, strict=True) for _ in range(count)],
            [ids for of_prompt in answers for ids in of_prompt],
            [ids for ids, count in zip(prompt_ids, counts, strict=True) for _ in range(count)],
            per_prompt=per_prompt,
            trainer_state=trainer_state,
            # What functions log belongs to completions of the policy.
            log_metric=metric_logger(lambda name, value: None, self.rewards.names),
            log_extra=log_extra,
        )
        refuse_token_rewards(scores)
        totals = iter(self.rewards.combine(scores.per_func).tolist())
        return {row: [next(totals) for _ in range(count)] for row, count in zip(rows, counts, strict=True)}

    def _join_block(self, block: int) -> None:
        """Takes part in the passes of a block that another process computes. No function of the user is called."""
        if self._are_sampled:
            self._sample(self.prompts.rows(self._rows_of(block))[1])
        for scorer in self.rewards.scorers_on(self.roles.policy):
            scorer.score_ids([])

    # ---- The answers ----

    @property
    def _are_sampled(self) -> bool:
        return self.args.reference_answers is None

    def _answers(self, examples: list[dict[str, Any]], prompt_ids: list[list[int]]) -> list[list[list[int]]]:
        """For each prompt, the token ids of its reference answers."""
        if self._are_sampled:
            ids = self._sample(prompt_ids)
            size = self.args.num_reference_answers
            return [ids[start : start + size] for start in range(0, len(ids), size)]
        return [self._encoded(example) for example in examples]

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Token ids of answers that the reference policy samples; those of a prompt are in a row."""
        with self.roles.activate("reference") as model:
            engine = self._engine
            engine.sync(model)
            n = self.args.num_reference_answers
            return sample_what_fits(engine, prompt_ids, self.sampling, n, self.roles.sizes).ids

    @cached_property
    def _engine(self) -> TransformersEngine:
        # Merging takes the adapter that is active. The bare base has none, though its layers have those of the policy.
        has_adapter = self.roles.stack.roles["reference"].adapter is not None
        merge = self.args.merge_for_generation and has_adapter
        engine = TransformersEngine(merge=merge, autocast=autocast_dtype(self.args))
        self.roles.sharding.join_engine(engine)
        return engine

    def _encoded(self, example: Mapping[str, Any]) -> list[list[int]]:
        """Token ids of the answers in the column, with a stop token."""
        prompt = example["prompt"]
        encoded = []
        for answer in answers_of(example[self.args.reference_answers]):
            if isinstance(prompt, str):
                answer = plain_text(answer)
            elif isinstance(answer, str):
                answer = [make_message("assistant", answer)]
            try:
                encoded.append(encode_completion(self.tokenizer, prompt, answer, template_options(example)))
            except Unrenderable as error:
                raise UserError(
                    f"reference_answers: column {self.args.reference_answers!r}, at the prompt "
                    f"{_shortened(plain_text(prompt))}: {error}: give the answer as text, or drop the row."
                ) from None
        return encoded


def refuse_token_rewards(scores: Scores) -> None:
    """Refuses rewards of single tokens, as PAR shapes the score of a whole completion.

    Raises:
        UserError: if a reward function returned token rewards.
    """
    if scores.dense is not None:
        raise UserError(
            "reward_shaping='par' compares scores of whole completions, but a reward function returns a list of token "
            "rewards: return their sum, or leave reward_shaping out."
        )


def answers_of(value: Any) -> list[str | list[dict[str, Any]]]:
    """The answers in a cell of the column: one answer, or a list of answers, each as text or as messages.

    Returns:
        The answers; an empty list if the cell has none, or something that is not an answer.
    """
    if isinstance(value, str) or is_messages(value):
        value = [value]
    if not isinstance(value, list):
        return []
    if not all(is_messages(answer) or (isinstance(answer, str) and answer.strip()) for answer in value):
        return []
    return value


def check_reference_answers(args: PPOConfig, dataset: Dataset) -> None:
    """Checks the column of reference answers before training, in every row.

    Args:
        args: options of the run.
        dataset: the training data.

    Raises:
        UserError: if there is no such column, or if a row has no answer in it.
    """
    column = args.reference_answers
    if args.reward_shaping is None or column is None:
        return
    if column not in dataset.column_names:
        raise UserError(
            f"reference_answers={column!r}: train_dataset has no such column, only {dataset.column_names}: name one of "
            "them, or leave it out to sample the answers from the reference policy."
        )
    for number, row in enumerate(RowsWithoutFill(dataset.select_columns([column]))):
        if not answers_of(row[column]):
            raise UserError(
                f"train_dataset row {number}: `{column}` is {_shortened(row[column])}, not an answer or a list of "
                "answers (reference_answers), each as text or messages: fix or drop the row."
            )


def _shortened(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}…"


def said_of_references(args: PPOConfig) -> str:
    """In words, what scores are compared with."""
    if args.reference_answers is not None:
        return f"those of column {args.reference_answers!r}"
    return f"{args.num_reference_answers} for each prompt, sampled from the reference policy"

"""Answers to many prompts in batches, and their rewards."""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_rlhf_ext.data.prompting import as_user_turn
from hf_rlhf_ext.data.templates import TEMPLATE_COLUMNS, template_options
from hf_rlhf_ext.data.text import (
    Messages,
    Unrenderable,
    decode_completion,
    encode_generation_prompt,
    make_message,
    prefill_of,
    with_prefill,
)
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.probing import unchanged_random_state
from hf_rlhf_ext.ppo.engine import Sampling, TransformersEngine
from hf_rlhf_ext.recipes.chat_parts.answers import Answer, completion_of
from hf_rlhf_ext.recipes.chat_parts.models import Speaker
from hf_rlhf_ext.recipes.chat_parts.options import AnswerArguments
from hf_rlhf_ext.recipes.chat_parts.prompts import PromptRow
from hf_rlhf_ext.recipes.chat_parts.rewards import Reward, RewardSum
from hf_rlhf_ext.training.bars import no_bars


@dataclass(frozen=True)
class Job:
    """A prompt for one model.

    Attributes:
        speaker: the model.
        row: the prompt, as in its file.
        system: system text before a prompt that has none; `None` for none.
    """

    speaker: Speaker
    row: PromptRow
    system: str | None

    @property
    def prompt(self) -> str | Messages:
        """The prompt as the model gets it: text only for a model that continues text."""
        if isinstance(self.row.prompt, str) and not self.speaker.uses_messages:
            return self.row.prompt
        messages = as_user_turn(self.row.prompt)
        if self.system and messages[0]["role"] != "system":
            return [make_message("system", self.system), *messages]
        return messages

    def prompt_ids(self, max_new_tokens: int) -> list[int]:
        """Token ids of the prompt.

        Raises:
            UserError: the chat template refuses it, or it leaves no room for the answer. The text is the same for all
                prompts of a kind, so that they can be counted.
        """
        ids = encode_generation_prompt(self.speaker.tokenizer, self.prompt, template_options(self.row.columns))
        if not ids:
            raise UserError("they have no tokens")
        if len(ids) + max_new_tokens > self.speaker.positions:
            raise UserError(
                f"with {max_new_tokens} tokens of an answer, they are longer than the model supports "
                f"({self.speaker.positions} tokens): lower --max_new_tokens"
            )
        return ids

    def answer(self, ids: list[int], prompt_ids: list[int]) -> Answer:
        """The answer in generated tokens."""
        text = decode_completion(self.speaker.tokenizer, ids, prompt_ids)
        is_complete = bool(ids) and ids[-1] in self.speaker.stop_ids
        completion = completion_of(self.speaker, self.prompt, text)
        return Answer(text, completion, len(ids), is_complete, ids=ids, prompt_ids=prompt_ids)

    def training_row(self) -> dict[str, Any]:
        """The row as reward functions get it in PPO: the prompt as the model got it, and all other columns."""
        return self.row.all_columns | {"prompt": self.prompt}

    def output_row(self, answer: Answer, reward: Reward | None) -> dict[str, Any]:
        """The row to write. Its prompt and completion have the form of the prompt in the file."""
        prompt, completion = self.row.prompt, answer.completion
        if isinstance(prompt, str):
            completion = answer.text
        elif prefill_of(prompt) is not None:  # a begun answer, which the completion then holds as a whole
            prompt, completion = with_prefill(self.speaker.tokenizer, prompt, answer.text)
        row = {
            "prompt": prompt,
            "model": self.speaker.name,
            "completion": completion,
            "tokens": answer.n_tokens,
            "stopped": answer.is_complete,
            "row": self.row.number,
        }
        if reward is None:
            return row
        row["reward"] = reward.total
        return row | {"rewards": reward.parts} if reward.parts else row


def answers_of(
    speaker: Speaker, jobs: Sequence[Job], options: AnswerArguments, *, batch_size: int
) -> list[Answer | None]:
    """Samples one answer to each prompt. A prompt that the model cannot read has none, which is printed and counted.

    The same options and prompts give the same answers; they depend on `batch_size` too.
    """
    encoded, problems = _encode(jobs, options.max_new_tokens)
    for reason, count in problems.items():
        print(f"{speaker.name}: {count} prompts without an answer: {reason}", file=sys.stderr)
    answers: list[Answer | None] = [None] * len(jobs)
    order = sorted(encoded, key=lambda number: -len(encoded[number]))  # prompts of similar length: less padding
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        stop_ids=speaker.stop_ids,
        pad_token_id=speaker.tokenizer.pad_token_id,
        **options.distribution(),
    )
    # Merging needs an adapter: the base answers with the adapters of others switched off.
    engine = TransformersEngine(merge=speaker.has_adapter)
    bar = tqdm(total=len(order), desc=speaker.name, leave=False, disable=None)  # None: on terminals only
    with unchanged_random_state(speaker.device), speaker.activated() as model, bar, no_bars():
        engine.sync(model)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            torch.manual_seed(_seed(options.seed, speaker.name, start))
            sampled = engine.generate([encoded[number] for number in batch], sampling).ids
            for number, ids in zip(batch, sampled, strict=True):
                answers[number] = jobs[number].answer(ids, encoded[number])
            bar.update(len(batch))
    return answers


def _encode(jobs: Sequence[Job], max_new_tokens: int) -> tuple[dict[int, list[int]], Counter]:
    """Token ids of the prompts by their position, and how many cannot be read, by reason."""
    encoded: dict[int, list[int]] = {}
    problems: Counter = Counter()
    for number, job in enumerate(jobs):
        try:
            encoded[number] = job.prompt_ids(max_new_tokens)
        except Unrenderable as error:
            problems[error.reason] += 1
        except UserError as error:
            problems[str(error)] += 1
    return encoded, problems


def rewards_of(scorer: Any, jobs: Sequence[Job], answers: Sequence[Answer | None]) -> list[Reward | None]:
    """Rewards of answers, as PPO gets them; all None without a reward model.

    An answer that the reward model cannot read, for example as it is too long, has none, which is printed and counted.
    """
    rewards: list[Reward | None] = [None] * len(jobs)
    if scorer is None:
        return rewards
    problems: list[str] = []
    waiting = [[number for number, answer in enumerate(answers) if answer is not None]]
    while waiting:
        part = waiting.pop()
        try:
            scored = _scored(scorer, [jobs[number] for number in part], [answers[number] for number in part])
        except UserError as error:
            if len(part) == 1:
                problems.append(str(error))
            else:  # one of them is refused: the halves lead to it
                middle = len(part) // 2
                waiting += [part[middle:], part[:middle]]
            continue
        for number, reward in zip(part, scored, strict=True):
            rewards[number] = reward
    if problems:
        name = jobs[0].speaker.name
        print(f"{name}: {len(problems)} answers without a reward, the first: {problems[0]}", file=sys.stderr)
    return rewards


def _scored(scorer: Any, jobs: Sequence[Job], answers: Sequence[Answer]) -> list[Reward]:
    """Rewards of answers, all of which the reward model can read."""
    if isinstance(scorer, RewardSum):
        rows = [job.training_row() for job in jobs]
        ids, prompt_ids = [answer.ids for answer in answers], [answer.prompt_ids for answer in answers]
        return scorer.score(jobs[0].speaker.tokenizer, rows, ids, prompt_ids)
    columns = {}
    for column in TEMPLATE_COLUMNS:
        values = [job.row.columns.get(column) for job in jobs]
        if any(value is not None for value in values):
            columns[column] = values
    completions = [_continuation(job, answer) for job, answer in zip(jobs, answers, strict=True)]
    scores = scorer([job.prompt for job in jobs], completions, **columns)
    return [Reward(float(score)) for score in scores]


def _continuation(job: Job, answer: Answer) -> str | Messages:
    """What the reward model scores: text where the model went on with a begun answer, as in PPO."""
    return answer.text if prefill_of(job.prompt) is not None else answer.completion


def _seed(*parts: Any) -> int:
    """A seed that depends on all parts: each batch has one of its own, so that nothing that ran before changes it."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:6])

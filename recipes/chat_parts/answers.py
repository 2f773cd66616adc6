"""Answers of a model to one question, token by token, and their rewards."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hf_rlhf_ext.data.text import Messages, decode_completion, encode_generation_prompt, make_message, open_thought
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.probing import evaluating, unchanged_random_state
from hf_rlhf_ext.ppo.engine import generate_completions, sampling_config
from hf_rlhf_ext.recipes.chat_parts.models import Speaker
from hf_rlhf_ext.recipes.chat_parts.options import AnswerArguments
from hf_rlhf_ext.recipes.chat_parts.rewards import Reward, RewardSum

logger = logging.getLogger(__name__)

_UNFINISHED = "\ufffd"
"""How an incomplete character is decoded, whose last bytes are in the next token."""


@dataclass
class Answer:
    """An answer of a model.

    Attributes:
        text: the text, without special tokens.
        completion: what a reward model scores: the text, or one message of the assistant.
        n_tokens: number of tokens, including the stop token.
        is_complete: whether it ended by itself, and not at the largest number of tokens or by Ctrl-C.
        was_stopped: whether Ctrl-C stopped it.
        ids: its token ids.
        prompt_ids: token ids of what came before it.
    """

    text: str
    completion: str | Messages
    n_tokens: int
    is_complete: bool
    was_stopped: bool = False
    ids: list[int] = field(default_factory=list, repr=False)
    prompt_ids: list[int] = field(default_factory=list, repr=False)


class AnswerStopped(Exception):
    """Raised in a streamer to end an answer that the user stopped."""


class AnswerStreamer(BaseStreamer):
    """Shows an answer while it is sampled, so that the parts together are the decoded answer.

    `TextStreamer` of Transformers decodes line by line, and so loses the space with which a line begins for
    SentencePiece tokenizers.

    Args:
        tokenizer: decodes the tokens.
        prompt_ids: the tokens before the answer.
        show: gets each new piece of text.
        is_stopped: whether the user wants no more of it.
    """

    def __init__(self, tokenizer, prompt_ids: list[int], show: Callable[[str], None], is_stopped: Callable[[], bool]):
        self.tokenizer = tokenizer
        self.prompt_ids = prompt_ids
        self.show = show
        self.is_stopped = is_stopped
        self.ids: list[int] = []
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the next tokens, see `generate_completions`."""
        self.ids += value.flatten().tolist()
        text = self.text()
        if not text.endswith(_UNFINISHED):
            self._show_rest(text)
        if self.is_stopped():
            raise AnswerStopped

    def end(self) -> None:
        """Shows what was held back."""
        self._show_rest(self.text())

    def text(self) -> str:
        """The answer so far."""
        return decode_completion(self.tokenizer, self.ids, self.prompt_ids)

    def _show_rest(self, text: str) -> None:
        # A tokenizer may clean up spaces that it has decoded before. Nothing is shown until it goes on from there.
        if text.startswith(self.shown) and text != self.shown:
            self.show(text[len(self.shown) :])
            self.shown = text


def answer_to(
    speaker: Speaker,
    prompt: str | Messages,
    options: AnswerArguments,
    *,
    seed: int,
    show: Callable[[str], None] = lambda piece: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Samples one answer.

    Args:
        speaker: the model.
        prompt: text that it continues, or a conversation.
        options: how to sample.
        seed: seed of this answer. The random state of the caller does not change.
        show: gets each new piece of text.
        is_stopped: whether the user wants no more of it, asked after each token.

    Raises:
        UserError: the chat template refuses the conversation, or it leaves no room for an answer.
    """
    prompt_ids = encode_generation_prompt(speaker.tokenizer, prompt)
    config = sampling_config(
        max_new_tokens=room_for_answer(speaker, prompt_ids, options.max_new_tokens),
        stop_ids=speaker.stop_ids,
        pad_token_id=speaker.tokenizer.pad_token_id,
        **options.distribution(),
    )
    streamer = AnswerStreamer(speaker.tokenizer, prompt_ids, show, is_stopped)
    was_stopped = False
    with unchanged_random_state(speaker.device), speaker.activated() as model, evaluating(model):
        torch.manual_seed(seed)
        try:
            (ids,), _ = generate_completions(model, [prompt_ids], config, speaker.device, streamer=streamer)
        except AnswerStopped:
            ids, was_stopped = streamer.ids, True
    is_complete = not was_stopped and bool(ids) and ids[-1] in speaker.stop_ids
    text = decode_completion(speaker.tokenizer, ids, prompt_ids)
    return Answer(text, completion_of(speaker, prompt, text), len(ids), is_complete, was_stopped, ids, prompt_ids)


def room_for_answer(speaker: Speaker, prompt_ids: list[int], max_new_tokens: int) -> int:
    """Largest number of tokens of an answer, which the model's positions may limit.

    Raises:
        UserError: there are no tokens before the answer, or no room is left after them.
    """
    if not prompt_ids:
        raise UserError("the question has no tokens: write some text.")
    room = speaker.positions - len(prompt_ids)
    if room < 1:
        raise UserError(
            f"the conversation has {len(prompt_ids)} tokens, and the model has room for {speaker.positions}: shorten "
            "the question, or begin a new conversation (/new)."
        )
    return min(max_new_tokens, room)


def completion_of(speaker: Speaker, prompt: str | Messages, text: str) -> str | Messages:
    """An answer as data has it: text after text, one message of the assistant after messages."""
    if isinstance(prompt, str):
        return text
    # Some templates open a thought in the prompt, which belongs to the answer.
    return [make_message("assistant", open_thought(speaker.tokenizer, prompt, {}) + text)]


def reward_of(scorer: Any, speaker: Speaker, prompt: str | Messages, answer: Answer) -> Reward:
    """The reward of an answer of a model, as PPO gets it.

    Raises:
        UserError: the reward model cannot score it, for example as it is too long.
    """
    if isinstance(scorer, RewardSum):
        return scorer.score(speaker.tokenizer, [{"prompt": prompt}], [answer.ids], [answer.prompt_ids])[0]
    return Reward(float(scorer([prompt], [answer.completion])[0]))

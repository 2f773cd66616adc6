"""What a reward model is asked: pairs of prompt and completion, in the form of its training."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.prompt_form import MESSAGES, TEXT, PromptForm, remembered_form
from ..data.prompting import as_user_turn
from ..data.text import Messages, is_messages, make_message, prefill_of
from ..errors import UserError
from .normalization import NORMALIZATION_FILE

logger = logging.getLogger(__name__)


# --- lists -----------------------------------------------------------------------------------------------------------


def as_lists(prompts: Any, completions: Any) -> tuple[list, list]:
    """Returns prompts and completions as lists of equal length. One prompt with one completion is a pair.

    Args:
        prompts: N prompts, or one: a string, or a conversation as a list of messages.
        completions: N completions, or one.

    Raises:
        UserError: for one prompt with a list of completions or the reverse, for something else than a list, and if the
            numbers differ.
    """
    given = {"prompts": prompts, "completions": completions}
    single = {option: isinstance(value, str) or is_messages(value) for option, value in given.items()}
    if all(single.values()):
        return [prompts], [completions]
    for option, value in given.items():
        if single[option]:
            kind = "string" if isinstance(value, str) else "conversation"
            (other,) = given.keys() - {option}
            raise UserError(
                f"{option} is one {kind}, but {other} is not: give two lists of the same length, or one prompt and one "
                "completion."
            )
        if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
            raise UserError(f"{option} is a {type(value).__name__}: give a list with one entry for each pair.")
    prompts, completions = list(prompts), list(completions)
    if len(prompts) != len(completions):
        raise UserError(f"completions: {len(completions)} for {len(prompts)} prompts: give one completion per prompt.")
    for option, values in (("prompts", prompts), ("completions", completions)):
        for index, value in enumerate(values):
            _check_is_text(option, index, value)
    return prompts, completions


def _check_is_text(option: str, index: int, value: Any) -> None:
    if not isinstance(value, str) and not is_messages(value):
        raise UserError(f"{option}[{index}] is a {type(value).__name__}: give a string or a list of messages.")


# --- the form --------------------------------------------------------------------------------------------------------


def form_of_reward_model(model: nn.Module) -> PromptForm:
    """The form that a reward model in memory was trained on. That of its base, a policy, does not count."""
    remembered = remembered_form(model)
    if remembered is not None:
        return remembered
    folder = Path(str(model.config.name_or_path)).expanduser()
    return PromptForm.load(folder) if (folder / NORMALIZATION_FILE).is_file() else PromptForm()


class FormOfTraining:
    """Puts pairs into the form that a reward model was trained on, and says once where they had another one.

    Without a record of the form, and after training on both, pairs stay as they are.

    Args:
        trained: the form of training.
        name: what messages call the reward model.
    """

    def __init__(self, trained: PromptForm, name: str = "the reward model"):
        self.trained = trained
        self.name = name
        self.said: set[str] = set()  # an ensemble has one set for all of its members

    def fit(
        self, prompt: str | Messages, completion: str | Messages, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str | Messages, str | Messages]:
        """Returns a pair in the form of training.

        For a reward model that was trained on messages, a prompt that is text becomes a turn of the user, and a
        completion that is text the answer of the assistant.

        Args:
            prompt: text or messages.
            completion: text or messages.
            tokenizer: tokenizer of the reward model.

        Raises:
            UserError: if text is to be rendered by a tokenizer without a chat template.
        """
        if self.trained.prompt_form == TEXT and not isinstance(prompt, str) and tokenizer.chat_template is not None:
            self._say(
                "messages for text",
                "%s was trained on text and gets messages: they are rendered by the chat template of its tokenizer, "
                "which it has not seen in training, so that scores may mean little: give it text.",
            )
        if self.trained.prompt_form != MESSAGES:
            return prompt, completion
        if isinstance(prompt, str):
            prompt, completion = self._wrap(prompt, completion, tokenizer)
        if self.trained.other_template(tokenizer):
            self._say(
                "template",
                "%s was trained with another chat template than its tokenizer has now, so that scores differ: use the "
                "tokenizer of its folder.",
            )
        return prompt, completion

    def _wrap(
        self, prompt: str, completion: str | Messages, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Messages, str | Messages]:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{self.name} was trained on messages, but its tokenizer has no chat template to put text into: use "
                "the tokenizer of its folder."
            )
        self._say(
            "text for messages",
            "%s was trained on messages and gets text: each prompt is put into its chat template as a turn of the "
            "user, and each completion as the answer of the assistant.",
        )
        turns = as_user_turn(prompt)
        if isinstance(completion, str) and prefill_of(turns) is None:
            completion = [make_message("assistant", completion)]
        return turns, completion

    def _say(self, what: str, line: str) -> None:
        if what not in self.said:
            self.said.add(what)
            logger.warning(line, self.name)

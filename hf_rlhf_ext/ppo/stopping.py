"""Where a completion ends: at its first stop token, or at the token that completes a stop string."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ..errors import UserError

_ANCHOR = "a"  # a text in front of every window, see `StopStrings._decode`


class StopStrings:
    """Strings that end a completion.

    A completion ends with the token that completes one of the strings; this token may go on after the string. Only the
    tokens of the completion count, so a string that begins in the prompt does not end it. Special tokens are left out,
    as in the text that reward functions get, except for strings that contain the text of a special token.

    Args:
        strings: the strings, or a single one.
        tokenizer: tokenizer that decodes the completions.

    Attributes:
        strings: the strings.

    Raises:
        UserError: if a string is empty or is not text.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: PreTrainedTokenizerBase):
        self.strings = stop_string_list(strings)
        self._tokenizer = tokenizer
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        special |= {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._special_ids = set(special)
        special_texts = [text for text in special.values() if text]
        self._with_special = [text for text in self.strings if any(special in text for special in special_texts)]
        self._without_special = [text for text in self.strings if text not in self._with_special]
        # A token has at least one byte of text, so a string that the last token completes begins within this many
        # tokens. A few more are for tokens of which nothing is decoded.
        self._window = max(len(string.encode()) for string in self.strings) + 4

    def end(self, ids: list[int]) -> int | None:
        """Number of tokens up to the one that completes the first stop string; `None` if there is no stop string.

        Args:
            ids: token ids of a completion, without its prompt.
        """
        if not self._occurs_in(ids, ids):
            return None
        for length in range(1, len(ids) + 1):
            if self.is_complete(ids[:length]):
                return length
        return None

    def is_complete(self, ids: list[int]) -> bool:
        """Whether one of the strings occurs in the last tokens of a completion, which are the only ones decoded."""
        last = ids[-self._window :]
        last_plain: list[int] = []  # of the tokens that are not special
        for token in reversed(ids):
            if len(last_plain) == self._window:
                break
            if token not in self._special_ids:
                last_plain.append(token)
        return self._occurs_in(last, last_plain[::-1])

    def _occurs_in(self, ids: list[int], plain_ids: list[int]) -> bool:
        """Whether a string with special tokens occurs in `ids`, or another string in `plain_ids`."""
        if self._with_special:
            text = self._decode(ids, skip_special_tokens=False)
            if any(string in text for string in self._with_special):
                return True
        if self._without_special:
            text = self._decode(plain_ids, skip_special_tokens=True)
            return any(string in text for string in self._without_special)
        return False

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        # SentencePiece tokenizers drop the space of the first token. Behind another token it is kept.
        text = self._tokenizer.decode([*self._anchor_ids, *ids], **options)
        if text.startswith(_ANCHOR):
            return text.removeprefix(_ANCHOR)
        return self._tokenizer.decode(ids, **options)

    @cached_property
    def _anchor_ids(self) -> list[int]:
        ids = self._tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
        decoded = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return ids if decoded == _ANCHOR else []  # a vocabulary without the letter


class StopAtStrings(StoppingCriteria):
    """Stopping criterion for `generate`: ends the rows whose last token completes a stop string.

    Args:
        stop_strings: the strings.
        prompt_width: number of columns of the prompts, padding included.
    """

    def __init__(self, stop_strings: StopStrings, prompt_width: int):
        self._stop_strings = stop_strings
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """Returns (B,) bool: which rows are complete."""
        completions = input_ids[:, self._prompt_width :].tolist()
        complete = [self._stop_strings.is_complete(ids) for ids in completions]
        return torch.tensor(complete, dtype=torch.bool, device=input_ids.device)


def stop_string_list(strings: str | Sequence[str]) -> list[str]:
    """The strings as a list; raises `UserError` if one of them is empty or not text."""
    listed = [strings] if isinstance(strings, str) else strings
    if not isinstance(listed, (list, tuple)) or not listed:
        raise UserError(f"stop_strings must be a string or a list of strings, got {strings!r}: leave it out for none.")
    for string in listed:
        if not isinstance(string, str) or not string:
            raise UserError(f"stop_strings: {string!r} is not a text with characters: give each string as text.")
    return list(listed)


def cut_at_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Cuts `ids` after the first stop token; returns all ids if there is none."""
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1]
    return ids

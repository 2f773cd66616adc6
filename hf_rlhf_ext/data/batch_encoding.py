"""Tokenizes many rows together: the tokens that `data.text` gives for one row after the other, in a third of the time.

Chat templates are rendered and texts are tokenized in batches. Rows with more than roles and texts, such as tool calls,
thoughts, or options of their own, are rendered one by one, and so are those of which the template refuses one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .templates import TEMPLATE_COLUMNS, template_options
from .text import (
    Messages,
    Unrenderable,
    as_prompt,
    completion_text,
    generation_opener,
    is_rendered_as_given,
    puts_space_before_text,
    render_generation_prompt,
    render_prompt,
    rest_of_joined,
    written_after,
)

Row = dict[str, Any]
Batch = TypeVar("Batch")
BATCH = 1000
"""Number of rows that are tokenized together."""


class RowTexts(NamedTuple):
    """A row as texts.

    Attributes:
        prompt: The prompt, rendered if it is messages.
        completions: What is written after it, without stop token; empty for a prompt alone.
        is_text: Whether the prompt is text, which gets the tokenizer's special tokens.
    """

    prompt: str
    completions: list[str]
    is_text: bool


class RowIds(NamedTuple):
    """Token ids of a prompt and of its completions."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]


def encode_rows(tokenizer, rows: Sequence[Row]) -> list[RowIds | str]:
    """Returns the token ids of comparison rows, as `tokenize_row` gives them.

    A string in place of a row is the reason why the chat template cannot render it.
    """
    return _encoded(tokenizer, _texts_of_rows(tokenizer, rows))


def encode_batches(tokenizer, batches: Iterable[list[Row]]) -> Iterator[tuple[list[Row], list[RowIds | str]]]:
    """Yields each batch of comparison rows with the result of `encode_rows`.

    The next batch is read and rendered while the tokenizer, which needs no Python, is at work.
    """
    return _in_two_stages(
        batches, lambda rows: _texts_of_rows(tokenizer, rows), lambda texts: _encoded(tokenizer, texts)
    )


def encode_prompt_batches(
    tokenizer, batches: Iterable[Batch], rows_of: Callable[[Batch], Sequence[Row]]
) -> Iterator[tuple[Batch, list[list[int] | str]]]:
    """Yields each batch with the result of `encode_generation_prompts` for its rows. See `encode_batches`."""
    return _in_two_stages(
        batches,
        lambda batch: _texts_of_prompts(tokenizer, rows_of(batch)),
        lambda texts: _only_prompts(_encoded(tokenizer, texts)),
    )


def _in_two_stages(
    batches: Iterable[Batch], first: Callable[[Batch], Any], second: Callable[[Any], Any]
) -> Iterator[tuple[Batch, Any]]:
    """Yields each batch with `second(first(batch))`, in order. `second` runs in a thread, one batch at a time."""
    waiting: tuple[Batch, Future] | None = None
    with ThreadPoolExecutor(1) as thread:
        for batch in batches:
            of_first = first(batch)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = batch, thread.submit(second, of_first)
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def encode_generation_prompts(tokenizer, rows: Sequence[Row]) -> list[list[int] | str]:
    """Returns the ids that a policy continues, as `encode_generation_prompt` gives them for `prompt` of each row.

    A string in place of a row is the reason why the chat template cannot render it.
    """
    return _only_prompts(_encoded(tokenizer, _texts_of_prompts(tokenizer, rows)))


def _only_prompts(encoded: list[RowIds | str]) -> list[list[int] | str]:
    return [ids if isinstance(ids, str) else ids.prompt_ids for ids in encoded]


# --- rendering -------------------------------------------------------------------------------------------------------


def _texts_of_rows(tokenizer, rows: Sequence[Row]) -> list[RowTexts | str]:
    return _texts_of(tokenizer, rows, _render_plain_rows, _row_texts)


def _texts_of_prompts(tokenizer, rows: Sequence[Row]) -> list[RowTexts | str]:
    return _texts_of(tokenizer, rows, _render_plain_prompts, _prompt_texts)


def _texts_of(tokenizer, rows: Sequence[Row], render_plain: Callable, render_one: Callable) -> list[RowTexts | str]:
    rendered = render_plain(tokenizer, rows)
    texts: list[RowTexts | str] = []
    for index, row in enumerate(rows):
        if index in rendered:
            texts.append(rendered[index])
            continue
        try:
            texts.append(render_one(tokenizer, row))
        except Unrenderable as error:
            texts.append(error.reason)
    return texts


def _row_texts(tokenizer, row: Row) -> RowTexts:
    prompt = row["prompt"]
    options = template_options(row)
    before = render_prompt(tokenizer, prompt, options)
    completions = [completion_text(tokenizer, prompt, completion, options, before) for completion in row["completions"]]
    return RowTexts(before, completions, isinstance(prompt, str))


def _prompt_texts(tokenizer, row: Row) -> RowTexts:
    prompt = row["prompt"]
    rendered = render_generation_prompt(tokenizer, prompt, template_options(row))
    return RowTexts(rendered, [], isinstance(prompt, str))


def _render_plain_rows(tokenizer, rows: Sequence[Row]) -> dict[int, RowTexts]:
    """The texts of rows of plain messages by their index. Rows that need a closer look are left out."""
    plain = _PlainMessages(tokenizer)
    chosen: list[int] = []
    openers: list[str] = []
    wholes: list[Messages] = []
    for index, row in enumerate(rows):
        prompt = row["prompt"]
        if not plain.allows(row, prompt):
            continue
        opener = plain.opener_after(prompt)
        conversations = [[*prompt, *completion] for completion in row["completions"] if plain.is_plain(completion)]
        if opener is None or len(conversations) < len(row["completions"]):
            continue
        if all(map(plain.is_read, conversations)):
            chosen.append(index)
            openers.append(opener)
            wholes += conversations
    prompts = plain.render([rows[index]["prompt"] for index in chosen], add_generation_prompt=True)
    rendered_wholes = plain.render(wholes)
    if prompts is None or rendered_wholes is None:
        return {}
    texts = {}
    rest = iter(rendered_wholes)
    for index, opener, prompt in zip(chosen, openers, prompts, strict=True):
        before = prompt.removesuffix(opener)
        of_row = [next(rest) for _ in rows[index]["completions"]]
        if all(whole.startswith(before) for whole in of_row):
            texts[index] = RowTexts(before, [written_after(tokenizer, before, whole) for whole in of_row], False)
    return texts


def _render_plain_prompts(tokenizer, rows: Sequence[Row]) -> dict[int, RowTexts]:
    """The texts of plain prompts that are messages by their index. A turn that is left open is not plain."""
    plain = _PlainMessages(tokenizer)
    chosen = []
    for index, row in enumerate(rows):
        prompt = row["prompt"]
        if plain.allows(row, prompt) and prompt[-1]["role"] != "assistant":
            chosen.append(index)
    prompts = plain.render([rows[index]["prompt"] for index in chosen], add_generation_prompt=True)
    return {
        index: RowTexts(prompt, [], False) for index, prompt in zip(chosen, prompts or (), strict=prompts is not None)
    }


class _PlainMessages:
    """Which messages a chat template renders as they are, and the rendering of many of them.

    Plain messages have a role and a text, and no thought, which a template may leave out.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # An encoder reads prompt and completion as two texts.
        self._none = tokenizer.chat_template is None or tokenizer.sep_token is not None
        self._read: dict[tuple, bool] = {}
        self._openers: dict[str, str | None] = {}

    def allows(self, row: Row, prompt: Any) -> bool:
        """True for a prompt of plain messages that is rendered without options of its own."""
        if self._none or not self.is_plain(prompt) or any(row.get(column) for column in TEMPLATE_COLUMNS):
            return False
        return self.is_read(prompt, add_generation_prompt=True)

    def is_plain(self, messages: Any) -> bool:
        """True for messages that have roles and texts only."""
        if not isinstance(messages, list) or not messages:
            return False
        for message in messages:
            if not isinstance(message, dict) or len(message) != 2:
                return False
            content = message.get("content")
            if not isinstance(content, str) or "</think>" in content or not isinstance(message.get("role"), str):
                return False
        return True

    def is_read(self, messages: Messages, *, add_generation_prompt: bool = False) -> bool:
        """True if the template renders each text of plain messages."""
        # The form depends on the roles, and on which texts are empty.
        shape = (add_generation_prompt, *((message["role"], not message["content"]) for message in messages))
        if shape not in self._read:
            self._read[shape] = is_rendered_as_given(
                self.tokenizer, messages, add_generation_prompt=add_generation_prompt
            )
        return self._read[shape]

    def opener_after(self, prompt: Messages) -> str | None:
        """The optional end of the generation prompt; None if it is not found for this prompt."""
        role = prompt[-1]["role"]
        if role not in self._openers:
            try:
                self._openers[role] = generation_opener(self.tokenizer, prompt)
            except Unrenderable:
                self._openers[role] = None
        return self._openers[role]

    def render(self, conversations: list[Messages], *, add_generation_prompt: bool = False) -> list[str] | None:
        """The rendered conversations; None if the template refuses one of them."""
        if not conversations:
            return []
        try:
            return self.tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception:  # which one and why is found by rendering them one by one
            return None


# --- tokens ----------------------------------------------------------------------------------------------------------


def _encoded(tokenizer, texts: list[RowTexts | str]) -> list[RowIds | str]:
    rows = [row for row in texts if isinstance(row, RowTexts)]
    prompts = _encode_prompts(tokenizer, [(row.prompt, row.is_text) for row in rows])
    # Some sources include the stop token; there must be only one.
    stop = tokenizer.eos_token
    written = [[text.removesuffix(stop) for text in row.completions] if stop else row.completions for row in rows]
    if any(written) and puts_space_before_text(tokenizer):
        completions = _continuations(tokenizer, rows, prompts, written)
    else:
        completions = iter(_encode_texts(tokenizer, [text for row in written for text in row]))
    encoded: list[RowIds | str] = []
    of_rows = iter(zip(prompts, written, strict=True))
    for row in texts:
        if isinstance(row, str):
            encoded.append(row)
            continue
        prompt_ids, of_row = next(of_rows)
        encoded.append(RowIds(prompt_ids, [[*next(completions), tokenizer.eos_token_id] for _ in of_row]))
    return encoded


def _encode_prompts(tokenizer, prompts: list[tuple[str, bool]]) -> list[list[int]]:
    """The ids of prompts: of text with the tokenizer's special tokens, of rendered messages without."""
    plain = [text for text, is_text in prompts if is_text]
    with_special = iter(tokenizer(plain, return_attention_mask=False)["input_ids"] if plain else ())
    templated = [text for text, is_text in prompts if not is_text]
    rendered = iter(_plain_ids(tokenizer, templated))
    return [as_prompt(tokenizer, next(with_special)) if is_text else next(rendered) for _, is_text in prompts]


def _encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts, without special tokens. An empty text has none."""
    ids = iter(_plain_ids(tokenizer, [text for text in texts if text]))
    return [next(ids) if text else [] for text in texts]


def _plain_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    if not _is_plain_tokenizer(tokenizer):
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    # This turns padding and truncation of earlier calls off, and says which special tokens are split.
    ids = tokenizer(texts[:1], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    # The same ids without the places in the text, in three quarters of the time.
    rest = tokenizer.backend_tokenizer.encode_batch_fast(texts[1:], add_special_tokens=False)
    return ids + [encoding.ids for encoding in rest]


def _is_plain_tokenizer(tokenizer) -> bool:
    """True for a tokenizer of which the class does nothing to a text but to hand it to the library `tokenizers`."""
    kind = type(tokenizer)
    if not issubclass(kind, PreTrainedTokenizerFast) or kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return False
    own = getattr(kind, "_encode_plus", None)
    return own is not None and own is PreTrainedTokenizerFast.__dict__.get("_encode_plus")


def _continuations(tokenizer, rows: list[RowTexts], prompts: list[list[int]], written: list[list[str]]):
    """The ids of completions of a tokenizer that puts a space before every text: what they add to the prompt's."""
    pairs = []
    for row, prompt_ids, texts in zip(rows, prompts, written, strict=True):
        pairs += [(row, prompt_ids, text) for text in texts]
    joined = _encode_prompts(tokenizer, [(row.prompt + text, row.is_text) for row, _, text in pairs])
    for (_, prompt_ids, text), joined_ids in zip(pairs, joined, strict=True):
        yield rest_of_joined(tokenizer, prompt_ids, joined_ids, text) if text else []

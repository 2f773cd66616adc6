"""Tokenization of prompts and completions: one convention for training, scoring and rollouts.

A prompt is a string, or a list of messages that is rendered by the tokenizer's chat template with the generation
prompt. A completion is a string or a list of messages, of which the text is what the template adds to the prompt. It is
tokenized separately, as a policy generates it after the prompt's last token, and ends with exactly one stop token,
`tokenizer.eos_token_id`.

A conversation that ends with a turn of the assistant is continued by the policy, as in TRL's `apply_chat_template`: the
turn is left open, and what is generated belongs to it. Completions in data are messages of their own, which follow the
prompt's messages, as in TRL's `RewardTrainer`.
"""

import json
from collections.abc import Callable, Mapping
from os.path import commonprefix
from typing import Any, NamedTuple

from ..errors import UserError, first_line
from .media import media_of_message, text_of_parts
from .message_forms import FoundForm, as_given, find_form, shape_of

Messages = list[dict[str, Any]]

_sorted_json = json.JSONEncoder(sort_keys=True, default=str).encode  # `json.dumps` would make an encoder at each call
_json_string = json.JSONEncoder().encode
_PLAIN_FIELDS = {"role", "content"}

THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message with the thoughts before the answer. A chat template renders one of them, or none."""

_MARK = "thoughtmark"
_ANSWER = "answermark"
_SPACES = ("▁", "Ġ")
"""How tokenizers write a space at the start of a token."""
_MAX_CACHED = 1000
"""Number of chat templates with their options, or of shapes of conversations, of which the properties are kept."""
_CONTEXT = 8
"""Tokens of a prompt with which a completion is decoded."""


def is_messages(value: Any) -> bool:
    """True for a non-empty list of `{"role": …, "content": …}` dicts. `content` is text, a list of parts, or None."""
    if not isinstance(value, list) or not value:
        return False
    return all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or "content" not in value:
        return False
    role = value.get("role")
    return isinstance(role, str) and isinstance(value["content"], str | list | None)


def make_message(role: str, content: str) -> dict[str, Any]:
    """Returns a chat message with text only."""
    return {"role": role, "content": content}


def is_text(value: Any) -> bool:
    """True for a string or for messages."""
    return isinstance(value, str) or is_messages(value)


def text_key(value: str | Messages) -> str:
    """Returns a key that is equal for two texts (or conversations) that differ only in white space."""
    if isinstance(value, str):
        return " ".join(value.split())
    if (
        len(value) == 1
        and value[0].keys() == _PLAIN_FIELDS
        and all(isinstance(text, str) for text in value[0].values())
    ):
        # What follows, in a third of the time: most conversations are one message.
        words = " ".join(value[0]["content"].split())
        return f'[{{"content": {_json_string(words)}, "role": {_json_string(value[0]["role"])}}}]'
    messages = []
    for message in value:
        # Arrow fills missing fields with None, which must not make a difference.
        fields = {name: value for name, value in message.items() if value is not None}
        words = _content(message).split()
        fields["content"] = " ".join(words)
        messages.append(fields)
    return _sorted_json(messages)


def plain_text(value: str | Messages) -> str:
    """Returns the text that a person reads: the string, or the contents of the messages on separate lines."""
    if isinstance(value, str):
        return value
    return "\n".join(map(_content, value))


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    text = text_of_parts(content)
    return str(content or "") if text is None else text


def check_tokenizer(tokenizer, *, needs_chat_template: bool) -> None:
    """Raises `UserError` if the tokenizer has no stop token, no pad token, or (if needed) no chat template."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    # Completions end with the stop token, and rewards are read at its position.
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no eos token: set `tokenizer.eos_token` to the model's stop token.")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no pad token: set `tokenizer.pad_token` to an unused token "
            "(`tokenizer.pad_token = tokenizer.eos_token` works too, since padding is masked by length)."
        )
    if needs_chat_template and tokenizer.chat_template is None:
        raise UserError(
            f"the prompts are messages, but tokenizer {name!r} has no chat template: set `tokenizer.chat_template`, "
            "use an instruction-tuned model, or give prompts and completions as plain text."
        )


def start_ids(tokenizer) -> set[int]:
    """Returns the tokens that start a text. A truncated prompt keeps them."""
    return {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}


# --- prompts ---------------------------------------------------------------------------------------------------------


class Unrenderable(UserError):
    """Raised for messages that the chat template cannot render. `reason` is short, for the report on the rows."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}: change or drop the row, or set another `tokenizer.chat_template`.")
        self.reason = reason


def refused_row(where: str, reason: str) -> UserError:
    """Returns the error for a row that a chat template cannot render, where rows are not dropped.

    Args:
        where: Name of the dataset and number of the row.
        reason: `Unrenderable.reason`.
    """
    return UserError(
        f"{where}: {reason}: change or drop the row, set another `tokenizer.chat_template`, or pass "
        "unrenderable='drop' to leave out such rows with a warning."
    )


def render_prompt(tokenizer, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> str:
    """Returns the text before a completion: the prompt itself, or messages rendered by the chat template.

    It ends with the template's generation prompt, up to where every completion begins. Some generation prompts go on:
    `<think>` opens a thought, which a completion may have or not have. `render_generation_prompt` returns all of it.

    Args:
        tokenizer: The tokenizer, with its chat template.
        prompt: Text or messages.
        options: Arguments of the chat template, see `data.templates.template_options`.

    Raises:
        Unrenderable: The template refuses these messages, or leaves out their texts or tool calls.
    """
    if isinstance(prompt, str):
        return prompt
    check_tokenizer(tokenizer, needs_chat_template=True)
    whole = _render_with_generation_prompt(tokenizer, prompt, options)
    return whole.removesuffix(generation_opener(tokenizer, prompt, options))


def render_generation_prompt(tokenizer, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> str:
    """Returns the text that a policy continues: the prompt itself, or messages with the whole generation prompt.

    A last turn of the assistant is left open instead, so that the policy continues it.
    """
    if isinstance(prompt, str):
        return prompt
    check_tokenizer(tokenizer, needs_chat_template=True)
    if prefill_of(prompt) is not None:
        return _render(tokenizer, prompt, options, continue_final_message=True)
    # With the generation prompt, the first generated token is the first token of the answer.
    return _render_with_generation_prompt(tokenizer, prompt, options)


def _render_with_generation_prompt(tokenizer, prompt: Messages, options: Mapping[str, Any] | None) -> str:
    return _render(tokenizer, prompt, options, add_generation_prompt=True)


def prefill_of(prompt: str | Messages) -> str | None:
    """Returns the text of the assistant's turn at the end of a conversation, which a policy continues, or None.

    None for text, and for a last message of another role, with tool calls, or without text.
    """
    if isinstance(prompt, str) or prompt[-1].get("role") != "assistant" or prompt[-1].get("tool_calls"):
        return None
    content = prompt[-1]["content"]
    if isinstance(content, list):  # parts, of which the last one is continued
        last = content[-1] if content else None
        content = last.get("text") if isinstance(last, dict) else None
    return content if isinstance(content, str) else None


def with_prefill(
    tokenizer, prompt: Messages, generated: str, options: Mapping[str, Any] | None = None
) -> tuple[Messages, Messages]:
    """Moves the assistant's turn at the end of a prompt into the completion, where the policy has continued it.

    Args:
        tokenizer: The tokenizer, with its chat template.
        prompt: Messages that end with a turn of the assistant, see `prefill_of`.
        generated: The text with which the turn goes on.
        options: Arguments of the chat template.

    Returns:
        The earlier messages, and the whole turn as the only message of the completion. If there are no earlier
            messages, the prompt is unchanged, and the completion is only the text that was generated.
    """
    prefill = prefill_of(prompt)
    if prefill is None or len(prompt) == 1:
        return prompt, [make_message("assistant", generated)]
    # Many templates trim a message, so that the policy goes on right after its last word.
    if not render_generation_prompt(tokenizer, prompt, options).endswith(prefill):
        prefill = prefill.strip()
    content: Any = prefill + generated
    if isinstance(prompt[-1]["content"], list):
        content = [*prompt[-1]["content"][:-1], prompt[-1]["content"][-1] | {"text": content}]
    return prompt[:-1], [prompt[-1] | {"content": content}]


def encode_prompt(tokenizer, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> list[int]:
    """Returns the token ids of `render_prompt`. Special tokens are added to text only; a chat template has its own."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return _plain_ids(tokenizer, render_prompt(tokenizer, prompt, options))


def encode_generation_prompt(tokenizer, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> list[int]:
    """Returns the token ids that a policy continues, see `render_generation_prompt`."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return _plain_ids(tokenizer, render_generation_prompt(tokenizer, prompt, options))


def encode_text(tokenizer, text: str) -> list[int]:
    """Returns the token ids of plain text with the special tokens that start it, and without a stop token."""
    return as_prompt(tokenizer, tokenizer(text)["input_ids"])


def as_prompt(tokenizer, ids: list[int]) -> list[int]:
    """Returns the token ids of plain text as those of a prompt, of what the tokenizer gives with special tokens."""
    ids = without_second_start(tokenizer, ids)
    # T5's tokenizer appends a stop token to every text, which a prompt must not have. An encoder's separator is kept.
    has_separator = tokenizer.sep_token_id is not None
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not has_separator:
        return ids[:-1]
    return ids


def without_second_start(tokenizer, ids: list[int]) -> list[int]:
    """Removes the token that the tokenizer put before text that began with it, as rendered chat templates do."""
    is_twice = len(ids) > 1 and ids[0] == ids[1]
    return ids[1:] if is_twice and ids[0] in start_ids(tokenizer) else ids


def without_start(tokenizer, text: str) -> str:
    """Removes BOS from the start of text if the tokenizer adds it, for trainers that tokenize the text themselves."""
    start = tokenizer.bos_token
    adds_start = start and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(start) if adds_start else text


def _plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- completions -----------------------------------------------------------------------------------------------------


def completion_text(
    tokenizer,
    prompt: str | Messages,
    completion: str | Messages,
    options: Mapping[str, Any] | None = None,
    before: str | None = None,
) -> str:
    """Returns what the policy would write after the prompt, without the final stop token.

    For messages, it is exactly what the chat template adds to `render_prompt`: with headers, an empty thought, or
    trimmed, as the template has it. Only a thought in the text of the single message is kept as it is where the
    template would leave it out, as the one of DeepSeek-R1 does. `before` is `render_prompt` of the prompt, if it is
    known already.

    Raises:
        Unrenderable: The template refuses the messages, or leaves out a tool call or a thought.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(prompt, str):  # not a conversation, so there is nothing to render
        return plain_text(completion)
    try:
        return rendered_completion(tokenizer, prompt, completion, options, before)
    except _LostThought:
        if len(completion) > 1 or completion[0].get("tool_calls"):
            raise
        return _content(completion[0])


def rendered_completion(
    tokenizer,
    prompt: Messages,
    completion: Messages,
    options: Mapping[str, Any] | None = None,
    before: str | None = None,
) -> str:
    """Returns what the chat template adds to `render_prompt`, without the final stop token.

    `before` is `render_prompt` of the prompt, if it is known already.

    Raises:
        Unrenderable: The template refuses the messages, or leaves out a tool call or a thought.
    """
    if before is None:
        before = render_prompt(tokenizer, prompt, options)
    if _ends_with_separator(tokenizer, before):
        return _text_of_its_own(completion)
    whole = _render(tokenizer, [*prompt, *completion], options)
    if not whole.startswith(before):
        raise Unrenderable("the chat template renders the prompt differently when this completion follows it")
    _check_thoughts(tokenizer, prompt, completion, options)
    return written_after(tokenizer, before, whole)


def written_after(tokenizer, before: str, whole: str) -> str:
    """Returns what the chat template has written after the prompt, without the final stop token."""
    # Templates write the stop token, and some write a line break after it, which a policy does not generate.
    written = whole.removeprefix(before)
    text, stop, rest = written.rpartition(tokenizer.eos_token)
    return text if stop and not rest.strip() else written


def _ends_with_separator(tokenizer, rendered_prompt: str) -> bool:
    """True for an encoder, which reads the prompt and the completion as two texts with a separator between them."""
    return tokenizer.sep_token is not None and rendered_prompt.endswith(tokenizer.sep_token)


def _text_of_its_own(completion: Messages) -> str:
    """Returns the text of a single message, for an encoder. Raises `Unrenderable` if there is more than text."""
    first, *others = completion
    for name in ("tool_calls", *THOUGHT_FIELDS):
        if first.get(name):
            raise Unrenderable(f"the chat template of an encoder does not render {name} of a completion")
    content = first.get("content")
    if others or not (isinstance(content, str) or text_of_parts(content) is not None):
        raise Unrenderable("an encoder takes completions of one message")
    return _content(first)


def encode_completion(
    tokenizer,
    prompt: str | Messages,
    completion: str | Messages,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Returns the token ids of a completion, which end with exactly one stop token, even if the text is empty."""
    text = completion_text(tokenizer, prompt, completion, options)
    text = text.removesuffix(tokenizer.eos_token)  # some sources include it; there must be only one
    ids = []
    if text:
        ids = _continuation_ids(tokenizer, prompt, text, options)
    return [*ids, tokenizer.eos_token_id]


def _continuation_ids(tokenizer, prompt: str | Messages, text: str, options: Mapping[str, Any] | None) -> list[int]:
    """Returns the token ids of text that continues the prompt.

    A SentencePiece tokenizer puts a space before every text. After a prompt there is none, so the ids are those at the
    end of prompt and completion together, unless a token would reach over the border.
    """
    if not puts_space_before_text(tokenizer):
        return _plain_ids(tokenizer, text)
    prompt_ids = encode_prompt(tokenizer, prompt, options)
    joined = render_prompt(tokenizer, prompt, options) + text
    if isinstance(prompt, str):
        joined_ids = encode_text(tokenizer, joined)
    else:
        joined_ids = _plain_ids(tokenizer, joined)
    return rest_of_joined(tokenizer, prompt_ids, joined_ids, text)


def rest_of_joined(tokenizer, prompt_ids: list[int], joined_ids: list[int], text: str) -> list[int]:
    """Returns the token ids of a completion: those after the prompt's, or its own if a token reaches over the border.

    Args:
        tokenizer: A tokenizer that puts a space before every text.
        prompt_ids: Token ids of the prompt.
        joined_ids: Token ids of prompt and completion as one text.
        text: Text of the completion.
    """
    if joined_ids[: len(prompt_ids)] == prompt_ids:
        return joined_ids[len(prompt_ids) :]
    for start in ("\n", ".", "0"):  # a text with which the completion shares no token
        begun = _plain_ids(tokenizer, start)
        ids = _plain_ids(tokenizer, start + text)
        if ids[: len(begun)] == begun:
            return ids[len(begun) :]
    return _plain_ids(tokenizer, text)


def puts_space_before_text(tokenizer) -> bool:
    """True for the tokenizer of a decoder that puts a space before every text, as SentencePiece does."""
    if tokenizer.sep_token_id is not None:  # an encoder's completion is a text of its own
        return False
    first = tokenizer.convert_ids_to_tokens(_plain_ids(tokenizer, "a")[:1])
    return bool(first) and first[0].startswith(_SPACES)


def decode_completion(tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> str:
    """Decodes generated tokens without special tokens, for reward functions and people.

    With the tokens of a text prompt, a space between prompt and completion is kept, which SentencePiece tokenizers
    leave out at the start of a text.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not prompt_ids or not puts_space_before_text(tokenizer):
        return text
    context = prompt_ids[-_CONTEXT:]
    before = tokenizer.decode(context, skip_special_tokens=True)
    joined = tokenizer.decode(context + ids, skip_special_tokens=True)
    if before and joined.startswith(before):
        return joined.removeprefix(before)
    return text


# --- the chat template -----------------------------------------------------------------------------------------------


def _render(
    tokenizer,
    messages: Messages,
    options: Mapping[str, Any] | None,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """Renders messages. Raises `Unrenderable` if the template refuses them or leaves out a text or a tool call."""
    how = {"add_generation_prompt": add_generation_prompt}
    if continue_final_message:
        how["continue_final_message"] = True

    def render(messages: Messages) -> str:
        return _apply_template(tokenizer, messages, how, options)

    messages = _in_readable_form(tokenizer, messages, render, how | dict(options or {}))
    if not any(message.get("tool_calls") for message in messages):
        return render(messages)
    # Some templates render tool calls only in messages without text, and some read empty text as no text.
    for candidate in (messages, _without_empty_texts(messages)):
        marked, marks = _mark_tool_calls(candidate)
        if all(mark in render(marked) for mark in marks):
            return render(candidate)
    raise Unrenderable("the chat template does not render tool_calls")


def _apply_template(
    tokenizer, messages: Messages, how: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how, **(options or {}))
    except Exception as error:  # a template may raise any error, for example when it adds text to a record
        raise Unrenderable(f"the chat template refuses the messages ({first_line(error)[:100]})") from error


def is_rendered_as_given(tokenizer, messages: Messages, *, add_generation_prompt: bool = False) -> bool:
    """True if the chat template renders the text of each of these messages, in the form in which they are.

    The messages have text only: no tool calls, and nothing but text as their content.
    """
    how = {"add_generation_prompt": add_generation_prompt}
    found = _found_form(tokenizer, messages, lambda marked: _apply_template(tokenizer, marked, how), how)
    return found.form is as_given and found.lost_role is None


_forms: dict[tuple, FoundForm] = {}


def _in_readable_form(
    tokenizer,
    messages: Messages,
    render: Callable[[Messages], str],
    arguments: Mapping[str, Any],
) -> Messages:
    """Returns messages in the form that the chat template reads: with texts, or with lists of parts.

    Raises:
        Unrenderable: A message has a picture, sound or film, or the template leaves out the text of a message.
    """
    has_lists = any(isinstance(message.get("content"), list) for message in messages)
    for message in messages:
        media = media_of_message(message) if has_lists else None
        if media is not None:
            raise Unrenderable(f"images, audio and video are not supported, but a message has a part {media!r}")
    found = _found_form(tokenizer, messages, render, arguments)
    if found.lost_role is not None:
        render(found.form(messages))  # for the template's own reason, if it refuses them
        raise Unrenderable(f"the chat template does not render the text of a message of role {found.lost_role!r}")
    return found.form(messages)


def _found_form(
    tokenizer, messages: Messages, render: Callable[[Messages], str], arguments: Mapping[str, Any]
) -> FoundForm:
    key = (*_template_key(tokenizer, arguments), shape_of(messages))
    if key not in _forms:
        if len(_forms) >= _MAX_CACHED:
            _forms.clear()
        _forms[key] = find_form(messages, lambda marked: _rendered_or_none(render, marked))
    return _forms[key]


def _rendered_or_none(render: Callable[[Messages], str], messages: Messages) -> str | None:
    try:
        return render(messages)
    except Unrenderable:
        return None


def _template_key(tokenizer, arguments: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns what a rendering depends on besides the messages."""
    return (
        str(tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
        _sorted_json(arguments),
    )


def _without_empty_texts(messages: Messages) -> Messages:
    changed = []
    for message in messages:
        if message.get("tool_calls") and not message.get("content"):
            message = message | {"content": None}
        changed.append(message)
    return changed


def _mark_tool_calls(messages: Messages) -> tuple[Messages, list[str]]:
    """Returns the messages with a mark as the name of each function, and the marks."""
    marked = []
    marks: list[str] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            mark = f"called{len(marks)}here"
            marks.append(mark)
            if isinstance(call.get("function"), dict):
                call = call | {"function": call["function"] | {"name": mark}}
            else:
                call = call | {"name": mark}
            calls.append(call)
        if calls:
            message = message | {"tool_calls": calls}
        marked.append(message)
    return marked, marks


class _LostThought(Unrenderable):
    """Raised if the template leaves out a thought that is part of a message's text."""


def _check_thoughts(tokenizer, prompt: Messages, completion: Messages, options: Mapping[str, Any] | None) -> None:
    """Raises `Unrenderable` if the template leaves out a thought: answers that differ only there would be equal."""
    for place, message in enumerate(completion):
        thoughts = []
        for name in THOUGHT_FIELDS:
            value = message.get(name)
            if isinstance(value, str) and value.strip():
                lost = Unrenderable(f"the chat template does not render {name} of a completion")
                thoughts.append((message | {name: _MARK}, lost))
        content = _with_marked_thought(message.get("content"))
        if content is not None:
            lost = _LostThought("the chat template does not render the <think> part of a completion")
            thoughts.append((message | {"content": content}, lost))
        for marked, lost in thoughts:
            changed = [*completion[:place], marked, *completion[place + 1 :]]
            if _MARK not in _render(tokenizer, [*prompt, *changed], options):
                raise lost


def _with_marked_thought(content: Any) -> str | None:
    """Returns the text with a mark in place of its thought, or None if it has none or an empty one."""
    text = text_of_parts(content)
    if text is not None:
        content = text
    if not isinstance(content, str):
        return None
    before, close, answer = content.partition("</think>")
    opening, _, thought = before.rpartition("<think>")  # the prompt may have opened it
    if not close or not thought.strip():
        return None
    return f"{opening}<think>\n{_MARK}\n</think>{answer}"


# --- the generation prompt -------------------------------------------------------------------------------------------


class _Opening(NamedTuple):
    """The end of a generation prompt.

    Attributes:
        optional: What not every completion goes on with, such as "<think>\\n\\n</think>\\n\\n".
        thought: "<think>" with what follows, if the thought is left open.
    """

    optional: str
    thought: str


_openings: dict[tuple, _Opening] = {}


def generation_opener(tokenizer, prompt: Messages, options: Mapping[str, Any] | None = None) -> str:
    r"""Returns the end of the generation prompt with which not every completion goes on, such as "<think>\n", or "".

    It is found by rendering the prompt with completions of one and of several messages.
    """
    return _opening(tokenizer, prompt, options).optional


def open_thought(tokenizer, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> str:
    r"""Returns "<think>\n" if the generation prompt opens a thought, which then belongs to the text of the answer."""
    if isinstance(prompt, str) or prefill_of(prompt) is not None:
        return ""
    return _opening(tokenizer, prompt, options).thought


def _opening(tokenizer, prompt: Messages, options: Mapping[str, Any] | None) -> _Opening:
    # It depends on the template and its options only, except that some templates open no answer after a tool's message.
    key = (*_template_key(tokenizer, options or {}), prompt[-1].get("role"))
    if key not in _openings:
        if len(_openings) >= _MAX_CACHED:  # rows with options of their own
            _openings.clear()
        _openings[key] = _find_opening(tokenizer, prompt, options)
    return _openings[key]


def _find_opening(tokenizer, prompt: Messages, options: Mapping[str, Any] | None) -> _Opening:
    opened = _render(tokenizer, prompt, options, add_generation_prompt=True)
    if _ends_with_separator(tokenizer, opened):
        return _Opening("", "")
    shared = [opened]
    answer = make_message("assistant", _ANSWER)
    for completion in ([answer], [answer, make_message("user", "Why?"), answer]):
        try:
            text = _render(tokenizer, [*prompt, *completion], options)
        except Unrenderable:  # a row with such a completion is refused later
            continue
        if _ANSWER not in text:  # templates of vision models take lists of parts
            raise Unrenderable("the chat template does not render the text of messages")
        shared.append(text)

    begin = commonprefix([opened, _render(tokenizer, prompt, options)])
    common = commonprefix(shared)
    # Less in common than the prompt itself: it is rendered differently with a completion, which is refused later.
    optional = opened[len(common) :] if len(common) >= len(begin) else ""
    added = opened.removeprefix(begin)
    thought = added[added.rindex("<think>") :] if "<think>" in added else ""
    return _Opening(optional, "" if "</think>" in thought else thought)

"""Reads cells of preference rows: numbers, labels, text and chat messages.

The functions take values as JSON, Arrow or CSV files provide them. For any other value they raise `Unusable`, which
names the column.
"""

from collections.abc import Iterable
from typing import Any

from .schema import Row, Unusable, is_list_of, is_number
from .text import Messages, is_messages, make_message

_TEMPLATE_FIELDS = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Fields of a message that chat templates use in addition to role, content and tool calls."""

_TRUTH = {"true": 1.0, "false": 0.0}

_MAX_DEPTH = 50
"""Deepest nesting of lists and records in a tool call."""


# --- numbers and labels ----------------------------------------------------------------------------------------------


def number(row: Row, column: str) -> float:
    """Returns the cell as a finite number. A number may be written as text, as in CSV files."""
    value = row.get(column)
    if isinstance(value, bool):
        value = float(value)
    elif isinstance(value, str):
        value = _parse_number(value)
    if not is_number(value):
        raise Unusable(f"{column} is not a finite number")
    return float(value)


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        word = text.strip().lower()
        return _TRUTH.get(word)


def is_absent(value: Any) -> bool:
    """True for None, for an empty CSV cell, and for NaN, which pandas writes for a missing number."""
    is_nan = value != value
    return value is None or value == "" or is_nan


def optional_number(
    row: Row,
    column: str,
    flag: str,
    flags: list[str],
) -> float | None:
    """Returns an optional number: None if the cell is empty; None, with `flag` added, if it is not a number."""
    if is_absent(row.get(column)):
        return None
    try:
        return number(row, column)
    except Unusable:
        flags.append(flag)
        return None


def as_label(value: Any) -> str | None:
    """Returns a label such as a category as text. None for anything but text or a whole number."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, int) and is_number(value):
        return str(value)
    return None


# --- text and messages -----------------------------------------------------------------------------------------------


def text_or_messages(value: Any, column: str) -> str | Messages:
    """Returns text unchanged, and messages reduced to the fields that chat templates use."""
    if isinstance(value, str):
        return value
    if not is_messages(value):
        raise Unusable(f"{column} is not text")
    messages = []
    for turn in value:
        message = chat_message(turn["role"], turn, column)
        if message["content"] is None:
            message["content"] = ""
        messages.append(message)
    return messages


def chat_message(
    role: str | None,
    turn: dict[str, Any],
    column: str,
) -> dict[str, Any]:
    """Converts a turn to a chat message without empty fields.

    The text is in `content` or, as in ShareGPT, in `value`. A list of text parts is joined. `content` is None for a
    turn without text and without a tool call.
    """
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if isinstance(content, list):
        content = _join_parts(content, column)

    # A message may be only a tool call, without text. An empty list of calls counts as no call.
    calls = turn.get("tool_calls") or None
    if calls is not None:
        if not _are_calls(calls):
            raise Unusable(f"{column} has tool_calls that are not a list of records")
        if content is None:
            content = ""

    if not isinstance(content, str):
        content = None
    message = {"role": role, "content": content}
    for field in _TEMPLATE_FIELDS:
        value = turn.get(field)
        if isinstance(value, str):
            message[field] = value
    if calls:
        message["tool_calls"] = calls
    return message


def _join_parts(parts: list[Any], column: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):  # an image, for example: the text alone would be a different question
            raise Unusable(f"{column} has a part that is not text")
        texts.append(text)
    return "".join(texts)


def _are_calls(value: Any) -> bool:
    return is_list_of(value, dict) and all(map(_fits_a_column, value))


def _fits_a_column(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """False for integers over 64 bits and for values nested too deeply, which no Arrow column can store."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if not isinstance(value, dict | list):
        return True
    if depth == 0:
        return False
    entries = value.values() if isinstance(value, dict) else value
    return all(_fits_a_column(entry, depth - 1) for entry in entries)


def alike(prompt: Any, *answers: Any) -> tuple[Any, ...]:
    """Converts prompt and answers to messages if one of them is text and the other is messages."""
    prompt_is_text = isinstance(prompt, str)
    answers_are_text = isinstance(answers[0], str)
    if prompt_is_text and not answers_are_text:
        return ask(prompt), *answers
    if answers_are_text and not prompt_is_text:
        return prompt, *map(reply, answers)
    return prompt, *answers


def ask(
    question: str,
    *,
    system: str = "",
    history: Iterable[tuple[str, str]] = (),
) -> Messages:
    """Converts a question to messages, after a system message and earlier (question, answer) turns."""
    messages: Messages = []
    if system:
        messages.append(make_message("system", system))
    for earlier_question, earlier_answer in history:
        messages.append(make_message("user", earlier_question))
        messages.append(make_message("assistant", earlier_answer))
    messages.append(make_message("user", question))
    return messages


def reply(value: Any) -> Messages | None:
    """Converts text to an assistant message. Returns None for anything else, which `schema.settle` drops and flags."""
    if not isinstance(value, str):
        return None
    return [make_message("assistant", value)]

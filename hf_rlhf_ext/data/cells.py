"""Cells of preference rows: numbers, labels, text and chat messages; `Unusable` where a cell holds something else.

Every function takes a value as JSON, Arrow or a csv file gives it, and says in `Unusable` which column was wrong.
"""

from collections.abc import Iterable
from typing import Any

from .schema import Row, Unusable, is_list_of, is_number
from .text import Messages, is_messages, make_message

_TEMPLATE_FIELDS = ("name", "tool_call_id", "reasoning_content", "thinking")
"""What chat templates read of a message beside role, content and tool calls."""

_TRUTH = {"true": 1.0, "false": 0.0}

_MAX_DEPTH = 50
"""Levels of lists and records in a tool call."""


# --- numbers and labels ----------------------------------------------------------------------------------------------


def number(row: Row, column: str) -> float:
    """The cell as a finite number, also where a csv file spells it."""
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
    """True for None, for an empty cell of a csv file, and for NaN, as which pandas writes a missing number."""
    is_nan = value != value
    return value is None or value == "" or is_nan


def optional_number(
    row: Row,
    column: str,
    flag: str,
    flags: list[str],
) -> float | None:
    """The number that a row may do without: None where there is none, and `flag` where the cell is not a number."""
    if is_absent(row.get(column)):
        return None
    try:
        return number(row, column)
    except Unusable:
        flags.append(flag)
        return None


def as_label(value: Any) -> str | None:
    """A category or the like as text; None for what is neither text nor a whole number."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, int) and is_number(value):
        return str(value)
    return None


# --- text and messages -----------------------------------------------------------------------------------------------


def text_or_messages(value: Any, column: str) -> str | Messages:
    """Text as it is; messages with what chat templates read of them."""
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
    """The turn as a chat message without empty entries.

    Text is under `content` or, as in ShareGPT, under `value`; a list of text parts is joined. `content` is None for a
    turn with neither text nor a tool call.
    """
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if isinstance(content, list):
        content = _join_parts(content, column)

    # A message may be a tool call alone, without text; an empty list of calls is none.
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
        if not isinstance(text, str):  # an image, say: the text alone would be another question
            raise Unusable(f"{column} has a part that is not text")
        texts.append(text)
    return "".join(texts)


def _are_calls(value: Any) -> bool:
    return is_list_of(value, dict) and all(map(_fits_a_column, value))


def _fits_a_column(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """False for a whole number beyond 64 bits and for what is nested without end: no column can hold these."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if not isinstance(value, dict | list):
        return True
    if depth == 0:
        return False
    entries = value.values() if isinstance(value, dict) else value
    return all(_fits_a_column(entry, depth - 1) for entry in entries)


def alike(prompt: Any, *answers: Any) -> tuple[Any, ...]:
    """Prompt and answers, all as messages where one side is text and the other side is messages."""
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
    """A question as messages, after a system text and earlier (question, answer) turns."""
    messages: Messages = []
    if system:
        messages.append(make_message("system", system))
    for earlier_question, earlier_answer in history:
        messages.append(make_message("user", earlier_question))
        messages.append(make_message("assistant", earlier_answer))
    messages.append(make_message("user", question))
    return messages


def reply(value: Any) -> Messages | None:
    """Text as an assistant's message; None for anything else, for `schema.settle` to leave out and name."""
    if not isinstance(value, str):
        return None
    return [make_message("assistant", value)]

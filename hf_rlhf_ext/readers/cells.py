"""Helpers that read one cell of a public dataset: instructions with inputs, chat turns, lists written as JSON."""

import json
from typing import Any

from ..data.cells import ask, chat_message
from ..data.schema import Row, Unusable, is_list_of
from ..data.text import Messages, make_message

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "prompt": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Name of the speaker in ShareGPT, Vicuna, LLaMA-Factory and OASST -> role of the chat message."""


def text_cell(row: Row, column: str, default: str | None = None) -> str:
    """Returns the text of the cell, or `default` if the cell is missing."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise Unusable(f"{column} is not text")
    return value


def records(row: Row, column: str) -> list[Row]:
    """Returns the list of records in the cell."""
    value = row[column]
    if not is_list_of(value, dict):
        raise Unusable(f"{column} is not a list of records")
    return value


def text_list(row: Row, column: str) -> list[str]:
    """Returns the list of texts in the cell, which may also be written as JSON. The list must not be empty."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not value or not is_list_of(value, str):
        raise Unusable(f"{column} is not a list of texts")
    return value


def to_messages(turns: Any, column: str = "conversations") -> Messages:
    """Converts turns, `{from, value}` or `{role, content}`, to chat messages."""
    if not isinstance(turns, list) or not turns:
        raise Unusable(f"{column} is not a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable(f"{column} has a turn without a known speaker and text")
        # `role` is OpenAI's name for the field, `from` is ShareGPT's.
        speaker = turn.get("role") or turn.get("from")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        message = chat_message(role, turn, column)
        if role is None or message["content"] is None:
            raise Unusable(f"{column} has a turn without a known speaker and text")
        messages.append(message)
    return messages


def with_system(turns: Messages, row: Row) -> Messages:
    """Puts the `system` text of the row before the turns, unless they already begin with a system message."""
    system = row.get("system")
    if not isinstance(system, str) or not system:
        return turns
    if turns[0]["role"] == "system":
        return turns
    return [make_message("system", system), *turns]


def instruction(row: Row, column: str = "instruction") -> Messages:
    """Converts Alpaca's `instruction` and `input` (and LLaMA-Factory's `system` and `history`) to messages."""
    context = ""
    if column != "input":  # otherwise `input` is the question itself
        context = text_cell(row, "input", "")
    # LLaMA-Factory stores earlier turns as [question, answer].
    history = row.get("history") or []
    if not isinstance(history, list) or not all(map(_is_exchange, history)):
        raise Unusable("history is not a list of [question, answer]")
    question = text_cell(row, column)
    if context.strip():
        question += f"\n\n{context}"
    return ask(question, system=text_cell(row, "system", ""), history=history)


def _is_exchange(turn: Any) -> bool:
    if not isinstance(turn, list | tuple) or len(turn) != 2:
        return False
    return is_list_of(list(turn), str)

"""Cells as public data sets have them: instructions with inputs, turns under many names, lists spelled as JSON."""

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
"""ShareGPT, Vicuna, LLaMA-Factory and OASST names of a turn's speaker -> the role of a chat message."""


def text_cell(row: Row, column: str, default: str | None = None) -> str:
    """The cell's text; `default` stands for a missing cell."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise Unusable(f"{column} is not text")
    return value


def records(row: Row, column: str) -> list[Row]:
    """The cell's list of records."""
    value = row[column]
    if not is_list_of(value, dict):
        raise Unusable(f"{column} is not a list of records")
    return value


def text_list(row: Row, column: str) -> list[str]:
    """The cell's list of texts, at least one, also where the cell spells it as JSON."""
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
    """Turns as `{from, value}` or `{role, content}` -> messages."""
    if not isinstance(turns, list) or not turns:
        raise Unusable(f"{column} is not a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable(f"{column} has a turn without a known speaker and text")
        # OpenAI's name of the column, else ShareGPT's.
        speaker = turn.get("role") or turn.get("from")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        message = chat_message(role, turn, column)
        if role is None or message["content"] is None:
            raise Unusable(f"{column} has a turn without a known speaker and text")
        messages.append(message)
    return messages


def with_system(turns: Messages, row: Row) -> Messages:
    """The turns after the row's `system` text, unless they begin with one."""
    system = row.get("system")
    if not isinstance(system, str) or not system:
        return turns
    if turns[0]["role"] == "system":
        return turns
    return [make_message("system", system), *turns]


def instruction(row: Row, column: str = "instruction") -> Messages:
    """Alpaca's `instruction` and `input` (and LLaMA-Factory's `system` and `history`) as messages."""
    context = ""
    if column != "input":  # there `input` is the question itself
        context = text_cell(row, "input", "")
    # LLaMA-Factory's earlier turns, each [question, answer].
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

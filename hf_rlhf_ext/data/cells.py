"""What the cells of a source row hold: text, numbers, lists, turns of a conversation; `Unusable` where they do not."""

import json
from collections.abc import Iterable
from typing import Any

from .schema import Unusable, is_number
from .text import Messages, is_messages

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "prompt": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""ShareGPT, Vicuna, LLaMA-Factory and OASST names of a turn's speaker -> the role of a chat message."""

_FURTHER = ("name", "tool_call_id", "reasoning_content", "thinking")
"""What chat templates read of a message beside role, content and tool calls."""


def text(row: dict[str, Any], column: str, default: str | None = None) -> str:
    """The cell's text; `default` stands for a missing cell."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise Unusable(f"{column} is not text")
    return value


def number(row: dict[str, Any], column: str) -> float:
    """The cell as a finite number, also where a csv file spells it."""
    value = row.get(column)
    try:
        value = float(value) if isinstance(value, str | bool) else value
    except ValueError:
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower())
    if not is_number(value):
        raise Unusable(f"{column} is not a finite number")
    return float(value)


def is_absent(value: Any) -> bool:
    """True for None, for an empty cell of a csv file, and for NaN, as which pandas writes a missing number."""
    return value is None or value == "" or value != value


def optional_number(row: dict[str, Any], column: str, flag: str, flags: list[str]) -> float | None:
    """The number that a row may do without: None where there is none, and `flag` where the cell holds another thing."""
    if is_absent(row.get(column)):
        return None
    try:
        return number(row, column)
    except Unusable:
        flags.append(flag)
        return None


def as_label(value: Any) -> str | None:
    """A category or the like as text; None for what is neither text nor a whole number."""
    fits = isinstance(value, int) and not isinstance(value, bool) and is_number(value)
    return str(value) if fits else value if isinstance(value, str) and value else None


def records(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    value = row[column]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Unusable(f"{column} is not a list of records")
    return value


def json_texts(row: dict[str, Any], column: str) -> list[str]:
    """A list of texts, also where the cell spells it as JSON."""
    try:
        value = json.loads(text(row, column)) if isinstance(row[column], str) else row[column]
    except ValueError:
        value = None
    if not isinstance(value, list) or not value or not all(isinstance(turn, str) for turn in value):
        raise Unusable(f"{column} is not a list of texts")
    return value


# --- conversations ---------------------------------------------------------------------------------------------------


def messages(turns: Any, column: str = "conversations") -> Messages:
    """Turns as `{from, value}` or `{role, content}` -> messages."""
    if not isinstance(turns, list) or not turns:
        raise Unusable(f"{column} is not a list of turns")
    found = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        speaker = turn.get("role") or turn.get("from")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        message = _message(role, turn, column)
        if role is None or message["content"] is None:
            raise Unusable(f"{column} has a turn without a known speaker and text")
        found.append(message)
    return found


def text_or_messages(value: Any, column: str) -> str | Messages:
    """Text as it is; messages with what chat templates read of them."""
    if isinstance(value, str):
        return value
    if not is_messages(value):
        raise Unusable(f"{column} is not text")
    found = [_message(turn["role"], turn, column) for turn in value]
    return [message | {"content": message["content"] or ""} for message in found]


def _message(role: str | None, turn: dict[str, Any], column: str) -> dict[str, Any]:
    """The turn without empty entries; parts of text are joined; content is None without text or call."""
    calls = turn.get("tool_calls") or None
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(parts) < len(content) or not all(isinstance(part, str) for part in parts):
            raise Unusable(f"{column} has a part that is not text")
        content = "".join(parts)
    if calls is not None and not _are_calls(calls):
        raise Unusable(f"{column} has tool_calls that are not a list of records")
    content = "" if content is None and calls else content
    message = {"role": role, "content": content if isinstance(content, str) else None}
    message |= {name: turn[name] for name in _FURTHER if isinstance(turn.get(name), str)}
    return message | ({"tool_calls": calls} if calls else {})


def _are_calls(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(call, dict) and _fits(call) for call in value)


def _fits(value: Any, depth: int = 50) -> bool:
    """False for a whole number beyond 64 bits and for what is nested without end: no column holds these."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_fits(entry, depth - 1) for entry in inner)
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def alike(prompt: Any, *answers: Any) -> tuple[Any, ...]:
    """The same in messages where one is text and the others are messages."""
    if isinstance(prompt, str) and not isinstance(answers[0], str):
        return ask(prompt), *answers
    if not isinstance(prompt, str) and isinstance(answers[0], str):
        return prompt, *map(reply, answers)
    return prompt, *answers


def with_system(turns: Messages, row: dict[str, Any]) -> Messages:
    """The turns after the row's `system` text, unless they begin with one."""
    system = row.get("system")
    told = isinstance(system, str) and system and turns[0]["role"] != "system"
    return [{"role": "system", "content": system}, *turns] if told else turns


def ask(question: str, *, system: str = "", history: Iterable = ()) -> Messages:
    """A question as messages, after a system text and earlier (question, answer) turns."""
    turns = [{"role": "system", "content": system}] if system else []
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*turns, {"role": "user", "content": question}]


def reply(value: Any) -> Messages | None:
    """Text as an assistant's message; None for anything else, for `settle` to leave out and name."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else None


def instruction(row: dict[str, Any], column: str = "instruction") -> Messages:
    """Alpaca's `instruction` and `input` (and LLaMA-Factory's `system` and `history`) as messages."""
    given, history = text(row, "input", "") if column != "input" else "", row.get("history") or []
    if not isinstance(history, list) or not all(_is_exchange(turn) for turn in history):
        raise Unusable("history is not a list of [question, answer]")
    question = text(row, column) + (f"\n\n{given}" if given.strip() else "")
    return ask(question, system=text(row, "system", ""), history=history)


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(said, str) for said in turn)

"""Public formats of demonstrations: each function turns a row into `{prompt, completion, …}`, or raises `Unusable`."""

import json
import re
from typing import Any

from .cells import ask, instruction, is_absent, messages, optional_number, reply, text, with_system
from .preferences import split_demonstration
from .schema import Unusable, is_empty

Row = dict[str, Any]
_RATINGS = ("rating", "score", "stars", "quality")
_TURN = re.compile(r"### (Human|Assistant):")


def _shown(prompt: Any, completion: Any, row: Row) -> Row:
    """A demonstration, with the rating and the tools that its source gives; an empty answer is flagged."""
    flags = ["empty_completion"] if is_empty(completion) else []
    found = {"prompt": prompt, "completion": completion, "flags": flags}
    column = next((name for name in _RATINGS if not is_absent(row.get(name))), None)
    rating = optional_number(row, column, "bad_rating", flags) if column else None
    tools = _tools(row.get("tools"), flags)
    return found | ({} if rating is None else {"rating": rating}) | ({} if tools is None else {"tools": tools})


def _tools(value: Any, flags: list[str]) -> str | None:
    """Descriptions of functions as the JSON that TRL parses."""
    if value is None or value == "":
        return None
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, list | dict):
            return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        pass
    flags.append("bad_tools")
    return None


def _conversation(turns: list[Row], row: Row, every_turn: bool) -> list[Row]:
    """Its last answer as the completion, or each of them; what follows the last answer is left out."""
    answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant" and k]
    if not answers:
        raise Unusable("no answer after a prompt")
    return [_shown(turns[:k], turns[k : k + 1], row) for k in (answers if every_turn else answers[-1:])]


def alpaca(row: Row, *, every_turn: bool = False) -> Row:
    return _shown(instruction(row), reply(text(row, "output")), row)


def dolly(row: Row, *, every_turn: bool = False) -> Row:
    context = row.get("input") if is_absent(row.get("context")) else row["context"]
    return _shown(instruction(row | {"input": context}), reply(text(row, "response")), row)


def orca(row: Row, *, every_turn: bool = False) -> Row:
    question = ask(text(row, "question"), system=text(row, "system_prompt", ""))
    return _shown(question, reply(text(row, "response")), row)


def gpt4all(row: Row, *, every_turn: bool = False) -> Row:
    return _shown(ask(text(row, "prompt")), reply(text(row, "response")), row)


def share_gpt(row: Row, *, every_turn: bool = False) -> list[Row]:
    return _conversation(with_system(messages(row["conversations"]), row), row, every_turn)


def lima(row: Row, *, every_turn: bool = False) -> list[Row]:
    """A list of texts, question and answer in turn."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise Unusable("conversations is not a list of texts")
    roles = ("user", "assistant")
    return _conversation([{"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns)], row, every_turn)


def chat(row: Row, *, every_turn: bool = False) -> list[Row]:
    return _conversation(messages(row["messages"], "messages"), row, every_turn)


def prompt_completion(row: Row, *, every_turn: bool = False) -> Row:
    return _shown(*split_demonstration(row | {"messages": None}), row)


def oasst_text(row: Row, *, every_turn: bool = False) -> list[Row]:
    """Guanaco's OASST text, `### Human: … ### Assistant: …`."""
    parts = _TURN.split(text(row, "text"))[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return _conversation(turns, row, every_turn)

"""Public formats of demonstrations: each function turns a row into `{prompt, completion, …}`, or raises `Unusable`."""

import re
from typing import Any

from .preferences import ask, instruction, messages, number, reply, split_demonstration, text
from .schema import Unusable, is_empty

Row = dict[str, Any]
_RATINGS = ("rating", "score", "stars", "quality")
_TURN = re.compile(r"### (Human|Assistant):")


def _shown(prompt: Any, completion: Any, row: Row) -> Row:
    """A demonstration, with the rating and the tools that its source gives; an empty answer is flagged."""
    found = {"prompt": prompt, "completion": completion, "flags": ["empty_completion"] if is_empty(completion) else []}
    column = next((name for name in _RATINGS if row.get(name) is not None), None)
    if column:
        found["rating"] = number(row, column)
    if isinstance(row.get("tools"), str):
        found["tools"] = row["tools"]
    return found


def _conversation(turns: list[Row], row: Row, every_turn: bool) -> list[Row]:
    """Its last answer as the completion, or each of them; what follows the last answer is left out."""
    answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant" and k]
    if not answers:
        raise Unusable("no answer after a prompt")
    return [_shown(turns[:k], turns[k : k + 1], row) for k in (answers if every_turn else answers[-1:])]


def alpaca(row: Row, *, every_turn: bool = False) -> Row:
    return _shown(instruction(row), reply(text(row, "output")), row)


def dolly(row: Row, *, every_turn: bool = False) -> Row:
    given = {"instruction": row.get("instruction"), "input": row.get("context")}
    return _shown(instruction(given), reply(text(row, "response")), row)


def orca(row: Row, *, every_turn: bool = False) -> Row:
    question = ask(text(row, "question"), system=text(row, "system_prompt", ""))
    return _shown(question, reply(text(row, "response")), row)


def gpt4all(row: Row, *, every_turn: bool = False) -> Row:
    return _shown(ask(text(row, "prompt")), reply(text(row, "response")), row)


def share_gpt(row: Row, *, every_turn: bool = False) -> list[Row]:
    turns = messages(row["conversations"])
    if isinstance(row.get("system"), str) and row["system"] and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": row["system"]})
    return _conversation(turns, row, every_turn)


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

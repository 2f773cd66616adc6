"""Public demonstration formats: each function converts a row to `{prompt, completion, …}`, or raises `Unusable`."""

import json
import re
from typing import Any

from ..data.cells import ask, is_absent, optional_number, reply
from ..data.schema import Row, Unusable, is_empty, is_list_of
from ..data.text import Messages, make_message
from .cells import instruction, text_cell, to_messages, with_system
from .preferences import split_demonstration

RATING_COLUMNS = ("rating", "score", "stars", "quality")
_TURN = re.compile(r"### (Human|Assistant):")
_TEXT_ROLES = {"Human": "user", "Assistant": "assistant"}


def demonstration(prompt: Any, completion: Any, row: Row) -> Row:
    """Builds a demonstration, with the rating and tools of the source row. An empty completion is flagged."""
    flags = []
    if is_empty(completion):
        flags.append("empty_completion")
    result = {"prompt": prompt, "completion": completion, "flags": flags}

    rating = _rating(row, flags)
    if rating is not None:
        result["rating"] = rating
    tools = _tools_as_json(row.get("tools"), flags)
    if tools is not None:
        result["tools"] = tools
    return result


def _rating(row: Row, flags: list[str]) -> float | None:
    """Returns the value of the first rating column that is not empty."""
    for column in RATING_COLUMNS:
        if not is_absent(row.get(column)):
            return optional_number(row, column, "bad_rating", flags)
    return None


def _tools_as_json(value: Any, flags: list[str]) -> str | None:
    """Returns the function descriptions as a JSON string, which TRL parses."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, list | dict):
            return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        pass
    flags.append("bad_tools")
    return None


def _conversation(turns: Messages, row: Row, every_turn: bool) -> list[Row]:
    """Uses the last answer as the completion, or each answer with `every_turn`. Turns after the last are dropped."""
    # An answer at the very start has no prompt, so it is skipped.
    rows = []
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant" and place > 0:
            rows.append(demonstration(turns[:place], [turn], row))
    if not rows:
        raise Unusable("no answer after a prompt")
    return rows if every_turn else rows[-1:]


# --- one function per format; `every_turn` makes one row per answer of a conversation ---------------------------------


def alpaca(row: Row, *, every_turn: bool = False) -> Row:
    question = instruction(row)
    answer = reply(text_cell(row, "output"))
    return demonstration(question, answer, row)


def dolly(row: Row, *, every_turn: bool = False) -> Row:
    context = row.get("context")
    if is_absent(context):
        context = row.get("input")
    question = instruction(row | {"input": context})
    answer = reply(text_cell(row, "response"))
    return demonstration(question, answer, row)


def orca(row: Row, *, every_turn: bool = False) -> Row:
    question = text_cell(row, "question")
    prompt = ask(question, system=text_cell(row, "system_prompt", ""))
    answer = reply(text_cell(row, "response"))
    return demonstration(prompt, answer, row)


def gpt4all(row: Row, *, every_turn: bool = False) -> Row:
    question = ask(text_cell(row, "prompt"))
    answer = reply(text_cell(row, "response"))
    return demonstration(question, answer, row)


def share_gpt(row: Row, *, every_turn: bool = False) -> list[Row]:
    turns = to_messages(row["conversations"])
    return _conversation(with_system(turns, row), row, every_turn)


def lima(row: Row, *, every_turn: bool = False) -> list[Row]:
    """Reads a list of texts in which questions and answers alternate."""
    texts = row["conversations"]
    if not is_list_of(texts, str):
        raise Unusable("conversations is not a list of texts")
    turns = []
    for place, text in enumerate(texts):
        role = "assistant" if place % 2 else "user"
        turns.append(make_message(role, text))
    return _conversation(turns, row, every_turn)


def chat(row: Row, *, every_turn: bool = False) -> list[Row]:
    return _conversation(to_messages(row["messages"], "messages"), row, every_turn)


def prompt_completion(row: Row, *, every_turn: bool = False) -> Row:
    # Some datasets repeat both in a `messages` column, which is ignored here.
    prompt, completion = split_demonstration(row | {"messages": None})
    return demonstration(prompt, completion, row)


def oasst_text(row: Row, *, every_turn: bool = False) -> list[Row]:
    """Reads the text of Guanaco's OASST version, `### Human: … ### Assistant: …`."""
    parts = _TURN.split(text_cell(row, "text"))[1:]  # [speaker, words, speaker, words, …]
    speakers = parts[::2]
    turns = []
    for speaker, words in zip(speakers, parts[1::2], strict=True):
        turns.append(make_message(_TEXT_ROLES[speaker], words.strip()))
    return _conversation(turns, row, every_turn)

"""Conversations in the forms of public datasets, converted to chat messages.

These forms are read, and the same forms as JSON text (or as Python writes them, in a CSV file made with pandas):

- messages of OpenAI, `{role, content}`, and turns of ShareGPT, `{from, value}`, with the speakers of `speakers.py`;
- exchanges, such as `{input, output}` or `{human, assistant}`, and pairs `[question, answer]`;
- texts of user and assistant in turn;
- a record of lists, `{"role": […], "content": […]}`, and a record that holds one of these as `messages`.

For anything else the functions raise `Unusable`, which names the column.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from .media import TEXT_PARTS, media_field
from .schema import Row, Unusable, is_list_of
from .speakers import required_role, role_of
from .text import THOUGHT_FIELDS, Messages, make_message

_SPEAKER_FIELDS = ("role", "from", "speaker", "author", "sender")
_TEXT_FIELDS = ("content", "value", "text", "message", "utterance")
_ASKED_FIELDS = ("input", "human", "user", "question", "instruction", "prompt", "query")
_ANSWERED_FIELDS = ("output", "assistant", "bot", "gpt", "answer", "response", "completion")
_WRAPPERS = ("messages", "conversations", "conversation")

_TEMPLATE_FIELDS = ("name", "tool_call_id", *THOUGHT_FIELDS)
"""Fields of a message that chat templates use in addition to role, content and tool calls."""

_REASONING_PARTS = {"reasoning": "reasoning_content", "thinking": "thinking"}
"""Type of a part -> field of the message that chat templates read."""

_MAX_DEPTH = 50
"""Deepest nesting of lists and records in a tool call."""


# --- one message -----------------------------------------------------------------------------------------------------


def chat_message(
    role: str | None,
    turn: Row,
    column: str,
) -> dict[str, Any]:
    """Converts a turn to a chat message without empty fields.

    The text is in `content` or, as in ShareGPT, in `value`. A list of text parts is joined. `content` is None for a
    turn without text and without a tool call.
    """
    _refuse_media(turn, column)
    content = None
    for field in _TEXT_FIELDS:
        if content is None:
            content = turn.get(field)
    fields: dict[str, Any] = {}
    if isinstance(content, list):
        content, fields = _read_parts(content, column)

    for field in _TEMPLATE_FIELDS:
        value = turn.get(field)
        if isinstance(value, str):
            fields[field] = value
    calls = _calls_of(turn, column)
    if calls:
        fields["tool_calls"] = calls

    # A message may be only a tool call, without text.
    if content is None and fields.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        content = None
    return {"role": role, "content": content, **fields}


def _refuse_media(record: Row, column: str) -> None:
    """Raises `Unusable` for a picture, sound or film: the text alone would be a different question."""
    field = media_field(record)
    if field is not None:
        raise Unusable(f"{column} has a part that is not text: {field}")


def _read_parts(parts: list[Any], column: str) -> tuple[str | None, dict[str, Any]]:
    """Returns the joined text of a message's parts, and fields for its reasoning and tool calls."""
    texts: list[str] = []
    fields: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, dict):
            raise Unusable(f"{column} has a part that is not text")
        _refuse_media(part, column)
        kind = part.get("type")
        words = _text_of_part(part, kind)
        if words is None:
            raise Unusable(f"{column} has a part that is not text: {kind}")
        if kind == "tool_call":
            fields.setdefault("tool_calls", []).append(_call_of_text(words, column))
        elif kind in _REASONING_PARTS:
            field = _REASONING_PARTS[kind]
            fields[field] = fields.get(field, "") + words
        else:
            texts.append(words)
    # A message of nothing but tool calls has no text.
    has_text = bool(texts) or not fields
    return "".join(texts) if has_text else None, fields


def _text_of_part(part: Row, kind: Any) -> str | None:
    """Returns the words of a part: in `text`, or in `value`, as LLaMA-Factory's v1 files have it."""
    if kind not in (*TEXT_PARTS, *_REASONING_PARTS, "tool_call"):
        return None
    for field in ("text", "value", kind):
        words = part.get(field)
        if isinstance(words, str):
            return words
    return None


def _call_of_text(text: str, column: str) -> Row:
    """Reads a tool call written as JSON, `{"name": …, "arguments": …}`."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not _fits_a_column(call):
        raise Unusable(f"{column} has a tool call that is not JSON")
    return as_tool_call(call)


def as_tool_call(call: Row) -> Row:
    """Writes `{name, arguments}` as chat templates expect it, and leaves OpenAI's form as it is."""
    if "function" in call:
        return call
    return {"type": "function", "function": call}


def _calls_of(turn: Row, column: str) -> list[Row]:
    """Returns the tool calls of a turn, also from JSON text or from OpenAI's older field `function_call`."""
    calls = turn.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        written = parsed(calls)
        calls = calls if written is None else written
    if calls:
        if not are_calls(calls):
            raise Unusable(f"{column} has tool_calls that are not a list of records")
        return calls
    older = turn.get("function_call")
    if isinstance(older, dict) and older.get("name"):
        return [as_tool_call(older)]
    return []


def are_calls(value: Any) -> bool:
    """True for a list of records that a column can hold."""
    return is_list_of(value, dict) and all(map(_fits_a_column, value))


def _fits_a_column(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """False for integers over 64 bits, NaN, and values nested too deeply, which no column can store."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):
        return math.isfinite(value)  # JSON has no other numbers
    if not isinstance(value, dict | list):
        return True
    if depth == 0:
        return False
    entries = value.values() if isinstance(value, dict) else value
    return all(_fits_a_column(entry, depth - 1) for entry in entries)


# --- JSON text in a cell ---------------------------------------------------------------------------------------------

_RECORDS = re.compile(r"\s*\[\s*\{\s*['\"](\w+)['\"]\s*:")
"""How a list of records begins. The group is the name of the first field."""


def parsed(text: str) -> Any:
    """Returns the list or record that the text is, written as JSON or as Python writes it. None for any other text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_literal(text)
    return value if isinstance(value, list | dict) else None


def _python_literal(text: str) -> Any:
    """Reads what `DataFrame.to_csv` makes of a list. Only literals are read, nothing is run."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def conversation_in_text(text: str, column: str) -> Messages | None:
    """Returns the messages of a text that is a list of turns, written as JSON. None for any other text."""
    begins = _RECORDS.match(text)
    is_closed = begins is not None and text.rstrip().endswith("]")
    if not is_closed:
        return None
    turns = parsed(text)
    if turns is None:
        if begins.group(1) in (*_SPEAKER_FIELDS, "content", "value"):
            raise Unusable(f"{column} looks like a conversation, but is not JSON")
        return None
    # Any other list is an answer or a question that happens to be JSON.
    if not all(map(_has_known_speaker, turns)):
        return None
    return to_messages(turns, column)


def _has_known_speaker(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    has_text = any(isinstance(turn.get(field), str | list) for field in ("content", "value"))
    return role_of(_speaker_of(turn)) is not None and has_text


# --- a whole conversation --------------------------------------------------------------------------------------------


def to_messages(turns: Any, column: str = "conversations") -> Messages:
    """Converts a conversation in any of the forms above to messages. A turn without text is an error."""
    messages = read_conversation(turns, column)
    if messages is None:
        raise Unusable(f"{column} is not a list of turns")
    return messages


def read_conversation(value: Any, column: str) -> Messages | None:
    """Returns the messages of a conversation, or None if the value has none of the forms above."""
    if isinstance(value, str):
        value = parsed(value)
    value = _unwrapped(value)
    if not isinstance(value, list | tuple) or not value:
        return None
    reader = _reader_for(value)
    return reader(list(value), column) if reader else None


def _unwrapped(value: Any) -> Any:
    """Takes the list of turns out of a record: `{"messages": […]}`, or a record of lists, as `datasets` stores it."""
    if not isinstance(value, dict):
        return _with_small_letters(value)
    for name in _WRAPPERS:
        if isinstance(value.get(name), list):
            return value[name]
    lists = {name: entries for name, entries in value.items() if isinstance(entries, list)}
    lengths = {len(entries) for entries in lists.values()}
    if _speaker_of(lists) is None or len(lengths) != 1:
        return value
    return [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]


def _with_small_letters(turns: Any) -> Any:
    """Writes the fields of turns such as `{"Role": …, "Content": …}` in lower case."""
    has_capitals = isinstance(turns, list) and turns and isinstance(turns[0], dict) and _has_capital_speaker(turns[0])
    if not has_capitals:
        return turns
    small = []
    for turn in turns:
        is_record = isinstance(turn, dict)
        small.append({str(field).lower(): value for field, value in turn.items()} if is_record else turn)
    return small


def _has_capital_speaker(turn: Row) -> bool:
    if any(field in turn for field in _SPEAKER_FIELDS):
        return False
    return any(str(field).lower() in _SPEAKER_FIELDS[:2] for field in turn)


def _speaker_of(turn: Row) -> Any:
    """Returns the speaker of a turn: in `role` for OpenAI, in `from` for ShareGPT."""
    for field in _SPEAKER_FIELDS:
        if turn.get(field):
            return turn[field]
    return None


def has_speakers(value: Any) -> bool:
    """True for a message or turn, and for a list that begins with one."""
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return False
    return any(field in value for field in _SPEAKER_FIELDS[:2]) or _has_capital_speaker(value)


def _reader_for(turns: list[Any] | tuple[Any, ...]) -> Callable[[list[Any], str], Messages] | None:
    """Chooses the reader by the first turn. The reader checks the others."""
    first = turns[0]
    if isinstance(first, str):
        return _from_texts
    if isinstance(first, list | tuple):
        return _from_pairs
    if not isinstance(first, dict):
        return None
    is_exchange = _speaker_of(first) is None and _field_of(first, _ANSWERED_FIELDS) is not None
    return _from_exchanges if is_exchange else _from_turns


def _from_turns(turns: list[Any], column: str) -> Messages:
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Unusable(f"{column} has a turn without a known speaker and text")
        role = required_role(_speaker_of(turn), column)
        message = chat_message(role, turn, column)
        if message["content"] is None:
            raise Unusable(f"{column} has a turn without a known speaker and text")
        messages.append(message)
    return messages


def _from_texts(texts: list[Any], column: str) -> Messages:
    """Reads texts of user and assistant in turn."""
    if not is_list_of(texts, str):
        raise Unusable(f"{column} is not a list of texts")
    messages = []
    for place, text in enumerate(texts):
        role = "assistant" if place % 2 else "user"
        messages.append(make_message(role, text))
    return messages


def _from_pairs(pairs: list[Any], column: str) -> Messages:
    messages = []
    for pair in pairs:
        if not _is_pair_of_texts(pair):
            raise Unusable(f"{column} is not a list of [question, answer]")
        question, answer = pair
        messages.append(make_message("user", question))
        messages.append(make_message("assistant", answer))
    return messages


def _is_pair_of_texts(pair: Any) -> bool:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return False
    return is_list_of(list(pair), str)


def _from_exchanges(exchanges: list[Any], column: str) -> Messages:
    """Reads `{input, output}` (Capybara), `{human, assistant}` (ms-swift) and the like. A `system` text comes first."""
    messages: Messages = []
    for exchange in exchanges:
        if not isinstance(exchange, dict):
            raise Unusable(f"{column} has a turn without a known speaker and text")
        question = _field_of(exchange, _ASKED_FIELDS)
        answer = _field_of(exchange, _ANSWERED_FIELDS)
        if question is None or answer is None:
            raise Unusable(f"{column} has an exchange without a question and an answer")
        system = exchange.get("system")
        if isinstance(system, str) and system and not messages:
            messages.append(make_message("system", system))
        messages.append(make_message("user", question))
        messages.append(make_message("assistant", answer))
    return messages


def _field_of(record: Row, names: Iterable[str]) -> str | None:
    """Returns the first of the fields that holds text, whatever its case."""
    fields = {str(name).lower(): value for name, value in record.items()}
    for name in names:
        if isinstance(fields.get(name), str):
            return fields[name]
    return None


# --- sides and prompts, which may be text ----------------------------------------------------------------------------


def text_or_messages(value: Any, column: str) -> str | Messages:
    """Returns text unchanged, and a conversation or a single message as messages with the fields that templates use."""
    if isinstance(value, str):
        return conversation_in_text(value, column) or value
    if _are_plain_messages(value):  # most rows of most datasets, in a fifth of the time
        return [make_message(message["role"], message["content"]) for message in value]
    value = _unwrapped(value)
    turns = [value] if isinstance(value, dict) else value
    if not turns or not is_list_of(turns, dict):
        raise Unusable(f"{column} is not text")
    messages = []
    for turn in turns:
        messages.append(_message_of_side(turn, column))
    return messages


_PLAIN_ROLES = frozenset(("system", "user", "assistant", "tool"))
_PLAIN_FIELDS = {"role", "content"}


def _are_plain_messages(value: Any) -> bool:
    """True for messages that are read as they are: of a usual role, with text and nothing else."""
    if not isinstance(value, list) or not value:
        return False
    for message in value:
        if not isinstance(message, dict) or message.keys() != _PLAIN_FIELDS:
            return False
        role = message["role"]
        if not isinstance(role, str) or role not in _PLAIN_ROLES or not isinstance(message["content"], str):
            return False
    return True


def _message_of_side(turn: Row, column: str) -> dict[str, Any]:
    speaker = _speaker_of(turn)
    if not isinstance(speaker, str):
        raise Unusable(f"{column} is not text")
    message = chat_message(required_role(speaker, column), turn, column)
    if message["content"] is None:
        # A text field that is None is empty text, and anything else is an error.
        texts = [turn[field] for field in _TEXT_FIELDS if field in turn]
        if not texts or any(text is not None for text in texts):
            raise Unusable(f"{column} is not text")
        message["content"] = ""
    return message


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

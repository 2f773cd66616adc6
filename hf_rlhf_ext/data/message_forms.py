"""Forms of messages: some chat templates read the content of a message as text, others as a list of parts.

A template says nothing about a form that it does not read: it may print the list as Python does, or leave the text out.
So texts are replaced by marks, and the first form is used in which the template renders all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .media import TEXT_PARTS, text_of_parts

Messages = list[dict[str, Any]]
Form = Callable[[Messages], Messages]

_NAMES_OF_PARTS = ("'type'", '"type"', "'text'", '"text"')
"""What a template prints that turns a list of parts into text."""


def as_given(messages: Messages) -> Messages:
    """Returns the messages unchanged."""
    return messages


def as_text(messages: Messages) -> Messages:
    """Returns the messages with the text of a list of text parts in place of the list."""
    changed = []
    for message in messages:
        text = text_of_parts(message.get("content"))
        changed.append(message if text is None else message | {"content": text})
    return changed


def as_parts(messages: Messages) -> Messages:
    """Returns the messages with a list of one text part in place of each text."""
    changed = []
    for message in as_text(messages):
        content = message.get("content")
        if isinstance(content, str):
            message = message | {"content": [{"type": "text", "text": content}]}
        changed.append(message)
    return changed


class FoundForm(NamedTuple):
    """The form in which a chat template reads messages.

    Attributes:
        form: Function that returns messages in this form.
        lost_role: Role of a message whose text the template leaves out in every form, or None.
    """

    form: Form
    lost_role: str | None = None


def shape_of(messages: Messages) -> tuple:
    """Returns what the form depends on: for each message its role, its fields, and where its content has text."""
    shape = []
    for message in messages:
        fields = tuple(sorted(name for name, value in message.items() if value))
        content = message.get("content")
        if isinstance(content, list):
            places: Any = tuple((_type_of(part), bool(_text_of_part(part))) for part in content)
        else:
            places = type(content).__name__
        shape.append((message.get("role"), fields, places))
    return tuple(shape)


def find_form(messages: Messages, render: Callable[[Messages], str | None]) -> FoundForm:
    """Returns the form in which a chat template renders the text of every message.

    Args:
        messages: The messages. The text of a message with tool calls is not looked for, as some templates leave it out.
        render: Renders messages; returns None for messages that the template refuses.
    """
    marked, marks = _marked(messages)
    expected = render(as_text(marked))
    incomplete = FoundForm(as_given)  # for the template's own error, if it refuses every form
    for form in (as_given, as_text, as_parts):
        rendered = render(form(marked))
        if rendered is None or _prints_lists(rendered, expected):
            continue
        missing = [role for mark, role in marks.items() if mark not in rendered]
        if not missing:
            return FoundForm(form)
        if incomplete.lost_role is None:
            incomplete = FoundForm(form, missing[0])
    return incomplete


def _prints_lists(rendered: str, expected: str | None) -> bool:
    """True if the template has printed a list of parts. `expected` is what it renders of texts, if it takes them."""
    if expected is None:
        expected = ""
    return any(rendered.count(name) > expected.count(name) for name in _NAMES_OF_PARTS)


def _marked(messages: Messages) -> tuple[Messages, dict[str, str]]:
    """Returns the messages with a mark in place of each text, and for each mark the role of its message."""
    marked = []
    marks: dict[str, str] = {}

    def next_mark(message: dict[str, Any]) -> str:
        mark = f"text{len(marks)}here"
        marks[mark] = str(message.get("role"))
        return mark

    for message in messages:
        content = message.get("content")
        if message.get("tool_calls"):
            pass
        elif isinstance(content, str) and content.strip():
            message = message | {"content": next_mark(message)}
        elif isinstance(content, list):
            parts = []
            for part in content:
                if _text_of_part(part).strip():
                    part = part | {"text": next_mark(message)}
                parts.append(part)
            message = message | {"content": parts}
        marked.append(message)
    return marked, marks


def _type_of(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else type(part).__name__


def _text_of_part(part: Any) -> str:
    """Returns the text of a text part, or "" for anything else."""
    is_text = isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)
    return part["text"] if is_text else ""

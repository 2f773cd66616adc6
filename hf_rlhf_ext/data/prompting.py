"""Builds the prompt of a row from its parts: system text, earlier turns, question and context. Every reader uses it."""

import unicodedata
from collections.abc import Iterable, Sequence
from os.path import commonprefix
from typing import Any

from .cells import is_absent
from .conversations import ask, conversation_in_text, has_speakers, read_conversation, text_or_messages
from .schema import Row, Unusable
from .text import Messages, make_message, text_key
from .transcripts import is_transcript, read_marked, read_transcript, style_of

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction")
HISTORY_COLUMNS = ("history",)
CONTEXT_COLUMNS = ("context", "input")
"""Columns with the parts of a prompt beside the question, under the names that datasets use."""


# --- building --------------------------------------------------------------------------------------------------------


def build_prompt(
    question: Any,
    *,
    system: Any = None,
    history: Any = (),
    context: Any = None,
    as_messages: bool,
    column: str = "prompt",
) -> str | Messages:
    """Puts the parts of a prompt together.

    Args:
        question: Text, or a conversation in any form that `conversations.py` reads.
        system: Text for a first message, or None. It is left out if the conversation begins with the same one.
        history: Turns before the question: a conversation, or pairs of question and answer.
        context: Text that the question is about, or None. It follows the question after a blank line.
        as_messages: Whether a text question becomes messages. It always does with a system text or earlier turns.
        column: Column of the question, for the reason of `Unusable`.

    Returns:
        Text or messages.

    Raises:
        Unusable: The question is missing or is neither text nor a conversation, another part has the wrong type, or
            the conversation begins with another system message.
    """
    system = _optional_text(system, "system")
    question = read_question(question, column)
    earlier = _before_question(_read_history(history), question)
    question = _with_context(question, _optional_text(context, "context"))
    if isinstance(question, str) and (system or earlier):
        question = _with_room_before(question)
    if isinstance(question, str):
        if not (as_messages or system or earlier):
            return question
        question = ask(question)
    if earlier and question[0]["role"] == "system":
        # The system message stays in front of the earlier turns.
        conversation = [question[0], *earlier, *question[1:]]
    else:
        conversation = [*earlier, *question]
    return put_system_first(conversation, system)


def as_user_turns(prompts: Iterable[str | Messages]) -> list[Messages]:
    """Returns prompts as messages: text becomes one turn of the user, and messages are unchanged.

    Text that marks its turns is read as these turns: a transcript of HH-RLHF, and what a chat template has rendered.
    """
    return [as_user_turn(prompt) for prompt in prompts]


def as_user_turn(prompt: str | Messages) -> Messages:
    """Returns one prompt as messages, see `as_user_turns`."""
    if not isinstance(prompt, str):
        return prompt
    return _marked_turns(prompt) or ask(prompt)


def _marked_turns(text: str) -> Messages:
    """Returns the turns that a text marks, without the opened answer at its end. Empty for text without such marks."""
    if is_transcript(f"{text.rstrip()} "):
        turns = read_transcript(text.strip())
    else:
        style = style_of(text)
        # Other marks, such as "### Question:", belong to the text: its writer meant no chat template.
        turns = read_marked(text, style) if style is not None and style.is_template else []
    if turns and turns[-1] == make_message("assistant", ""):
        return turns[:-1]
    return turns


def read_question(value: Any, column: str) -> str | Messages:
    """Returns text unchanged, and a conversation in any form as messages."""
    if is_absent(value) and value != "":
        raise Unusable(f"{column} is missing")
    if isinstance(value, str):
        return conversation_in_text(value, column) or value
    if has_speakers(value):
        return text_or_messages(value, column)
    messages = read_conversation(value, column)
    if messages is None:
        raise Unusable(f"{column} is not text")
    return messages


def _optional_text(value: Any, column: str) -> str | None:
    """Returns the text of a cell, or None for a cell that is missing or holds only white space."""
    if is_absent(value):
        return None
    if not isinstance(value, str):
        raise Unusable(f"{column} is not text")
    return value if value.strip() else None


def _with_room_before(question: str) -> str | Messages:
    """Returns a question that a system text or earlier turns can stand before: a transcript of HH-RLHF as messages."""
    if is_transcript(f"{question.rstrip()} "):
        return read_transcript(question.strip().removesuffix("Assistant:"))
    style = style_of(question)
    if style is not None and style.is_template:
        raise Unusable("system or history has no place in a prompt that a chat template has rendered")
    return question


def _with_context(question: str | Messages, context: str | None) -> str | Messages:
    """Puts the context after the question. In a conversation, the question is its last message of the user."""
    if context is None:
        return question
    if isinstance(question, str):
        return f"{question}\n\n{context}"
    last = question[-1]
    if last["role"] != "user":
        raise Unusable("context has no question that it belongs to")
    return [*question[:-1], last | {"content": f"{last['content']}\n\n{context}"}]


def _read_history(history: Any) -> Messages:
    if is_absent(history) or not history:
        return []
    if isinstance(history, str) and is_transcript(history):
        return read_transcript(history.strip())
    style = style_of(history) if isinstance(history, str) else None
    messages = read_marked(history, style) if style else read_conversation(history, "history")
    if messages is None:
        raise Unusable("history is not a list of [question, answer], nor a text with marked turns")
    return messages


def _before_question(earlier: Messages, question: str | Messages) -> Messages:
    """Returns the earlier turns without those with which the question begins: a history may end with the question."""
    asked = ask(question) if isinstance(question, str) else question
    if earlier and earlier[-1] == make_message("assistant", ""):  # the last pair is the question, without its answer
        earlier = earlier[:-1]
    for n_shared in range(min(len(earlier), len(asked)), 0, -1):
        if text_key(earlier[-n_shared:]) == text_key(asked[:n_shared]):
            return earlier[:-n_shared]
    return earlier


def put_system_first(conversation: Messages, system: str | None) -> Messages:
    """Puts a system message before a conversation, unless it begins with the same one."""
    if not system:
        return conversation
    first = conversation[0]
    if first["role"] != "system":
        return [make_message("system", system), *conversation]
    own = first["content"]
    if own.strip() and text_key(own) != text_key(system):
        raise Unusable("system differs from the system message of the conversation")
    return [first | {"content": system}, *conversation[1:]]


# --- parts of a prompt in the columns of a row -----------------------------------------------------------------------


def system_text(row: Row, columns: Sequence[str] = SYSTEM_COLUMNS) -> str | None:
    """Returns the system text of a row, from the first of the columns that has one. Glaive writes "SYSTEM: " first."""
    system = None
    for column in columns:
        text = _optional_text(row.get(column), column)
        if text is None:
            continue
        text = text.removeprefix("SYSTEM: ")
        if system is not None and text_key(text) != text_key(system):
            raise Unusable(f"{column} differs from another system column")
        system = system or text
    return system


# --- a prompt that the answers repeat --------------------------------------------------------------------------------


def take_off_prompt(prompt: str | Messages, answer: str | Messages) -> str | Messages:
    """Returns the answer without the prompt at its start. An answer that does not repeat the prompt is unchanged."""
    rest = without_prompt(prompt, answer)
    return answer if rest is None else rest


def take_off_prompts(
    prompt: str | Messages,
    answers: Sequence[str | Messages],
) -> list[str | Messages]:
    """Takes the prompt off the answers to compare, if all of them repeat it. One that does may only quote it."""
    rests = [without_prompt(prompt, answer) for answer in answers]
    if isinstance(prompt, list) and all(isinstance(answer, str) for answer in answers):
        rests = [_without_question(prompt, answer) for answer in answers]
    if any(rest is None for rest in rests):
        return list(answers)
    return rests


def without_prompt(prompt: str | Messages, answer: str | Messages) -> str | Messages | None:
    """Returns what follows the prompt in an answer, or None for an answer that does not repeat the prompt."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return _text_after(prompt, answer)
    if isinstance(prompt, str):
        prompt = ask(prompt)
    if isinstance(answer, str) or not answer:
        return None
    # The answer may repeat the conversation without the system message or without the earlier turns.
    longest = min(len(prompt), len(answer) - 1)
    for n_repeated in range(longest, 0, -1):
        if text_key(prompt[-n_repeated:]) == text_key(answer[:n_repeated]):
            return answer[n_repeated:]
    return None


def without_question(question: str, answer: str) -> str | None:
    """Returns the answer to a question without the question at its start. None for one that does not repeat it.

    The answer to the single word "Hello" may begin with "Hello". A text that is only the question stays, too.
    """
    if len(question.split()) < 2:
        return None
    rest = _text_after(question, answer)
    return rest.lstrip() or None if rest is not None else None


def _without_question(prompt: Messages, answer: str) -> str | None:
    last = prompt[-1]
    return without_question(last["content"], answer) if last["role"] == "user" else None


def _text_after(prompt: str, answer: str) -> str | None:
    prompt = prompt.strip()
    answer_begins = answer.lstrip()
    if not prompt or not answer_begins.startswith(prompt):
        return None
    if not is_border(answer_begins, len(prompt)):
        return None
    return answer_begins[len(prompt) :]


# --- borders of words ------------------------------------------------------------------------------------------------

_JOINERS = frozenset(".,:/'’-_@+·")
"""Characters that belong to a word or number if letters or digits are on both sides: 3.5, don't, well-known."""


def is_border(text: str, cut: int) -> bool:
    """Whether a text can be cut before its character `cut` without cutting a word or a number into two."""
    if cut <= 0 or cut >= len(text):
        return True
    before = text[cut - 1]
    after = text[cut]
    if _continues_a_character(before, after):
        return False
    if _is_word(before) and _is_word(after):
        return False
    if after in _JOINERS and _is_word(before):
        return not _is_word(text[cut + 1 : cut + 2])
    if before in _JOINERS and _is_word(after):
        # A sign or a decimal point belongs to the digit after it, even if nothing is before it.
        is_sign = before in "+-.," and after.isdigit()
        return not (is_sign or _is_word(text[max(cut - 2, 0) : cut - 1]))
    return True


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _continues_a_character(before: str, after: str) -> bool:
    """True inside an accented letter, an emoji of several code points, or a line break of two characters."""
    if unicodedata.combining(after) or unicodedata.category(after) in ("Mn", "Me", "Mc", "Cf", "Sk"):
        return True
    return before == "\u200d" or (before, after) == ("\r", "\n")


def common_words(first: str, second: str) -> int:
    """Returns the length of the whole words that two texts begin with, cut at white space only.

    White space before the point where they begin to differ belongs to what follows. Neither rest is empty.
    """
    common = len(commonprefix([first, second]))
    cut = min(common, len(first) - 1, len(second) - 1)
    while cut > 0 and not (_ends_a_word(first, cut) and _ends_a_word(second, cut)):
        cut -= 1
    return max(cut, 0)


def _ends_a_word(text: str, cut: int) -> bool:
    if not text[cut].isspace() or text[cut - 1].isspace():
        return False
    # In "12 000", the space is a part of the number.
    is_in_number = text[cut - 1].isdigit() and text[cut + 1 : cut + 2].isdigit()
    return not is_in_number

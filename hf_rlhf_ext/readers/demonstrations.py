"""Reads demonstrations by the roles of their columns, and guesses these roles from names and values.

A demonstration is a whole conversation (`messages`), or a prompt and a completion. Every form has its system text,
earlier turns, tools and rating in further columns. An answer that a label calls disliked, unsafe or wrong is no
demonstration, unless the caller asks for all answers (`labels="all"`).
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from ..data.cells import is_absent, optional_number, template_kwargs_record, tools_as_json, truth
from ..data.conversations import (
    alike,
    are_calls,
    as_tool_call,
    parsed,
    read_conversation,
    reply,
    text_or_messages,
)
from ..data.prompting import (
    CONTEXT_COLUMNS,
    HISTORY_COLUMNS,
    SYSTEM_COLUMNS,
    build_prompt,
    system_text,
    take_off_prompt,
    without_prompt,
    without_question,
)
from ..data.schema import Row, Unusable, is_empty
from ..data.text import Messages
from ..data.transcripts import is_transcript, read_marked, read_transcript, style_of
from .columns import normal_name
from .profile import Profile
from .roles import Roles, cell

Labels = Literal["liked", "all"]

MESSAGES_COLUMNS = (
    "messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "data",  # codespell:ignore
)  # fmt: skip
TRANSCRIPT_COLUMNS = ("text", "transcript", "formatted_text")
PROMPT_COLUMNS = (
    "prompt", "instruction", "question", "query", "problem", "inputs", "user_prompt", "user", "human", "request",
    "input_text", "input",
)  # fmt: skip
COMPLETION_COLUMNS = (
    "completion", "response", "output", "generated_solution", "solution", "answer", "targets", "target", "answers",
    "reply", "assistant", "model_response", "model_output", "generation", "outputs",
)  # fmt: skip
TOOLS_COLUMNS = ("tools", "functions", "available_tools")
TEMPLATE_COLUMNS = ("chat_template_kwargs", "template_kwargs")
RATING_COLUMNS = ("rating", "score", "stars", "quality")
LIKED_COLUMNS = (
    "label", "kto_tag", "is_safe", "safe", "is_good", "liked", "is_liked", "thumbs_up", "accepted", "is_accepted",
    "acceptable", "is_acceptable", "is_correct", "correct", "desirable", "is_desirable", "thumbs", "thumb", "feedback",
)  # fmt: skip
DISLIKED_COLUMNS = ("is_unsafe", "unsafe", "toxic", "is_toxic", "harmful", "is_harmful", "disliked", "thumbs_down")
"""Names of columns, in the order in which they are tried: `input` comes last, as it often is the context.

True means a good answer in `LIKED_COLUMNS`, and a bad one in `DISLIKED_COLUMNS`.
"""


# --- the parts of a demonstration ------------------------------------------------------------------------------------


def read_demonstration(
    roles: Roles,
    row: Row,
    *,
    every_turn: bool = False,
    labels: Labels = "liked",
    label_columns: tuple[str, ...] = (),
    repeats_prompt: bool = False,
) -> list[Row]:
    """Reads a row by its roles.

    Args:
        roles: Which column has which role.
        row: A row of the source.
        every_turn: Whether to make one demonstration per answer of a conversation instead of one for the last answer.
        labels: "liked" refuses an answer whose label is false. "all" keeps every answer.
        label_columns: Further columns that say whether the answer is good, beside `roles.label`.
        repeats_prompt: Whether answers that are text begin with the prompt, which is then taken off.

    Returns:
        The demonstrations, at least one.

    Raises:
        Unusable: A part is missing or cannot be read, or the answer is not liked.
    """
    flags: list[str] = []
    for column in (roles.label, *label_columns):
        _check_label(row, column, labels, flags)
    if roles.messages is not None:
        turns = _conversation_of(roles, row)
        return _answers_of(turns, roles, row, every_turn, flags)

    prompt, completion = _asked_and_answered(roles, row, repeats_prompt)
    later_turns = _numbered_turns(roles, row)
    if later_turns:
        prompt, completion = alike(prompt, completion)
        if isinstance(prompt, str):
            prompt, completion = build_prompt(prompt, as_messages=True), reply(completion)
        return _answers_of([*prompt, *completion, *later_turns], roles, row, every_turn, flags)
    return [_demonstration(prompt, completion, roles, row, flags)]


def _check_label(row: Row, column: str | None, labels: Labels, flags: list[str]) -> None:
    """Raises `Unusable` if the label says that the answer is bad. A label that is neither yes nor no is flagged."""
    value = cell(row, column)
    if column is None or labels == "all" or is_absent(value):
        return
    is_good = _says_good(value, column)
    if is_good is None:
        flags.append("bad_label")
    elif not is_good:
        says_yes = truth(value)
        word = value if says_yes is None else str(says_yes).lower()
        raise Unusable(f"{column} is {word}, so the answer is no demonstration (labels='all' keeps it)")


_GOOD_WORDS = frozenset(("good", "accept", "like", "up", "thumbs up", "safe", "correct", "right", "👍"))
_BAD_WORDS = frozenset(
    ("bad", "reject", "rejected", "dislike", "down", "thumbs down", "unsafe", "incorrect", "wrong", "👎")
)


def _says_good(value: Any, column: str) -> bool | None:
    """Whether a label says that the answer is good. None for anything that says neither good nor bad."""
    if isinstance(value, str):
        word = value.strip().lower().replace("_", " ")
        if word in _GOOD_WORDS or word in LIKED_COLUMNS:
            return True
        if word in _BAD_WORDS or word in DISLIKED_COLUMNS or word.startswith("un") and word[2:] in LIKED_COLUMNS:
            return False
    says_yes = truth(value)
    return None if says_yes is None else says_yes != (normal_name(column) in DISLIKED_COLUMNS)


def _conversation_of(roles: Roles, row: Row) -> Messages:
    """Returns the conversation in the column `messages`, with the system text and earlier turns of the row first."""
    column = str(roles.messages)
    turns = _turns(cell(row, roles.messages), column)
    if turns is None:
        raise Unusable(f"{column} is not a list of turns")
    return build_prompt(
        turns,
        system=_system_of(roles, row),
        history=cell(row, roles.history),
        as_messages=True,
    )


def _turns(value: Any, column: str) -> Messages | None:
    """Reads a conversation, or a text that marks the turns. None for anything else."""
    messages = read_conversation(value, column)
    if messages is not None or not isinstance(value, str):
        return messages
    if is_transcript(value):
        return read_transcript(value.strip())
    style = style_of(value)
    return read_marked(value, style) if style else None


def _system_of(roles: Roles, row: Row) -> str | None:
    if roles.system is None:
        return None
    return system_text({roles.system: cell(row, roles.system)}, (roles.system,))


def _asked_and_answered(roles: Roles, row: Row, repeats_prompt: bool) -> tuple[Any, Any]:
    """Returns prompt and completion, both as text or both as messages."""
    column = str(roles.completion)
    value = cell(row, column)
    if value is None:
        raise Unusable(f"{column} is missing")
    completion = _as_calls(value, roles, row) or text_or_messages(value, column)
    prompt = build_prompt(
        cell(row, roles.prompt),
        system=_system_of(roles, row),
        history=cell(row, roles.history),
        context=cell(row, roles.context),
        as_messages=not roles.as_text,
        column=str(roles.prompt),
    )
    if isinstance(completion, str) and repeats_prompt:
        completion = _without_repeated_prompt(prompt, cell(row, roles.prompt), completion)
    rest = without_prompt(prompt, completion) if isinstance(completion, list) else None
    if rest is not None:
        completion = rest
    elif isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise Unusable(f"{column} is a conversation that does not begin with the prompt")
    return alike(prompt, completion)


def _without_repeated_prompt(prompt: str | Messages, question: Any, completion: str) -> str:
    """Takes the prompt, or the question without its context, off the start of an answer."""
    if isinstance(prompt, str):
        return take_off_prompt(prompt, completion)
    for asked in (prompt[-1]["content"], question):
        rest = without_question(asked, completion) if isinstance(asked, str) else None
        if rest is not None:
            return rest
    return completion


def _as_calls(value: Any, roles: Roles, row: Row) -> Messages | None:
    """Reads an answer that is a list of function calls, `[{"name": …, "arguments": …}]`, if the row has tools."""
    if roles.tools is None or is_absent(cell(row, roles.tools)):
        return None
    calls = parsed(value) if isinstance(value, str) else value
    if not isinstance(calls, list) or not calls or not are_calls(calls):
        return None
    if not all({"name", "arguments"} <= call.keys() for call in calls):
        return None
    tool_calls = list(map(as_tool_call, calls))
    return [{"role": "assistant", "content": "", "tool_calls": tool_calls}]


def _numbered_turns(roles: Roles, row: Row) -> Messages:
    """Returns the later turns of Magpie's sets: `instruction_2`, `response_2` and so on."""
    turns: Messages = []
    for asked, answered in _numbered_columns(roles, row):
        if is_absent(row[asked]) or is_absent(row[answered]):
            break
        turns += build_prompt(row[asked], as_messages=True, column=asked)
        answer = text_or_messages(row[answered], answered)
        turns += reply(answer) if isinstance(answer, str) else answer
    return turns


def _numbered_columns(roles: Roles, columns: Any) -> list[tuple[str, str]]:
    """Returns the pairs of columns with later turns, in order."""
    pairs = []
    number = 2
    while f"{roles.prompt}_{number}" in columns and f"{roles.completion}_{number}" in columns:
        pairs.append((f"{roles.prompt}_{number}", f"{roles.completion}_{number}"))
        number += 1
    return pairs


def _answers_of(
    turns: Messages,
    roles: Roles,
    row: Row,
    every_turn: bool,
    flags: list[str],
) -> list[Row]:
    """Uses the last answer as the completion, or each answer with `every_turn`. Turns after the last are dropped."""
    # An answer at the very start has no prompt, so it is skipped.
    places = []
    for place, turn in enumerate(turns):
        before = turns[:place]
        if turn["role"] == "assistant" and any(earlier["role"] != "system" for earlier in before):
            places.append(place)
    if not places:
        raise Unusable("no answer after a prompt")
    if not every_turn:
        places = places[-1:]
    return [_demonstration(turns[:place], [turns[place]], roles, row, flags) for place in places]


def _demonstration(
    prompt: Any,
    completion: Any,
    roles: Roles,
    row: Row,
    flags: list[str],
) -> Row:
    """Builds a demonstration, with the rating and tools of the source row. Empty texts are flagged."""
    flags = list(flags)
    if is_empty(prompt):
        flags.append("empty_prompt")
    if is_empty(completion):
        flags.append("empty_completion")
    result = {"prompt": prompt, "completion": completion, "flags": flags}

    columns: Row = {}
    if roles.rating is not None:
        columns["rating"] = optional_number({roles.rating: cell(row, roles.rating)}, roles.rating, "bad_rating", flags)
    columns["tools"] = tools_as_json(cell(row, roles.tools), flags)
    columns["chat_template_kwargs"] = template_kwargs_record(cell(row, roles.template_kwargs), flags)
    for column, value in columns.items():
        if value is not None:
            result[column] = value
    return result


# --- guessing the roles ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemonstrationReader:
    """Reads the rows of a source whose roles are known.

    Attributes:
        roles: Which column has which role.
        label_columns: Columns that say whether the answer is good.
        numbered: Columns with later turns, such as `instruction_2`.
        repeats_prompt: Whether the answers begin with the prompt.
    """

    roles: Roles
    label_columns: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    repeats_prompt: bool = False

    @property
    def columns(self) -> set[str]:
        """All columns that are read."""
        return {*self.roles.columns, *self.label_columns, *self.numbered}

    def __call__(self, row: Row, *, every_turn: bool = False, labels: Labels = "liked") -> list[Row]:
        return read_demonstration(
            self.roles,
            row,
            every_turn=every_turn,
            labels=labels,
            label_columns=self.label_columns,
            repeats_prompt=self.repeats_prompt,
        )


def guess_demonstration(profile: Profile) -> DemonstrationReader | None:
    """Finds the roles of the columns by their names and first values. None if these are no demonstrations."""
    roles = _guess_structure(profile)
    return None if roles is None else with_further_columns(roles, profile)


def with_further_columns(roles: Roles, profile: Profile) -> DemonstrationReader:
    """Completes the roles of the conversation, or of prompt and completion, with the other columns of the source.

    Args:
        roles: Roles that are known. They are not changed.
        profile: The columns and their first values.
    """
    taken = roles.columns
    found = {
        "system": _first_of(profile, SYSTEM_COLUMNS, _are_text, taken),
        "history": _first_of(profile, HISTORY_COLUMNS, _are_conversations, taken),
        "tools": _first_of(profile, TOOLS_COLUMNS, _are_lists_or_text, taken),
        "template_kwargs": _first_of(profile, TEMPLATE_COLUMNS, _are_lists_or_text, taken),
        "rating": _first_of(profile, RATING_COLUMNS, _are_numbers, taken),
    }
    if roles.messages is None:  # a conversation takes no context
        found["context"] = _first_of(profile, CONTEXT_COLUMNS, _are_text, taken)
    for role, column in found.items():
        if column is not None and getattr(roles, role) is None:
            roles = replace(roles, **{role: column})

    label_columns = []
    for name in (*LIKED_COLUMNS, *DISLIKED_COLUMNS):
        column = _first_of(profile, (name,), _say_yes_or_no, taken)
        if column is not None:
            label_columns.append(column)
    numbered: tuple[str, ...] = ()
    for pair in _numbered_columns(roles, profile.values):
        numbered += pair
    return DemonstrationReader(roles, tuple(label_columns), numbered, answers_repeat_prompt(roles, profile))


def answers_repeat_prompt(roles: Roles, profile: Profile) -> bool:
    """True if all answers of the first rows begin with their question. A single one of many may only quote it."""
    n_repeated = 0
    for row in profile.rows:
        question, answer = cell(row, roles.prompt), cell(row, roles.completion)
        if not isinstance(question, str) or not isinstance(answer, str):
            continue
        if without_question(question, answer) is None:
            return False
        n_repeated += 1
    return n_repeated > 0


def _guess_structure(profile: Profile) -> Roles | None:
    """Finds the conversation, or the prompt and the completion."""
    completion = _first_of(profile, COMPLETION_COLUMNS, _are_answers)
    messages = _first_of(profile, MESSAGES_COLUMNS, _have_answers)
    if messages is not None:
        return Roles(kind="demonstrations", messages=messages)
    # A conversation that ends with the user is the prompt of the completion beside it.
    prompt = _first_of(profile, (*MESSAGES_COLUMNS, *CONTEXT_COLUMNS), _are_conversations)
    if prompt is None:
        prompt = _first_of(profile, PROMPT_COLUMNS, _are_questions)
    if prompt is None or completion is None:
        # A transcript comes last, as it often repeats the other columns.
        text = _first_of(profile, TRANSCRIPT_COLUMNS, _have_answers)
        return Roles(kind="demonstrations", messages=text) if text else None
    as_text = (normal_name(prompt), normal_name(completion)) == ("prompt", "completion")
    return Roles(kind="demonstrations", prompt=prompt, completion=completion, as_text=as_text)


def nearest_demonstration(profile: Profile) -> str:
    """Returns a `columns={…}` with the prompt and completion as far as their names say, and "…" for the rest."""
    prompt = _first_of(profile, PROMPT_COLUMNS, _are_questions)
    completion = _first_of(profile, COMPLETION_COLUMNS, _are_answers, {prompt} if prompt else ())
    if prompt is None and completion is None:
        texts = [column for column, values in profile.values.items() if values and _are_text(values)]
        prompt, completion = (*texts, None, None)[:2]
    prompt = prompt or _misspelt(profile, PROMPT_COLUMNS, completion)
    completion = completion or _misspelt(profile, COMPLETION_COLUMNS, prompt)
    return json.dumps({"prompt": prompt or "…", "completion": completion or "…"}, ensure_ascii=False)


def _misspelt(profile: Profile, names: Collection[str], taken: str | None) -> str | None:
    """The column whose name is nearly one of these, or None."""
    columns = {}
    for column, values in profile.values.items():
        name = normal_name(column)
        is_one_of_several = name[-2:-1] == "_"  # `answer_b` is no misspelt `answers`
        if column != taken and name not in names and not is_one_of_several and _are_text(values):
            columns[name] = column
    for name in names:
        near = get_close_matches(name, columns, n=1, cutoff=0.8)
        if near:
            return columns[near[0]]
    return None


def _first_of(
    profile: Profile,
    columns: Iterable[str],
    fits: Callable[[list[Any]], bool],
    taken: Collection[str] = (),
) -> str | None:
    """Returns the first of the columns, in any spelling, that is not taken and has values, if they fit."""
    for name in columns:
        for column in _spellings_of(name, profile):
            values = profile.values[column]
            if values and column not in taken and fits(values):
                return column
    return None


def _spellings_of(name: str, profile: Profile) -> list[str]:
    """The columns of this name, such as "System Prompt" for `system_prompt`; the one that is spelled so comes first."""
    same = [column for column in profile.values if column != name and normal_name(column) == name]
    return [name, *same] if name in profile.values else same


def _mostly(test: Callable[[Any], bool], values: list[Any]) -> bool:
    """True if more than half of the values pass: single cells may be broken."""
    return sum(map(test, values)) > len(values) / 2


def _say_yes_or_no(values: list[Any]) -> bool:
    return all(_says_good(value, "label") is not None for value in values)


def _are_text(values: list[Any]) -> bool:
    return _mostly(lambda value: isinstance(value, str), values)


def _are_lists_or_text(values: list[Any]) -> bool:
    return _mostly(lambda value: isinstance(value, str | list | dict), values)


def _are_numbers(values: list[Any]) -> bool:
    numbers = [value for value in values if optional_number({"rating": value}, "rating", "", []) is not None]
    return len(numbers) >= len(values) / 2  # the others are flagged


def _are_questions(values: list[Any]) -> bool:
    return _mostly(lambda value: isinstance(value, str) or _roles_in(value) != [], values)


def _are_answers(values: list[Any]) -> bool:
    """True for texts, messages, and lists of function calls."""
    return _mostly(lambda value: isinstance(value, str) or "assistant" in _roles_in(value), values)


def _are_conversations(values: list[Any]) -> bool:
    return _mostly(lambda value: _roles_in(value) != [], values)


def _have_answers(values: list[Any]) -> bool:
    """True for conversations in which someone answers, at least in one of the rows."""
    return _are_conversations(values) and any("assistant" in _roles_in(value) for value in values)


def _roles_in(value: Any) -> list[str]:
    """Returns the roles of a conversation's turns, or an empty list if the value is none."""
    if isinstance(value, dict):
        value = [value] if "role" in value else value
    try:
        turns = _turns(value, "")
    except Unusable:
        # A conversation that cannot be read is still one: its rows are dropped with the reason.
        is_list_of_records = isinstance(value, list) and isinstance(value[0], dict)
        return ["user", "assistant"] if is_list_of_records else []
    return [turn["role"] for turn in turns or ()]

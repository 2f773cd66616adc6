"""Roles of the columns of a row: which one holds the prompt, which ones the answers, and which one says who wins.

A comparison is *prompt* x *answers* x *verdict*, and a demonstration is *prompt* x *completion*. `Roles` says which
column has which role. It comes from the table in `registry.py`, from a user's `columns={…}`, or from the aliases in
`guessing.py`.

A column may be a path: `question.full_text` is a field of a record, and `answers[].text` the field `text` of every
entry of a list.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

from ..data.schema import PreferenceDataError, Row

Kind = Literal["comparisons", "demonstrations"]


@dataclass(frozen=True)
class Roles:
    """The columns of each role. `None` and `()` mean that there is no column with this role.

    Every field but `kind`, `verdict_is` and `as_text` is a column, a path (`question.full_text`, `answers[].text`) or a
    tuple of them. The fields are the keys of a user's `columns={…}`.

    Attributes:
        kind: What the rows become.
        prompt: Text, messages, turns of ShareGPT, or JSON text of them. `None` if the answers begin with the prompt.
        system: System text before the prompt.
        history: Earlier turns: pairs of question and answer, or messages.
        context: Text after the question, such as Alpaca's `input`.
        started: Beginning of the answers, such as the steps of a solution that both answers continue.
        tools: Schemas of the tools, for the chat template.
        template_kwargs: Further arguments of the chat template.
        category: Use case of the row.
        chosen: The better answer, or a list of good answers. The same column as `prompt`: its last turn.
        rejected: The worse answer, or a list of bad answers.
        answers: One column for each answer, or one column with a list of answers.
        answer: The only answer of the row. The rows of a prompt are compared to each other.
        verdict: Which answer is better. `verdict_is` says what its values mean.
        verdict_is: Meaning of the verdict's values, such as "0 or 1" or "A or B". See `verdicts.decoder`.
        ratings: One column for each answer (or one with a list): a higher value is better. Next to a verdict, or to
            chosen and rejected, the ratings give the margin. With `answer`, the rating of that answer, or whether it
            is good.
        ranks: As `ratings`, but a lower value is better.
        votes: One column for each annotator, or one column with a list; values as those of the verdict.
        annotator: Name of the person who judged.
        margin: How much better the better answer is.
        tie: True for a tie.
        status: "tie" for a tie; other values mean nothing.
        turn: Number of the turn that was judged, from 1. Later turns of the answers are not read.
        candidates: A list of answers among which chosen and rejected are.
        candidate_ratings: The ratings of `candidates`.
        repeats: Columns that say the same as others, and are not looked at.
        as_text: Whether text stays text. Otherwise questions and answers become messages.
        messages: A whole conversation of a demonstration.
        completion: The answer of a demonstration.
        label: Whether the answer of a demonstration was liked.
        rating: The rating of a demonstration.
    """

    kind: Kind = "comparisons"
    prompt: str | None = None
    system: str | None = None
    history: str | None = None
    context: str | None = None
    started: str | None = None
    tools: str | None = None
    template_kwargs: str | None = None
    category: str | None = None

    chosen: str | None = None
    rejected: str | None = None
    answers: tuple[str, ...] = ()
    answer: str | None = None
    verdict: str | None = None
    verdict_is: Any = None
    ratings: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()
    annotator: str | None = None
    margin: str | None = None
    tie: str | None = None
    status: str | None = None
    turn: str | None = None
    candidates: str | None = None
    candidate_ratings: str | None = None
    repeats: tuple[str, ...] = ()
    as_text: bool = False

    messages: str | None = None
    completion: str | None = None
    label: str | None = None
    rating: str | None = None

    @classmethod
    def from_mapping(cls, columns: Mapping[str, Any], kind: Kind = "comparisons") -> "Roles":
        """Checks a user's `columns={…}` and returns it as roles.

        Raises:
            PreferenceDataError: A key is no role of this kind, or a value is no column.
        """
        return cls(kind=kind).updated(columns)

    def updated(self, columns: Mapping[str, Any]) -> "Roles":
        """These roles, changed by a user's `columns={…}`. Raises `PreferenceDataError` like `from_mapping`."""
        if not isinstance(columns, Mapping):
            raise PreferenceDataError(f"columns: {columns!r} is no dictionary: write {{'prompt': 'question', …}}.")
        changes: dict[str, Any] = {}
        for role, value in columns.items():
            if role not in ROLES[self.kind]:
                raise PreferenceDataError(_unknown_role(role, self.kind))
            changes[role] = _checked(role, value)
        roles = replace(self, **changes)
        _check_one_role_each(roles)
        _check_one_judgment(roles)
        return roles

    @property
    def columns(self) -> set[str]:
        """All columns that are read. For a path, the column where it begins."""
        read = set()
        for role in ROLES[self.kind]:
            if role in NOT_COLUMNS:
                continue
            value = getattr(self, role)
            paths = value if isinstance(value, tuple) else (value,)
            for path in paths:
                if path is not None:
                    read.update((path, column_of(path)))  # a column may have a dot in its name
        return read

    def as_mapping(self) -> dict[str, Any]:
        """The `columns={…}` that gives these roles."""
        mapping = {}
        for role in ROLES[self.kind]:
            value = getattr(self, role)
            if value:
                mapping[role] = list(value) if isinstance(value, tuple) else value
        return mapping


NOT_COLUMNS = ("verdict_is", "as_text")
SEVERAL = ("answers", "ratings", "ranks", "votes", "repeats")
"""Roles that may have several columns."""
_BOTH = ("prompt", "system", "history", "context", "tools", "template_kwargs", "category", "as_text")
_OF_DEMONSTRATIONS = ("messages", "completion", "label", "rating")
ROLES: dict[Kind, tuple[str, ...]] = {
    "comparisons": tuple(f.name for f in fields(Roles) if f.name not in ("kind", *_OF_DEMONSTRATIONS)),
    "demonstrations": (*_BOTH, *_OF_DEMONSTRATIONS),
}


def _checked(role: str, value: Any) -> Any:
    """Returns the value of a key of `columns={…}`. Raises `PreferenceDataError` if it cannot have this value."""
    if value is None or role == "verdict_is":
        return value
    if role == "as_text":
        return bool(value)
    if role not in SEVERAL:
        if not isinstance(value, str):
            raise PreferenceDataError(f"columns: {role} is {value!r}: give the name of one column.")
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise PreferenceDataError(f"columns: {role} is {value!r}: give the name of a column, or a list of names.")
    return tuple(names)


def _unknown_role(role: str, kind: Kind) -> str:
    near = get_close_matches(str(role), ROLES[kind], n=1)
    if near:
        return f"columns: no role {role!r}: did you mean {near[0]}?"
    usual = "prompt, system, chosen, rejected, answers, verdict, verdict_is, ratings"
    if kind == "demonstrations":
        usual = "prompt, completion, messages, system, label"
    return f"columns: no role {role!r}; the usual ones are {usual}."


_MAY_SHARE = {frozenset(("prompt", "chosen")), frozenset(("prompt", "answer"))}
"""Roles that may have the same column: a conversation that ends with the answer."""


def _check_one_role_each(roles: Roles) -> None:
    """Raises `PreferenceDataError` if two roles, or two answers, have the same column."""
    role_of: dict[str, str] = {}
    for role, value in roles.as_mapping().items():
        if role in (*NOT_COLUMNS, "category", "repeats"):
            continue
        for path in [value] if isinstance(value, str) else value:
            other = role_of.setdefault(path, role)
            is_twice = isinstance(value, list) and value.count(path) > 1
            if is_twice or (other != role and frozenset((other, role)) not in _MAY_SHARE):
                both = f"twice in {role}" if is_twice else f"both {other} and {role}"
                raise PreferenceDataError(f"columns: {path!r} is {both}: give each role a column of its own.")


def _check_one_judgment(roles: Roles) -> None:
    """Raises `PreferenceDataError` if the roles say twice what is compared, or leave an answer without a score."""
    if roles.kind == "demonstrations":
        return
    if roles.rejected is not None:
        for role in ("answers", "answer", "verdict"):
            if getattr(roles, role):
                raise PreferenceDataError(
                    f"columns: chosen and rejected say which answer is better, so {role} is not read: give chosen and "
                    "rejected, or answers and verdict."
                )
    n_answers = 2 if roles.rejected is not None else len(roles.answers)
    if roles.answer is not None:
        n_answers = 1
    for role in ("ratings", "ranks"):
        columns = getattr(roles, role)
        # One column has a list.
        if n_answers and len(columns) > 1 and len(columns) != n_answers:
            raise PreferenceDataError(
                f"columns: {role} has {len(columns)} columns for {n_answers} answers: give one each."
            )


def check_complete(roles: Roles) -> None:
    """Raises `PreferenceDataError` if a user's roles lack the answers or the verdict."""
    if roles.kind == "demonstrations":
        if roles.messages is None and (roles.prompt is None or roles.completion is None):
            raise PreferenceDataError("columns: give messages, or prompt and completion.")
        return
    judged = roles.verdict or roles.ratings or roles.ranks or roles.votes or roles.verdict_is == "best first"
    if roles.rejected is not None:
        if roles.chosen is None:
            raise PreferenceDataError("columns: rejected needs chosen, the column of the better answer.")
    elif roles.answers or roles.answer:
        if not judged:
            raise PreferenceDataError(
                "columns: nothing says which answer is better: give verdict with verdict_is, or ratings, ranks or "
                "votes."
            )
        if roles.verdict is not None and roles.verdict_is is None and roles.answers:
            raise PreferenceDataError(
                f"columns: give verdict_is, the meaning of {roles.verdict}: such as '0 or 1', '1 or 2, 0 is a tie', "
                "'A or B' or 'below zero for the first'."
            )
    else:
        raise PreferenceDataError(
            "columns: give chosen and rejected, or answers with verdict, ratings, ranks or votes."
        )


# --- paths ------------------------------------------------------------------------------------------------------------


def column_of(path: str) -> str:
    """The column where a path begins: `answers` for `answers[].text`."""
    return path.split("[]")[0].split(".")[0]


def cell(row: Row, path: str | None) -> Any:
    """Returns the value at a path: None if there is none. A list path gives one value for each entry of the list."""
    if path is None:
        return None
    if path in row:  # a column may have a dot in its name
        return row[path]
    if "[]" in path:
        place, _, rest = path.partition("[].")
        entries = parsed(cell(row, place))
        if not isinstance(entries, list):
            return None
        return [cell(entry, rest) if isinstance(entry, dict) else None for entry in entries]
    column, _, rest = path.partition(".")
    value = parsed(row.get(column)) if rest else row.get(column)
    if rest:
        return cell(value, rest) if isinstance(value, dict) else None
    return value


def parsed(value: Any) -> Any:
    """Returns the list or record that a text holds as JSON or, as pandas writes it to a csv, as Python.

    Any other value is returned as it is.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        with catch_warnings():
            simplefilter("ignore")  # of a text that is no Python
            literal = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return literal if isinstance(literal, list | dict) else value

"""The records that a store returns: settings, annotators, tasks as they are shown, and judgments."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..errors import UserError
from .answers import MOST_CATEGORY, Answer
from .tasks import Task, is_finite, is_whole


class StoreUnavailable(UserError):
    """Raised if the file of a store cannot be used now: it is locked, the disk is full, or it was moved.

    Nothing was changed: the same call can be made again later.
    """


@dataclass(frozen=True)
class Settings:
    """Settings of a store, which all processes that use it share.

    Attributes:
        title: Heading of the page.
        instructions: What annotators should look at, in Markdown.
        gold_share: Share of gold questions among the tasks that a person is given, 0 to 1.
        overlap_share: Share of new tasks that `overlap_wanted` people judge, 0 to 1, so that agreement can be measured.
        overlap_wanted: How many people judge a task of the overlap.
        wanted: How many people judge any other new task, unless the task asks for more.
        lease_seconds: How long a task is kept for the person that it was shown to, in seconds.
        seed: Decides which tasks are in the overlap, the order of completions, and the places of gold questions.
        paused: Whether no new tasks are given out.
        categories: Use cases that a person can choose from for a prompt in the wrong category.

    Raises:
        UserError: A value is out of range. The message names the setting.
    """

    title: str = "Which answer is better?"
    instructions: str = ""
    gold_share: float = 0.1
    overlap_share: float = 0.0
    overlap_wanted: int = 3
    wanted: int = 1
    lease_seconds: float = 600
    seed: int = 0
    paused: bool = False
    categories: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name in ("gold_share", "overlap_share"):
            value = getattr(self, name)
            if not is_finite(value) or not 0 <= value <= 1:
                raise UserError(f"{name} is {value!r}: give a share from 0 to 1.")
        for name in ("overlap_wanted", "wanted"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise UserError(f"{name} is {value!r}: give a number of people, at least 1.")
        if not is_finite(self.lease_seconds) or self.lease_seconds <= 0:
            raise UserError(f"lease_seconds is {self.lease_seconds!r}: give a positive number of seconds.")
        for name in ("title", "instructions"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} is {getattr(self, name)!r}: give text.")
        _check_categories(self.categories)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _check_categories(categories: Any) -> None:
    if not isinstance(categories, list) or not all(isinstance(name, str) for name in categories):
        raise UserError(f"categories is {categories!r}: give a list of names.")
    for name in categories:
        # Others could be chosen on the page, and then be refused.
        if not name.strip() or len(name) > MOST_CATEGORY or categories.count(name) > 1:
            raise UserError(f"categories has {name!r}: give each name once, with 1 to {MOST_CATEGORY} characters.")


class Added(NamedTuple):
    """Result of adding tasks: how many were new, and how many the store had already."""

    added: int
    known: int


@dataclass(frozen=True)
class Annotator:
    """A person with a link of their own.

    Attributes:
        role: "annotator", or "admin" for somebody who also sees the statistics.
        active: Whether the link works.
        created: When the person was added, in unix seconds.
        judged: Number of live judgments, without skips.
        skipped: Number of tasks that the person skipped.
        token_hash: SHA-256 of the token of the person's link, which changes with a new link. None without a link.
    """

    id: int
    name: str
    role: str
    active: bool
    created: float
    judged: int
    skipped: int
    token_hash: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Shown:
    """A task that is kept for one person.

    Attributes:
        task: The task. Its gold answer and `made_by` must not be shown to the person.
        order: `order[position]` is the index of the completion at that position; position 0 is shown first.
        expires: When others may be given the task, in unix seconds.
        answer: The answer that was taken back, in display order, if the task is shown again after an undo.
    """

    task: Task
    order: list[int]
    expires: float
    answer: Answer | None = None


class Judged(NamedTuple):
    """Result of a judgment. `is_repeat` says that it was on disk already, and that nothing was written."""

    judgment_id: int
    is_repeat: bool


@dataclass(frozen=True)
class Judgment:
    """One judgment.

    Attributes:
        key: Idempotency key with which it was sent. Imported judgments have none.
        annotator: Name of the person.
        order: The order in which the person saw the completions, as in `Shown`.
        answer: The answer by completion: `preference` 1 says that completion 0 is much better.
        seconds: Time that the person spent, in seconds.
        created: When it was made, in unix seconds.
        undone: When it was taken back, in unix seconds. None for a live judgment.
    """

    id: int
    key: str | None
    annotator: str
    task_id: int
    order: list[int]
    answer: Answer
    seconds: float
    created: float
    undone: float | None

    @property
    def is_skip(self) -> bool:
        return "skip" in self.answer


SELECT_TASKS = "SELECT * FROM tasks JOIN texts ON texts.task_id = tasks.id"
"""Selects what `task_of` needs."""


def task_of(row: Any) -> Task:
    """Builds the task from a row of `SELECT_TASKS`."""
    gold = json.loads(row["gold"]) if row["gold"] else None
    return Task(
        prompt=json.loads(row["prompt"]),
        completions=json.loads(row["completions"]),
        made_by=json.loads(row["made_by"]),
        category=row["category"],
        source=row["source"],
        row=row["row"],
        wanted=row["wanted"],
        gold=gold,
        batch=row["batch"],
        id=row["id"],
    )


def judgment_of(row: Any) -> Judgment:
    """Builds the judgment from a row of the table, joined with its key and the name of the annotator."""
    return Judgment(
        id=row["id"],
        key=row["key"],
        annotator=row["name"],
        task_id=row["task_id"],
        order=json.loads(row["display"]),
        answer=json.loads(row["answer"]),
        seconds=row["seconds"],
        created=row["created"],
        undone=row["undone"],
    )

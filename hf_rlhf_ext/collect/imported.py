"""Adds judgments that were made elsewhere to a store. Each function runs inside a transaction."""

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from .answers import Answer, storable
from .assignment import insert_judgment
from .records import SELECT_TASKS
from .tasks import Task


def add_answers(connection: sqlite3.Connection, task: Task, answers: Mapping[str, Answer], now: float) -> int:
    """Adds answers (annotator -> answer by completion) on a task of the store. Returns how many were new."""
    row = connection.execute(f"{SELECT_TASKS} WHERE fingerprint = ?", (task.fingerprint,)).fetchone()
    places = _places(task.completions, json.loads(row["completions"]))
    display = json.dumps(list(range(row["n_completions"])))  # the order that people saw is not known
    n_added = 0
    for name, answer in answers.items():
        annotator_id = _annotator_named(connection, name, now)
        has_judged = connection.execute(
            "SELECT 1 FROM judgments WHERE annotator_id = ? AND task_id = ? AND undone IS NULL",
            (annotator_id, row["id"]),
        ).fetchone()
        if has_judged is None:
            stored = _renumbered(answer, places)
            insert_judgment(connection, row, annotator_id, display, stored, seconds=0, now=now)
            connection.execute("DELETE FROM leases WHERE task_id = ? AND annotator_id = ?", (row["id"], annotator_id))
            n_added += 1
    # So many people are wanted as there are, so that the limit on judgments and leases still holds.
    connection.execute(
        """UPDATE tasks SET wanted = max(wanted, n_judged + (
            SELECT count(*) FROM leases WHERE task_id = tasks.id AND expires > ?
        )) WHERE id = ? AND gold IS NULL""",
        (now, row["id"]),
    )
    return n_added


def _annotator_named(connection: sqlite3.Connection, name: str, now: float) -> int:
    name = storable(name)
    connection.execute(
        "INSERT OR IGNORE INTO annotators (name, role, active, created) VALUES (?, 'annotator', 1, ?)", (name, now)
    )
    return connection.execute("SELECT id FROM annotators WHERE name = ?", (name,)).fetchone()["id"]


def _places(completions: list[Any], in_store: list[Any]) -> list[int]:
    """Returns, for each completion, its index in the store, which may have them in another order."""
    texts = [json.dumps(completion, sort_keys=True) for completion in in_store]
    return [texts.index(json.dumps(completion, sort_keys=True)) for completion in completions]


def _renumbered(answer: Answer, places: list[int]) -> Answer:
    """Rewrites an answer by completion for another order of the completions: `places[k]` is the new index of k."""
    stored = dict(answer)
    if "preference" in answer and places[0] == 1:
        stored["preference"] = 8 - answer["preference"]
    if "votes" in answer:
        stored["votes"] = [vote | {"pair": [places[k] for k in vote["pair"]]} for vote in answer["votes"]]
    for name in ("ranks", "flags", "ratings"):
        if name in answer:
            values: list[Any] = [None] * len(places)
            for k, place in enumerate(places):
                values[place] = answer[name][k]
            stored[name] = values
    return stored

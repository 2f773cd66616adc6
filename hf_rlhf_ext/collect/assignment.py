"""Which task a person is given next, and what a judgment and an undo change. Each function runs inside a transaction.

A task is lacking people while its live judgments and the live leases of other people are fewer than `wanted`. Gold
questions never lack people in this sense: everybody may judge them, and they do not count.
"""

import json
import random
import re
import sqlite3
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .answers import Answer, BadAnswer, Conflict, NotLeased, by_completion, by_position, checked_answer
from .records import SELECT_TASKS, Judged, Settings, Shown, task_of
from .tasks import Task, is_finite

_KEY = re.compile(r"[A-Za-z0-9_-]{8,64}")


@dataclass
class Place:
    """How far one person has come in the open tasks, so that the search need not start at the first task each time.

    Only the order of tasks depends on it. If nothing is found behind it, the search starts again at the first task.

    Attributes:
        started: `tasks.started` of the last task looked at, among those that somebody has judged.
        fresh: `tasks.id` of the last task looked at, among the others.
    """

    started: int = 0
    fresh: int = 0


# --- the next task ---------------------------------------------------------------------------------------------------


def next_shown(
    connection: sqlite3.Connection,
    settings: Settings,
    annotator_id: int,
    place: Place,
    now: float,
) -> Shown | None:
    """Leases a task to a person. Returns None if there is none, or if the store is paused."""
    annotator = active_annotator(connection, annotator_id)
    if settings.paused:
        return None
    lease = _reopened_lease(connection, settings, annotator_id, now)
    if lease is not None:
        return lease
    task_id = None
    if _is_time_for_gold(settings, annotator):
        task_id = _gold_task(connection, settings, annotator)
    if task_id is None:
        task_id = _open_task(connection, annotator_id, place, now)
    if task_id is None and (place.started or place.fresh):
        # Tasks before the place may have come back: a lease expired, or a judgment was undone.
        place.started = place.fresh = 0
        task_id = _open_task(connection, annotator_id, place, now)
    if task_id is None and settings.gold_share and _has_only_gold(connection):
        task_id = _gold_task(connection, settings, annotator)
    if task_id is None:
        return None
    return _lease(connection, settings, annotator, task_id, now)


def active_annotator(connection: sqlite3.Connection, annotator_id: int) -> sqlite3.Row:
    row = connection.execute("SELECT * FROM annotators WHERE id = ?", (annotator_id,)).fetchone()
    if row is None:
        raise UserError(f"annotator {annotator_id} is unknown: add the person first.")
    if not row["active"]:
        raise UserError(f"annotator {row['name']!r} is not active: activate the person first.")
    return row


def _reopened_lease(connection: sqlite3.Connection, settings: Settings, annotator_id: int, now: float) -> Shown | None:
    """Returns the task that the person has on screen, after a reload. An expired lease is renewed if possible."""
    lease = connection.execute(
        "SELECT * FROM leases WHERE annotator_id = ? ORDER BY expires DESC LIMIT 1", (annotator_id,)
    ).fetchone()
    if lease is None:
        return None
    task = _task_row(connection, lease["task_id"])
    expires = lease["expires"]
    if expires <= now and not _lacks_people(connection, task, annotator_id, now):
        return None
    # Renewed late, so that a reload seldom writes.
    if expires < now + settings.lease_seconds / 2:
        expires = now + settings.lease_seconds
        connection.execute(
            "UPDATE leases SET expires = ? WHERE task_id = ? AND annotator_id = ?",
            (expires, lease["task_id"], annotator_id),
        )
    return Shown(_whole_task(connection, task["id"]), json.loads(lease["display"]), expires)


def _task_row(connection: sqlite3.Connection, task_id: int) -> sqlite3.Row | None:
    return connection.execute("SELECT * FROM tasks WHERE id = ?", (task_id,)).fetchone()


def _whole_task(connection: sqlite3.Connection, task_id: int) -> Task:
    return task_of(connection.execute(f"{SELECT_TASKS} WHERE id = ?", (task_id,)).fetchone())


def _lacks_people(connection: sqlite3.Connection, task: sqlite3.Row, annotator_id: int, now: float) -> bool:
    if task["gold"] is not None:
        return True
    others = connection.execute(
        "SELECT count(*) FROM leases WHERE task_id = ? AND annotator_id != ? AND expires > ?",
        (task["id"], annotator_id, now),
    ).fetchone()[0]
    return task["n_judged"] + others < task["wanted"]


def _is_time_for_gold(settings: Settings, annotator: sqlite3.Row) -> bool:
    """True if the next gold question is due: one in every 1 / gold_share tasks, at a random place among them."""
    if not settings.gold_share:
        return False
    n_gold = annotator["n_gold"]
    n_given = annotator["n_judged"] + annotator["n_skipped"]
    place = random.Random(f"gold {settings.seed} {annotator['name']} {n_gold}").random()
    return n_given >= int((n_gold + place) / settings.gold_share)


def _has_only_gold(connection: sqlite3.Connection) -> bool:
    """True for a store such as a test for new people: there are no other tasks to mix the gold questions into."""
    return connection.execute("SELECT 1 FROM tasks WHERE gold IS NULL LIMIT 1").fetchone() is None


def _gold_task(connection: sqlite3.Connection, settings: Settings, annotator: sqlite3.Row) -> int | None:
    """Returns a random gold question that the person has not seen."""
    rows = connection.execute(
        """SELECT id FROM tasks WHERE gold IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM judgments WHERE annotator_id = ? AND task_id = tasks.id AND undone IS NULL
        ) ORDER BY id""",
        (annotator["id"],),
    ).fetchall()
    if not rows:
        return None
    rng = random.Random(f"which gold {settings.seed} {annotator['name']} {annotator['n_gold']}")
    return rng.choice(rows)["id"]


_CANDIDATES = """
    SELECT id, started, EXISTS (
        SELECT 1 FROM judgments WHERE annotator_id = :annotator AND task_id = tasks.id AND undone IS NULL
    ) AS seen, n_judged + (
        SELECT count(*) FROM leases
        WHERE task_id = tasks.id AND annotator_id != :annotator AND expires > :now
    ) < wanted AS lacks_people
    FROM tasks
    WHERE gold IS NULL AND n_judged < wanted AND
"""
# The conditions are those of the partial indices, which SQLite uses only if it finds them word by word.
_STARTED = _CANDIDATES + "started IS NOT NULL AND started > :place ORDER BY started, id"
_FRESH = _CANDIDATES + "started IS NULL AND id > :place ORDER BY id"


def _open_task(connection: sqlite3.Connection, annotator_id: int, place: Place, now: float) -> int | None:
    """Returns a task that lacks people: first one that others have judged, so that tasks are completed early."""
    task_id, place.started = _first_open(connection, _STARTED, "started", annotator_id, place.started, now)
    if task_id is None:
        task_id, place.fresh = _first_open(connection, _FRESH, "id", annotator_id, place.fresh, now)
    return task_id


def _first_open(
    connection: sqlite3.Connection,
    query: str,
    column: str,
    annotator_id: int,
    place: int,
    now: float,
) -> tuple[int | None, int]:
    """Returns the first task behind a place that the person may be given, if any, and the place before it."""
    values = {"annotator": annotator_id, "now": now, "place": place}
    rows = connection.execute(query, values)  # computed one by one: most often, the first one is it
    try:
        for row in rows:
            if row["lacks_people"] and not row["seen"]:
                return row["id"], place
            place = row[column]
    finally:
        rows.close()
    return None, place


def _lease(
    connection: sqlite3.Connection,
    settings: Settings,
    annotator: sqlite3.Row,
    task_id: int,
    now: float,
) -> Shown:
    row = _task_row(connection, task_id)
    order = list(range(row["n_completions"]))
    # The same order if the task comes back to the person later.
    random.Random(f"order {settings.seed} {annotator['name']} {row['fingerprint']}").shuffle(order)
    expires = now + settings.lease_seconds
    _save_lease(connection, task_id, annotator["id"], json.dumps(order), now, expires)
    return Shown(_whole_task(connection, task_id), order, expires)


def _save_lease(
    connection: sqlite3.Connection, task_id: int, annotator_id: int, display: str, now: float, expires: float
) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO leases (task_id, annotator_id, display, granted, expires) VALUES (?, ?, ?, ?, ?)",
        (task_id, annotator_id, display, now, expires),
    )


# --- a judgment ------------------------------------------------------------------------------------------------------


def judge(
    connection: sqlite3.Connection,
    annotator_id: int,
    task_id: int,
    key: str,
    answer: Any,
    seconds: float,
    now: float,
) -> Judged:
    """Stores a judgment, unless the same one was stored with this key before."""
    _check_key(key)
    if not is_finite(seconds) or seconds < 0:
        raise BadAnswer(f"seconds is {seconds!r}: give the seconds that the person spent")
    active_annotator(connection, annotator_id)
    task = _task_row(connection, task_id)
    if task is None:
        raise NotLeased(f"there is no task {task_id}: load the page again")
    answer = checked_answer(answer, task["n_completions"])
    earlier = _earlier_with_key(connection, annotator_id, key)
    if earlier is not None:
        return _repeated(earlier, task_id, answer)
    lease = _lease_to_judge(connection, task, annotator_id, answer, now)
    stored = by_completion(answer, json.loads(lease["display"]))
    judgment_id = insert_judgment(connection, task, annotator_id, lease["display"], stored, seconds, now)
    connection.execute("DELETE FROM leases WHERE task_id = ? AND annotator_id = ?", (task_id, annotator_id))
    _insert_key(connection, annotator_id, key, judgment_id, now, is_undo=False)
    return Judged(judgment_id, is_repeat=False)


def _check_key(key: Any) -> None:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise BadAnswer("key is not valid: give 8 to 64 letters, digits, hyphens or underscores, new for each judgment")


def _earlier_with_key(connection: sqlite3.Connection, annotator_id: int, key: str) -> sqlite3.Row | None:
    return connection.execute(
        """SELECT is_undo, judgment_id, task_id, display, answer
        FROM keys LEFT JOIN judgments ON judgments.id = judgment_id
        WHERE keys.annotator_id = ? AND key = ?""",
        (annotator_id, key),
    ).fetchone()


def _repeated(earlier: sqlite3.Row, task_id: int, answer: Answer) -> Judged:
    """Returns the result of the judgment that was sent before. Refuses a key that was used for something else."""
    if not earlier["is_undo"] and earlier["task_id"] == task_id:
        stored = by_completion(answer, json.loads(earlier["display"]))
        if stored == json.loads(earlier["answer"]):
            return Judged(earlier["judgment_id"], is_repeat=True)
    raise Conflict("this key was used for another judgment or undo: make a new key for each")


def _lease_to_judge(
    connection: sqlite3.Connection, task: sqlite3.Row, annotator_id: int, answer: Answer, now: float
) -> sqlite3.Row:
    """Returns the lease under which the person may judge the task, which may have expired."""
    task_id = task["id"]
    if _live_judgment(connection, annotator_id, task_id):
        raise Conflict(f"task {task_id} was judged by this person already: undo that judgment first")
    lease = connection.execute(
        "SELECT display, expires FROM leases WHERE task_id = ? AND annotator_id = ?", (task_id, annotator_id)
    ).fetchone()
    if lease is None:
        raise NotLeased(f"task {task_id} was not given to this person: load the page again")
    has_expired = lease["expires"] <= now
    # A skip needs no place, as it does not count.
    if has_expired and "skip" not in answer and not _lacks_people(connection, task, annotator_id, now):
        raise Conflict(f"task {task_id} went to others after its time had run out: go on with the next task")
    return lease


def _live_judgment(connection: sqlite3.Connection, annotator_id: int, task_id: int) -> bool:
    found = connection.execute(
        "SELECT 1 FROM judgments WHERE annotator_id = ? AND task_id = ? AND undone IS NULL", (annotator_id, task_id)
    ).fetchone()
    return found is not None


def insert_judgment(
    connection: sqlite3.Connection,
    task: sqlite3.Row,
    annotator_id: int,
    display: str,
    stored: Answer,
    seconds: float,
    now: float,
) -> int:
    """Adds a judgment by completion to the tables and counts. Returns its id."""
    is_skip = "skip" in stored
    judgment_id = connection.execute(
        """INSERT INTO judgments (task_id, annotator_id, display, answer, skipped, seconds, created)
        VALUES (?, ?, ?, ?, ?, ?, ?)""",
        (task["id"], annotator_id, display, json.dumps(stored), is_skip, seconds, now),
    ).lastrowid
    _count(connection, task["id"], annotator_id, is_skip=is_skip, is_gold=task["gold"] is not None, change=1)
    return judgment_id


def _count(
    connection: sqlite3.Connection, task_id: int, annotator_id: int, *, is_skip: bool, is_gold: bool, change: int
) -> None:
    """Adds `change` to the counts of a judgment's task and annotator."""
    changed_columns = ["n_skipped" if is_skip else "n_judged"]
    if is_gold:
        changed_columns.append("n_gold")
    for column in changed_columns:
        connection.execute(f"UPDATE annotators SET {column} = {column} + ? WHERE id = ?", (change, annotator_id))
    if not is_skip:
        connection.execute(
            """UPDATE tasks SET n_judged = n_judged + :change, started = (
                SELECT min(id) FROM judgments WHERE task_id = :task AND undone IS NULL AND NOT skipped
            ) WHERE id = :task""",
            {"change": change, "task": task_id},
        )


def _insert_key(
    connection: sqlite3.Connection, annotator_id: int, key: str, judgment_id: int | None, now: float, *, is_undo: bool
) -> None:
    connection.execute(
        "INSERT INTO keys (annotator_id, key, is_undo, judgment_id, created) VALUES (?, ?, ?, ?, ?)",
        (annotator_id, key, is_undo, judgment_id, now),
    )


# --- undo ------------------------------------------------------------------------------------------------------------


def undo(connection: sqlite3.Connection, settings: Settings, annotator_id: int, key: str, now: float) -> Shown | None:
    """Takes back the last live judgment of a person, and leases its task to the person again."""
    _check_key(key)
    active_annotator(connection, annotator_id)
    earlier = _earlier_with_key(connection, annotator_id, key)
    if earlier is not None:
        return _repeated_undo(connection, annotator_id, earlier)
    last = connection.execute(
        "SELECT * FROM judgments WHERE annotator_id = ? AND undone IS NULL ORDER BY id DESC LIMIT 1", (annotator_id,)
    ).fetchone()
    _insert_key(connection, annotator_id, key, last["id"] if last else None, now, is_undo=True)
    if last is None:
        return None
    task = _task_row(connection, last["task_id"])
    if last["skipped"] and not _lacks_people(connection, task, annotator_id, now):
        raise Conflict(f"the skip of task {task['id']} cannot be undone: others have taken the task")
    connection.execute("UPDATE judgments SET undone = ? WHERE id = ?", (now, last["id"]))
    is_gold = task["gold"] is not None
    _count(connection, task["id"], annotator_id, is_skip=bool(last["skipped"]), is_gold=is_gold, change=-1)
    # A person has one open task. The one that was on screen is given out later.
    connection.execute("DELETE FROM leases WHERE annotator_id = ? AND expires > ?", (annotator_id, now))
    expires = now + settings.lease_seconds
    _save_lease(connection, task["id"], annotator_id, last["display"], now, expires)
    return _shown_again(connection, last, expires)


def _shown_again(connection: sqlite3.Connection, judgment: sqlite3.Row, expires: float) -> Shown:
    task = _whole_task(connection, judgment["task_id"])
    order = json.loads(judgment["display"])
    return Shown(task, order, expires, answer=by_position(json.loads(judgment["answer"]), order))


def _repeated_undo(connection: sqlite3.Connection, annotator_id: int, earlier: sqlite3.Row) -> Shown | None:
    """Returns the result of an undo that was sent before, while the person still has its task on screen."""
    if not earlier["is_undo"]:
        raise Conflict("this key was used for a judgment: make a new key for each judgment and undo")
    if earlier["judgment_id"] is None:
        return None
    lease = connection.execute(
        "SELECT * FROM leases WHERE task_id = ? AND annotator_id = ?", (earlier["task_id"], annotator_id)
    ).fetchone()
    if lease is None:
        return None
    return _shown_again(connection, earlier, lease["expires"])

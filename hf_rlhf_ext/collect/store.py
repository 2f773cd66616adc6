"""The store: one SQLite file with the tasks, the annotators and every judgment.

A judgment that `Store.judge` has returned is on disk: the file is in WAL mode with `synchronous=FULL`, and the
transaction is committed before the call returns. Several threads and several processes may use one file at once.
"""

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from . import assignment, imported
from .answers import Answer, BadAnswer, Conflict, NotLeased
from .assignment import Place
from .records import (
    SELECT_TASKS,
    Added,
    Annotator,
    Judged,
    Judgment,
    Settings,
    Shown,
    StoreUnavailable,
    judgment_of,
    task_of,
)
from .schema import copy_to, create_private, prepare
from .tasks import Task

__all__ = [
    "Added",
    "Annotator",
    "BadAnswer",
    "Conflict",
    "Judged",
    "Judgment",
    "NotLeased",
    "Settings",
    "Shown",
    "Store",
    "StoreUnavailable",
]

_BUSY_SECONDS = 30
"""How long a transaction waits for that of another process or thread."""
_ROLES = ("annotator", "admin")


class Store:
    """Tasks, annotators and judgments in one SQLite file.

    Times are unix seconds. `now` is for tests; it defaults to the clock. Each method raises `StoreUnavailable`, a
    `UserError`, if the file cannot be used now: it is locked for long, the disk is full, or the file was moved away.

    Args:
        path: The file. If it does not exist, it is created, readable by its owner only. A store of an older version is
            migrated, and a copy of the old one is kept beside it.

    Raises:
        UserError: The file cannot be opened, is no store, or was written by a newer version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = self.path.absolute()  # the working folder may change
        self._write_lock = threading.RLock()
        self._read_lock = threading.RLock()
        self._places: dict[int, Place] = {}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            create_private(self._file)
            self._writer = _connect(self._file)
        except (OSError, sqlite3.Error) as error:
            raise _refused(path, error) from None
        try:
            _use_wal(self._writer)
            prepare(self._writer, self.path)
            self._reader = _connect(self._file)
            self._reader.execute("PRAGMA query_only = ON")
            self._identity = _identity(self._file)
        except (OSError, sqlite3.Error) as error:
            self._writer.close()
            raise _refused(path, error) from None
        except UserError:
            self._writer.close()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. The store cannot be used afterward."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def _holding(self, lock: threading.RLock) -> Iterator[None]:
        """Holds a lock of this process. Says in one line what SQLite says about the file, but not our own mistakes."""
        if not lock.acquire(timeout=_BUSY_SECONDS):
            raise StoreUnavailable(f"{self.path}: it is in use for more than {_BUSY_SECONDS} seconds: try again later.")
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except sqlite3.DatabaseError as error:
            raise StoreUnavailable(f"{self.path}: {first_line(error)}: {_remedy(error)}.") from error
        finally:
            lock.release()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._holding(self._read_lock):
            yield self._reader

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is on disk when the block is left, or undone if the block raises."""
        with self._holding(self._write_lock):
            self._refuse_moved()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite rolls back by itself after some errors, such as a full disk.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _refuse_moved(self) -> None:
        """Raises `StoreUnavailable` if the open file has lost its name, as SQLite would go on writing to it."""
        try:
            is_same = _identity(self._file) == self._identity
        except OSError:
            is_same = False
        if not is_same:
            raise StoreUnavailable(
                f"{self.path}: the file was moved, deleted or replaced while it was in use, and nothing more is "
                "stored: put it back, or start again with the one that is there now."
            )

    def _rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        with self._reading() as connection:
            return connection.execute(query, values).fetchall()

    # --- settings and tasks ------------------------------------------------------------------------------------------

    def settings(self) -> Settings:
        """Returns the settings of the store."""
        with self._reading() as connection:
            return _settings_in(connection)

    def save_settings(self, settings: Settings) -> None:
        """Replaces the settings. They hold for tasks that are added, and for what is given out, from now on."""
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (settings.to_json(),))

    def add_tasks(self, tasks: Iterable[Task]) -> Added:
        """Adds tasks in this order. A task with the same prompt and completions as an earlier one is not added again.

        How many people judge a task is its own `wanted`, or that of the settings if it is higher. Of all tasks, the
        share `overlap_share` is judged by at least `overlap_wanted` people. A task that is known already also belongs
        to the batch in which it is added again, with the judgments that it has. Its `wanted` is raised if the new one
        is higher.

        Raises:
            UserError: A known task has another gold answer. Nothing is added.
        """
        tasks = list(tasks)
        with self._writing() as connection:
            settings = _settings_in(connection)
            new = _unknown_tasks(connection, tasks)
            overlap = _overlap(connection, settings, new)
            for fingerprint, task in new.items():
                is_overlap = fingerprint in overlap
                wanted = max(task.wanted, settings.wanted)
                if is_overlap:
                    wanted = max(wanted, settings.overlap_wanted)
                _insert_task(connection, replace(task, wanted=wanted), fingerprint, is_overlap)
            for task in tasks:
                _extend_known(connection, task, max(task.wanted, settings.wanted))
        return Added(len(new), len(tasks) - len(new))

    def add_judged(self, judged: Iterable[tuple[Task, Mapping[str, Answer]]], now: float | None = None) -> list[int]:
        """Adds judgments that were made elsewhere, all or none, and those tasks that the store does not have.

        Args:
            judged: Tasks, each with annotator -> answer by completion. People who are not in the store are added,
                without a link.
            now: The time, in unix seconds.

        Returns:
            For each task, how many judgments were added: a person has one on each task.
        """
        added = []
        with self._writing() as connection:
            now = _clock(now)
            for task, answers in judged:
                for fingerprint in _unknown_tasks(connection, [task]):
                    _insert_task(connection, task, fingerprint, is_overlap=False)
                _add_to_batch(connection, task)
                added.append(imported.add_answers(connection, task, answers, now))
        return added

    def tasks(self, batch: str | None = None) -> list[Task]:
        """Returns the tasks of a batch, or all, in the order in which they were added."""
        rows = self._rows(f"{SELECT_TASKS} WHERE {_IN_BATCH} ORDER BY id", {"batch": batch})
        return list(map(task_of, rows))

    def batches(self) -> list[str]:
        """Returns the names of all batches, sorted."""
        rows = self._rows(
            "SELECT batch FROM tasks WHERE batch IS NOT NULL UNION SELECT batch FROM further_batches ORDER BY batch"
        )
        return [row["batch"] for row in rows]

    # --- annotators --------------------------------------------------------------------------------------------------

    def add_annotator(self, name: str, role: str = "annotator") -> str:
        """Adds a person. Returns the secret token of the person's link, of which the store keeps only the hash.

        Args:
            name: Shown to the person and to admins. Spaces around it are removed.
            role: "annotator" or "admin".

        Raises:
            UserError: The name is taken, empty or has a comma, or the role is unknown.
        """
        if not _is_name(name):
            raise UserError(f"annotator name {name!r}: give 1 to 100 characters on one line, without a comma.")
        name = name.strip()
        if role not in _ROLES:
            raise UserError(f"role {role!r} is unknown: give annotator or admin.")
        token = secrets.token_urlsafe(32)
        values = (name, role, _hash(token), time.time())
        try:
            with self._writing() as connection:
                connection.execute(
                    "INSERT INTO annotators (name, role, token_hash, active, created) VALUES (?, ?, ?, 1, ?)", values
                )
        except sqlite3.IntegrityError:
            raise UserError(f"annotator {name!r} exists already: give another name, or make a new link.") from None
        return token

    def new_token(self, name: str) -> str:
        """Returns a new token for a person. The old link stops working."""
        token = secrets.token_urlsafe(32)
        with self._writing() as connection:
            _change_annotator(connection, name, "token_hash = ?", _hash(token))
        return token

    def set_active(self, name: str, active: bool) -> None:
        """Makes the link of a person work or not. The tasks that an inactive person had open go to others."""
        with self._writing() as connection:
            _change_annotator(connection, name, "active = ?", bool(active))
            if not active:
                connection.execute(
                    "DELETE FROM leases WHERE annotator_id = (SELECT id FROM annotators WHERE name = ?)", (name,)
                )

    def annotators(self) -> list[Annotator]:
        """Returns everybody who was added, in this order."""
        return [_annotator_of(row) for row in self._rows("SELECT * FROM annotators ORDER BY id")]

    def annotator(self, annotator_id: int) -> Annotator | None:
        """Returns the person with this id, active or not, or None."""
        rows = self._rows("SELECT * FROM annotators WHERE id = ?", (annotator_id,))
        return _annotator_of(rows[0]) if rows else None

    def annotator_of(self, token: str) -> Annotator | None:
        """Returns the active person with this token, or None."""
        # The lookup is by hash: its time tells nothing about the token.
        rows = self._rows("SELECT * FROM annotators WHERE token_hash = ? AND active", (_hash(token),))
        return _annotator_of(rows[0]) if rows else None

    def secret_key(self) -> bytes:
        """Returns 32 random bytes with which the page signs sessions. They are made once and stay the same."""
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('secret_key', ?)", (secrets.token_hex(32),))
            row = connection.execute("SELECT value FROM meta WHERE key = 'secret_key'").fetchone()
        return bytes.fromhex(row["value"])

    # --- judging -----------------------------------------------------------------------------------------------------

    def next_task(self, annotator_id: int, now: float | None = None) -> Shown | None:
        """Keeps a task for a person for `lease_seconds`. Returns the same one again until the person has judged it.

        A person never gets a task that they judged or skipped. At most `wanted` people have judged a task or have it
        open, except gold questions, which everybody gets. Tasks that others have judged come first.

        Returns:
            The task, or None if there is none for the person, or if the store is paused.

        Raises:
            UserError: The person is unknown or not active.
        """
        with self._writing() as connection:
            now = _clock(now)
            return self._next(connection, annotator_id, now)

    def _next(self, connection: sqlite3.Connection, annotator_id: int, now: float) -> Shown | None:
        place = self._places.setdefault(annotator_id, Place())
        return assignment.next_shown(connection, _settings_in(connection), annotator_id, place, now)

    def judge(
        self,
        annotator_id: int,
        task_id: int,
        key: str,
        answer: Answer,
        seconds: float,
        now: float | None = None,
    ) -> Judged:
        """Stores a judgment. It is on disk when the call returns.

        Args:
            annotator_id: Who judged.
            task_id: The task, which `next_task` gave to this person. If its lease has expired, the judgment is still
                taken while the task lacks people.
            key: Made by the page for each judgment: 8 to 64 letters, digits, hyphens or underscores. The same judgment
                sent again with its key is stored once.
            answer: The answer in display order; see `hf_rlhf_ext.collect.answers`.
            seconds: Time that the person spent.
            now: The time, in unix seconds.

        Returns:
            The id of the judgment, and whether it was stored before.

        Raises:
            BadAnswer: The answer does not fit the task, or `key` or `seconds` are not valid.
            NotLeased: The task was not given to this person.
            Conflict: The person has judged the task already, others have taken it in the meantime, or the key was used
                for something else.
        """
        with self._writing() as connection:
            now = _clock(now)
            return assignment.judge(connection, annotator_id, task_id, key, answer, seconds, now)

    def judge_and_next(
        self,
        annotator_id: int,
        task_id: int,
        key: str,
        answer: Answer,
        seconds: float,
        now: float | None = None,
    ) -> tuple[Judged, Shown | None]:
        """Does `judge` and then `next_task` in one transaction, which is faster."""
        with self._writing() as connection:
            now = _clock(now)
            judged = assignment.judge(connection, annotator_id, task_id, key, answer, seconds, now)
            return judged, self._next(connection, annotator_id, now)

    def undo(self, annotator_id: int, key: str, now: float | None = None) -> Shown | None:
        """Takes back the last judgment of a person, which stays in the history, and shows its task again.

        Args:
            annotator_id: Who takes it back.
            key: As in `judge`. The same undo sent again takes back nothing more.
            now: The time, in unix seconds.

        Returns:
            The task in the same order, with the answer that was taken back, or None if there was nothing to undo.

        Raises:
            Conflict: It was a skip, and others have taken the task; or the key was used for a judgment.
        """
        with self._writing() as connection:
            now = _clock(now)
            return assignment.undo(connection, _settings_in(connection), annotator_id, key, now)

    # --- reading -----------------------------------------------------------------------------------------------------

    def progress(self, annotator_id: int) -> dict[str, Any]:
        """Returns how far a person, and all people together, have come.

        Returns:
            `judged` and `skipped` by this person, `open` tasks that the person could still get, their sum `total`, the
                person's `median_seconds` (None without a judgment), and `done` of all `tasks`.
        """
        with self._reading() as connection:
            person = connection.execute("SELECT * FROM annotators WHERE id = ?", (annotator_id,)).fetchone()
            if person is None:
                raise UserError(f"annotator {annotator_id} is unknown: add the person first.")
            n_tasks, n_open = connection.execute(_COUNT_TASKS).fetchone()
            n_seen = connection.execute(_COUNT_SEEN, (annotator_id,)).fetchone()[0]
            median = _median_seconds(connection, annotator_id)
        n_still_open = n_open - n_seen
        return {
            "judged": person["n_judged"],
            "skipped": person["n_skipped"],
            "open": n_still_open,
            "total": person["n_judged"] + person["n_skipped"] + n_still_open,
            "done": n_tasks - n_open,
            "tasks": n_tasks,
            "median_seconds": median,
        }

    def counts(self, batch: str | None = None) -> dict[str, int]:
        """Returns the numbers of `tasks`, of `complete` ones (judged by all wanted people), and of `judgments` that
        were made and are `wanted`. Gold questions and skips do not count.
        """
        row = self._rows(
            f"""SELECT count(*), coalesce(sum(n_judged >= wanted), 0), coalesce(sum(n_judged), 0),
            coalesce(sum(wanted), 0) FROM tasks WHERE gold IS NULL AND {_IN_BATCH}""",
            {"batch": batch},
        )[0]
        return dict(zip(("tasks", "complete", "judgments", "wanted"), row, strict=True))

    def judgments(self, batch: str | None = None, live_only: bool = True) -> list[Judgment]:
        """Returns the judgments of a batch, or all, oldest first. `live_only` leaves out those that were undone."""
        rows = self._rows(
            f"""SELECT judgments.*, name, key FROM judgments
            JOIN annotators ON annotators.id = judgments.annotator_id
            JOIN tasks ON tasks.id = task_id
            LEFT JOIN keys ON keys.annotator_id = judgments.annotator_id AND judgment_id = judgments.id AND NOT is_undo
            WHERE {_IN_BATCH} AND (undone IS NULL OR NOT :live_only) ORDER BY judgments.id""",
            {"batch": batch, "live_only": live_only},
        )
        return list(map(judgment_of, rows))

    def backup(self, path: str | Path) -> None:
        """Writes a consistent copy of the store, while it is in use. The file is complete or absent.

        Raises:
            UserError: The file is the store itself, or it cannot be written.
        """
        path = Path(path)
        self.refuse_own_file(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._reading() as connection:
                copy_to(connection, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {first_line(error)}: give another file.") from None

    def refuse_own_file(self, path: str | Path) -> None:
        """Raises `UserError` if a file that would be written is the store itself."""
        path = Path(path)
        if path.exists() and path.samefile(self._file):
            raise UserError(f"{path}: it is the store itself, which would be lost: give another file.")


_IN_BATCH = """(:batch IS NULL OR tasks.batch = :batch
    OR tasks.id IN (SELECT task_id FROM further_batches WHERE further_batches.batch = :batch))"""
_COUNT_TASKS = """SELECT
    (SELECT count(*) FROM tasks) - (SELECT count(*) FROM tasks WHERE gold IS NOT NULL),
    (SELECT count(*) FROM tasks WHERE gold IS NULL AND n_judged < wanted AND started IS NOT NULL)
    + (SELECT count(*) FROM tasks WHERE gold IS NULL AND n_judged < wanted AND started IS NULL)
"""
_COUNT_SEEN = """SELECT count(*) FROM judgments INDEXED BY live_judgments
    JOIN tasks ON tasks.id = task_id
    WHERE annotator_id = ? AND undone IS NULL AND gold IS NULL AND tasks.n_judged < wanted
"""


def _median_seconds(connection: sqlite3.Connection, annotator_id: int) -> float | None:
    """Returns the median from the index that holds the seconds of a person in order. Imported judgments have none."""
    condition = "annotator_id = ? AND undone IS NULL AND NOT skipped AND seconds > 0"
    count = connection.execute(f"SELECT count(*) FROM judgments WHERE {condition}", (annotator_id,)).fetchone()[0]
    if not count:
        return None
    # The value in the middle, or the two that are there if the count is even.
    middle = connection.execute(
        f"SELECT seconds FROM judgments WHERE {condition} ORDER BY seconds LIMIT ? OFFSET ?",
        (annotator_id, 2 - count % 2, (count - 1) // 2),
    ).fetchall()
    return sum(row[0] for row in middle) / len(middle)


_REMEDIES = {
    sqlite3.SQLITE_BUSY: "another program is using it for long, end that program or try again",
    sqlite3.SQLITE_LOCKED: "another program is using it for long, end that program or try again",
    sqlite3.SQLITE_FULL: "make room on the disk, and try again",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable, or copy it to such a folder",
    sqlite3.SQLITE_IOERR: "check the disk",
    sqlite3.SQLITE_CORRUPT: "the file is damaged, go back to a copy of it",
}


def _remedy(error: BaseException) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return "give another file"
    return _REMEDIES.get(code & 0xFF, "give another file")  # the other bits say where it happened


def _refused(path: str | Path, error: OSError | sqlite3.Error) -> UserError:
    return UserError(f"{path}: cannot be opened as a store: {first_line(error)}: {_remedy(error)}.")


def _identity(path: Path) -> tuple[int, int]:
    """Numbers that stay the same while a file is open, and that another file under its name does not have."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    """Turns on WAL mode. SQLite does not wait for other processes here, so several that start at once try again."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _clock(now: float | None) -> float:
    """The time, read inside of a transaction: the times of judgments are in the order of their transactions."""
    return time.time() if now is None else now


def _is_name(name: Any) -> bool:
    """True for a name that fits in one line of a terminal, and in a list with commas."""
    if not isinstance(name, str) or not name.strip() or len(name) > 100 or "," in name:
        return False
    # Some scripts and emoji need these two, which count as not printable.
    joined = name.strip().replace("\u200c", "").replace("\u200d", "")
    return bool(joined) and joined.isprintable()


def _change_annotator(connection: sqlite3.Connection, name: str, change: str, value: Any) -> None:
    cursor = connection.execute(f"UPDATE annotators SET {change} WHERE name = ?", (value, name))
    if not cursor.rowcount:
        raise UserError(f"annotator {name!r} is unknown: add the person first.")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _settings_in(connection: sqlite3.Connection) -> Settings:
    row = connection.execute("SELECT value FROM meta WHERE key = 'settings'").fetchone()
    if row is None:
        return Settings()
    names = {column.name for column in fields(Settings)}
    saved = json.loads(row["value"])
    # A newer version with the same tables may have saved further settings.
    return Settings(**{name: value for name, value in saved.items() if name in names})


def _annotator_of(row: sqlite3.Row) -> Annotator:
    return Annotator(
        id=row["id"],
        name=row["name"],
        role=row["role"],
        active=bool(row["active"]),
        created=row["created"],
        judged=row["n_judged"],
        skipped=row["n_skipped"],
        token_hash=row["token_hash"],
    )


def _unknown_tasks(connection: sqlite3.Connection, tasks: list[Task]) -> dict[str, Task]:
    """Returns the tasks that the store does not have, by fingerprint, each once."""
    unknown: dict[str, Task] = {}
    for task in tasks:
        fingerprint = task.fingerprint
        known = connection.execute("SELECT 1 FROM tasks WHERE fingerprint = ?", (fingerprint,)).fetchone()
        if known is None:
            unknown.setdefault(fingerprint, task)
    return unknown


def _overlap(connection: sqlite3.Connection, settings: Settings, new: dict[str, Task]) -> set[str]:
    """Chooses the new tasks of the overlap, so that it is the wanted share of all tasks, old ones included."""
    candidates = [fingerprint for fingerprint, task in new.items() if task.gold is None]
    n_tasks, n_overlap = connection.execute(
        "SELECT count(*), coalesce(sum(is_overlap), 0) FROM tasks WHERE gold IS NULL"
    ).fetchone()
    lacking = round(settings.overlap_share * (n_tasks + len(candidates))) - n_overlap
    candidates.sort(key=lambda fingerprint: _hash(f"{settings.seed} {fingerprint}"))
    return set(candidates[: max(0, lacking)])


def _insert_task(connection: sqlite3.Connection, task: Task, fingerprint: str, is_overlap: bool) -> None:
    gold = None if task.gold is None else json.dumps(task.gold)
    values = (
        fingerprint,
        len(task.completions),
        task.category,
        task.source,
        task.row,
        task.wanted,
        gold,
        task.batch,
        is_overlap,
    )
    task_id = connection.execute(
        """INSERT INTO tasks (fingerprint, n_completions, category, source, row, wanted, gold, batch, is_overlap)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        values,
    ).lastrowid
    connection.execute(
        "INSERT INTO texts VALUES (?, ?, ?, ?)",
        (task_id, json.dumps(task.prompt), json.dumps(task.completions), json.dumps(task.made_by)),
    )


def _extend_known(connection: sqlite3.Connection, task: Task, wanted: int) -> None:
    """Adds the batch of a task that the store has, and raises its number of people. Does nothing if nothing is new."""
    known = connection.execute(
        "SELECT id, gold, completions FROM tasks JOIN texts ON texts.task_id = tasks.id WHERE fingerprint = ?",
        (task.fingerprint,),
    ).fetchone()
    gold = None if known["gold"] is None else json.loads(known["gold"])
    if _best_texts(gold, json.loads(known["completions"])) != _best_texts(task.gold, task.completions):
        raise UserError(
            f"`gold` differs from that of task {known['id']} of the store, which asks the same: leave this task out."
        )
    connection.execute("UPDATE tasks SET wanted = ? WHERE id = ? AND wanted < ?", (wanted, known["id"], wanted))
    _add_to_batch(connection, task)


def _best_texts(gold: Mapping[str, Any] | None, completions: Sequence[Any]) -> set[str] | None:
    """Returns the best completions by their texts, as the store may have them in another order."""
    if gold is None:
        return None
    return {json.dumps(completions[k], sort_keys=True) for k in gold["best"]}


def _add_to_batch(connection: sqlite3.Connection, task: Task) -> None:
    """Adds a task of the store to the batch of `task`, which asks the same."""
    if task.batch is not None:
        connection.execute(
            """INSERT OR IGNORE INTO further_batches (batch, task_id)
            SELECT :batch, id FROM tasks WHERE fingerprint = :fingerprint AND batch IS NOT :batch""",
            {"batch": task.batch, "fingerprint": task.fingerprint},
        )

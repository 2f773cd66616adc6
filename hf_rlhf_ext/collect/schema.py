"""Tables of a store, in numbered steps. A store of an older version is migrated by the steps that it lacks.

A step is never changed once it was released. A new version appends a step to `STEPS`.
"""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

APPLICATION_ID = 0x52_4C_48_46
"""Marks a SQLite file as a store."""

_FIRST_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE tasks (
        id INTEGER PRIMARY KEY,
        fingerprint TEXT NOT NULL UNIQUE,
        n_completions INTEGER NOT NULL,
        category TEXT,
        source TEXT,
        row INTEGER,
        wanted INTEGER NOT NULL,
        gold TEXT,                   -- JSON
        batch TEXT
    )""",
    "CREATE INDEX tasks_of_batch ON tasks (batch)",
    # Beside the tasks, whose rows change with each judgment: long texts are written once.
    """CREATE TABLE texts (
        task_id INTEGER PRIMARY KEY REFERENCES tasks (id),
        prompt TEXT NOT NULL,        -- JSON, as are the next two
        completions TEXT NOT NULL,
        made_by TEXT NOT NULL
    )""",
    """CREATE TABLE annotators (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        role TEXT NOT NULL,
        token_hash TEXT UNIQUE,      -- NULL if the person has no link
        active INTEGER NOT NULL,
        created REAL NOT NULL
    )""",
    """CREATE TABLE leases (
        task_id INTEGER NOT NULL REFERENCES tasks (id),
        annotator_id INTEGER NOT NULL REFERENCES annotators (id),
        display TEXT NOT NULL,       -- JSON: display[position] is the index of a completion
        granted REAL NOT NULL,
        expires REAL NOT NULL,
        PRIMARY KEY (task_id, annotator_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX leases_of_annotator ON leases (annotator_id)",
    """CREATE TABLE judgments (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        task_id INTEGER NOT NULL REFERENCES tasks (id),
        annotator_id INTEGER NOT NULL REFERENCES annotators (id),
        display TEXT NOT NULL,
        answer TEXT NOT NULL,        -- JSON, by completion
        skipped INTEGER NOT NULL,
        seconds REAL NOT NULL,
        created REAL NOT NULL,
        undone REAL                  -- when it was taken back; NULL for a live judgment
    )""",
    "CREATE UNIQUE INDEX live_judgments ON judgments (annotator_id, task_id) WHERE undone IS NULL",
    "CREATE INDEX judgments_of_annotator ON judgments (annotator_id, id)",
    "CREATE INDEX judgments_of_task ON judgments (task_id)",
    """CREATE TABLE keys (
        annotator_id INTEGER NOT NULL REFERENCES annotators (id),
        key TEXT NOT NULL,
        is_undo INTEGER NOT NULL,
        judgment_id INTEGER REFERENCES judgments (id),  -- NULL for an undo that had nothing to undo
        created REAL NOT NULL,
        PRIMARY KEY (annotator_id, key)
    ) WITHOUT ROWID""",
)

# Counts that were computed by reading judgments, now kept beside the tasks and annotators, so that giving out a task
# takes the same time in a large store.
_COUNTS = (
    "ALTER TABLE tasks ADD COLUMN n_judged INTEGER NOT NULL DEFAULT 0",  # live judgments that are not skipped
    "ALTER TABLE tasks ADD COLUMN started INTEGER",  # id of the first of them
    "ALTER TABLE tasks ADD COLUMN is_overlap INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE annotators ADD COLUMN n_judged INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE annotators ADD COLUMN n_skipped INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE annotators ADD COLUMN n_gold INTEGER NOT NULL DEFAULT 0",  # gold questions among both
    """UPDATE tasks SET (n_judged, started) = (
        SELECT count(*), min(id) FROM judgments WHERE task_id = tasks.id AND undone IS NULL AND NOT skipped
    )""",
    """UPDATE annotators SET (n_judged, n_skipped, n_gold) = (
        SELECT count(*) - coalesce(sum(skipped), 0), coalesce(sum(skipped), 0), count(tasks.gold)
        FROM judgments JOIN tasks ON tasks.id = task_id
        WHERE annotator_id = annotators.id AND undone IS NULL
    )""",
    """CREATE INDEX started_tasks ON tasks (started, id)
        WHERE gold IS NULL AND n_judged < wanted AND started IS NOT NULL""",
    "CREATE INDEX fresh_tasks ON tasks (id) WHERE gold IS NULL AND n_judged < wanted AND started IS NULL",
    "CREATE INDEX seconds_of_annotator ON judgments (annotator_id, seconds) WHERE undone IS NULL AND NOT skipped",
    "CREATE INDEX gold_tasks ON tasks (id) WHERE gold IS NOT NULL",
)

# The same question may be added in several batches. It is judged once, and belongs to all of them.
_FURTHER_BATCHES = (
    """CREATE TABLE further_batches (
        batch TEXT NOT NULL,         -- beside tasks.batch, the first one
        task_id INTEGER NOT NULL REFERENCES tasks (id),
        PRIMARY KEY (batch, task_id)
    ) WITHOUT ROWID""",
)

STEPS = (_FIRST_TABLES, _COUNTS, _FURTHER_BATCHES)
"""Statements that lead from version 0 (an empty file) to 1, from 1 to 2, and so on."""
SCHEMA_VERSION = len(STEPS)


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Creates the tables of an empty file, or migrates a store of an older version after a backup beside it.

    Raises:
        UserError: The file is no store, or a store of a newer version.
    """
    version = _version(connection, path)
    if version == SCHEMA_VERSION:
        return
    if version > 0:
        _back_up(connection, path, version)
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have done it in the meantime.
        version = _version(connection, path)
        for step in STEPS[version:]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Returns the version of the store in this file, or 0 for an empty file."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    n_tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and n_tables:
        raise UserError(f"{path}: it is a SQLite file, but no store of judgments: give another file.")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: the store has version {version}, and this hf-rlhf-ext reads up to {SCHEMA_VERSION}: "
            "update it with `pip install -U hf-rlhf-ext`."
        )
    return version


def _back_up(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Copies the store to a file beside it, which replaces no other file."""
    target = path.with_name(f"{path.name}.version-{version}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.version-{version}-{number}")
    copy_to(connection, target)


def copy_to(connection: sqlite3.Connection, target: Path) -> None:
    """Writes a consistent copy of the open store. The copy appears under its name when it is complete."""
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        create_private(unfinished)
        copy = sqlite3.connect(unfinished)
        try:
            connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, without -wal beside it
        finally:
            copy.close()
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def create_private(path: Path) -> None:
    """Creates an empty file that only its owner can read, as a store holds the key of sessions and people's answers.

    A file that exists keeps its mode. SQLite gives the files beside it, such as the log, the same mode.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

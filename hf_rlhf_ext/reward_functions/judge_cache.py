"""Scores of a judge by request, in memory or in a file, so that no request is paid for twice."""

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line


def key_of(*parts: Any) -> str:
    """A digest of what a score depends on. No key of an endpoint is among it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class MemoryCache:
    """Scores of this process."""

    def __init__(self):
        self._scores: dict[str, float] = {}

    def get(self, key: str) -> float | None:
        """The score of a request; `None` if it is not known."""
        return self._scores.get(key)

    def put(self, key: str, score: float, reply: str) -> None:
        """Keeps a score. The reply is kept only in files."""
        self._scores[key] = score


class FileCache:
    """Scores in an SQLite file, with the judge's replies to read. Threads and processes may share the file.

    Args:
        path: the file, made if it does not exist.

    Raises:
        UserError: the file cannot be written or is something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS judgments "
                "(request TEXT PRIMARY KEY, score REAL NOT NULL, reply TEXT NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"judge: cache={path} cannot be used ({first_line(error)}): name another file.") from None

    def get(self, key: str) -> float | None:
        """The score of a request; `None` if it is not known."""
        row = self._execute("SELECT score FROM judgments WHERE request = ?", key)
        return None if row is None else row[0]

    def put(self, key: str, score: float, reply: str) -> None:
        """Keeps a score, and the reply that it was read from."""
        reply = reply.encode("utf-8", "replace").decode()
        self._execute("INSERT OR REPLACE INTO judgments VALUES (?, ?, ?)", key, score, reply)

    def _execute(self, statement: str, *values: Any) -> tuple | None:
        """The first row of a statement's result."""
        try:
            with self._lock:
                return self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:  # a full disk, or a file that is gone
            problem = first_line(error)
        raise UserError(f"judge: cache={self.path} cannot be used ({problem}): make room, or name another file.")

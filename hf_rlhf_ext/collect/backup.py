"""Copies of a store in a private data set on the Hub, for a server whose disk does not last, such as a Space.

The store stays a file on the local disk. `Backup` pushes a snapshot of it every few minutes and at the end, and
`BackupRepository.restore` brings the last snapshot back at the next start. A snapshot holds no secret that opens the
page: links are stored as hashes only, and the key of sessions is left out, so that people open their link again after a
restore. But it has their names, answers and comments: this is why the data set must be private.
"""

import hashlib
import logging
import os
import sqlite3
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitScheduler, HfApi

from ..errors import UserError, first_line
from ..hub.client import check_access, retried
from .store import Store

logger = logging.getLogger(__name__)

SNAPSHOT = "judgments.sqlite"
"""Name of the snapshot in the data set."""

CARD = """\
---
viewer: false
tags:
- hf_rlhf_ext
---

# Backup of judgments

Snapshots of the store of `hf-rlhf collect serve`, which the server makes by itself. Keep this data set private: it has
names, judgments and comments of people. Their secret links are in it as hashes only.

`{snapshot}` is a SQLite file. Download it and pass it to `hf-rlhf collect` as `--store {snapshot}`.
"""


@dataclass(frozen=True)
class Head:
    """The newest commit of the data set, and the digest of the snapshot in it; None if it has none."""

    commit: str
    snapshot: str | None


class BackupRepository:
    """The data set that holds the snapshots. It is created, private, if it does not exist.

    Args:
        repo_id: `owner/name`, or only a name in your own namespace.
        token: access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        allow_public: accept a data set that exists and is public.

    Raises:
        UserError: the token cannot write there, the Hub cannot be reached, or the data set is public.
    """

    def __init__(self, repo_id: str, *, token: str | None = None, allow_public: bool = False):
        self.api = HfApi(token=token)
        self.name = SNAPSHOT
        self.known: set[str] = set()
        """Digests of the snapshots that this server restored or pushed."""
        try:
            self.repo_id = check_access(repo_id, token)
        except UserError as error:
            raise UserError(str(error).replace("push_to_hub:", "backup_repo:", 1)) from None
        try:
            self.api.create_repo(self.repo_id, repo_type="dataset", private=True, exist_ok=True)
            is_private = self.api.repo_info(self.repo_id, repo_type="dataset").private
        except Exception as error:  # the Hub's client and its HTTP library raise many kinds
            raise UserError(f"backup_repo: cannot use {self.repo_id}: {first_line(error)}.") from error
        if not is_private and not allow_public:
            raise UserError(
                f"backup_repo: {self.repo_id} is public, and the store has names and comments of people: make it "
                "private in its settings, or pass --backup_public true."
            )

    @property
    def has_conflict(self) -> bool:
        """Whether another server pushed too, so that this one uses a name of its own."""
        return self.name != SNAPSHOT

    def head(self) -> Head:
        """The newest commit. Raises errors of the Hub's client."""
        commit = self.api.repo_info(self.repo_id, repo_type="dataset").sha
        found = self.api.get_paths_info(self.repo_id, [SNAPSHOT], repo_type="dataset", revision=commit)
        if not found:
            return Head(commit, None)
        file = found[0]
        return Head(commit, file.lfs.sha256 if file.lfs else file.blob_id)

    def restore(self, path: str | Path) -> int | None:
        """Brings the snapshot back if there is no local store. Call it before the store is opened.

        A local store is kept if it has every judgment of the snapshot, as after a restart on the same disk.

        Args:
            path: where the store is, or will be.

        Returns:
            The number of judgments in the restored store; None if nothing was restored.

        Raises:
            UserError: the Hub cannot be reached or the snapshot cannot be read, so that a new store would replace it;
                or the local store lacks judgments of the snapshot.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".restore-") as scratch:
            snapshot = self._download(Path(scratch))
            if snapshot is None:
                return None
            saved = self._judgments_in(snapshot)
            if path.exists():
                self._refuse_missing(path, saved)
                return None
            _set_log_aside(path)
            snapshot.chmod(0o600)  # as that of a new store
            os.replace(snapshot, path)
        return len(saved)

    def _download(self, folder: Path) -> Path | None:
        """The snapshot as a file in `folder`; None if the data set has none."""
        try:
            head = self.head()
            if head.snapshot is None:
                return None
            path = self.api.hf_hub_download(
                self.repo_id, SNAPSHOT, repo_type="dataset", revision=head.commit, local_dir=folder
            )
        except Exception as error:
            raise UserError(
                f"backup_repo: cannot read the backup in {self.repo_id}: {first_line(error)}: start again later, or "
                "leave out --backup_repo to work without it."
            ) from error
        self.known.add(head.snapshot)
        return Path(path)

    def _judgments_in(self, snapshot: Path) -> set[tuple[str, str]]:
        try:
            return _judgments_in(snapshot)
        except Exception as error:  # whatever SQLite says about a broken file
            raise UserError(
                f"backup_repo: {SNAPSHOT} in {self.repo_id} is not a readable store ({first_line(error)}): take an "
                "earlier version from the history of the data set, or give another --backup_repo."
            ) from error

    def _refuse_missing(self, path: Path, saved: set[tuple[str, str]]) -> None:
        missing = saved - _judgments_in(path)
        if missing:
            raise UserError(
                f"backup_repo: {self.repo_id} has {len(missing)} judgments that {path} does not have, so they are two "
                "stores: give another --backup_repo, or move the local file away to work with the one of the backup."
            )

    def commit(self, snapshot: Path, digest: str) -> CommitInfo:
        """Pushes a snapshot in one commit. Raises errors of the Hub's client.

        If another server has pushed since, its snapshot is kept, and this one gets a name of its own.
        """
        head = self.head()
        if head.snapshot is not None and head.snapshot not in self.known and not self.has_conflict:
            self.name = f"judgments-{uuid4().hex[:8]}.sqlite"
            logger.warning("backup: another server saved to %s: this one saves to %s.", self.repo_id, self.name)
        # Before the request, because its reply may be lost after the commit was made.
        self.known.add(digest)
        operations = [CommitOperationAdd(self.name, snapshot)]
        if head.snapshot is None:
            operations.append(CommitOperationAdd("README.md", CARD.format(snapshot=SNAPSHOT).encode()))
        return self.api.create_commit(
            self.repo_id,
            operations,
            repo_type="dataset",
            commit_message="Backup of judgments",
            parent_commit=head.commit,  # a push in between is refused, and looked at in the next attempt
        )


class Backup(CommitScheduler):
    """Pushes snapshots of a store: at the start, every few minutes if something changed, and at the end.

    A push that fails is tried again, at the latest after `minutes`. It is logged and reported by `notices`, and never
    raises: people go on judging.

    Args:
        store: the open store.
        repository: where snapshots go. `restore` was called before the store was opened.
        minutes: time between two pushes.
    """

    def __init__(self, store: Store, repository: BackupRepository, *, minutes: float = 2.0):
        if not minutes > 0:
            raise UserError(f"backup_minutes must be above 0, got {minutes}.")
        # The base class starts its thread at once, which uses these.
        self.store = store
        self.repository = repository
        self.saved_at: float | None = None
        self.problem: str | None = None
        self._saved_digest: str | None = None
        self._is_closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="hf-rlhf-backup-")
        super().__init__(
            repo_id=repository.repo_id,
            repo_type="dataset",
            folder_path=self._folder.name,
            every=minutes,
            private=True,
            hf_api=repository.api,
        )

    def push_to_hub(self) -> CommitInfo | None:
        """Pushes a snapshot if the store has changed since the last one. The scheduler calls it."""
        with self.lock:
            if self._is_closed:
                return None
            try:
                commit = self._push()
            except Exception as error:  # of the Hub, the network or the disk: the server must go on
                self.problem = first_line(error)
                logger.warning("backup to %s failed: %s. It is tried again.", self.repo_id, self.problem)
                return None
            self.problem = None
            self.saved_at = time.time()
            return commit

    def _push(self) -> CommitInfo | None:
        snapshot = self.folder_path / SNAPSHOT
        snapshot.unlink(missing_ok=True)
        self.store.backup(snapshot)
        _leave_out_session_key(snapshot)
        with snapshot.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == self._saved_digest:
            return None
        commit = retried(lambda: self.repository.commit(snapshot, digest))
        self._saved_digest = digest
        return commit

    def notices(self) -> list[str]:
        """What an administrator should know, in one line each; empty if all is well."""
        lines = []
        if self.problem is not None:
            lines.append(
                f"The last backup to {self.repo_id} failed ({self.problem}). {self._last_success()} It is tried again "
                f"every {self.every:g} minutes; until then, new judgments are only on this server's disk."
            )
        if self.repository.has_conflict:
            lines.append(
                f"Another server saves to {self.repo_id} too. Both are kept: this one saves to {self.repository.name} "
                "there. Stop one of them."
            )
        return lines

    def _last_success(self) -> str:
        if self.saved_at is None:
            return "There is none yet."
        return time.strftime("The last good one is of %H:%M UTC.", time.gmtime(self.saved_at))

    def close(self) -> None:
        """Pushes what is not pushed yet, and stops. Call it before the store is closed. It never raises."""
        self.stop()
        self.push_to_hub()
        with self.lock:  # the scheduler may have started one more push
            self._is_closed = True
            self._folder.cleanup()
        if self.problem is not None:
            logger.warning("backup: the last judgments are not in %s: keep the local file.", self.repo_id)


def _judgments_in(path: Path) -> set[tuple[str, str]]:
    """All judgments of a store, also those taken back, by annotator and key."""
    with Store(path) as store:
        judgments = store.judgments(live_only=False)
    return {(judgment.annotator, judgment.key or str(judgment.id)) for judgment in judgments}  # imported ones: no key


def _leave_out_session_key(snapshot: Path) -> None:
    """Deletes the key with which the server signs sessions: with it, a reader of the data set could act as anybody."""
    connection = sqlite3.connect(snapshot)
    try:
        connection.execute("PRAGMA secure_delete = ON")  # overwritten, not only marked as free
        connection.execute("DELETE FROM meta WHERE key = 'secret_key'")
        connection.commit()
    finally:
        connection.close()


def _set_log_aside(path: Path) -> None:
    """Renames the log of a store that is gone: SQLite would apply it to the restored one."""
    for suffix in ("-wal", "-shm"):
        log = path.with_name(path.name + suffix)
        if log.exists():
            log.rename(log.with_name(f"{log.name}.old"))

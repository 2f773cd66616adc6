"""Copies of a store on the Hub: pushed, restored, never in the way of the server. The Hub is the tests' own server."""

import sqlite3
import time

import pytest
from huggingface_hub import HfApi

from hf_rlhf_ext.collect.backup import SNAPSHOT, Backup, BackupRepository
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.errors import UserError
from tests.hub.conftest import hub  # noqa: F401  (a fixture)

REPO = "alice/judgments"
RARELY = 60.0
"""Minutes: only the first push and those of the test happen."""


def filled(path, n_tasks: int = 4) -> Store:
    """A store with tasks and one person, whose judgments come from `judge_one`."""
    store = Store(path)
    store.add_tasks([Task(prompt=f"Question {i}?", completions=[f"Yes, {i}.", f"No, {i}."]) for i in range(n_tasks)])
    store.add_annotator("anna")
    return store


def judge_one(store: Store, key: str) -> None:
    (anna,) = store.annotators()
    shown = store.next_task(anna.id)
    store.judge(anna.id, shown.task.id, key, {"preference": 2, "comment": "short"}, 1.5)


def content(store: Store) -> tuple:
    return store.settings(), store.tasks(), store.annotators(), store.judgments(live_only=False)


def refusal(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_judgments_come_back_after_the_disk_is_lost(hub, tmp_path):  # noqa: F811
    path = tmp_path / "judgments.sqlite"
    repository = BackupRepository(REPO)
    assert repository.restore(path) is None  # nothing there yet
    with filled(path) as store:
        token = store.new_token("anna")
        backup = Backup(store, repository, minutes=RARELY)
        for key in ("first-key", "second-key"):
            judge_one(store, key)
        (anna,) = store.annotators()
        store.undo(anna.id, "undo-key-1")
        judge_one(store, "third-key")
        backup.close()
        assert backup.notices() == []
        before = content(store)
    for file in tmp_path.iterdir():
        file.unlink()

    restored = BackupRepository(REPO).restore(path)
    assert restored == 3
    assert path.stat().st_mode & 0o777 == 0o600
    with Store(path) as store:
        assert content(store) == before
        assert store.annotator_of(token).name == "anna"  # links still work
    assert [file.name for file in tmp_path.iterdir()] == ["judgments.sqlite"]


def test_the_data_set_is_private_explained_and_opens_no_page(hub, tmp_path):  # noqa: F811
    repository = BackupRepository(REPO)
    with filled(tmp_path / "judgments.sqlite") as store:
        token = store.new_token("anna")
        key = store.secret_key()  # as a server that signs sessions
        Backup(store, repository, minutes=RARELY).close()
        assert store.secret_key() == key
    assert hub.repo(REPO, "datasets").private
    files = hub.files(REPO, "datasets")
    assert "private" in files["README.md"].decode()
    snapshot = files[SNAPSHOT]
    assert b"anna" in snapshot and token.encode() not in snapshot
    assert key not in snapshot and key.hex().encode() not in snapshot


def test_a_public_data_set_is_refused_unless_it_is_wanted(hub, tmp_path):  # noqa: F811
    HfApi().create_repo(REPO, repo_type="dataset", private=False)
    line = refusal(BackupRepository, REPO)
    assert "is public" in line and "--backup_public true" in line
    assert BackupRepository(REPO, allow_public=True).repo_id == REPO


@pytest.mark.parametrize(
    "repo, token, reason",
    [("bob/x", None, "not yours"), (REPO, "hf_wrong", "does not know this token")],
)
def test_a_data_set_that_cannot_be_written_is_one_line_at_the_start(hub, repo, token, reason):  # noqa: F811
    line = refusal(BackupRepository, repo, token=token)
    assert line.startswith("backup_repo: ") and reason in line


def test_a_hub_that_fails_at_the_start_stops_before_an_empty_store_could_replace_the_backup(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "old.sqlite") as store:
        Backup(store, BackupRepository(REPO), minutes=RARELY).close()
    repository = BackupRepository(REPO)
    hub.fault(status=403, match="resolve", times=99)
    line = refusal(repository.restore, tmp_path / "judgments.sqlite")
    assert "cannot read the backup" in line and not (tmp_path / "judgments.sqlite").exists()


def test_a_local_store_that_is_ahead_is_kept(hub, tmp_path):  # noqa: F811
    path = tmp_path / "judgments.sqlite"
    with filled(path) as store:
        judge_one(store, "first-key")
        Backup(store, BackupRepository(REPO), minutes=RARELY).close()
        judge_one(store, "second-key")  # not pushed: the process was killed
        before = content(store)
    repository = BackupRepository(REPO)
    assert repository.restore(path) is None
    with Store(path) as store:
        assert content(store) == before
        Backup(store, repository, minutes=RARELY).close()
    other = tmp_path / "elsewhere" / "judgments.sqlite"
    assert BackupRepository(REPO).restore(other) == 2


def test_a_local_store_that_lacks_judgments_of_the_backup_is_refused(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "a.sqlite") as store:
        judge_one(store, "first-key")
        Backup(store, BackupRepository(REPO), minutes=RARELY).close()
    with filled(tmp_path / "b.sqlite") as store:
        for key in ("another-1", "another-2"):
            judge_one(store, key)
    line = refusal(BackupRepository(REPO).restore, tmp_path / "b.sqlite")
    assert "1 judgments" in line and "two stores" in line
    with Store(tmp_path / "b.sqlite") as store:
        assert len(store.judgments()) == 2


def test_a_broken_backup_is_one_line(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "a.sqlite") as store:
        Backup(store, BackupRepository(REPO), minutes=RARELY).close()
    HfApi().upload_file(path_or_fileobj=b"\0not SQLite" * 200, path_in_repo=SNAPSHOT, repo_id=REPO, repo_type="dataset")
    line = refusal(BackupRepository(REPO).restore, tmp_path / "judgments.sqlite")
    assert "not a readable store" in line and "history" in line
    assert not (tmp_path / "judgments.sqlite").exists()


def test_the_log_of_a_lost_store_is_not_applied_to_the_restored_one(hub, tmp_path):  # noqa: F811
    path = tmp_path / "judgments.sqlite"
    with filled(path) as store:
        judge_one(store, "first-key")
        Backup(store, BackupRepository(REPO), minutes=RARELY).close()
        judge_one(store, "second-key")
        log = path.with_name("judgments.sqlite-wal").read_bytes()  # as after a kill
        assert log
    path.unlink()
    path.with_name("judgments.sqlite-wal").write_bytes(log)
    assert BackupRepository(REPO).restore(path) == 1
    with Store(path) as store:
        assert len(store.judgments()) == 1
    assert path.with_name("judgments.sqlite-wal.old").read_bytes() == log


def test_nothing_is_pushed_if_nothing_changed(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "judgments.sqlite") as store:
        backup = Backup(store, BackupRepository(REPO), minutes=RARELY)
        backup.trigger().result()
        commits = len(hub.repo(REPO, "datasets").history())
        assert backup.trigger().result() is None
        assert len(hub.repo(REPO, "datasets").history()) == commits
        judge_one(store, "first-key")
        assert backup.trigger().result() is not None
        backup.close()
    assert len(hub.repo(REPO, "datasets").history()) == commits + 1


def test_a_failed_push_is_reported_and_made_good_and_people_go_on(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "judgments.sqlite") as store:
        backup = Backup(store, BackupRepository(REPO), minutes=RARELY)
        backup.trigger().result()
        judge_one(store, "first-key")
        hub.fault(status=403, match="commit")  # not worth another try now
        assert backup.trigger().result() is None
        (notice,) = backup.notices()
        assert REPO in notice and "failed" in notice and "The last good one is of" in notice
        judge_one(store, "second-key")
        assert backup.trigger().result() is not None
        assert backup.notices() == []
        backup.close()
    assert BackupRepository(REPO).restore(tmp_path / "again.sqlite") == 2


def test_a_busy_hub_is_asked_again_at_once(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "judgments.sqlite") as store:
        backup = Backup(store, BackupRepository(REPO), minutes=RARELY)
        backup.trigger().result()
        judge_one(store, "first-key")
        hub.fault(status=503, match="commit", headers={"Retry-After": "0"})
        assert backup.trigger().result() is not None
        backup.close()


def test_a_commit_whose_reply_was_lost_is_no_conflict(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "judgments.sqlite") as store:
        backup = Backup(store, BackupRepository(REPO), minutes=RARELY)
        backup.trigger().result()
        judge_one(store, "first-key")
        hub.fault(match="commit", done=True)
        backup.trigger().result()
        judge_one(store, "second-key")
        backup.close()
        assert backup.notices() == [] and not backup.repository.has_conflict
    assert BackupRepository(REPO).restore(tmp_path / "again.sqlite") == 2


def test_two_servers_at_once_keep_both_and_say_so(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "a.sqlite") as first, filled(tmp_path / "b.sqlite") as second:
        backups = [Backup(store, BackupRepository(REPO), minutes=RARELY) for store in (first, second)]
        for backup in backups:
            backup.trigger().result()
        judge_one(first, "first-key")
        judge_one(second, "second-key")
        for backup in backups:
            backup.close()
        conflicts = [backup for backup in backups if backup.repository.has_conflict]
        assert len(conflicts) == 1
        assert "Another server saves" in conflicts[0].notices()[0]
    snapshots = [name for name in hub.files(REPO, "datasets") if name.endswith(".sqlite")]
    assert len(snapshots) == 2
    keys = set()
    for name in snapshots:
        copy = tmp_path / f"copy-{name}"
        copy.write_bytes(hub.files(REPO, "datasets")[name])
        with Store(copy) as store:
            keys |= {judgment.key for judgment in store.judgments()}
    assert keys == {"first-key", "second-key"}


def test_pushes_happen_by_themselves(hub, tmp_path):  # noqa: F811
    with filled(tmp_path / "judgments.sqlite") as store:
        backup = Backup(store, BackupRepository(REPO), minutes=0.2 / 60)
        judge_one(store, "first-key")
        deadline = time.monotonic() + 20
        judgments = 0
        while judgments == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
            data = hub.files(REPO, "datasets").get(SNAPSHOT)
            if data is not None:
                copy = tmp_path / "copy.sqlite"
                copy.write_bytes(data)
                connection = sqlite3.connect(copy)
                judgments = connection.execute("SELECT count(*) FROM judgments").fetchone()[0]
                connection.close()
        backup.close()
    assert judgments == 1

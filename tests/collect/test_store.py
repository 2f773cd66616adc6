"""The store: nothing confirmed is lost, nothing counts twice, and no task goes to more people than it should."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hf_rlhf_ext.collect import schema
from hf_rlhf_ext.collect.store import BadAnswer, Conflict, NotLeased, Settings, Store, StoreUnavailable
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.errors import UserError
from tests.collect.conftest import make_tasks

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[2]


def refusal(kind, call, *args, **options) -> str:
    """The message with which a call is refused, which must be one line."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def judge_all(store, annotator_id, answer=None, prefix="key-of"):
    """Judges until there is nothing left. Returns the tasks in the order in which they were shown."""
    shown_tasks = []
    while shown := store.next_task(annotator_id):
        shown_tasks.append(shown.task)
        key = f"{prefix}-{annotator_id}-{shown.task.id:06d}"
        store.judge(annotator_id, shown.task.id, key, answer or {"preference": 2}, 1.0)
    return shown_tasks


# --- giving out tasks ------------------------------------------------------------------------------------------------


def test_nobody_gets_a_task_twice_and_each_goes_to_the_wanted_number(make_store):
    store = make_store(7, wanted=2, gold_share=0)
    seen = {person: [task.id for task in judge_all(store, person)] for person in (1, 2, 3)}
    assert all(len(set(ids)) == len(ids) for ids in seen.values())
    assert Counter(id for ids in seen.values() for id in ids) == dict.fromkeys(range(1, 8), 2)
    assert store.counts() == {"tasks": 7, "complete": 7, "judgments": 14, "wanted": 14}


def test_tasks_that_others_have_judged_come_first(make_store):
    store = make_store(5, wanted=2, gold_share=0)
    for person in (1, 2):
        shown = store.next_task(person)
        assert shown.task.id == 1
        store.judge(person, 1, f"key-{person}-0000", {"preference": 1}, 1.0)
    assert store.next_task(1).task.id == 2
    store.judge(1, 2, "key-1-0001", {"preference": 1}, 1.0)
    assert store.next_task(1).task.id == 3  # open, judged by nobody
    assert store.next_task(2).task.id == 2  # judged by ann, lacks one


def test_a_reload_shows_the_same_task_and_an_expired_lease_goes_to_others(make_store):
    store = make_store(1, lease_seconds=60)
    first = store.next_task(1, now=1000)
    again = store.next_task(1, now=1010)
    assert (again.task, again.order, again.expires) == (first.task, first.order, 1060)
    assert store.next_task(1, now=1050).expires == 1110  # renewed while the person is there
    assert store.next_task(2, now=1109) is None
    assert store.next_task(2, now=1111).task == first.task
    # The first one is late: somebody else has the task now.
    assert "went to others" in refusal(Conflict, store.judge, 1, 1, "key-0001", {"preference": 1}, 1.0, now=1112)
    assert store.next_task(1, now=1113) is None
    # But a late judgment is welcome when the other one leaves too.
    assert not store.judge(1, 1, "key-0001", {"preference": 1}, 1.0, now=1200).is_repeat
    assert "went to others" in refusal(Conflict, store.judge, 2, 1, "key-0002", {"preference": 1}, 1.0, now=1201)
    assert store.counts()["judgments"] == 1


def test_a_skipped_task_is_not_shown_again_and_does_not_count(make_store):
    store = make_store(1)
    store.next_task(1)
    store.judge(1, 1, "key-0001", {"skip": True, "comment": "no idea"}, 1.0)
    assert store.next_task(1) is None
    assert store.counts() == {"tasks": 1, "complete": 0, "judgments": 0, "wanted": 1}
    assert store.next_task(2).task.id == 1
    expected = {"judged": 0, "skipped": 1, "open": 0, "total": 1, "done": 0, "tasks": 1, "median_seconds": None}
    assert store.progress(1) == expected


def test_a_pause_gives_out_nothing_but_takes_what_is_open(make_store):
    store = make_store(3)
    shown = store.next_task(1)
    store.save_settings(Settings(paused=True))
    assert store.next_task(1) is None and store.next_task(2) is None
    assert store.judge_and_next(1, shown.task.id, "key-0001", {"preference": 1}, 1.0)[1] is None
    store.save_settings(Settings())
    assert store.next_task(1) is not None


def test_sides_are_shuffled_per_person_and_the_same_in_a_rebuilt_store(make_store):
    tasks = make_tasks(300)
    store = make_store(tasks, wanted=3, gold_share=0)
    other = make_store(tasks, name="other.sqlite", wanted=3, gold_share=0)
    first_shown = {person: [] for person in (1, 2, 3)}
    for person, sides in first_shown.items():
        for k in range(300):
            shown = store.next_task(person)
            assert sorted(shown.order) == [0, 1]
            sides.append(shown.order[0])
            store.judge(person, shown.task.id, f"key-{person}-{k:05d}", {"preference": 4}, 1.0)
        assert abs(sum(sides) - 150) < 40  # 4.6 standard deviations
    assert first_shown[1] != first_shown[2] != first_shown[3]
    assert other.next_task(1).order[0] == first_shown[1][0]
    reseeded = make_store(tasks, name="reseeded.sqlite", seed=1, gold_share=0)
    orders = []
    for k in range(40):
        shown = reseeded.next_task(1)
        orders.append(shown.order[0])
        reseeded.judge(1, shown.task.id, f"key-{k:06d}", {"preference": 4}, 1.0)
    assert orders != first_shown[1][:40]


def test_all_orders_of_three_completions_occur(make_store):
    store = make_store([Task(f"q{i}", ["a", "b", "c"]) for i in range(120)], gold_share=0)
    orders = Counter()
    for k in range(120):
        shown = store.next_task(1)
        orders[tuple(shown.order)] += 1
        store.judge(1, shown.task.id, f"key-{k:06d}", {"ranks": [1, 2, 2]}, 1.0)
    assert len(orders) == 6 and min(orders.values()) > 5


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_gold_questions_come_at_their_share_at_places_nobody_can_guess(make_store, share):
    gold = [Task(f"gold {i}", ["right", "wrong"], gold={"best": [0]}) for i in range(100)]
    store = make_store([*gold, *make_tasks(200)], wanted=3, gold_share=share)
    places = {}
    for person in (1, 2, 3):
        shown = judge_all(store, person)[:200]
        places[person] = [k for k, task in enumerate(shown) if task.gold]
        assert abs(len(places[person]) - 200 * share) <= 1
        # One in each stretch of 1 / share tasks.
        for k, place in enumerate(places[person]):
            assert int(k / share) <= place < (k + 1) / share
        gaps = {after - before for before, after in zip(places[person], places[person][1:], strict=False)}
        assert len(gaps) > 1
    assert places[1] != places[2]
    # Each person has each gold question once, and they do not count as tasks.
    assert store.counts()["tasks"] == 200 and store.counts()["complete"] == 200


def test_gold_runs_out_and_a_share_of_zero_or_one(make_store):
    gold = [Task(f"gold {i}", ["right", "wrong"], gold={"best": [0]}) for i in range(2)]
    store = make_store([*gold, *make_tasks(4)], gold_share=1)
    assert [task.gold is not None for task in judge_all(store, 1)] == [True, True, False, False, False, False]
    assert store.progress(1)["total"] == 6
    none = make_store([*gold, *make_tasks(4)], name="none.sqlite", gold_share=0)
    assert [task.gold for task in judge_all(none, 1)] == [None] * 4


def test_the_overlap_is_a_share_of_all_tasks(make_store):
    store = make_store(0, overlap_share=0.2, overlap_wanted=3, wanted=1)
    tasks = make_tasks(100, wanted=2)
    for task in tasks[:50]:
        store.add_tasks([task])
    assert Counter(task.wanted for task in store.tasks()) == {2: 40, 3: 10}
    store.add_tasks(tasks)
    assert Counter(task.wanted for task in store.tasks()) == {2: 80, 3: 20}
    overlap = {task.id for task in store.tasks()[50:] if task.wanted == 3}
    assert overlap != set(range(51, 61)), "they are spread"


def test_a_known_task_is_not_added_again(make_store):
    store = make_store(5)
    swapped = [Task(task.prompt, task.completions[::-1], batch="later") for task in make_tasks(7)]
    assert store.add_tasks([*swapped, *swapped]) == (2, 12)
    assert len(store.tasks()) == 7 and len(store.tasks("later")) == 7
    assert store.counts("later")["tasks"] == 7


# --- judging ---------------------------------------------------------------------------------------------------------


def test_a_known_task_belongs_to_each_batch_in_which_it_was_added(make_store):
    store = make_store([Task("same", ["a", "b"], batch="one"), Task("none", ["a", "b"])], gold_share=0)
    judge_all(store, 1)
    again = [Task("same", ["b", "a"], batch="two"), Task("new", ["a", "b"], batch="two"), Task("none", ["a", "b"])]
    assert store.add_tasks(again) == (1, 2)
    assert store.add_tasks(again) == (0, 3) and store.batches() == ["one", "two"]
    assert [task.prompt for task in store.tasks("two")] == ["same", "new"]
    assert [task.prompt for task in store.tasks("one")] == ["same"] and len(store.tasks()) == 3
    assert store.counts("two") == {"tasks": 2, "complete": 1, "judgments": 1, "wanted": 2}
    assert [judgment.task_id for judgment in store.judgments("two")] == [1]


def test_more_people_can_be_wanted_later_but_not_fewer(make_store):
    store = make_store([Task("q", ["a", "b"], wanted=2)], gold_share=0)
    judge_all(store, 1)
    judge_all(store, 2)
    assert store.next_task(3) is None
    store.add_tasks([Task("q", ["a", "b"])])
    assert store.tasks()[0].wanted == 2
    store.add_tasks([Task("q", ["b", "a"], wanted=3)])
    assert store.counts() == {"tasks": 1, "complete": 0, "judgments": 2, "wanted": 3}
    assert store.next_task(3).task.id == 1


def test_a_known_task_with_another_gold_answer_is_refused(make_store):
    gold = Task("gold", ["a", "b"], gold={"best": [0]})
    store = make_store([gold, Task("q", ["a", "b"])])
    assert store.add_tasks([gold, Task("gold", ["b", "a"], gold={"best": [1]})]) == (0, 2)
    for other in (Task("gold", ["a", "b"]), Task("gold", ["b", "a"], gold={"best": [0]})):
        assert "task 1" in refusal(UserError, store.add_tasks, [Task("new", ["a", "b"]), other])
    assert "gold" in refusal(UserError, store.add_tasks, [Task("q", ["a", "b"], gold={"best": [0]})])
    assert len(store.tasks()) == 2


def test_a_store_of_gold_questions_only(make_store):
    tasks = [Task(f"gold {i}", ["a", "b"], gold={"best": [0]}) for i in range(4)]
    store = make_store(tasks, gold_share=0.1)
    assert len(judge_all(store, 1)) == 4
    store.save_settings(Settings(gold_share=0))
    assert store.next_task(2) is None


def test_the_overlap_never_wants_fewer_people(make_store):
    store = make_store(4, wanted=5, overlap_share=0.5, overlap_wanted=3)
    assert [task.wanted for task in store.tasks()] == [5, 5, 5, 5]


def test_names_of_all_scripts(make_store):
    names = ["Zoë", "李", "علی\u200cرضا", "👩\u200d🔬", "Anne Marie"]
    store = make_store(1, names)
    store.add_annotator("  Tom ")
    assert [person.name for person in store.annotators()] == [*names, "Tom"]
    for bad in ("Tom", "", " ", "\u200d", "two\nlines", "a,b", "\u202eevil", "x" * 101, None):
        refusal(UserError, store.add_annotator, bad)


def test_a_repeated_judgment_is_one_judgment(make_store):
    store = make_store(2)
    shown = store.next_task(1)
    answer = {"preference": 2, "flags": [["harmful"], []]}
    first = store.judge(1, shown.task.id, "key-0001", answer, 3.0)
    assert not first.is_repeat
    for _ in range(3):  # after a lost reply the page may have measured other seconds
        again, following = store.judge_and_next(1, shown.task.id, "key-0001", answer | {"comment": ""}, 5.0)
        assert again == (first.judgment_id, True) and following.task.id == 2
    (judgment,) = store.judgments()
    assert (judgment.key, judgment.seconds, judgment.annotator) == ("key-0001", 3.0, "ann")
    assert "new key" in refusal(Conflict, store.judge, 1, shown.task.id, "key-0001", {"preference": 3}, 3.0)
    assert "new key" in refusal(Conflict, store.judge, 1, 2, "key-0001", answer, 3.0)
    # Another person may have made the same key.
    other = store.next_task(2)
    assert other is None or not store.judge(2, other.task.id, "key-0001", answer, 3.0).is_repeat
    # After an undo, the same request again changes nothing.
    store.undo(1, "undo-0001")
    assert store.judge(1, shown.task.id, "key-0001", answer, 3.0) == (first.judgment_id, True)
    assert [judgment.annotator for judgment in store.judgments()] == ([] if other is None else ["bob"])


def test_what_may_not_be_judged(make_store):
    store = make_store(3)
    assert "not given" in refusal(NotLeased, store.judge, 1, 1, "key-0001", {"preference": 1}, 1.0)
    assert "no task 99" in refusal(NotLeased, store.judge, 1, 99, "key-0001", {"preference": 1}, 1.0)
    shown = store.next_task(1)
    assert "not given" in refusal(NotLeased, store.judge, 2, shown.task.id, "key-0001", {"preference": 1}, 1.0)
    judge = store.judge
    assert "ranks" in refusal(BadAnswer, judge, 1, shown.task.id, "key-0001", {"ranks": [1, 2]}, 1.0)
    for seconds in (-1, float("nan"), float("inf"), "3", None, True):
        assert "seconds" in refusal(BadAnswer, judge, 1, shown.task.id, "key-0001", {"preference": 1}, seconds)
    for key in ("short", "a" * 65, "key with space", "schlüssel", None, 12345678, "key-0001\n"):
        assert "key" in refusal(BadAnswer, judge, 1, shown.task.id, key, {"preference": 1}, 1.0)
    assert store.judgments(live_only=False) == []
    judge(1, shown.task.id, "key-0001", {"preference": 1}, 1.0)
    assert "undo" in refusal(Conflict, judge, 1, shown.task.id, "key-0002", {"preference": 1}, 1.0)
    assert "unknown" in refusal(UserError, judge, 9, shown.task.id, "key-0002", {"preference": 1}, 1.0)


def test_answers_are_kept_by_completion(make_store):
    store = make_store([Task(f"q{i}", ["a", "b", "c"]) for i in range(20)], gold_share=0)
    for k in range(20):
        shown = store.next_task(1)
        ranks = [1 + (completion == 2) for completion in shown.order]  # c is worse than a and b
        answer = {"ranks": ranks, "edited": {"position": shown.order.index(1), "text": "better b"}}
        store.judge(1, shown.task.id, f"key-{k:06d}", answer, 1.0)
    for judgment in store.judgments():
        assert judgment.answer == {"ranks": [1, 1, 2], "edited": {"completion": 1, "text": "better b"}}
        assert sorted(judgment.order) == [0, 1, 2]


def test_undo_takes_back_one_judgment_after_the_other_and_keeps_the_history(make_store):
    store = make_store(3)
    for k in range(2):
        shown = store.next_task(1)
        store.judge(1, shown.task.id, f"key-{k:06d}", {"preference": k + 1, "comment": str(k)}, 1.0)
    waiting = store.next_task(1)
    assert waiting.task.id == 3
    back = store.undo(1, "undo-0001")
    assert (back.task.id, back.answer) == (2, {"preference": 2, "comment": "1"})
    assert store.undo(1, "undo-0001") == back, "sent again after a lost reply"
    assert store.next_task(1).order == back.order and store.next_task(1).task.id == 2
    assert store.next_task(2).task.id == 3, "the task that was on screen is free"
    assert store.undo(1, "undo-0002").task.id == 1
    assert store.undo(1, "undo-0003") is None
    assert store.undo(1, "undo-0001") is None, "task 2 is no longer on screen"
    store.judge(1, 1, "key-again", {"preference": 7}, 1.0)
    assert store.undo(1, "undo-0003") is None, "an undo that found nothing stays so"
    assert "key" in refusal(Conflict, store.undo, 1, "key-again")
    assert "key" in refusal(Conflict, store.judge, 1, 1, "undo-0001", {"preference": 7}, 1.0)
    history = store.judgments(live_only=False)
    assert [judgment.undone is None for judgment in history] == [False, False, True]
    assert [judgment.key for judgment in history] == ["key-000000", "key-000001", "key-again"]
    assert [judgment.id for judgment in store.judgments()] == [history[2].id]
    assert store.progress(1)["judged"] == 1 and store.counts()["judgments"] == 1


def test_a_skip_is_not_undone_into_a_task_that_others_have(make_store):
    store = make_store(1)
    store.next_task(1)
    store.judge(1, 1, "key-0001", {"skip": True}, 1.0)
    assert store.undo(1, "undo-0001").answer == {"skip": True}
    store.judge(1, 1, "key-0002", {"skip": True}, 1.0)
    store.next_task(2)
    assert "others" in refusal(Conflict, store.undo, 1, "undo-0002")
    assert store.progress(1)["skipped"] == 1


# --- people ----------------------------------------------------------------------------------------------------------


def test_tokens_are_secret_and_can_be_replaced(make_store, tmp_path):
    store = make_store(2, people=())
    token = store.add_annotator("ann", "admin")
    assert len(token) >= 43
    ann = store.annotator_of(token)
    assert (ann.name, ann.role, ann.active) == ("ann", "admin", True)
    assert store.annotator_of(token[:-1]) is None and store.annotator_of("") is None
    assert store.annotator_of("\ud800") is None
    new = store.new_token("ann")
    assert store.annotator_of(token) is None and store.annotator_of(new).id == ann.id
    store.next_task(ann.id)
    store.set_active("ann", False)
    assert store.annotator_of(new) is None
    assert "not active" in refusal(UserError, store.next_task, ann.id)
    bob = store.annotator_of(store.add_annotator("bob"))
    assert store.next_task(bob.id).task.id == 1, "what an inactive person had open is free"
    store.set_active("ann", True)
    assert store.annotator_of(new).name == "ann"
    assert "exists" in refusal(UserError, store.add_annotator, "ann")
    assert "unknown" in refusal(UserError, store.new_token, "eve")
    assert "unknown" in refusal(UserError, store.set_active, "eve", True)
    for name in ("", "  ", "two\nlines", "a" * 101, None):
        assert "name" in refusal(UserError, store.add_annotator, name)
    assert "role" in refusal(UserError, store.add_annotator, "dan", "boss")
    store.backup(tmp_path / "copy.sqlite")
    content = (tmp_path / "copy.sqlite").read_bytes()
    assert token.encode() not in content and new.encode() not in content


def test_settings_are_checked_and_shared(make_store, tmp_path):
    store = make_store(1)
    settings = Settings(title="Ours", instructions="# Be kind", categories=["chat", "code"], seed=3)
    store.save_settings(settings)
    with Store(tmp_path / "store.sqlite") as other:
        assert other.settings() == settings
    wrong = {"gold_share": 1.5, "overlap_share": float("nan"), "wanted": 0, "overlap_wanted": 1.5, "lease_seconds": 0}
    for name, value in wrong.items():
        assert name in refusal(UserError, Settings, **{name: value})


# --- several threads and processes -----------------------------------------------------------------------------------

WORKER = """
import sys
from tests.collect.test_store import work
from hf_rlhf_ext.collect.store import Store
path, *people = sys.argv[1:]
with Store(path) as store:
    for seed, person in enumerate(people):
        work(store, int(person), steps=40, seed=seed)
"""


def work(store, annotator_id, steps, seed):
    """Acts like a person with a bad network: judges, skips, undoes, sends twice, leaves and comes back."""
    rng = random.Random(f"{annotator_id} {seed}")
    shown = None
    for step in range(steps):
        key = f"key-{annotator_id}-{seed}-{step}"
        action = rng.random()
        try:
            if shown is None or action < 0.1:
                shown = store.next_task(annotator_id)
            elif action < 0.2:
                undone = store.undo(annotator_id, key)
                assert undone == store.undo(annotator_id, key)
                shown = undone or shown
            else:
                answer = {"skip": True} if action < 0.3 else {"preference": rng.randint(1, 7)}
                judged, following = store.judge_and_next(annotator_id, shown.task.id, key, answer, 1.0)
                assert not judged.is_repeat
                if rng.random() < 0.3:
                    assert store.judge(annotator_id, shown.task.id, key, answer, 1.0) == (judged.judgment_id, True)
                shown = following
        except (Conflict, NotLeased):  # the lease has expired, or was released by an undo
            shown = None


def watch(path, stop, problems):
    """Looks at the file from outside, again and again."""
    connection = sqlite3.connect(path, timeout=30)
    while not stop.is_set():
        problems += connection.execute(
            """SELECT id, wanted, judged, leased FROM (
                SELECT tasks.id, wanted, (
                    SELECT count(*) FROM judgments WHERE task_id = tasks.id AND undone IS NULL AND NOT skipped
                ) AS judged, (SELECT count(*) FROM leases WHERE task_id = tasks.id AND expires > ?) AS leased
                FROM tasks WHERE gold IS NULL
            ) WHERE judged + leased > wanted""",
            (time.time(),),
        ).fetchall()
        time.sleep(0.01)
    connection.close()


def check_by_brute_force(path):
    """Counts everything again from the judgments. Returns the number of live ones."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    tasks = {row[0]: row[1:] for row in connection.execute("SELECT id, wanted, gold, n_judged, started FROM tasks")}
    query = "SELECT id, task_id, annotator_id, skipped, created, undone FROM judgments ORDER BY id"
    history = connection.execute(query).fetchall()
    live = [row for row in history if row[5] is None]

    assert max(Counter((row[1], row[2]) for row in live).values(), default=0) <= 1, "twice to one person"
    judged = Counter(row[1] for row in live if not row[3])
    for task_id, (wanted, gold, n_judged, started) in tasks.items():
        assert n_judged == judged[task_id]
        assert started == min((row[0] for row in live if row[1] == task_id and not row[3]), default=None)
        if gold is None:
            assert n_judged <= wanted
            # At no time in the past were there more.
            events = []
            for row in history:
                if row[1] == task_id and not row[3]:
                    events.append((row[4], 1))
                    events += [(row[5], -1)] if row[5] else []
            total = 0
            for _, change in sorted(events):
                total += change
                assert total <= wanted
    query = "SELECT id, n_judged, n_skipped, n_gold FROM annotators"
    for annotator_id, *counts in connection.execute(query):
        own = [row for row in live if row[2] == annotator_id]
        n_skipped = sum(row[3] for row in own)
        assert counts == [len(own) - n_skipped, n_skipped, sum(tasks[row[1]][1] is not None for row in own)]
    connection.close()
    return len(live)


@pytest.mark.slow
def test_20_threads_and_4_processes_on_one_file(make_store, tmp_path):
    gold = [Task(f"gold {i}", ["right", "wrong"], gold={"best": [0]}) for i in range(10)]
    people = [f"person {i}" for i in range(28)]
    # Leases so short that some expire.
    settings = {"wanted": 2, "overlap_share": 0.2, "gold_share": 0.2, "lease_seconds": 0.3}
    store = make_store([*gold, *make_tasks(150)], people, is_durable=True, **settings)
    path = str(tmp_path / "store.sqlite")
    stop, problems = threading.Event(), []
    watcher = threading.Thread(target=watch, args=(path, stop, problems), daemon=True)
    watcher.start()
    processes = []
    for k in range(4):
        command = [sys.executable, "-c", WORKER, path, str(21 + 2 * k), str(22 + 2 * k)]
        processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    errors = []

    def run(person):
        try:
            work(store, person, steps=40, seed=0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(person,), daemon=True) for person in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [process.communicate(timeout=120)[1] for process in processes]
    stop.set()
    watcher.join()
    assert [process.returncode for process in processes] == [0, 0, 0, 0], said
    assert errors == [] and problems == []
    assert check_by_brute_force(path) > 300
    # What is left is done by one person after the other.
    for person in range(1, 29):
        while shown := store.next_task(person):
            store.judge(person, shown.task.id, f"rest-{person}-{shown.task.id:05d}", {"preference": 4}, 1.0)
    check_by_brute_force(path)
    counts = store.counts()
    assert counts["complete"] == counts["tasks"] == 150 and counts["judgments"] == counts["wanted"]


# --- durability ------------------------------------------------------------------------------------------------------

JUDGE_UNTIL_KILLED = """
import sys
from hf_rlhf_ext.collect.store import Store
store = Store(sys.argv[1])
shown = store.next_task(1)
while shown:
    key = f"key-{shown.task.id:06d}"
    judged, following = store.judge_and_next(1, shown.task.id, key, {"preference": 1 + shown.task.id % 7}, 1.0)
    print(json_line := f"{key} {judged.judgment_id} {shown.task.id}", flush=True)
    shown = following
"""


def test_what_was_confirmed_survives_a_killed_process(make_store, tmp_path):
    store = make_store(3000, gold_share=0)
    store.close()
    path = tmp_path / "store.sqlite"
    confirmed = []
    for round_number in range(3):
        command = [sys.executable, "-c", JUDGE_UNTIL_KILLED, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(20 + 13 * round_number):
            confirmed.append(process.stdout.readline().split())
        os.kill(process.pid, signal.SIGKILL)
        confirmed += [line.split() for line in process.stdout.read().splitlines() if line.count(" ") == 2]
        process.wait()
        process.stdout.close()
        with Store(path) as again:
            stored = {judgment.key: judgment for judgment in again.judgments()}
            for key, judgment_id, task_id in confirmed:
                assert (stored[key].id, stored[key].task_id) == (int(judgment_id), int(task_id))
            # At most one per process was on disk without having been confirmed.
            assert 0 <= len(stored) - len(confirmed) <= round_number + 1
            last = again.judgments()[-1]
            answer = {"preference": 1 + last.task_id % 7}
            assert again.judge(1, last.task_id, last.key, answer, 9.0) == (last.id, True), "sent again"
    assert check_by_brute_force(path) == len(stored)


def test_a_commit_is_on_disk_before_it_is_confirmed(make_store):
    store = make_store(1, is_durable=True)
    for name, value in {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1}.items():
        assert store._writer.execute(f"PRAGMA {name}").fetchone()[0] == value, name


def test_a_backup_is_a_store_of_its_own(make_store, tmp_path):
    store = make_store(4)
    judge_all(store, 1)
    copy = tmp_path / "copies" / "copy.sqlite"
    store.backup(copy)
    store.backup(copy)  # replaces it
    assert [path.name for path in copy.parent.iterdir()] == ["copy.sqlite"]
    with Store(copy) as other:
        assert other.judgments() == store.judgments() and other.tasks() == store.tasks()
        assert other.settings() == store.settings()
        other.undo(1, "undo-0001")
    assert store.counts()["judgments"] == 4


# --- versions --------------------------------------------------------------------------------------------------------


def store_of_version_1(path):
    """Builds a store from the first step only, with rows in it."""
    connection = sqlite3.connect(path)
    for statement in schema.STEPS[0]:
        connection.execute(statement)
    connection.execute("PRAGMA user_version = 1")
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute("INSERT INTO meta VALUES ('settings', ?)", (Settings(title="Old").to_json(),))
    for k, task in enumerate(make_tasks(4), 1):
        gold = json.dumps({"best": [0]}) if k == 4 else None
        connection.execute(
            "INSERT INTO tasks (id, fingerprint, n_completions, wanted, gold) VALUES (?, ?, 2, 2, ?)",
            (k, task.fingerprint, gold),
        )
        texts = (k, json.dumps(task.prompt), json.dumps(task.completions))
        connection.execute("INSERT INTO texts VALUES (?, ?, ?, '[]')", texts)
    for name in ("ann", "bob"):
        connection.execute(
            "INSERT INTO annotators (name, role, token_hash, active, created) VALUES (?, 'annotator', ?, 1, 5)",
            (name, f"hash of {name}"),
        )
    judgments = [  # task, annotator, answer, skipped, undone
        (1, 1, {"preference": 1}, 0, None),
        (1, 2, {"preference": 7}, 0, None),
        (2, 1, {"skip": True}, 1, None),
        (3, 1, {"preference": 2}, 0, 50.0),
        (3, 1, {"preference": 3}, 0, None),
        (4, 1, {"preference": 3}, 0, None),
    ]
    for k, (task, annotator, answer, skipped, undone) in enumerate(judgments, 1):
        connection.execute(
            "INSERT INTO judgments VALUES (?, ?, ?, '[0, 1]', ?, ?, 2.5, ?, ?)",
            (k, task, annotator, json.dumps(answer), skipped, 10.0 + k, undone),
        )
        connection.execute("INSERT INTO keys VALUES (?, ?, 0, ?, ?)", (annotator, f"old-key-{k}", k, 10.0 + k))
    connection.commit()
    connection.close()
    return len(judgments)


def test_an_old_store_is_migrated_and_a_copy_stays(tmp_path):
    path = tmp_path / "store.sqlite"
    n_judgments = store_of_version_1(path)
    with Store(path) as store:
        assert len(store.judgments(live_only=False)) == n_judgments and len(store.tasks()) == 4
        assert [judgment.key for judgment in store.judgments()] == [f"old-key-{k}" for k in (1, 2, 3, 5, 6)]
        assert store.settings().title == "Old"
        assert store.counts() == {"tasks": 3, "complete": 1, "judgments": 3, "wanted": 6}
        assert [(person.name, person.judged, person.skipped) for person in store.annotators()] == [
            ("ann", 3, 1),
            ("bob", 1, 0),
        ]
        store.save_settings(Settings(gold_share=0))
        assert store.next_task(1) is None
        assert store.next_task(2).task.id == 3, "it has a judgment of ann"
    check_by_brute_force(path)
    copy = tmp_path / "store.sqlite.version-1"
    connection = sqlite3.connect(copy)
    assert connection.execute("PRAGMA user_version").fetchone()[0] == 1
    assert connection.execute("SELECT count(*) FROM judgments").fetchone()[0] == n_judgments
    connection.close()
    before = copy.read_bytes()
    with Store(path):  # nothing to migrate
        pass
    store_of_version_1(tmp_path / "second.sqlite")
    (tmp_path / "second.sqlite.version-1").write_text("mine")
    Store(tmp_path / "second.sqlite").close()
    assert (tmp_path / "second.sqlite.version-1").read_text() == "mine"
    assert (tmp_path / "second.sqlite.version-1-2").is_file() and copy.read_bytes() == before


def test_a_migrated_store_has_the_tables_of_a_new_one(tmp_path):
    store_of_version_1(tmp_path / "old.sqlite")
    tables = []
    for name in ("old.sqlite", "new.sqlite"):
        Store(tmp_path / name).close()
        connection = sqlite3.connect(tmp_path / name)
        tables.append(connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall())
        assert connection.execute("PRAGMA user_version").fetchone()[0] == schema.SCHEMA_VERSION
        connection.close()
    assert tables[0] == tables[1]


def test_a_failed_migration_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "store.sqlite"
    store_of_version_1(path)
    monkeypatch.setattr(schema, "STEPS", (schema.STEPS[0], ("CREATE TABLE new (a)", "CREATE TABLE meta (a)")))
    assert "meta" in refusal(UserError, Store, path)
    monkeypatch.undo()
    with Store(path) as store:
        assert len(store.judgments()) == 5


def test_files_that_are_refused(tmp_path):
    newer = tmp_path / "newer.sqlite"
    Store(newer).close()
    connection = sqlite3.connect(newer)
    connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    connection.close()
    message = refusal(UserError, Store, newer)
    assert f"version {schema.SCHEMA_VERSION + 1}" in message and "pip install -U" in message
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to look like one " * 50)
    assert "cannot be opened" in refusal(UserError, Store, text)
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE other (a)")
    connection.close()
    assert "no store" in refusal(UserError, Store, foreign)
    assert "cannot be opened" in refusal(UserError, Store, tmp_path)
    assert text.read_text().startswith("not a database") and not list(tmp_path.glob("*version*"))


def test_processes_that_create_the_same_store_at_once(tmp_path):
    code = (
        "import sys; from hf_rlhf_ext.collect.store import Store; s = Store(sys.argv[1]); s.add_annotator(sys.argv[2])"
    )
    store_of_version_1(tmp_path / "old.sqlite")
    processes = []
    for name in ("new.sqlite", "old.sqlite"):
        for k in range(3):
            command = [sys.executable, "-c", code, str(tmp_path / name), f"person {k}"]
            processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr[-2000:]
    with Store(tmp_path / "new.sqlite") as new, Store(tmp_path / "old.sqlite") as old:
        assert len(new.annotators()) == 3 and len(old.annotators()) == 5 and len(old.judgments()) == 5


# --- a file that cannot be used ---------------------------------------------------------------------------------------


def test_a_store_and_its_copies_are_private(tmp_path):
    path = tmp_path / "old.sqlite"
    old = os.umask(0o022)
    try:
        with Store(tmp_path / "store.sqlite") as store:
            store.add_annotator("ann")
            store.backup(tmp_path / "copy.sqlite")
            made = [item for item in tmp_path.iterdir() if item.is_file()]
            assert len(made) == 4, "with the log and its index"
        store_of_version_1(path)
        path.chmod(0o640)
        Store(path).close()
    finally:
        os.umask(old)
    for item in (tmp_path / "store.sqlite", tmp_path / "copy.sqlite", tmp_path / "old.sqlite.version-1"):
        assert item.stat().st_mode & 0o777 == 0o600, item
    assert path.stat().st_mode & 0o777 == 0o640, "what the owner chose stays"


def test_the_log_is_private_too(make_store):
    store = make_store(1)
    log = store.path.with_name(store.path.name + "-wal")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_store_that_another_process_locks_for_long_is_one_line(make_store, monkeypatch):
    store = make_store(2, gold_share=0)
    shown = store.next_task(1)
    store._writer.execute("PRAGMA busy_timeout = 20")
    other_process = sqlite3.connect(store.path, isolation_level=None)
    other_process.execute("BEGIN IMMEDIATE")
    message = refusal(StoreUnavailable, store.judge, 1, shown.task.id, "key-0001", {"preference": 1}, 1.0)
    assert "locked" in message and str(store.path) in message and "try again" in message
    refusal(StoreUnavailable, store.add_annotator, "dan")
    assert store.counts()["tasks"] == 2, "reading goes on"
    other_process.execute("COMMIT")
    other_process.close()
    assert not store.judge(1, shown.task.id, "key-0001", {"preference": 1}, 1.0).is_repeat

    # A thread that waits behind another one does not wait for ever either.
    monkeypatch.setattr("hf_rlhf_ext.collect.store._BUSY_SECONDS", 0.05)
    held, done = threading.Event(), threading.Event()

    def hold():
        with store._writing():
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    assert "in use" in refusal(StoreUnavailable, store.next_task, 2)
    done.set()
    thread.join()


def test_a_full_disk_is_one_line_and_changes_nothing(make_store):
    store = make_store(2)
    n_pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {n_pages}")
    big = [Task("x" * 50_000 + str(i), ["a", "b"]) for i in range(5)]
    message = refusal(StoreUnavailable, store.add_tasks, big)
    assert "full" in message and "make room" in message
    assert store.counts()["tasks"] == 2 and store.next_task(1) is not None
    store._writer.execute("PRAGMA max_page_count = 1000000")
    assert store.add_tasks(big).added == 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
def test_a_store_that_one_may_not_write_is_one_line():
    code = (
        "import os, sys; from hf_rlhf_ext.collect.store import Store, UserError; os.setuid(65534)\n"
        "try: Store(sys.argv[1])\nexcept UserError as error: print(error)"
    )
    with tempfile.TemporaryDirectory() as folder:  # `tmp_path` is in a folder that others cannot enter
        path = Path(folder) / "store.sqlite"
        Store(path).close()
        path.chmod(0o444)
        path.parent.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "readonly" in done.stdout and "writable" in done.stdout and not done.stderr
    assert done.stdout.count("\n") == 1


def test_a_damaged_store_is_one_line(make_store, tmp_path):
    path = tmp_path / "damaged.sqlite"
    make_store(200, name="whole.sqlite").backup(path)
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        with Store(path) as store:
            store.tasks()
    assert "malformed" in str(caught.value) and "copy" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mishap", ["deleted", "moved", "replaced"])
def test_nothing_is_confirmed_after_the_file_lost_its_name(make_store, tmp_path, mishap):
    store = make_store(2, gold_share=0)
    shown = store.next_task(1)
    away = tmp_path / "away.sqlite"
    os.replace(store.path, away)
    if mishap == "deleted":
        away.unlink()
    if mishap == "replaced":
        store.path.write_bytes(away.read_bytes())
    arguments = (1, shown.task.id, "key-0001", {"preference": 1}, 1.0)
    assert "moved, deleted or replaced" in refusal(StoreUnavailable, store.judge, *arguments)
    if mishap == "moved":
        os.replace(away, store.path)
        assert not store.judge(*arguments).is_repeat


def test_the_working_folder_may_change(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Store("store.sqlite") as store:
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.add_tasks(make_tasks(1))
        assert "the store itself" in refusal(UserError, store.backup, tmp_path / "store.sqlite")
    with Store(tmp_path / "store.sqlite") as store:
        assert len(store.tasks()) == 1


# --- against a model -------------------------------------------------------------------------------------------------

PEOPLE = (1, 2, 3)


class StoreAgainstModel(RuleBasedStateMachine):
    """Every step is also done on dictionaries, with the rules written out plainly."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "store.sqlite")
        self.store._writer.execute("PRAGMA synchronous = OFF")  # nothing is killed here
        self.store.save_settings(Settings(lease_seconds=100, gold_share=0.3))
        gold = [Task(f"gold {i}", ["a", "b"], gold={"best": [0]}) for i in range(2)]
        self.store.add_tasks([*make_tasks(3), *[Task(f"two {i}", ["a", "b"], wanted=2) for i in range(3)], *gold])
        self.wanted = {task.id: 99 if task.gold else task.wanted for task in self.store.tasks()}
        for person in PEOPLE:
            self.store.add_annotator(str(person))
        self.now = 1000.0
        self.number = 0
        self.judged = {}  # (person, task) -> answer that is live, in display order
        self.order_of_judging = {person: [] for person in PEOPLE}
        self.leases = {}  # (person, task) -> expires
        self.sent = []  # (person, task, key, answer, judgment id)

    def teardown(self):
        self.store.close()
        self.folder.cleanup()

    def key(self):
        self.number += 1
        return f"key-{self.number:06d}"

    def live_leases(self, task, but_not):
        return sum(t == task and p != but_not and expires > self.now for (p, t), expires in self.leases.items())

    def n_judged(self, task):
        return sum(t == task and "skip" not in answer for (_, t), answer in self.judged.items())

    def has_room(self, task, person):
        return self.n_judged(task) + self.live_leases(task, person) < self.wanted[task]

    def allowed(self, person):
        """Tasks that the person may be given now, without gold questions, which need not be given."""
        free = {t for t in self.wanted if (person, t) not in self.judged and self.has_room(t, person)}
        return free, {t for t in free if self.wanted[t] != 99}

    @rule(person=st.sampled_from(PEOPLE))
    def ask(self, person):
        shown = self.store.next_task(person, now=self.now)
        self.check_shown(person, shown)

    def check_shown(self, person, shown):
        allowed, must = self.allowed(person)
        if shown is None:
            assert not must
            return
        assert shown.task.id in allowed and shown.expires > self.now
        live = {t for (p, t), expires in self.leases.items() if p == person and expires > self.now}
        assert not live or live == {shown.task.id}, "one open task per person, the same after a reload"
        self.leases[person, shown.task.id] = shown.expires

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), preference=st.integers(1, 7), skips=st.booleans(), goes_on=st.booleans())
    def judge(self, data, preference, skips, goes_on):
        person, task = data.draw(st.sampled_from(sorted(self.leases)))
        answer = {"skip": True} if skips else {"preference": preference}
        key = self.key()
        in_time = self.leases[person, task] > self.now or skips or self.has_room(task, person)
        following = None
        try:
            if goes_on:
                judged, following = self.store.judge_and_next(person, task, key, answer, 1.0, now=self.now)
            else:
                judged = self.store.judge(person, task, key, answer, 1.0, now=self.now)
        except Conflict:
            assert not in_time
            return
        assert in_time and not judged.is_repeat
        del self.leases[person, task]
        self.judged[person, task] = answer
        self.order_of_judging[person].append(task)
        self.sent.append((person, task, key, answer, judged.judgment_id))
        if goes_on:
            self.check_shown(person, following)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def send_again(self, data):
        person, task, key, answer, judgment_id = data.draw(st.sampled_from(self.sent))
        assert self.store.judge(person, task, key, answer, 2.0, now=self.now) == (judgment_id, True)
        with pytest.raises(Conflict):
            other = {"preference": 1 + answer.get("preference", 0) % 7}
            self.store.judge(person, task, key, other, 2.0, now=self.now)

    @rule(person=st.sampled_from(PEOPLE), task=st.integers(1, 8))
    def judge_without_a_lease(self, person, task):
        if (person, task) in self.leases:
            return
        expected = Conflict if (person, task) in self.judged else NotLeased
        with pytest.raises(expected):
            self.store.judge(person, task, self.key(), {"preference": 1}, 1.0, now=self.now)

    @rule(person=st.sampled_from(PEOPLE))
    def undo(self, person):
        key = self.key()
        if not self.order_of_judging[person]:
            assert self.store.undo(person, key, now=self.now) is None
            return
        task = self.order_of_judging[person][-1]
        answer = self.judged[person, task]
        if "skip" in answer and not self.has_room(task, person):
            with pytest.raises(Conflict):
                self.store.undo(person, key, now=self.now)
            return
        shown = self.store.undo(person, key, now=self.now)
        assert (shown.task.id, shown.answer) == (task, answer)
        self.order_of_judging[person].pop()
        del self.judged[person, task]
        for p, t in list(self.leases):
            if p == person and self.leases[p, t] > self.now:
                del self.leases[p, t]
        self.leases[person, task] = shown.expires
        assert self.store.undo(person, key, now=self.now) == shown

    @rule(seconds=st.sampled_from([1.0, 60.0, 101.0]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def the_store_has_what_the_model_has(self):
        live = {}
        for judgment in self.store.judgments():
            answer = dict(judgment.answer)
            if judgment.order == [1, 0] and "preference" in answer:
                answer["preference"] = 8 - answer["preference"]
            live[int(judgment.annotator), judgment.task_id] = answer
        assert live == self.judged
        for task, wanted in self.wanted.items():
            assert self.n_judged(task) + self.live_leases(task, None) <= wanted
        for person in PEOPLE:
            own = [answer for (p, _), answer in self.judged.items() if p == person]
            progress = self.store.progress(person)
            assert progress["skipped"] == sum("skip" in answer for answer in own)
            assert progress["judged"] == len(own) - progress["skipped"]
            still_open = [t for t, n in self.wanted.items() if n != 99 and self.n_judged(t) < n]
            assert progress["open"] == sum((person, t) not in self.judged for t in still_open)


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = hypothesis_settings(max_examples=40, stateful_step_count=40, deadline=None)


# --- speed -----------------------------------------------------------------------------------------------------------


def test_the_next_task_is_found_without_reading_all_of_them(make_store):
    """Counts the steps of SQLite's virtual machine, which do not depend on the speed of this computer."""
    steps = {}
    for n_tasks in (200, 2000):
        store = make_store(n_tasks, name=f"{n_tasks}.sqlite", wanted=2, gold_share=0)
        shown = store.next_task(1)
        for k in range(150):
            _, shown = store.judge_and_next(1, shown.task.id, f"key-{k:06d}", {"preference": 4}, 1.0)
        counted = 0

        def count():
            nonlocal counted
            counted += 1

        store._writer.set_progress_handler(count, 10)
        for k in range(150, 170):
            _, shown = store.judge_and_next(1, shown.task.id, f"key-{k:06d}", {"preference": 4}, 1.0)
        store._writer.set_progress_handler(None, 0)
        steps[n_tasks] = counted
    assert steps[2000] < 1.2 * steps[200], steps

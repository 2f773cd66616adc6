"""Judging a batch with the real store and the real server over HTTP, by simulated people and by the client."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from hf_rlhf_ext.collect import judging
from hf_rlhf_ext.collect.client import JudgeClient, work
from hf_rlhf_ext.collect.judging import judge_tasks
from hf_rlhf_ext.collect.simulated import SimulatedPerson
from hf_rlhf_ext.collect.store import Settings, Store
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.errors import UserError

pytestmark = pytest.mark.xdist_group("processes")


def number_of(prompts, completions):
    return [float(text) for text in completions]


def people(*names, **options):
    return [SimulatedPerson(name, **{"gold": number_of, "noise": 0.5} | options) for name in names]


def make_tasks(n, *, batch="round-1", **columns):
    return [
        Task(prompt=f"{batch} {i}", completions=["0.1", f"{i}.5", "-3"][: 2 + i % 2], batch=batch, **columns)
        for i in range(n)
    ]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        yield store


class InThread(threading.Thread):
    """Runs `judge_tasks` beside the test. `urls` waits for its links."""

    def __init__(self, store, **options):
        super().__init__(daemon=True)
        self.store, self.options = store, options
        self.lines = []
        self.result = self.error = None
        self._urls, self._has_started = None, threading.Event()

    def run(self):
        try:
            self.result = judge_tasks(
                self.store, on_start=self._note, show=self.lines.append, poll_seconds=0.05, **self.options
            )
        except BaseException as error:
            self.error = error
        self._has_started.set()

    def _note(self, urls):
        self._urls = urls
        self._has_started.set()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.join(20)

    @property
    def urls(self):
        assert self._has_started.wait(20)
        if self.error is not None:
            raise self.error
        return self._urls


# ---- Simulated people ------------------------------------------------------------------------------------------------


def test_simulated_people_complete_a_batch_with_their_own_answers(store):
    store.add_tasks([*make_tasks(20, wanted=2), *make_tasks(5, batch="other")])
    crew = people("sim-1", "sim-2", "sim-3", position_bias=0.2)
    counts = judge_tasks(store, how="simulated", batch="round-1", people=crew)
    assert counts == store.counts("round-1") == {"tasks": 20, "complete": 20, "judgments": 40, "wanted": 40}

    tasks = {task.id: task for task in store.tasks()}
    by_name = {person.name: person for person in crew}
    seen = set()
    for judgment in store.judgments():
        task, person = tasks[judgment.task_id], by_name[judgment.annotator]
        shown = [task.completions[k] for k in judgment.order]
        expected = person.answer(task.prompt, shown)
        if "preference" in expected and judgment.order == [1, 0]:
            expected = {"preference": 8 - expected["preference"]}
        elif "ranks" in expected:
            ranks = dict(zip(judgment.order, expected["ranks"], strict=True))
            expected = {"ranks": [ranks[k] for k in range(3)]}
        assert judgment.answer == expected
        assert judgment.seconds == person.seconds_for(task.prompt, shown)
        seen.add((judgment.annotator, judgment.task_id))
    assert len(seen) == len(store.judgments())  # nobody judged twice


def test_a_complete_batch_starts_nothing(store, monkeypatch):
    store.add_tasks(make_tasks(3))
    judge_tasks(store, how="simulated", people=people("sim-1"))
    monkeypatch.setattr(judging, "_Crew", None)  # would fail if it were called
    assert judge_tasks(store, how="simulated", people=people("sim-1"))["complete"] == 3
    assert judge_tasks(store, how="page", names=["Anna"])["complete"] == 3


def test_the_quota_holds_over_all_calls(store):
    store.add_tasks(make_tasks(30))
    options = {"how": "simulated", "people": people("sim-1", "sim-2", "sim-3")}
    assert judge_tasks(store, simulated_quota=7, **options)["judgments"] == 7
    assert not any(annotator.active for annotator in store.annotators())
    assert judge_tasks(store, simulated_quota=7, **options)["judgments"] == 7
    assert judge_tasks(store, simulated_quota=12, **options)["judgments"] == 12
    assert judge_tasks(store, **options)["complete"] == 30  # goes on where it stopped
    assert len(store.judgments()) == 30


def test_gold_questions_are_given_but_not_waited_for(store):
    store.save_settings(Settings(gold_share=0.5))
    gold = [Task(prompt=f"gold {i}", completions=["1", "2"], gold={"best": [1]}, batch="round-1") for i in range(40)]
    store.add_tasks([*make_tasks(10), *gold])
    options = {"how": "simulated", "batch": "round-1", "people": people("sim-1")}
    assert judge_tasks(store, simulated_quota=6, **options)["judgments"] == 6  # without the gold questions
    assert len(store.judgments()) > 6
    assert judge_tasks(store, **options) == {"tasks": 10, "complete": 10, "judgments": 10, "wanted": 10}


def test_everybody_skips_everything(store):
    store.add_tasks(make_tasks(4, wanted=2))
    with pytest.raises(UserError, match="4 of 4 tasks.*judged or skipped.*give more people") as error:
        judge_tasks(store, how="simulated", batch="round-1", people=people("sim-1", "sim-2", skip_share=1.0))
    assert "\n" not in str(error.value) and store.counts()["judgments"] == 0
    assert len(store.judgments()) == 8  # the skips are kept


def test_some_skipped_tasks_are_left_behind_with_a_line(store):
    store.add_tasks(make_tasks(40))
    lines = []
    counts = judge_tasks(store, how="simulated", people=people("sim-1", skip_share=0.3), show=lines.append)
    n_skipped = sum(judgment.is_skip for judgment in store.judgments())
    assert 0 < n_skipped < 40 and counts["complete"] == 40 - n_skipped
    assert f"{n_skipped} of 40 tasks stay incomplete" in lines[-1]


def test_a_broken_gold_reward_is_not_hidden(store):
    store.add_tasks(make_tasks(4))

    def broken(prompts, completions):
        raise ZeroDivisionError("gold")

    with pytest.raises(ZeroDivisionError):
        judge_tasks(store, how="simulated", people=people("sim-1", gold=broken))


# ---- People at the page ----------------------------------------------------------------------------------------------


def test_the_page_waits_for_people_and_their_links_stay(store):
    store.add_tasks(make_tasks(6))
    with InThread(store, how="page", batch="round-1", names=["Anna", "Tom"]) as run:
        assert set(run.urls) == {"Anna", "Tom", "admin"}
        with JudgeClient(run.urls["Anna"]) as anna, JudgeClient(run.urls["Tom"]) as tom:
            person = people("x")[0]
            places = iter([True, True, False])
            assert work(tom, person, may_go_on=lambda: next(places)) == 2
            assert run.is_alive() and run.result is None
            # Tom still has a task open, which Anna cannot get.
            assert work(anna, person) == 3
            time.sleep(0.2)
            assert run.is_alive()
            assert work(tom, person) == 1
    assert run.error is None and run.result["complete"] == 6
    assert any(run.urls["Anna"] in line for line in run.lines)
    admin = JudgeClient(run.urls["admin"])
    assert "/join/" in run.urls["admin"] and admin.origin == run.urls["Anna"].partition("/join/")[0]

    # The next round: the same people, whose links are not replaced.
    store.add_tasks(make_tasks(2, batch="round-2"))
    token = run.urls["Anna"].rpartition("/")[2]
    with InThread(store, how="page", batch="round-2", names=["Anna", "Tom"]) as again:
        assert again.urls == {}
        address = re.search(r"http://\S+", again.lines[0])[0]
        with JudgeClient(f"{address}/join/{token}") as anna:
            assert work(anna, person) == 2
    assert again.result["complete"] == 2 and any("keep the links" in line for line in again.lines)


def test_no_link_is_made_that_is_never_shown(store):
    store.add_tasks(make_tasks(2, wanted=2))
    with pytest.raises(UserError, match="there are 1"):
        judge_tasks(store, how="page", names=["Anna"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen"):
        judge_tasks(store, how="page", names=["Anna", "Tom"], port=taken.getsockname()[1])
    assert store.annotators() == []


def test_mixed_leaves_the_rest_to_people(store):
    store.add_tasks(make_tasks(20))
    with InThread(store, how="mixed", names=["Anna"], people=people("sim-1", "sim-2"), simulated_quota=12) as run:
        anna_link = run.urls["Anna"]
        end = time.monotonic() + 20
        while store.counts()["judgments"] < 12 and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3)
        assert store.counts()["judgments"] == 12 and run.is_alive()
        with JudgeClient(anna_link) as anna:
            assert work(anna, people("x")[0]) == 8  # no task is kept back for simulated people
    assert run.result["complete"] == 20
    by = [judgment.annotator for judgment in store.judgments()]
    assert by.count("Anna") == 8


def test_mixed_is_half_and_half_by_default(store):
    store.add_tasks(make_tasks(11))
    with InThread(store, how="mixed", names=["Anna"], people=people("sim-1")) as run:
        link = run.urls["Anna"]
        end = time.monotonic() + 20
        while store.counts()["judgments"] < 5 and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3)
        assert store.counts()["judgments"] == 5
        with JudgeClient(link) as anna:
            assert work(anna, people("x")[0]) == 6
    assert run.result["complete"] == 11


def test_a_person_who_skips_everything_ends_the_wait(store, monkeypatch):
    monkeypatch.setattr(judging, "CHECK_SECONDS", 0.1)
    store.add_tasks(make_tasks(3))
    with InThread(store, how="page", names=["Anna"]) as run, JudgeClient(run.urls["Anna"]) as anna:
        assert work(anna, people("x", skip_share=1.0)[0]) == 3
    assert isinstance(run.error, UserError) and "3 of 3 tasks stay incomplete" in str(run.error)


SCRIPT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from hf_rlhf_ext.collect.judging import judge_tasks
from hf_rlhf_ext.collect.store import Store
with Store(sys.argv[1]) as store:
    try:
        judge_tasks(store, how="page", names=["Anna"])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_ctrl_c_leaves_everything_on_disk(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store(path) as store:
        store.add_tasks(make_tasks(5))
    command = [sys.executable, "-c", SCRIPT, str(path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "Waiting for people" in run.stdout.readline()
        link = re.search(r"Anna: (\S+)", run.stdout.readline())[1]
        with JudgeClient(link) as anna:
            places = iter([True, True, True, False])
            work(anna, people("x")[0], may_go_on=lambda: next(places))
        os.kill(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in err
    assert "stopped: 3 of 5 tasks are judged" in out and "the same command goes on" in out
    with Store(path) as store:
        assert len(store.judgments()) == 3
        with pytest.raises(UserError, match="is given twice"):
            judge_tasks(store, how="mixed", names=["Anna"], people=people("Anna"))
        # The task that Anna had open when the run stopped is Anna's until its lease ends.
        store.set_active("Anna", False)
        assert judge_tasks(store, how="simulated", people=people("sim-1"))["complete"] == 5


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_fewer_people_than_wanted_are_refused_at_the_start(store):
    store.add_tasks([*make_tasks(2), *make_tasks(2, batch="round-2", wanted=3)])
    for options in ({"how": "simulated", "people": people("a", "b")}, {"how": "page", "names": ["Anna", "Tom"]}):
        with pytest.raises(UserError, match="wants judgments of 3 people, and there are 2.*lower `wanted`") as error:
            judge_tasks(store, batch="round-2", **options)
        assert "\n" not in str(error.value)
    assert judge_tasks(store, batch="round-1", how="simulated", people=people("a", "b"))["complete"] == 2


@pytest.mark.parametrize(
    "options, text",
    [
        ({"how": "phone"}, "must be one of page, simulated, mixed"),
        ({"how": "page"}, "nobody can judge"),
        ({"how": "page", "names": ["Anna"], "people": people("sim-1")}, "use 'mixed'"),
        ({"how": "simulated"}, "needs simulated people"),
        ({"how": "simulated", "people": people("sim-1"), "names": ["Anna"]}, "use 'mixed'"),
        ({"how": "simulated", "people": people("sim-1", "sim-1")}, "given twice"),
        ({"how": "simulated", "people": people("sim-1"), "simulated_quota": -1}, "simulated_quota"),
        ({"how": "page", "names": ["Anna"], "simulated_quota": 3}, "simulated_quota"),
        ({"how": "simulated", "people": people("boss")}, "is an admin"),
    ],
)
def test_options_that_do_not_fit_are_refused(store, options, text):
    store.add_tasks(make_tasks(2))
    store.add_annotator("boss", role="admin")
    with pytest.raises(UserError, match=text) as error:
        judge_tasks(store, **options)
    assert "\n" not in str(error.value)


def test_a_paused_store_is_refused_for_simulated_people(store):
    store.add_tasks(make_tasks(2))
    store.save_settings(Settings(paused=True))
    with pytest.raises(UserError, match="paused"):
        judge_tasks(store, how="simulated", people=people("sim-1"))

"""The client against the real server and a real store. `CuttingProxy` loses replies as a network does."""

import socket
import threading
import time

import pytest

from hf_rlhf_ext.collect.client import JudgeClient, ServerGone, ServerRefused, work
from hf_rlhf_ext.collect.simulated import SimulatedPerson
from hf_rlhf_ext.collect.store import Settings, Store
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.collect.web.app import create_app
from hf_rlhf_ext.collect.web.server import Server
from hf_rlhf_ext.errors import UserError

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        store.add_tasks([Task(prompt=f"Say {i}", completions=[f"a {i}", f"b {i}"]) for i in range(6)])
        yield store


def link_to(server, token):
    return f"{server.url}/join/{token}"


class CuttingProxy:
    """Passes connections on to the server, and cuts the connection instead of the reply to chosen requests.

    Args:
        port: port of the server.
        cut: number of replies to POST requests that are lost, from the first on.
    """

    def __init__(self, port: int, cut: int):
        self.port = port
        self.cut = cut
        self.n_lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client):
        with client, socket.create_connection(("127.0.0.1", self.port)) as server:
            while request := client.recv(65536):
                # The client sends a small body in a packet of its own.
                while b"\r\n\r\n" not in request or len(request) < self._length(request):
                    request += client.recv(65536)
                server.sendall(request)
                reply = server.recv(65536)
                while len(reply) < self._length(reply):
                    reply += server.recv(65536)
                if request.startswith(b"POST /api/") and self.n_lost < self.cut:
                    self.n_lost += 1
                    return  # the server has done its work, and nobody hears of it
                client.sendall(reply)

    @staticmethod
    def _length(message):
        head, _, _ = message.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return len(head) + 4 + int(line.split(b":")[1])
        return len(head) + 4


# ---- What the page does ----------------------------------------------------------------------------------------------


def test_it_sees_the_texts_and_saves_what_was_clicked(store):
    token = store.add_annotator("Ada")
    replies = []
    with (
        Server(create_app(store)) as server,
        JudgeClient(link_to(server, token), on_reply=lambda *r: replies.append(r)) as ada,
    ):
        assert ada.join()["name"] == "Ada"
        task = ada.task()
        number = task.prompt.split()[1]
        assert task.prompt == f"Say {number}" and set(task.completions) == {f"a {number}", f"b {number}"}
        assert task.kind == "compare"
        assert ada.task() == task  # a reload

        saved = ada.judge({"preference": 2, "comment": "clear"}, 3.5)
        assert not saved.is_repeat and saved.task != task and ada.current == saved.task
        assert ada.progress["judged"] == 1

    (judgment,) = store.judgments()
    assert (judgment.annotator, judgment.task_id, judgment.seconds) == ("Ada", task.id, 3.5)
    texts = store.tasks()[task.id - 1].completions
    assert [texts[k] for k in judgment.order] == task.completions  # what was first on the page
    assert judgment.answer["comment"] == "clear"
    assert judgment.answer["preference"] == (2 if judgment.order == [0, 1] else 6)
    assert [(method, path) for method, path, _ in replies[-2:]] == [("GET", "/api/task"), ("POST", "/api/judgments")]
    assert all(0 < seconds < 20 for _, _, seconds in replies)


def test_undo_shows_the_task_again(store):
    token = store.add_annotator("Ada")
    with Server(create_app(store)) as server, JudgeClient(link_to(server, token)) as ada:
        task = ada.task()
        ada.judge({"preference": 1}, 1.0)
        assert ada.undo() == {"preference": 1}
        assert ada.current == task
        ada.judge({"preference": 7}, 1.0)
        assert ada.undo() == {"preference": 7}
        assert ada.undo() is None  # nothing left
    assert store.judgments() == [] and len(store.judgments(live_only=False)) == 2


def test_a_conversation_and_a_ranking(tmp_path):
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    completions = [[{"role": "assistant", "content": text}] for text in ("x", "y", "z")]
    with Store(tmp_path / "store.sqlite") as store:
        store.add_tasks([Task(prompt=prompt, completions=completions)])
        token = store.add_annotator("Ada")
        with Server(create_app(store)) as server, JudgeClient(link_to(server, token)) as ada:
            task = ada.task()
            assert task.prompt == prompt and task.kind == "rank" and sorted(task.completions) == ["x", "y", "z"]
            assert ada.judge({"ranks": [2, 1, 3]}, 1.0).task is None
        (judgment,) = store.judgments()
        assert [judgment.answer["ranks"][k] for k in judgment.order] == [2, 1, 3]


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_a_lost_reply_is_one_judgment(store):
    token = store.add_annotator("Ada")
    with Server(create_app(store)) as server:
        proxy = CuttingProxy(int(server.url.rpartition(":")[2]), cut=2)
        with JudgeClient(f"{proxy.url}/join/{token}") as ada:
            task = ada.task()
            saved = ada.judge({"preference": 3}, 1.0)
            assert saved.is_repeat and proxy.n_lost == 2  # saved by the first try, which nobody heard of
            assert saved.task is not None and saved.task != task
            ada.judge({"preference": 3}, 1.0)

            proxy.n_lost = 0  # the same for an undo: only one judgment is taken back
            assert ada.undo() == {"preference": 3}
        proxy.close()
    assert [judgment.task_id for judgment in store.judgments()] == [task.id]
    assert len(store.judgments(live_only=False)) == 2


def test_a_restarted_server_keeps_the_session(store):
    token = store.add_annotator("Ada")
    with Server(create_app(store)) as server:
        port = int(server.url.rpartition(":")[2])
        ada = JudgeClient(link_to(server, token))
        ada.task()

    def start_again():
        time.sleep(0.4)
        with Server(create_app(store), port=port):
            is_judged.wait(20)

    is_judged = threading.Event()
    thread = threading.Thread(target=start_again)
    thread.start()
    started = time.monotonic()
    ada.judge({"preference": 3}, 1.0)
    assert time.monotonic() - started > 0.3  # it waited
    is_judged.set()
    thread.join()
    ada.close()
    assert len(store.judgments()) == 1


def test_no_server_is_one_line_when_patience_is_over(store):
    token = store.add_annotator("Ada")
    with Server(create_app(store)) as server:
        link = link_to(server, token)
    with JudgeClient(link, patience=0.3) as ada, pytest.raises(ServerGone, match="is the server running") as error:
        ada.task()
    assert "\n" not in str(error.value)


def test_too_many_requests_wait_as_told(store):
    token = store.add_annotator("Ada")
    app = create_app(store, person_limit=60)  # one a second, after the first 60
    replies = []
    with (
        Server(app) as server,
        JudgeClient(link_to(server, token), on_reply=lambda method, path, _: replies.append(path)) as ada,
    ):
        for _ in range(62):
            ada.undo()
    n_refused = replies.count("/api/undo") - 62
    assert 1 <= n_refused <= 4  # it did not ask again before the seconds of Retry-After were over


def test_an_old_link_and_a_wrong_one_are_refused_in_one_line(store):
    token = store.add_annotator("Ada")
    with Server(create_app(store)) as server, JudgeClient(link_to(server, token)) as ada:
        ada.task()
        store.new_token("Ada")
        with pytest.raises(ServerRefused, match="ask for a new one") as error:
            ada.judge({"preference": 3}, 1.0)
        assert error.value.status == 404 and "\n" not in str(error.value)
    for link in ("http://127.0.0.1:1/judge", "127.0.0.1/join/x", "ftp://127.0.0.1/join/x"):
        with pytest.raises(UserError, match="must look like http"):
            JudgeClient(link)


def test_a_wrong_answer_is_refused_with_the_servers_reason(store):
    token = store.add_annotator("Ada")
    with Server(create_app(store)) as server, JudgeClient(link_to(server, token)) as ada:
        task = ada.task()
        with pytest.raises(ServerRefused, match="preference") as error:
            ada.judge({"preference": 9}, 1.0)
        assert error.value.status in (400, 422)
        assert ada.current == task  # still there, to be answered
        with pytest.raises(UserError, match="call task"):
            JudgeClient(link_to(server, token)).judge({"preference": 1}, 1.0)


# ---- Working ---------------------------------------------------------------------------------------------------------


def by_letter(prompts, completions):
    return [float(text.startswith("a")) for text in completions]


def test_work_answers_everything_or_until_told_to_stop(store):
    token = store.add_annotator("Ada")
    ada = SimulatedPerson("Ada", gold=by_letter, noise=0)
    seen = []
    with Server(create_app(store)) as server, JudgeClient(link_to(server, token)) as client:
        places = iter([True, True, False])
        assert work(client, ada, may_go_on=lambda: next(places)) == 2
        assert work(client, ada, on_saved=lambda *saved: seen.append(saved)) == 4
        assert work(client, ada) == 0
    judgments = store.judgments()
    assert len(judgments) == 6 and {judgment.answer["preference"] for judgment in judgments} == {1}  # "a" is better
    assert [judgment.key for judgment in judgments[2:]] == [saved.key for _, _, saved in seen]


def test_a_task_that_others_took_is_left_alone(tmp_path):
    """Its lease ran out while the person was thinking, and somebody else judged it."""
    with Store(tmp_path / "store.sqlite") as store:
        store.save_settings(Settings(lease_seconds=0.2))
        store.add_tasks([Task(prompt=f"Say {i}", completions=["a", "b"]) for i in range(2)])
        token = store.add_annotator("Ada")
        store.add_annotator("Grace")
        grace = store.annotators()[1].id
        asked = []

        class SlowOnce(SimulatedPerson):
            def answer(self, prompt, completions):
                asked.append(prompt)
                if len(asked) == 1:
                    time.sleep(0.3)
                    shown = store.next_task(grace)
                    assert shown.task.prompt == prompt
                    store.judge(grace, shown.task.id, "grace-key", {"preference": 4}, 1.0)
                return super().answer(prompt, completions)

        with Server(create_app(store)) as server, JudgeClient(link_to(server, token)) as client:
            assert work(client, SlowOnce("Ada", gold=by_letter, noise=0)) == 1
        assert asked == ["Say 0", "Say 1"]
        assert [(judgment.annotator, judgment.task_id) for judgment in store.judgments()] == [("Grace", 1), ("Ada", 2)]


def test_the_origin_is_written_as_browsers_do():
    for link, origin in (
        ("https://Judge.Example:443/join/abc", "https://judge.example"),
        ("http://judge.example:80/join/abc", "http://judge.example"),
        ("http://[::1]:8347/join/abc", "http://[::1]:8347"),
    ):
        with JudgeClient(link) as client:
            assert client.origin == origin

import importlib.abc
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import httpx2
import pytest

from hf_rlhf_ext.collect.client import JudgeClient
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.collect.web import security
from hf_rlhf_ext.collect.web.app import create_app
from hf_rlhf_ext.collect.web.security import RateLimiter, Sessions, client_address, origin_of
from hf_rlhf_ext.collect.web.server import Server, is_loopback, open_socket, url_of
from hf_rlhf_ext.errors import UserError

pytestmark = pytest.mark.xdist_group("processes")


def cookie_of(visitor):
    """The name and the value of the session's cookie."""
    [(name, value)] = visitor.http.cookies.items()
    return name, value


# ---- signing in -------------------------------------------------------------------------------------------------


def test_a_link_signs_in(site):
    token = site.store.add_annotator("Ada")
    reply = site.visitor().get(f"/join/{token}")
    assert reply.status_code == 303 and reply.headers["location"] == "/judge"
    cookie = reply.headers["set-cookie"]
    assert cookie.startswith("session_") and "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie
    assert "Secure" not in cookie  # on plain http, browsers would drop it
    assert token not in cookie


def test_an_admin_lands_on_the_admin_page(site):
    token = site.store.add_annotator("Root", "admin")
    assert site.visitor().get(f"/join/{token}").headers["location"] == "/admin"


def test_the_cookie_is_secure_where_people_use_https(open_site):
    site = open_site(secure=True)
    link = f"/join/{site.store.add_annotator('Ada')}"
    assert "Secure" in site.visitor().get(link).headers["set-cookie"]

    # Behind a proxy that tells nothing, the public address decides. On this machine, people use plain http.
    site = open_site(url="https://judge.example")
    assert "Secure" in site.visitor().get(link, headers={"Host": "judge.example"}).headers["set-cookie"]
    assert "Secure" not in site.visitor().get(link).headers["set-cookie"]


def test_pages_need_a_session(site):
    for path in ("/judge", "/admin", "/api/session", "/api/task", "/api/admin/statistics"):
        assert site.visitor().get(path).status_code == 401
    reply = site.visitor().get("/judge", headers={"Accept": "text/html,*/*"})
    assert reply.status_code == 401 and "<h1>Open your personal link</h1>" in reply.text

    ada = site.person()
    reply = ada.get("/judge")
    assert reply.status_code == 200 and "text/html" in reply.headers["content-type"]
    assert ada.get("/admin").status_code == 403


def test_a_link_from_a_web_mail_needs_one_more_step(site):
    # Browsers do not send the SameSite=Strict cookie on the redirect that follows a click on another site.
    reply = site.visitor().get("/judge", headers={"Sec-Fetch-Site": "cross-site", "Accept": "text/html"})
    assert reply.status_code == 200 and 'content="0; url=/judge"' in reply.text


def test_a_click_in_a_web_mail_signs_in_with_a_real_browser(site):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    token = site.store.add_annotator("Ada")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page()
        page.route("http://mail.example/", lambda route: route.fulfill(body=mail, content_type="text/html"))
        mail = f'<a href="{site.url}/join/{token}">your link</a>'
        page.goto("http://mail.example/")
        with page.expect_response(lambda response: response.url == f"{site.url}/api/session") as caught:
            page.click("a")
        assert caught.value.status == 200
        assert page.url == f"{site.url}/judge"
        browser.close()


def test_a_browser_gets_pages_instead_of_json(site):
    visitor = site.visitor()
    accept = {"Accept": "text/html,application/xhtml+xml"}
    reply = visitor.get("/join/no-such-link", headers=accept)
    assert reply.status_code == 404 and "text/html" in reply.headers["content-type"]
    replies = [visitor.get("/join/no-such-link", headers=accept) for _ in range(12)]
    assert replies[-1].status_code == 429 and "text/html" in replies[-1].headers["content-type"]
    assert visitor.get("/api/task", headers=accept).headers["content-type"] == "application/json"


def test_two_sites_of_one_host_do_not_sign_each_other_out(site, tmp_path):
    ada = site.person("Ada")
    with Store(tmp_path / "other.sqlite") as store, Server(create_app(store)) as other:
        # Browsers send the cookies of a host to all of its ports.
        both = httpx2.Client(trust_env=False, verify=False, cookies=dict([cookie_of(ada)]))
        assert both.get(f"{other.url}/join/{store.add_annotator('Ben')}").status_code == 303
        assert both.get(f"{other.url}/api/session").json()["name"] == "Ben"
        assert both.get(f"{site.url}/api/session").json()["name"] == "Ada"


def test_on_https_no_other_host_of_the_domain_can_set_the_cookie(open_site):
    site = open_site(secure=True)
    link = f"/join/{site.store.add_annotator('Ada')}"
    cookie = site.visitor().get(link).headers["set-cookie"].split(";")[0]
    assert cookie.startswith("__Host-")
    assert site.visitor().get("/api/session", headers={"Cookie": cookie}).status_code == 200
    tossed = {"Cookie": cookie.removeprefix("__Host-")}
    assert site.visitor().get("/api/session", headers=tossed).status_code == 401


def test_an_annotator_gets_a_page_instead_of_the_admins(site):
    reply = site.person().get("/admin", headers={"Accept": "text/html"})
    assert reply.status_code == 403 and 'href="/judge"' in reply.text and "This page is for admins" in reply.text


def test_a_restart_signs_nobody_out(open_site):
    first = open_site()
    ada = first.person()
    name, value = cookie_of(ada)
    first.server.stop()
    first.store.close()

    second = open_site()
    again = second.visitor(cookies={name: value})
    session = again.get("/api/session").json()
    assert session["name"] == "Ada" and session["csrf"] == ada.csrf


def test_a_new_link_ends_the_old_sessions_at_once(site):
    ada = site.person()
    assert ada.get("/api/task").status_code == 200
    token = site.store.new_token("Ada")
    assert ada.get("/api/task").status_code == 401
    assert site.visitor().join(token).get("/api/task").status_code == 200


def test_a_deactivated_person_is_out_at_once(site):
    ada = site.person()
    site.store.set_active("Ada", False)
    reply = ada.get("/api/task")
    assert reply.status_code == 401 and reply.json()["error"].startswith("You are not signed in")
    site.store.set_active("Ada", True)
    assert ada.get("/api/task").status_code == 200


# ---- judging ----------------------------------------------------------------------------------------------------


def test_the_session_tells_the_page_what_it_needs(site):
    ada = site.person()
    session = ada.get("/api/session").json()
    assert set(session) == {
        "name",
        "role",
        "csrf",
        "title",
        "instructions_html",
        "categories",
        "flags",
        "paused",
        "progress",
    }
    assert session["name"] == "Ada" and session["role"] == "annotator" and session["paused"] is False
    assert session["flags"] == ["harmful", "nonsense", "wrong_language"]


def test_judging_a_task_saves_it_and_gives_the_next(site):
    site.add_tasks(2)
    ada = site.person()
    first = ada.task()
    reply = ada.judge(first["id"], {"preference": 2, "comment": "hm", "flags": [["harmful"], []]}, seconds=12.25)
    assert reply.status_code == 200
    body = reply.json()
    assert body["saved"] is True and body["repeat"] is False
    assert body["next"]["task"]["id"] != first["id"] and body["next"]["progress"]["judged"] == 1

    [judgment] = site.store.judgments()
    assert (judgment.annotator, judgment.task_id, judgment.seconds) == ("Ada", first["id"], 12.25)
    is_swapped = judgment.order == [1, 0]
    assert judgment.answer["preference"] == (6 if is_swapped else 2)
    assert judgment.answer["flags"] == ([[], ["harmful"]] if is_swapped else [["harmful"], []])
    shown = [completion["text"] for completion in first["completions"]]
    assert shown == [site.store.tasks()[0].completions[i] for i in judgment.order]


def test_a_reload_shows_the_same_task(site):
    site.add_tasks(3)
    ada = site.person()
    first, second = ada.task(), ada.task()
    assert first == second


def test_without_tasks_there_is_nothing_to_do(site):
    assert site.person().get("/api/task").json()["task"] is None


def test_undo_shows_the_task_again_with_its_answer(site):
    site.add_tasks(2)
    ada = site.person()
    task = ada.task()
    answer = {"preference": 1, "comment": "sure", "edited": {"position": 1, "text": "better"}}
    ada.judge(task["id"], answer)
    body = ada.post("/api/undo", {"key": "undo-key-1"}).json()
    assert body["undone"] is True and body["answer"] == answer
    assert body["task"]["task"]["completions"] == task["completions"] and body["task"]["progress"]["judged"] == 0
    assert ada.post("/api/undo", {"key": "undo-key-1"}).json()["undone"] is True
    assert site.store.judgments() == [] and len(site.store.judgments(live_only=False)) == 1

    body = ada.post("/api/undo", {"key": "undo-key-2"}).json()
    assert body["undone"] is False and body["answer"] is None and body["task"]["task"]["id"] == task["id"]


def test_a_judgment_that_is_sent_twice_is_one(site):
    site.add_tasks(2)
    ada = site.person()
    task = ada.task()
    first = ada.judge(task["id"], {"preference": 3}, key="same-key")
    second = ada.judge(task["id"], {"preference": 3}, key="same-key")
    assert first.json()["repeat"] is False and second.json()["repeat"] is True
    assert first.json()["next"]["task"]["id"] == second.json()["next"]["task"]["id"]
    other = ada.judge(task["id"], {"preference": 4}, key="same-key")
    assert other.status_code == 409
    assert len(site.store.judgments()) == 1


def test_refusals_say_why(site):
    site.add_tasks(2)
    ada, bob = site.person("Ada"), site.person("Bob")
    task, others = ada.task(), bob.task()
    assert ada.judge(others["id"], {"preference": 1}).status_code == 409  # given to Bob
    reply = ada.judge(task["id"], {"preference": 8})
    assert reply.status_code == 400 and "preference" in reply.json()["error"]
    assert ada.judge(task["id"], {"preference": 1}, key="short").status_code == 400
    assert site.store.judgments() == []


def test_a_paused_store_gives_out_nothing_but_takes_what_was_given(site):
    site.add_tasks(2)
    ada, root = site.person(), site.person("Root", "admin")
    task = ada.task()
    assert root.post("/api/admin/pause", {"paused": True}).json() == {"paused": True}
    body = ada.get("/api/task").json()
    assert body["task"] is None and body["paused"] is True
    body = ada.judge(task["id"], {"preference": 4}).json()
    assert body["saved"] is True and body["next"]["task"] is None and body["next"]["paused"] is True


def test_instructions_are_rendered(site):
    from dataclasses import replace

    site.store.save_settings(replace(site.store.settings(), instructions="Be **fair**", title="<b>T</b>"))
    session = site.person().get("/api/session").json()
    assert session["instructions_html"] == "<p>Be <strong>fair</strong></p>\n" and session["title"] == "<b>T</b>"


def test_the_longest_answer_in_any_script_is_taken(site):
    site.add_tasks(1)
    ada = site.person()
    edited = {"position": 0, "text": "\U00020000" * 20_000}  # a Han sign of four bytes
    answer = {"preference": 1, "comment": "漢" * 2000, "category": "é" * 100, "edited": edited}
    assert ada.judge(ada.task()["id"], answer).status_code == 200
    assert site.store.judgments()[0].answer["edited"]["text"] == edited["text"]


def test_the_same_click_sent_many_times_at_once_is_one(site):
    site.add_tasks(5)
    ada = site.person()
    body = {"task": ada.task()["id"], "key": "one-click", "seconds": 1, "answer": {"preference": 1}}
    replies = []

    def send():
        replies.append(ada.post("/api/judgments", body))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200] * 8
    assert sorted(reply.json()["repeat"] for reply in replies) == [False] + [True] * 7
    assert len({reply.json()["next"]["task"]["id"] for reply in replies}) == 1
    assert len(site.store.judgments()) == 1


def test_ranking_and_rating(site):
    site.store.add_tasks([Task("which?", ["a", "b", "c"]), Task("how good?", ["one"])])
    ada = site.person()
    task = ada.task()
    assert (task["kind"], task["n"]) == ("rank", 3)
    task = ada.judge(task["id"], {"ranks": [2, 1, 2]}).json()["next"]["task"]
    assert (task["kind"], task["n"]) == ("rate", 1)
    assert ada.judge(task["id"], {"ratings": [6]}).json()["next"]["task"] is None


# ---- a lost reply -----------------------------------------------------------------------------------------------

SERVER_SCRIPT = """
    import os, sys
    from hf_rlhf_ext.collect.store import Store
    from hf_rlhf_ext.collect.web.app import create_app
    from hf_rlhf_ext.collect.web.server import serve_forever

    path, port, mode = sys.argv[1:]
    app = create_app(Store(path))

    async def dies_before_the_reply(scope, receive, send):
        # The process ends like a killed one: after the commit, before the first byte of the reply.
        async def send_or_die(message):
            if scope["path"] == "/api/judgments":
                os._exit(9)
            await send(message)

        await app(scope, receive, send_or_die)

    serve_forever(dies_before_the_reply if mode == "dies" else app, port=int(port))
"""


def start_server(path, port, mode):
    command = [sys.executable, "-c", textwrap.dedent(SERVER_SCRIPT), str(path), str(port), mode]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[1])


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("what", ["judgment", "undo"])
def test_a_server_that_dies_between_commit_and_reply_loses_and_doubles_nothing(tmp_path, what):
    path, port = tmp_path / "store.sqlite", free_port()
    url = f"http://127.0.0.1:{port}"
    with Store(path) as store:
        store.add_tasks([Task(f"q {i}", ["a", "b"]) for i in range(3)])
        token = store.add_annotator("Ada")

    process = start_server(path, port, "dies")
    with httpx2.Client(base_url=url, trust_env=False, timeout=20) as http:
        http.get(f"/join/{token}")
        headers = {"Origin": url, "X-CSRF-Token": http.get("/api/session").json()["csrf"]}
        task = http.get("/api/task").json()["task"]
        body = {"task": task["id"], "key": "one-click", "seconds": 2.0, "answer": {"preference": 1}}
        with pytest.raises(httpx2.TransportError):
            http.post("/api/judgments", json=body, headers=headers)
        assert process.wait(20) == 9

        process = start_server(path, port, "lives")
        reply = http.post("/api/judgments", json=body, headers=headers)
        assert reply.status_code == 200 and reply.json()["repeat"] is True
        if what == "undo":
            assert http.post("/api/undo", json={"key": "undo-key"}, headers=headers).json()["undone"] is True
            # The first click arrives once more, late: it stays undone.
            assert http.post("/api/judgments", json=body, headers=headers).json()["repeat"] is True

    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    process.stderr.close()
    with Store(path) as store:
        assert len(store.judgments(live_only=False)) == 1
        assert len(store.judgments()) == (0 if what == "undo" else 1)
        assert store.judgments(live_only=False)[0].key == "one-click"


def test_serving_says_nothing_about_lost_connections_and_ends_in_good_order(tmp_path):
    path, port = tmp_path / "store.sqlite", free_port()
    url = f"http://127.0.0.1:{port}"
    with Store(path) as store:
        token = store.add_annotator("Ada")
    process = start_server(path, port, "lives")
    with httpx2.Client(base_url=url, trust_env=False, timeout=20) as http:
        http.get(f"/join/{token}")
        csrf = http.get("/api/session").json()["csrf"]
        lines = ["POST /api/undo HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Origin: {url}", f"X-CSRF-Token: {csrf}"]
        [(name, value)] = http.cookies.items()
        lines += [f"Cookie: {name}={value}", "Content-Type: application/json", "Content-Length: 99"]
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall("\r\n".join([*lines, "", '{"key": ']).encode())
            time.sleep(0.1)
        assert http.get("/api/task").status_code == 200

    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=20)[1]
    assert output == ""


# ---- waiting for the disk ---------------------------------------------------------------------------------------


def test_the_site_answers_while_somebody_waits_for_the_disk(site):
    site.add_tasks(2)
    ada, bob = site.person("Ada"), site.person("Bob")
    task = ada.task()
    other_process = sqlite3.connect(site.store.path, isolation_level=None)
    other_process.execute("BEGIN IMMEDIATE")
    replies = []
    waiting = threading.Thread(target=lambda: replies.append(ada.judge(task["id"], {"preference": 1})))
    waiting.start()
    try:
        time.sleep(0.2)
        started = time.perf_counter()
        assert bob.get("/api/session").status_code == 200
        assert bob.get("/static/shared.css").status_code == 200
        assert time.perf_counter() - started < 2 and waiting.is_alive()
    finally:
        other_process.execute("COMMIT")
        waiting.join(20)
        other_process.close()
    assert replies[0].json()["saved"] is True


def test_a_busy_store_asks_to_send_again(site):
    site.add_tasks(1)
    ada = site.person()
    task = ada.task()
    site.store._writer.execute("PRAGMA busy_timeout = 20")
    other_process = sqlite3.connect(site.store.path, isolation_level=None)
    other_process.execute("BEGIN IMMEDIATE")
    reply = ada.judge(task["id"], {"preference": 1}, key="same-key")
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
    assert "nothing was changed" in reply.json()["error"] and "sqlite" not in reply.text
    other_process.execute("COMMIT")
    other_process.close()
    assert ada.judge(task["id"], {"preference": 1}, key="same-key").json()["repeat"] is False


# ---- admin ------------------------------------------------------------------------------------------------------


def test_an_admin_adds_people_and_makes_new_links(site):
    root = site.person("Root", "admin")
    link = root.post("/api/admin/annotators", {"name": "Ada"}).json()["link"]
    assert link.startswith(f"{site.url}/join/")
    ada = site.visitor().join(link.rsplit("/", 1)[1])
    people = root.get("/api/admin/annotators").json()["annotators"]
    assert [(person["name"], person["role"], person["active"]) for person in people] == [
        ("Root", "admin", True),
        ("Ada", "annotator", True),
    ]
    ada_id = people[1]["id"]
    assert root.post("/api/admin/annotators", {"name": "Ada"}).status_code == 400

    new_link = root.post(f"/api/admin/annotators/{ada_id}/link", {}).json()["link"]
    assert ada.get("/api/task").status_code == 401
    ada.join(new_link.rsplit("/", 1)[1])

    assert root.post(f"/api/admin/annotators/{ada_id}/active", {"active": False}).status_code == 200
    assert ada.get("/api/task").status_code == 401
    assert root.post(f"/api/admin/annotators/{people[0]['id']}/active", {"active": False}).status_code == 400
    for nobody in ("999", "-1", "x", "1.0", "²", "0" * 20, "9" * 5000):
        assert root.post(f"/api/admin/annotators/{nobody}/link", {}).status_code == 404


def test_links_name_the_public_address(open_site):
    site = open_site(url="https://judge.example/")
    root = site.person("Root", "admin")
    link = root.post("/api/admin/annotators", {"name": "Ada"}).json()["link"]
    assert link.startswith("https://judge.example/join/")
    assert root.post("/api/admin/pause", {"paused": False}, Origin="https://judge.example").status_code == 200


def test_statistics_and_exports(site):
    site.add_tasks(4, wanted=2)
    root, ada, bob = site.person("Root", "admin"), site.person("Ada"), site.person("Bob")
    for judge in (ada, bob):
        for _ in range(4):
            task = judge.task()
            is_yes_first = task["completions"][0]["text"].startswith("yes")
            answer = {"preference": 2 if is_yes_first else 6}
            assert judge.judge(task["id"], answer).status_code == 200

    found = root.get("/api/admin/statistics").json()
    assert found["counts"]["judgments"] == 8 and found["notices"] == [] and found["paused"] is False
    assert {person["name"] for person in found["per_annotator"]} >= {"Ada", "Bob"}
    site.app.state.notices = lambda: ["the backup is late"]
    assert root.get("/api/admin/statistics").json()["notices"] == ["the backup is late"]

    reply = root.get("/api/admin/export/comparisons.jsonl")
    assert reply.headers["content-disposition"] == 'attachment; filename="comparisons.jsonl"'
    rows = [json.loads(line) for line in reply.text.split("\n")[:-1]]
    assert len(rows) == 4 and sum(len(row["votes"]) for row in rows) == 8
    assert root.get("/api/admin/export/demonstrations.jsonl").status_code == 200


def test_an_export_has_one_row_a_line_whatever_its_texts_hold(site):
    breaks = "a\r\nb\x85c\u2028d\u2029e\x1ef"
    site.store.add_tasks([Task(breaks, [breaks + "1", breaks + "2"], category=f"x{breaks}"[:90])])
    root, ada = site.person("Root", "admin"), site.person("Ada")
    ada.judge(ada.task()["id"], {"preference": 1, "comment": breaks, "edited": {"position": None, "text": breaks}})
    for name in ("comparisons", "demonstrations"):
        reply = root.get(f"/api/admin/export/{name}.jsonl")
        [line] = reply.text.splitlines()
        assert json.loads(line)["prompt"] == breaks
        assert reply.headers["x-content-type-options"] == "nosniff"


def test_nobody_waits_while_an_export_imports_what_it_needs(site, monkeypatch):
    threads = []

    class Spy(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "hf_rlhf_ext.collect.export":
                threads.append(threading.current_thread().name)

    root = site.person("Root", "admin")
    monkeypatch.setattr(sys, "meta_path", [Spy(), *sys.meta_path])
    for name in ("comparisons.jsonl", "demonstrations.jsonl", "counts"):
        monkeypatch.delitem(sys.modules, "hf_rlhf_ext.collect.export", raising=False)
        assert root.get(f"/api/admin/export/{name}").status_code == 200
    assert len(threads) == 3 and "judging-site" not in threads  # the thread that answers everybody


def test_the_export_tells_what_is_left_out(site):
    site.add_tasks(3)
    site.store.add_tasks([Task("gold?", ["yes", "no"], gold={"best": [0]})])
    root, ada = site.person("Root", "admin"), site.person("Ada")
    assert ada.judge(ada.task()["id"], {"skip": True}).status_code == 200
    written = {"preference": 1, "comment": "why", "edited": {"position": 0, "text": "better"}}
    task = next(task for task in iter(ada.task, None) if task["prompt"][0]["text"] != "gold?")
    assert ada.judge(task["id"], written).status_code == 200
    counts = root.get("/api/admin/export/counts").json()
    assert (counts["tasks"], counts["comparisons"], counts["demonstrations"]) == (4, 1, 1)
    assert counts["left_out"] == {"skipped": 1, "not judged yet": 1, "gold question": 1}
    assert counts["notes"]["comments, which stay in the store"] == 1


# ---- rate limits ------------------------------------------------------------------------------------------------


def test_the_limiter_allows_a_burst_and_then_the_rate():
    limiter = RateLimiter(60, burst=3)
    assert [limiter.take("a", now=0) for _ in range(4)] == [0, 0, 0, 1.0]
    assert limiter.take("b", now=0) == 0
    assert limiter.take("a", now=0.75) == 0.25
    assert limiter.take("a", now=1.0) == 0
    assert limiter.take("a", now=100) == limiter.take("a", now=100) == limiter.take("a", now=100) == 0
    assert limiter.take("a", now=100) == 1.0


def test_the_memory_of_the_limiter_is_bounded():
    limiter = RateLimiter(60, burst=1, max_keys=10)
    for address in range(1000):
        limiter.take(address, now=0)
    assert len(limiter) == 10
    assert RateLimiter(None, burst=0).take("a") == 0


def test_a_person_with_a_keyboard_is_not_hindered_and_a_machine_is(open_site):
    # One answer each 0.1 s for five minutes.
    limiter = RateLimiter(900, burst=60)
    assert not any(limiter.take("a", now=0.1 * i) for i in range(3000))

    site = open_site(person_limit=1)  # slow, so that the speed of the machine does not matter
    ada, bob = site.person("Ada"), site.person("Bob")
    replies = [ada.post("/api/undo", {"key": f"undo-key-{i}"}) for i in range(62)]
    assert {reply.status_code for reply in replies[:60]} == {200}
    assert replies[-1].status_code == 429 and int(replies[-1].headers["retry-after"]) >= 1
    assert ada.get("/api/task").status_code == 200  # what a page asks for is counted apart
    assert [ada.get("/api/task").status_code for _ in range(62)][-1] == 429
    assert bob.post("/api/undo", {"key": "undo-key-1"}).status_code == 200


def test_the_limit_per_person_can_be_turned_off(open_site):
    site = open_site(person_limit=None)
    ada = site.person()
    assert {ada.post("/api/undo", {"key": f"undo-key-{i}"}).status_code for i in range(80)} == {200}


def request_from(host, **headers):
    return SimpleNamespace(client=host and SimpleNamespace(host=host), headers=headers)


def test_one_network_of_ipv6_is_one_address():
    assert client_address(request_from("192.0.2.7")) == "192.0.2.7"
    assert client_address(request_from("2001:db8:1:2:3::4")) == client_address(request_from("2001:db8:1:2:ffff::9"))
    assert client_address(request_from("2001:db8:1:3::4")) != client_address(request_from("2001:db8:1:2::4"))
    assert len(client_address(request_from("x" * 10_000))) == 64
    assert client_address(request_from(None)) == "unknown"


def test_an_address_of_ipv4_stays_one_however_a_proxy_writes_it():
    for host in ("192.0.2.7", "::ffff:192.0.2.7", "192.0.2.7:5678", "[::ffff:192.0.2.7]:5678"):
        assert client_address(request_from(host)) == "192.0.2.7"
    assert client_address(request_from("[2001:db8::1]:80")) == client_address(request_from("2001:db8::9"))


# ---- behind a proxy ---------------------------------------------------------------------------------------------


def test_addresses_of_a_proxy_are_believed_only_if_asked(open_site):
    def tries(site, forwarded):
        replies = [
            site.visitor().get(f"/join/no-such-link-{i}", headers={"X-Forwarded-For": forwarded(i)}) for i in range(15)
        ]
        return [reply.status_code for reply in replies].count(429)

    # Without a proxy, a client cannot escape the limit by making addresses up.
    assert tries(open_site(), lambda i: f"192.0.2.{i}") >= 4
    # With one, it is the proxy's own entry that counts, which is the last.
    assert tries(open_site(trusted_proxy=True), lambda i: f"192.0.2.{i}, 198.51.100.1") >= 4
    assert tries(open_site(trusted_proxy=True), lambda i: f"198.51.100.1, 192.0.2.{i}") == 0


def test_https_of_a_proxy_counts_only_if_asked(open_site):
    headers = {"X-Forwarded-Proto": "https"}
    plain = open_site()
    token = plain.store.add_annotator("Ada")
    assert "Secure" not in plain.visitor().get(f"/join/{token}", headers=headers).headers["set-cookie"]
    behind = open_site(trusted_proxy=True)
    assert "Secure" in behind.visitor().get(f"/join/{token}", headers=headers).headers["set-cookie"]

    link = f"/join/{behind.store.add_annotator('Root', 'admin')}"
    cookie = behind.visitor().get(link, headers=headers).headers["set-cookie"].split(";")[0]
    root = behind.visitor(headers=headers | {"Host": "judge.example", "Cookie": cookie})
    root.csrf = root.get("/api/session").json()["csrf"]
    assert root.post("/api/admin/pause", {"paused": False}, Origin="https://judge.example").status_code == 200
    assert root.post("/api/admin/pause", {"paused": False}, Origin="http://judge.example").status_code == 403


def test_a_proxy_for_https_that_the_server_was_not_told_of_is_named(site):
    ada = site.person()
    origin = site.url.replace("http:", "https:")
    reply = ada.post("/api/undo", {"key": "undo-key"}, Origin=origin)
    assert reply.status_code == 403 and "--url" in reply.json()["error"]


def test_origins_are_written_as_browsers_do():
    assert origin_of("https://Judge.Example:443/a/b") == "https://judge.example"
    assert origin_of("http://127.0.0.1:8000") == "http://127.0.0.1:8000"
    assert origin_of("http://[::1]:8000/") == "http://[::1]:8000"


# ---- sessions ---------------------------------------------------------------------------------------------------


def test_a_cookie_fits_one_key_one_person_and_one_link():
    ada = SimpleNamespace(id=1, token_hash="a" * 64, active=True)
    sessions = Sessions(b"k" * 32)
    cookie = sessions.cookie_for(ada)
    session = sessions.read(cookie)
    assert session.annotator_id == 1 and sessions.is_current(session, ada)
    assert not sessions.is_current(session, SimpleNamespace(id=1, token_hash="b" * 64, active=True))
    assert not sessions.is_current(session, SimpleNamespace(id=1, token_hash="a" * 64, active=False))
    assert not sessions.is_current(session, None)
    assert Sessions(b"x" * 32).read(cookie) is None
    assert sessions.csrf_token(session) not in cookie
    for forged in (
        cookie[:-1],
        cookie + "a",
        "2" + cookie[1:],
        cookie.replace(".", "", 1),
        "",
        None,
        "é.é.é",
        "1..",
        "²..a",
    ):
        assert sessions.read(forged) is None


# ---- server -----------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_said_in_one_line(site):
    port = int(site.url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"port {port}.*--port") as caught:
        Server(site.app, port=port)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--host"):
        Server(site.app, host="no.such.host.invalid")


def test_only_loopback_is_served_without_a_warning():
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.0.2.1", "judge.example", ""]))


def test_another_host_is_announced(site, capsys, monkeypatch):
    from hf_rlhf_ext.collect.web import server

    monkeypatch.setattr(server.uvicorn.Server, "run", lambda self, sockets: None)
    server.serve_forever(site.app, host="0.0.0.0", port=0)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "https" in warning and "reverse proxy" in warning
    server.serve_forever(site.app, port=0)
    assert capsys.readouterr().err == ""


def test_the_address_of_a_server_can_be_opened():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, "0.0.0.0") == f"http://127.0.0.1:{port}"
        assert url_of(listener, "::1") == f"http://[::1]:{port}"


def test_a_site_on_ipv6_can_be_used(tmp_path):
    try:
        open_socket("::1", 0).close()
    except UserError:
        pytest.skip("this machine has no IPv6")
    with Store(tmp_path / "store.sqlite") as store, Server(create_app(store), "::1") as server:
        store.add_tasks([Task("question?", ["yes", "no"])])
        with JudgeClient(f"{server.url}/join/{store.add_annotator('Ada')}") as client:
            client.task()
            client.judge({"preference": 1}, 1.0)
        assert len(store.judgments()) == 1


def test_replies_do_not_wait_for_acknowledgments(site):
    # With Nagle's algorithm, each reply took 40 ms more: ten of them took longer than this.
    site.add_tasks(12)
    ada = site.person()
    seconds = []
    for _ in range(10):
        task = ada.task()
        started = time.perf_counter()
        ada.judge(task["id"], {"preference": 4})
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.035


def test_the_site_is_imported_fast_and_without_torch():
    code = (
        "import sys; import hf_rlhf_ext.collect.web.app, hf_rlhf_ext.collect.web.server;"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.strip() == "[]"


def test_static_files_are_checked_for_changes_only(site):
    visitor = site.visitor()
    reply = visitor.get("/static/shared.css")
    assert reply.headers["cache-control"] == "no-cache"
    again = visitor.get("/static/shared.css", headers={"If-None-Match": reply.headers["etag"]})
    assert again.status_code == 304


def test_every_response_has_the_headers(site):
    ada = site.person()
    replies = [site.visitor().get(path) for path in ("/", "/judge", "/nowhere", "/join/x", "/static/shared.css")]
    replies += [ada.get("/api/task"), ada.post("/api/undo", []), ada.http.post("/api/undo", content=b"x" * 100_000)]
    for reply in replies:
        for name, value in security.SECURITY_HEADERS.items():
            assert reply.headers[name] == value
        is_static = reply.request.url.path.startswith("/static/")
        assert reply.headers["cache-control"] == ("no-cache" if is_static else "no-store")
        assert "server" not in reply.headers

"""Attacks on the judging site, over real HTTP: nothing runs, nothing leaks, and each refusal is one line of JSON."""

import http.client
import json
import secrets
import socket
import time
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.collect.web import server
from hf_rlhf_ext.errors import UserError

pytestmark = pytest.mark.xdist_group("processes")

SCRIPTS = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'> [x](javascript:alert(1)) [y](data:text/html,1)"
SQL = "'; DROP TABLE judgments; --\" OR 1=1"


def assert_refused(reply, *statuses):
    """The status is one of these, and the body is {"error": one short line} that tells nothing of the inside."""
    assert reply.status_code in statuses, (reply.status_code, reply.text)
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    message = body["error"]
    assert 5 < len(message) <= 301 and message.isprintable()
    for inside in ("Traceback", "sqlite", ".py", "/tmp", "site-packages", "secret"):
        assert inside not in message


@pytest.fixture
def ada(site):
    site.add_tasks(5)
    return site.person("Ada")


def judgment(ada, **changes):
    body = {"task": ada.task()["id"], "key": secrets.token_hex(8), "seconds": 1.5, "answer": {"preference": 1}}
    return body | changes


# ---- scripts in every text --------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, rendered):
        super().__init__()
        self.found = []
        self.feed(rendered)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def html_parts(value, name=""):
    """All values that the page puts in as HTML: those of the keys `html` and `…_html`."""
    if isinstance(value, dict):
        return [part for key, inner in value.items() for part in html_parts(inner, key)]
    if isinstance(value, list):
        return [part for inner in value for part in html_parts(inner, name)]
    return [value] if name.endswith("html") else []


def test_scripts_in_every_text_stay_text(site):
    store = site.store
    store.save_settings(replace(store.settings(), title=SCRIPTS, instructions=SCRIPTS, categories=[SCRIPTS[:90]]))
    conversation = [{"role": SCRIPTS, "content": SCRIPTS}]
    turns = [{"role": SCRIPTS, "content": SCRIPTS}, {"role": "tool", "content": SCRIPTS}]
    store.add_tasks(
        [
            Task(SCRIPTS, [SCRIPTS + "a", SCRIPTS + "b"], category=SCRIPTS, made_by=[{"policy": SCRIPTS}, {}]),
            Task(conversation, [turns, [{"role": "assistant", "content": SCRIPTS}]]),
        ]
    )
    ada, root = site.person(SCRIPTS[:90]), site.person("Root", "admin")
    answer = {"preference": 1, "comment": SCRIPTS, "category": SCRIPTS[:90], "edited": {"position": 0, "text": SCRIPTS}}
    replies = [ada.get("/api/session"), ada.get("/api/task")]
    replies.append(ada.judge(ada.task()["id"], answer))
    replies.append(ada.judge(ada.task()["id"], answer))
    replies.append(ada.post("/api/undo", {"key": "undo-key"}))
    replies.append(root.get("/api/admin/statistics"))
    replies.append(root.get("/api/admin/annotators"))

    n_parts = 0
    for reply in replies:
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "script-src 'self'" in reply.headers["content-security-policy"]
        for part in html_parts(reply.json()):
            n_parts += 1
            for tag, attributes in Tags(part).found:
                assert tag in ("p", "strong")
                assert not attributes
    assert n_parts >= 8
    # The words are all there, as text.
    assert "<script>alert(1)</script>" in ada.get("/api/session").json()["title"]
    export = root.get("/api/admin/export/comparisons.jsonl")
    assert "html" not in export.headers["content-type"] and "attachment" in export.headers["content-disposition"]


def test_the_pages_hold_no_text_of_anybody(site):
    site.store.save_settings(replace(site.store.settings(), title="TITLE-7", instructions="INSTRUCTIONS-7"))
    root = site.person("NAME-7", "admin")
    for path in ("/", "/judge", "/admin"):
        page = root.get(path)
        assert page.status_code == 200 and "-7" not in page.text
        assert "<script>" not in page.text and " style=" not in page.text and " onclick=" not in page.text


def test_a_task_does_not_tell_who_made_it_nor_whether_it_is_gold(site):
    made_by = [{"policy": "POLICY-7", "revision": "REVISION-7"}, {"policy": "POLICY-8"}]
    others = {"made_by": made_by, "source": "SOURCE-7", "batch": "BATCH-7", "row": 4242}
    site.store.save_settings(replace(site.store.settings(), gold_share=0.5))
    site.store.add_tasks(
        [
            Task("plain?", ["a", "b"], **others),
            Task("gold?", ["c", "d"], gold={"best": [1]}, **others),
            Task("other?", ["e", "f"], **others),
        ]
    )
    ada = site.person()
    replies = [ada.get("/api/session"), ada.get("/api/task")]
    fields = set()
    for _ in range(3):
        task = ada.task()
        fields.add(tuple(sorted(task)))
        replies.append(ada.judge(task["id"], {"preference": 1}))
    assert len(fields) == 1
    for reply in replies:
        assert reply.status_code == 200
        for secret in ("POLICY", "REVISION", "SOURCE", "BATCH", "4242", "gold_", '"gold"', "best", "order"):
            assert secret not in reply.text


# ---- links, cookies and tokens that are not ours ----------------------------------------------------------------


def test_forged_links_open_nothing(site):
    token = site.store.add_annotator("Ada")
    forged = [
        token[:-1],
        token + "A",
        token[1:],
        token.swapcase(),
        "x",
        "%00",
        "%0d%0aSet-Cookie:%20a=b",
        "é",
        SQL,
        "a" * 5000,
    ]
    for link in forged:
        reply = site.visitor().get(f"/join/{link}")
        assert "set-cookie" not in reply.headers
        if reply.status_code != 429:
            assert_refused(reply, 404)
    assert site.visitor().get(f"/join/{token}").status_code == 303


def test_forged_cookies_open_nothing(site):
    ada = site.person()
    [(name, cookie)] = ada.http.cookies.items()
    annotator_id, fingerprint, mac = cookie.split(".")
    root_id = site.store.annotator_of(site.store.add_annotator("Root", "admin")).id
    forged = [
        "",
        "1",
        cookie[:-1],
        cookie + "A",
        f"{root_id}.{fingerprint}.{mac}",
        f"{annotator_id}.{fingerprint}.",
        f"{annotator_id}.{fingerprint}.{mac[::-1]}",
        f"-{cookie}",
        f"{10**30}.{fingerprint}.{mac}",
        SQL.replace(";", ""),
        "a" * 4000,
    ]
    for value in forged:
        visitor = site.visitor()
        assert_refused(visitor.get("/api/task", headers={"Cookie": f"{name}={value}"}), 401)


def test_a_csrf_token_fits_one_person(site):
    site.add_tasks(5)
    ada, bob = site.person("Ada"), site.person("Bob")
    body = judgment(ada)
    # Ada's cookie with Bob's token, and the other way round.
    assert_refused(ada.post("/api/judgments", body, **{"X-CSRF-Token": bob.csrf}), 403)
    assert_refused(bob.post("/api/judgments", body, **{"X-CSRF-Token": ada.csrf}), 403)
    # Bob's own session and token do not judge Ada's task either.
    assert_refused(bob.post("/api/judgments", body), 409)
    assert site.store.judgments() == []
    assert ada.post("/api/judgments", body).status_code == 200


def test_nobody_undoes_what_another_person_judged(site):
    site.add_tasks(5)
    ada, bob = site.person("Ada"), site.person("Bob")
    ada.post("/api/judgments", judgment(ada))
    assert bob.post("/api/undo", {"key": "undo-key"}).json()["undone"] is False
    assert len(site.store.judgments()) == 1


# ---- requests that another site makes the browser send ----------------------------------------------------------


def test_a_post_needs_the_csrf_token(site, ada):
    origin = {"Origin": site.url}
    assert_refused(ada.http.post("/api/judgments", json=judgment(ada), headers=origin), 403)
    for token in ("", "x", "A" * 43, "é", ada.csrf[:-1], ada.csrf.swapcase()):
        headers = origin | {"X-CSRF-Token": token.encode()}
        assert_refused(ada.http.post("/api/judgments", json=judgment(ada), headers=headers), 403)
    assert site.store.judgments() == []


def test_a_post_of_another_origin_is_refused(site, ada):
    host = urlsplit(site.url).netloc
    origins = ["https://evil.example", "null", "", "http://127.0.0.1", "http://127.0.0.1:1"]
    origins += [f"https://{host}", host, f"http://{host}.evil.example", f"http://{host}@evil.example", site.url + "/"]
    for origin in origins:
        assert_refused(ada.post("/api/judgments", judgment(ada), Origin=origin), 403)
    assert site.store.judgments() == []


def test_a_post_needs_an_origin_or_the_word_of_the_browser(site, ada):
    token = {"X-CSRF-Token": ada.csrf}
    body = judgment(ada)
    assert_refused(ada.http.post("/api/judgments", json=body, headers=token), 403)
    for where in ("cross-site", "same-site", "x"):
        assert_refused(ada.http.post("/api/judgments", json=body, headers=token | {"Sec-Fetch-Site": where}), 403)
        assert_refused(ada.post("/api/judgments", body, **{"Sec-Fetch-Site": where}), 403)
    assert (
        ada.http.post("/api/judgments", json=body, headers=token | {"Sec-Fetch-Site": "same-origin"}).status_code == 200
    )


def test_a_post_must_be_json(site, ada):
    content = json.dumps(judgment(ada))
    for content_type in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=a",
        "",
        "text/json",
    ):
        headers = {"Origin": site.url, "X-CSRF-Token": ada.csrf, "Content-Type": content_type}
        assert_refused(ada.http.post("/api/judgments", content=content, headers=headers), 415)
    assert site.store.judgments() == []


def test_no_other_site_may_read_replies(site, ada):
    reply = ada.http.request("OPTIONS", "/api/judgments", headers={"Origin": "https://evil.example"})
    assert_refused(reply, 405)
    task = ada.get("/api/task", headers={"Origin": "https://evil.example"})
    for headers in (reply.headers, task.headers):
        assert not [name for name in headers if name.startswith("access-control")]


# ---- files ------------------------------------------------------------------------------------------------------

TRAVERSALS = [
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e/app.py",
    "/static/%2e%2e%2f%2e%2e%2fstore.py",
    "/static/..%5capp.py",
    "/static/....//app.py",
    "/static/./../app.py",
    "/static/%252e%252e/app.py",
    "/static//etc/passwd",
    "/static/%2fetc%2fpasswd",
    "/static/shared.css/../../app.py",
    "/static/shared.css%00.html",
    "/static/%00",
    "/static/" + "a" * 3000,
    "/static/",
    "/static",
    "/static/..",
    "//etc/passwd",
    "/../../../../etc/passwd",
    "/static/%ff%fe",
    "/static/~root",
    "/static/__init__.py",
]


def get_raw(site, path):
    """Sends the path as it is. Other clients would tidy it up."""
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(site.url).port, timeout=20)
    try:
        connection.putrequest("GET", path, skip_accept_encoding=True)
        connection.endheaders()
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def test_no_file_outside_of_the_folder_is_sent(site):
    assert get_raw(site, "/static/shared.css")[0] == 200
    for path in TRAVERSALS:
        assert get_raw(site, path) == (404, '{"error":"There is no such page."}'), path


# ---- too much ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_announced", [True, False])
def test_an_answer_of_two_megabytes_is_refused(site, ada, is_announced):
    body = json.dumps(judgment(ada, answer={"preference": 1, "comment": "x" * 2_000_000})).encode()
    content = body if is_announced else iter([body[i : i + 10_000] for i in range(0, len(body), 10_000)])
    headers = {"Origin": site.url, "X-CSRF-Token": ada.csrf, "Content-Type": "application/json"}
    started = time.perf_counter()
    assert_refused(ada.http.post("/api/judgments", content=content, headers=headers), 413)
    assert time.perf_counter() - started < 3
    assert site.store.judgments() == []
    assert ada.get("/api/task").status_code == 200


def test_a_stranger_cannot_send_much_either(site):
    assert_refused(site.visitor().http.post("/api/undo", content=b"x" * 2_000_000), 413)
    assert_refused(site.visitor().http.post("/api/undo", content=iter([b"x" * 1000] * 100)), 401, 413)


def test_long_fields_are_refused_in_one_short_line(site, ada):
    for answer in (
        {"preference": 1, "comment": "x" * 3000},
        {"preference": 1, "category": "x" * 3000},
        {"preference": 1, "edited": {"position": 0, "text": "x" * 21_000}},
        {"preference": "x" * 50_000},
        {"x" * 50_000: 1},
        {"preference": list(range(10_000))},
    ):
        assert_refused(ada.post("/api/judgments", judgment(ada, answer=answer)), 400)
    assert_refused(ada.post("/api/judgments", judgment(ada, key="k" * 60_000)), 400)
    assert_refused(ada.post("/api/judgments", judgment(ada) | {"x" * 60_000: 1}), 400)


def test_a_completion_of_two_megabytes_is_shown_plain_and_fast(site):
    long_text = "<img src=x onerror=alert(1)> **b** " * 60_000
    site.store.add_tasks([Task("long?", [long_text, "short"])])
    ada = site.person()
    started = time.perf_counter()
    completions = ada.task()["completions"]
    assert time.perf_counter() - started < 3
    [shown] = [completion for completion in completions if completion["text"] == long_text]
    assert shown["html"].startswith("<pre") and "<img" not in shown["html"] and "<strong>" not in shown["html"]


def test_a_flood_of_wrong_links_is_slowed_down_and_hinders_nobody(site):
    token = site.store.add_annotator("Bob")
    ada = site.person("Ada")
    stranger = site.visitor()
    replies = [stranger.get(f"/join/{secrets.token_urlsafe(32)}") for _ in range(30)]
    assert [reply.status_code for reply in replies[:10]] == [404] * 10
    assert [reply.status_code for reply in replies].count(429) >= 18  # 20, but for a refill on a slow machine
    assert_refused(replies[-1], 429)
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 60
    # From the same address:
    assert ada.get("/api/task").status_code == 200
    assert site.visitor().join(token).get("/judge").status_code == 200


def test_a_flood_without_a_session_is_slowed_down_and_hinders_nobody(open_site):
    site = open_site(address_limit=6)  # slow, so that the speed of the machine does not matter
    ada = site.person()
    stranger = site.visitor()
    paths = ["/", "/judge", "/api/task", "/static/shared.css", "/api/admin/statistics"]
    statuses = [stranger.get(path).status_code for _ in range(80) for path in paths]
    assert 429 not in statuses[:300] and statuses[-1] == 429
    assert statuses.count(429) > 80
    forged = {"Cookie": f"{next(iter(ada.http.cookies))}=1.{'a' * 22}.{'b' * 43}"}
    assert_refused(stranger.get("/api/task", headers=forged), 429)
    assert_refused(stranger.http.post("/api/judgments", json={}), 429)
    for path in ("/judge", "/api/task", "/static/shared.css"):
        assert ada.get(path).status_code == 200
    page = stranger.get("/judge", headers={"Accept": "text/html"})
    assert page.status_code == 429 and "retry-after" in page.headers


def test_connections_on_which_nobody_asks_are_closed_and_others_are_not(site, monkeypatch):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.5)
    address = ("127.0.0.1", urlsplit(site.url).port)
    idle = [socket.create_connection(address, timeout=20) for _ in range(50)]
    for number, connection in enumerate(idle):
        connection.sendall(b"GET /judge HTTP/1.1\r\nHo"[: number * 2])
    ada = site.person()
    assert [connection.recv(10) for connection in idle] == [b""] * 50
    started = time.perf_counter()
    assert ada.get("/api/task").status_code == 200
    assert time.perf_counter() - started < 5
    for connection in idle:
        connection.close()


def test_headers_without_end_are_refused(site):
    with socket.create_connection(("127.0.0.1", urlsplit(site.url).port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
        with pytest.raises(OSError):
            for _ in range(1000):  # 10 MB
                connection.sendall(b"a" * 10_000)


# ---- methods and routes -----------------------------------------------------------------------------------------


def test_unknown_routes_and_methods_are_refused(site, ada):
    for path in (
        "/nowhere",
        "/api",
        "/api/",
        "/api/tasks",
        "/judge/",
        "/join",
        "/join/",
        "/join/a/b",
        "/static",
        "/docs",
    ):
        assert_refused(ada.get(path), 404)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST"):
        for path in ("/", "/judge", "/api/task", "/join/abc", "/api/session"):
            assert_refused(ada.http.request(method, path), 405)
    for method in ("GET", "PUT", "DELETE"):
        assert_refused(ada.http.request(method, "/api/judgments"), 405)
    assert_refused(ada.http.request("POST", "/static/shared.css"), 405)


def test_head_sends_no_body(site, ada):
    for path in ("/", "/judge", "/api/session", "/static/shared.css"):
        reply = ada.http.head(path)
        assert reply.status_code == 200 and reply.content == b""


def test_an_unknown_host_is_not_repeated(site, ada):
    for path in ("/judge/", "/", "/join/x", "/nowhere"):
        reply = ada.get(path, headers={"Host": "evil.example"})
        assert "evil" not in reply.text and "evil" not in str(reply.headers)


# ---- the admin's API --------------------------------------------------------------------------------------------


def test_an_annotator_is_no_admin(site, ada):
    before = site.store.annotators(), site.store.settings()
    for path in ("/admin", "/api/admin/statistics", "/api/admin/annotators"):
        assert_refused(ada.get(path), 403)
    for name in ("comparisons.jsonl", "demonstrations.jsonl", "counts"):
        assert_refused(ada.get(f"/api/admin/export/{name}"), 403)
    for path, body in (
        ("annotators", {"name": "Eve"}),
        ("annotators/1/active", {"active": False}),
        ("annotators/1/link", {}),
        ("pause", {"paused": True}),
    ):
        assert_refused(ada.post(f"/api/admin/{path}", body), 403)
        assert_refused(site.visitor().post(f"/api/admin/{path}", body), 401)
    assert (site.store.annotators(), site.store.settings()) == before


def test_an_admin_needs_the_csrf_token_too(site):
    root = site.person("Root", "admin")
    for path, body in (("annotators", {"name": "Eve"}), ("annotators/1/link", {}), ("pause", {"paused": True})):
        assert_refused(root.post(f"/api/admin/{path}", body, **{"X-CSRF-Token": ""}), 403)
        assert_refused(root.post(f"/api/admin/{path}", body, Origin="https://evil.example"), 403)
    assert len(site.store.annotators()) == 1 and not site.store.settings().paused


def test_an_admin_cannot_make_admins_over_the_web(site):
    root = site.person("Root", "admin")
    assert_refused(root.post("/api/admin/annotators", {"name": "Eve", "role": "admin"}), 400)
    for name in ("", "   ", "a\nb", "a" * 101, 7, None, ["x"]):
        assert_refused(root.post("/api/admin/annotators", {"name": name}), 400)


# ---- values -----------------------------------------------------------------------------------------------------


def test_sql_in_every_field_is_only_text(site, ada):
    root = site.person("Root", "admin")
    assert root.post("/api/admin/annotators", {"name": SQL}).status_code == 200
    answer = {"preference": 1, "comment": SQL, "category": SQL, "edited": {"position": 0, "text": SQL}}
    assert ada.post("/api/judgments", judgment(ada, answer=answer)).status_code == 200
    assert_refused(ada.post("/api/judgments", judgment(ada, key=SQL)), 400)
    for field in ("task", "seconds"):
        assert_refused(ada.post("/api/judgments", judgment(ada, **{field: SQL})), 400)
    assert_refused(ada.post("/api/undo", {"key": SQL}), 400)
    assert_refused(root.post(f"/api/admin/annotators/{SQL}/link", {}), 404)
    [kept] = site.store.judgments()
    assert kept.answer["comment"] == SQL and kept.answer["category"] == SQL
    assert site.store.annotators()[-1].name == SQL


def test_numbers_that_are_no_seconds_are_refused(site, ada):
    headers = {"Origin": site.url, "X-CSRF-Token": ada.csrf, "Content-Type": "application/json"}
    body = json.dumps(judgment(ada, seconds=0))
    numbers = ["NaN", "Infinity", "-Infinity", "1e999", "-1", "1e300", "9" * 5000, "true", "null", '"1"', "[]"]
    for number in numbers:
        content = body.replace('"seconds": 0', f'"seconds": {number}')
        assert_refused(ada.http.post("/api/judgments", content=content, headers=headers), 400)
    assert site.store.judgments() == []
    assert ada.http.post("/api/judgments", content=body, headers=headers).status_code == 200


def test_numbers_that_are_no_task_are_refused(site, ada):
    for task in (-1, 10**18, 2**63, 10**400, 1.5, True, None, "1", [1]):
        assert_refused(ada.post("/api/judgments", judgment(ada, task=task)), 400, 409)
    assert site.store.judgments() == []


def test_broken_json_is_refused(site, ada):
    headers = {"Origin": site.url, "X-CSRF-Token": ada.csrf, "Content-Type": "application/json"}
    contents = [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b'{"key": "a", "key": {}}', b"{}"]
    contents += [b"[" * 60_000, b'{"a":' * 10_000]
    for content in contents:
        for path in ("/api/judgments", "/api/undo"):
            assert_refused(ada.http.post(path, content=content, headers=headers), 400)


def test_infinity_is_no_json_anywhere(site, ada):
    headers = {"Origin": site.url, "X-CSRF-Token": ada.csrf, "Content-Type": "application/json"}
    for value in (b"1e999", b"-Infinity", b"[NaN]"):
        reply = ada.http.post("/api/undo", content=b'{"key": ' + value + b"}", headers=headers)
        assert_refused(reply, 400)
        assert "JSON" in reply.json()["error"]


def test_unicode_is_kept(site, ada):
    comment = "naïve 漢字 🙂👩‍👩‍👧 \u202eright to left\u202c \u2028 a\u0000b"
    assert ada.post("/api/judgments", judgment(ada, answer={"preference": 1, "comment": comment})).status_code == 200
    assert site.store.judgments()[0].answer["comment"] == comment
    # Half of a surrogate pair cannot be stored in UTF-8. The rest of the comment is kept.
    body = json.dumps(judgment(ada, answer={"preference": 1, "comment": "half \ud83d"}))
    headers = {"Origin": site.url, "X-CSRF-Token": ada.csrf, "Content-Type": "application/json"}
    assert ada.http.post("/api/judgments", content=body, headers=headers).status_code == 200
    assert site.store.judgments()[1].answer["comment"] == "half ?"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([SQL, SCRIPTS, "skip"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
answers = st.dictionaries(
    st.sampled_from(["preference", "ranks", "skip", "flags", "category", "comment", "ratings", "edited", "x"]),
    json_values,
    max_size=4,
)


def test_no_body_whatever_makes_the_server_fail(open_site):
    site = open_site(person_limit=None)
    site.add_tasks(1000)
    ada = site.person()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        answer=json_values | answers,
        changes=st.dictionaries(st.sampled_from(["task", "key", "seconds", "x"]), json_values, max_size=1),
    )
    def send(answer, changes):
        body = json.dumps(judgment(ada, answer=answer) | changes)
        headers = {"Origin": site.url, "X-CSRF-Token": ada.csrf, "Content-Type": "application/json"}
        reply = ada.http.post("/api/judgments", content=body.encode("utf-8", "surrogatepass"), headers=headers)
        if reply.status_code == 200:
            assert reply.json()["saved"] is True
        else:
            assert_refused(reply, 400, 409, 413)

    send()


def test_a_message_of_two_lines_becomes_one(site, ada, monkeypatch):
    def refuse(*args, **kwargs):
        raise UserError("first line\r\n  second line")

    monkeypatch.setattr(site.store, "undo", refuse)
    reply = ada.post("/api/undo", {"key": "undo-key"})
    assert_refused(reply, 400)
    assert reply.json()["error"] == "first line second line"


def test_an_error_of_our_own_tells_nothing(site, ada, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the key is SECRET-7 in /home/somebody")

    monkeypatch.setattr(site.store, "progress", fail)
    reply = ada.get("/api/task")
    assert_refused(reply, 500)
    assert "SECRET" not in reply.text
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")

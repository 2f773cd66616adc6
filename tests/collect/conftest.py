"""A store in a temporary folder, with tasks and people."""

import secrets

import pytest

from hf_rlhf_ext.collect.store import Settings, Store
from hf_rlhf_ext.collect.tasks import Task


def make_tasks(n: int, **columns) -> list[Task]:
    """Returns n different tasks with two completions."""
    return [Task(prompt=f"Question {i}?", completions=[f"Yes, {i}.", f"No, {i}!!"], **columns) for i in range(n)]


@pytest.fixture
def make_store(tmp_path):
    """Makes a store: `make_store(tasks, people=["ann"], gold_share=0.5)`. Keyword arguments are settings.

    `people` have the ids 1, 2, … in their order. All stores are closed after the test. Unless `is_durable`, nothing
    waits for the disk, which is faster.
    """
    stores = []

    def make(tasks=5, people=("ann", "bob", "cem"), *, name="store.sqlite", is_durable=False, **settings):
        store = Store(tmp_path / name)
        if not is_durable:
            store._writer.execute("PRAGMA synchronous = OFF")
        stores.append(store)
        store.save_settings(Settings(**settings))
        store.add_tasks(make_tasks(tasks) if isinstance(tasks, int) else tasks)
        for person in people:
            store.add_annotator(person)
        return store

    yield make
    for store in stores:
        store.close()


# ---- a site: a store behind a real server ------------------------------------------------------------------------


class Visitor:
    """A browser without a session, over real HTTP."""

    def __init__(self, site, **options):
        import httpx2

        self.site = site
        self.csrf = ""
        # Without `verify`, a client is made 30 ms faster: it reads no certificates.
        self.http = httpx2.Client(base_url=site.url, trust_env=False, verify=False, timeout=20, **options)
        self.get = self.http.get

    def join(self, token):
        reply = self.http.get(f"/join/{token}")
        assert reply.status_code == 303, reply.text
        self.csrf = self.get("/api/session").json()["csrf"]
        return self

    def post(self, path, body, **headers):
        known = {"Origin": self.site.url, "X-CSRF-Token": self.csrf}
        return self.http.post(path, json=body, headers=known | headers)

    def task(self):
        return self.get("/api/task").json()["task"]

    def judge(self, task_id, answer, *, key=None, seconds=1.5):
        key = key or secrets.token_hex(8)
        return self.post("/api/judgments", {"task": task_id, "key": key, "seconds": seconds, "answer": answer})


class Site:
    """A store, and a real server on a free port of this machine."""

    def __init__(self, path, **options):
        from hf_rlhf_ext.collect.web.app import create_app
        from hf_rlhf_ext.collect.web.server import Server

        self.store = Store(path)
        self.app = create_app(self.store, **options)
        self.server = Server(self.app)
        self.url = self.server.url
        self.visitors = []

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *error):
        for visitor in self.visitors:
            visitor.http.close()
        self.server.stop()
        self.store.close()

    def visitor(self, **options):
        visitor = Visitor(self, **options)
        self.visitors.append(visitor)
        return visitor

    def person(self, name="Ada", role="annotator"):
        """A new annotator who has opened the link."""
        return self.visitor().join(self.store.add_annotator(name, role))

    def add_tasks(self, n=5, **others):
        self.store.add_tasks([Task(f"question {i}?", [f"yes {i}", f"no {i}"], **others) for i in range(n)])


@pytest.fixture
def open_site(tmp_path):
    """Starts a site with the options of `create_app`. Several sites of one test share the store's file."""
    sites = []

    def start(**options):
        site = Site(tmp_path / "store.sqlite", **options).__enter__()
        sites.append(site)
        return site

    yield start
    for site in sites:
        site.__exit__()


@pytest.fixture
def site(open_site):
    return open_site()

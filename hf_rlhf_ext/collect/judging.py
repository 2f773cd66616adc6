"""Gets the tasks of a batch judged: by people on the page, by simulated people over HTTP, or by both."""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import UserError
from .client import JudgeClient, Saved, TaskOnPage, work
from .simulated import SimulatedPerson

if TYPE_CHECKING:
    from .store import Store

WAYS = ("page", "simulated", "mixed")
ADMIN = "admin"
"""Name of the admin that is added to a store without one."""
LINE_SECONDS = 60.0
"""Seconds between two lines of progress where there is no terminal."""
CHECK_SECONDS = 10.0
"""Seconds between two checks whether the people can still judge anything."""
IDLE_SECONDS = 0.2
"""Seconds after which a simulated person without a task asks again."""

Show = Callable[[str], None]


def judge_tasks(
    store: "Store",
    *,
    how: str = "page",
    batch: str | None = None,
    names: Sequence[str] = (),
    people: Sequence[SimulatedPerson] = (),
    simulated_quota: int | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    url: str | None = None,
    on_start: Callable[[dict[str, str]], None] | None = None,
    poll_seconds: float = 1.0,
    show: Show | None = None,
) -> dict[str, int]:
    """Starts the server, waits until a batch is judged, and stops the server.

    Each judgment is on disk at once. After an interruption, another call goes on where the last one stopped.

    Args:
        store: the open store, to which the tasks were added.
        how: "page" waits for people at the page, "simulated" lets `people` work over HTTP, and "mixed" does both.
        batch: batch of the tasks to wait for. `None` is all tasks of the store.
        names: people who judge at the page. New ones are added, and their links are shown. Links of an earlier call
            stay valid. People whom an admin adds meanwhile may judge too.
        people: simulated people. They are added to the store under their names, and get a new link in each call.
        simulated_quota: number of judgments of this batch that simulated people make in all, over all calls. `None` is
            no limit for "simulated", and half of the wanted judgments for "mixed".
        host: address on which the server listens. "simulated" always uses 127.0.0.1.
        port: port of the page. 0 is 8347 as long as it is free, so that links work again in the next call, else any.
        url: address of the page in links, if people reach it by another one than `http://host:port`.
        on_start: called when the server runs, with the link of each person whose link is new in this call.
        poll_seconds: time between two looks at the store.
        show: prints a line. By default, to stdout.

    Returns:
        `store.counts(batch)`. "complete" is less than "tasks" if the quota is reached, or if people skipped tasks that
        nobody else can judge. The second is shown in a line.

    Raises:
        UserError: if the people are fewer than a task wants, if everybody skipped everything, or if the options do not
            fit together.
    """
    show = show or _print
    simulated = [person.name for person in people]
    _check_options(store, how, names, simulated, simulated_quota)
    counts = store.counts(batch)
    if _is_complete(counts):
        return counts
    if how == "mixed" and simulated_quota is None:
        simulated_quota = counts["wanted"] // 2
    tasks = _Batch(store, batch, how, simulated)
    tasks.refuse_too_few_people(names)
    crew = _Crew(store, tasks, people, simulated_quota)
    with _page(store, how, host, port, url) as address, crew, _interruption_in_words(tasks, show):
        urls = {} if how == "simulated" else _add_people(store, names, address, show)
        if on_start is not None:
            on_start(urls)
        _wait(tasks, crew, poll_seconds, show)
    return store.counts(batch)


# ---- Before the work -------------------------------------------------------------------------------------------------


def _check_options(store: "Store", how: str, names: Sequence[str], simulated: Sequence[str], quota: int | None) -> None:
    if how not in WAYS:
        raise UserError(f"how={how!r}: must be one of {', '.join(WAYS)}.")
    if how == "page" and simulated:
        raise UserError("how='page' has no simulated people: leave `people` out, or use 'mixed'.")
    if how != "page" and not simulated:
        raise UserError(f"how={how!r} needs simulated people: give `people`.")
    if how == "simulated" and names:
        raise UserError("how='simulated' has no people at the page: leave `names` out, or use 'mixed'.")
    if quota is not None and (how == "page" or quota < 0):
        raise UserError(f"simulated_quota={quota}: must be at least 0, and goes with 'simulated' and 'mixed'.")
    for name in simulated:
        if name in names or simulated.count(name) > 1:
            raise UserError(f"the name {name!r} is given twice: each simulated person needs a name of its own.")
    admins = {annotator.name for annotator in store.annotators() if annotator.role == "admin"}
    for name in [*simulated, *names]:
        if name in admins:
            raise UserError(f"{name!r} is an admin of the store: give the person who judges another name.")
    if how != "page" and store.settings().paused:
        raise UserError("the store is paused, so that nobody gets a task: end the pause on the admin page first.")


def _add_people(store: "Store", names: Sequence[str], address: str, show: Show) -> dict[str, str]:
    """Adds the people whom the store does not have, and an admin, and shows their links. Returns these links.

    It is called when the page runs: a link can be shown only once, as the store has no copy of it.
    """
    show(f"Waiting for people at {address}")
    before = store.annotators()
    known = {annotator.name for annotator in before}
    urls = {}
    for name in names:
        if name not in known:
            urls[name] = f"{address}/join/{store.add_annotator(name)}"
            show(f"  {name}: {urls[name]}")
    if not any(annotator.role == "admin" for annotator in before):
        admin = ADMIN
        while admin in known or admin in names:
            admin += "-1"
        urls[admin] = f"{address}/join/{store.add_annotator(admin, role='admin')}"
        show(f"  {admin} (admin page): {urls[admin]}")
    if before:
        show("  Others keep the links that they have. For a lost one, the admin page makes a new link.")
    return urls


# ---- What is left to judge -------------------------------------------------------------------------------------------


class _Batch:
    """The tasks of a batch, and who can still judge them. Gold questions are not waited for.

    Args:
        store: has all tasks of the batch.
        batch: name of the batch, or None for all tasks.
        how: one of `WAYS`.
        simulated: names of the simulated people.
    """

    def __init__(self, store: "Store", batch: str | None, how: str, simulated: Sequence[str]):
        self.store = store
        self.batch = batch
        self.how = how
        self.simulated = set(simulated)
        self.tasks = [task for task in store.tasks(batch) if task.gold is None]
        self.ids = {task.id for task in self.tasks}

    @property
    def name(self) -> str:
        return "the store" if self.batch is None else f"batch {self.batch!r}"

    def counts(self) -> dict[str, int]:
        return self.store.counts(self.batch)

    def available(self, *, with_simulated: bool = True) -> set[str]:
        """Names of the people who may judge."""
        names = set(self.simulated) if with_simulated else set()
        if self.how != "simulated":
            for annotator in self.store.annotators():
                if annotator.active and annotator.role != "admin" and annotator.name not in self.simulated:
                    names.add(annotator.name)
        return names

    def simulated_judgments(self) -> int:
        """Number of judgments of this batch that simulated people have made, without skipped tasks."""
        return sum(
            judgment.annotator in self.simulated and judgment.task_id in self.ids and not judgment.is_skip
            for judgment in self.store.judgments(self.batch)
        )

    def refuse_too_few_people(self, names: Sequence[str]) -> None:
        """Raises `UserError` if a task wants more people than there are, with `names` that are yet to be added."""
        known = {annotator.name for annotator in self.store.annotators()}
        available = self.available() | (set(names) - known)
        if not available:
            raise UserError(f"nobody can judge {self.name}: give `names` of people, who get a link each.")
        judges, _ = self._who_answered()
        for task in self.tasks:
            n_people = len(available | judges[task.id])
            if task.wanted > n_people:
                raise UserError(
                    f"{self.name}: task {task.id} wants judgments of {task.wanted} people, and there are {n_people}: "
                    "give more people, or lower `wanted`."
                )

    def left(self, *, with_simulated: bool = True) -> tuple[int, int]:
        """Counts the incomplete tasks, and those that nobody can judge any more because all have judged or skipped."""
        available = self.available(with_simulated=with_simulated)
        judges, skippers = self._who_answered()
        n_incomplete = n_stuck = 0
        for task in self.tasks:
            if len(judges[task.id]) < task.wanted:
                n_incomplete += 1
                n_stuck += not (available - judges[task.id] - skippers[task.id])
        return n_incomplete, n_stuck

    def _who_answered(self) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
        """For each task, the names of those who judged it, and of those who skipped it."""
        judges: dict[int, set[str]] = defaultdict(set)
        skippers: dict[int, set[str]] = defaultdict(set)
        for judgment in self.store.judgments(self.batch):
            who = skippers if judgment.is_skip else judges
            who[judgment.task_id].add(judgment.annotator)
        return judges, skippers


def _is_complete(counts: dict[str, int]) -> bool:
    return counts["complete"] >= counts["tasks"]


def _progress(counts: dict[str, int]) -> str:
    return f"{counts['complete']} of {counts['tasks']} tasks are judged, with {counts['judgments']} judgments"


# ---- The servers -----------------------------------------------------------------------------------------------------


@contextmanager
def _page(store: "Store", how: str, host: str, port: int, url: str | None) -> Iterator[str]:
    """Runs the page for people, and gives its address. Does nothing for "simulated"."""
    if how == "simulated":
        yield ""
        return
    from .web.app import create_app
    from .web.server import DEFAULT_PORT, Server

    secure = url is not None and url.startswith("https:")
    app = create_app(store, url=url, secure=secure)
    try:
        server = Server(app, host=host, port=port or DEFAULT_PORT)
    except UserError:
        if port:
            raise
        server = Server(app, host=host, port=0)
    with server:
        yield (url or server.url).rstrip("/")


class _Crew:
    """The simulated people: a thread each, which works over HTTP at a server of their own.

    That server has the same store and listens on this machine only. It has no limit on requests, which people at the
    page have, and it is reached without https.

    Args:
        store: the open store.
        tasks: the batch.
        people: simulated people. Without any, nothing is started.
        quota: number of judgments of the batch that they make in all, or None.
    """

    def __init__(self, store: "Store", tasks: _Batch, people: Sequence[SimulatedPerson], quota: int | None):
        self.store = store
        self.people = list(people)
        self.quota = quota
        self.changed = threading.Event()
        """Set when somebody becomes idle or stops, so that the waiting main thread looks at once."""
        self.error: BaseException | None = None
        self._tasks = tasks
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._idle: set[str] = set()
        self._answering: set[str] = set()
        self._n_judged = 0
        self._threads: list[threading.Thread] = []
        self._server: Any = None

    def __enter__(self) -> "_Crew":
        if not self.people:
            return self
        self._n_judged = self._tasks.simulated_judgments()
        if self.quota_is_used:
            return self
        from .web.app import create_app
        from .web.server import Server

        tokens = [self._new_token(person.name) for person in self.people]
        app = create_app(self.store, person_limit=None, address_limit=None)
        self._server = Server(app).__enter__()
        for person, token in zip(self.people, tokens, strict=True):
            link = f"{self._server.url}/join/{token}"
            thread = threading.Thread(target=self._run, args=(person, link), name=person.name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.quota_is_used:
            self.leave()
        if self._server is not None:
            self._server.stop()

    @property
    def quota_is_used(self) -> bool:
        return self.quota is not None and self._n_judged >= self.quota

    @property
    def is_idle(self) -> bool:
        """Whether everybody asked for a task after the last judgment and got none, or has stopped."""
        with self._lock:
            return self.quota_is_used or len(self._idle) == len(self.people)

    def _new_token(self, name: str) -> str:
        if all(annotator.name != name for annotator in self.store.annotators()):
            return self.store.add_annotator(name)
        self.store.set_active(name, True)
        return self.store.new_token(name)

    def _run(self, person: SimulatedPerson, link: str) -> None:
        try:
            with JudgeClient(link) as client:
                while not (self._stop.is_set() or self.quota_is_used):
                    self._work(client, person)
        except BaseException as error:
            # Raised again in the main thread.
            self.error = error
        self.changed.set()

    def _work(self, client: JudgeClient, person: SimulatedPerson) -> None:
        """Works until there is no task, then waits a little."""

        def may_go_on() -> bool:
            return self._take_place(person.name)

        def note(task: TaskOnPage, answer: dict[str, Any], saved: Saved) -> None:
            self._note(person.name, task, answer)

        work(client, person, may_go_on=may_go_on, on_saved=note)
        with self._lock:
            self._answering.discard(person.name)
            if client.current is None:
                self._idle.add(person.name)
        self.changed.set()
        self._stop.wait(IDLE_SECONDS)

    def _take_place(self, name: str) -> bool:
        """Whether this person may answer one more task, so that all together do not exceed the quota."""
        with self._lock:
            if self._stop.is_set():
                return False
            others = len(self._answering - {name})
            if self.quota is not None and self._n_judged + others >= self.quota:
                return False
            self._answering.add(name)
            return True

    def _note(self, name: str, task: TaskOnPage, answer: dict[str, Any]) -> None:
        with self._lock:
            self._answering.discard(name)
            self._idle.clear()  # what others could not get may be free now
            if task.id in self._tasks.ids and not answer.get("skip"):
                self._n_judged += 1

    def leave(self) -> None:
        """Ends the work and deactivates the simulated people, so that no task is kept for them while people wait."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        known = {annotator.name for annotator in self.store.annotators()}
        for person in self.people:
            if person.name in known:
                self.store.set_active(person.name, False)


@contextmanager
def _interruption_in_words(tasks: _Batch, show: Show) -> Iterator[None]:
    """Says at Ctrl-C what is on disk, before the page stops."""
    try:
        yield
    except KeyboardInterrupt:
        show(f"stopped: {_progress(tasks.counts())}. All are on disk: the same command goes on from here.")
        raise


# ---- Waiting ---------------------------------------------------------------------------------------------------------


def _wait(tasks: _Batch, crew: _Crew, poll_seconds: float, show: Show) -> None:
    """Returns when the batch is complete, the quota of "simulated" is used, or nobody can judge what is left."""
    checked = time.monotonic()
    has_left = False
    with _Progress(tasks.name, tasks.counts(), show) as progress:
        while True:
            crew.changed.clear()
            if crew.error is not None:
                raise crew.error
            counts = tasks.counts()
            progress.update(counts)
            if _is_complete(counts):
                return
            if crew.quota_is_used and tasks.how == "simulated":
                return
            if crew.quota_is_used and not has_left:
                has_left = True
                crew.leave()
            is_time = tasks.how == "simulated" or time.monotonic() - checked > CHECK_SECONDS
            if crew.is_idle and is_time:
                checked = time.monotonic()
                if _is_stuck(tasks, crew, show):
                    return
            crew.changed.wait(poll_seconds)


def _is_stuck(tasks: _Batch, crew: _Crew, show: Show) -> bool:
    """Whether nobody can judge what is left.

    Raises:
        UserError: if so, and nothing was judged at all.
    """
    n_incomplete, n_stuck = tasks.left(with_simulated=not crew.quota_is_used)
    if n_stuck < n_incomplete or n_incomplete == 0:
        return False
    counts = tasks.counts()
    what = f"{n_incomplete} of {counts['tasks']} tasks stay incomplete: everybody has judged or skipped them"
    if counts["judgments"] == 0:
        raise UserError(f"{tasks.name}: {what}. Nothing was judged: give more people, or other tasks.")
    show(f"{tasks.name}: {what}. Going on with {counts['judgments']} judgments.")
    return True


class _Progress:
    """A progress bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, name: str, counts: dict[str, int], show: Show):
        self._name = name
        self._show = show
        self._shown = counts["judgments"]
        self._time = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=name, total=counts["tasks"], initial=counts["complete"], unit=" tasks", disable=not is_terminal
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, counts: dict[str, int]) -> None:
        if not self._bar.disable:
            # An undo makes it smaller.
            self._bar.n = counts["complete"]
            self._bar.refresh()
            return
        if counts["judgments"] != self._shown and time.monotonic() - self._time > LINE_SECONDS:
            self._shown = counts["judgments"]
            self._time = time.monotonic()
            self._show(f"{self._name}: {_progress(counts)}")


def _print(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()

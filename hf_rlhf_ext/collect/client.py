"""A client for the collection server that does over HTTP what the page does in a browser.

Simulated people and the load benchmark use it. It needs the packages of `hf-rlhf-ext[collect]`.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from ..errors import UserError, first_line

if TYPE_CHECKING:
    import httpx2

FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0
"""Seconds between two tries of a request. Each wait is twice the one before."""
TIMEOUT = 30.0
"""Seconds to wait for one reply."""


class ServerRefused(UserError):
    """The server refused a request, for the reason in its answer.

    `status` is the HTTP status: 401 without a valid session, 404 for an unknown link, 409 if the task is not this
    person's to judge any more, 422 or 400 for an answer that does not fit the task.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class ServerGone(UserError):
    """No reply for as long as the client was told to try."""


@dataclass(frozen=True)
class TaskOnPage:
    """What a person sees of a task.

    id: number of the task.
    kind: "compare" (two completions), "rank" (more), or "rate" (one).
    prompt: the text, or the messages of a conversation with more than one message.
    completions: texts in the order in which they are shown.
    category: category of the prompt, or None.
    """

    id: int
    kind: str
    prompt: str | list[dict[str, str]]
    completions: list[str]
    category: str | None

    @classmethod
    def from_json(cls, task: dict[str, Any]) -> "TaskOnPage":
        messages = [{"role": message["role"], "content": message["text"]} for message in task["prompt"]]
        prompt = messages[0]["content"] if len(messages) == 1 else messages
        completions = [completion["text"] for completion in task["completions"]]
        return cls(task["id"], task["kind"], prompt, completions, task.get("category"))


@dataclass(frozen=True)
class Saved:
    """Reply to a judgment, which is on the server's disk when it arrives.

    key: the idempotency key of the judgment.
    is_repeat: whether the server had saved this key before, for an earlier try of which the reply was lost.
    task: the next task, or None if there is none now.
    """

    key: str
    is_repeat: bool
    task: TaskOnPage | None


class JudgeClient:
    """One person's session with the server. The link is opened with the first request.

    A request without a reply is sent again with the same key, until `patience` is over. A session that the server does
    not know any more, after a restart, is opened again with the link. One client must not be shared between threads.

    Args:
        link: the person's secret link, `http://…/join/TOKEN`.
        patience: seconds for which a request is tried again if there is no reply, or if the server is too busy.
        on_reply: called with the method, the path, and the seconds of each request that got a reply.

    Attributes:
        current: the task that is shown now, or None.
        paused: whether the server gives out no tasks for now.
        progress: this person's counts, as in the last reply.

    Raises:
        UserError: if `link` is not such a link, or if a package is missing.
    """

    def __init__(
        self, link: str, *, patience: float = 60.0, on_reply: Callable[[str, str, float], None] | None = None
    ) -> None:
        try:
            import httpx2
        except ImportError:
            raise UserError("httpx2 is not installed: pip install 'hf-rlhf-ext[collect]'") from None
        parts = urlsplit(link)
        if parts.scheme not in ("http", "https") or not parts.netloc or not parts.path.startswith("/join/"):
            raise UserError(f"{link!r} is not a personal link: it must look like http://host:port/join/TOKEN.")
        # As browsers write it: lower case, and without the port that the scheme implies.
        self.origin = str(httpx2.URL(f"{parts.scheme}://{parts.netloc}"))
        self.patience = patience
        self.current: TaskOnPage | None = None
        self.paused = False
        self.progress: dict[str, Any] = {}
        self._join_path = parts.path
        self._csrf: str | None = None
        self._on_reply = on_reply
        self._lost = httpx2.TransportError
        is_local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        # A proxy of the environment cannot reach this machine's own addresses.
        self._http = httpx2.Client(base_url=self.origin, timeout=TIMEOUT, trust_env=not is_local)

    def __enter__(self) -> "JudgeClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def join(self) -> dict[str, Any]:
        """Opens the link, and returns the session: name, role, instructions, categories and so on."""
        self._checked(self._try("GET", self._join_path), {200, 302, 303, 307})
        session = self._checked(self._try("GET", "/api/session"), {200}).json()
        self._csrf = session["csrf"]
        self.paused = session.get("paused", False)
        self.progress = session.get("progress", {})
        return session

    def task(self) -> TaskOnPage | None:
        """The task that is shown, as after a reload of the page, or None if there is none now."""
        return self._keep(self._call("GET", "/api/task"))

    def judge(self, answer: dict[str, Any], seconds: float, *, key: str | None = None) -> Saved:
        """Sends the answer to the task that is shown.

        Args:
            answer: the answer with its positions as they are shown.
            seconds: time that the person took.
            key: idempotency key, if the judgment may have been sent before. By default, a new one.

        Raises:
            ServerRefused: if the server refuses the answer.
            ServerGone: without a reply. The judgment may be saved or not: sending it again with the same key is safe.
        """
        if self.current is None:
            raise UserError("no task is shown: call task() first.")
        key = key or new_key()
        body = {"task": self.current.id, "key": key, "seconds": seconds, "answer": answer}
        reply = self._call("POST", "/api/judgments", body)
        return Saved(key, reply["repeat"], self._keep(reply["next"]))

    def undo(self, *, key: str | None = None) -> dict[str, Any] | None:
        """Takes the last judgment back. Its task is shown again, as `current`.

        Returns:
            The answer that was taken back, or None if there was none to take back.
        """
        reply = self._call("POST", "/api/undo", {"key": key or new_key()})
        self._keep(reply["task"])
        return reply["answer"] if reply["undone"] else None

    def _keep(self, reply: dict[str, Any]) -> TaskOnPage | None:
        """Notes what a reply says about the task that is shown."""
        self.current = TaskOnPage.from_json(reply["task"]) if reply.get("task") else None
        self.paused = reply.get("paused", False)
        self.progress = reply.get("progress", self.progress)
        return self.current

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request within the session."""
        if self._csrf is None:
            self.join()
        reply = self._try(method, path, body)
        if reply.status_code in (401, 403):
            # The server has forgotten the session, or its CSRF token. The link opens a new one.
            self.join()
            reply = self._try(method, path, body)
        return self._checked(reply, {200, 201}).json()

    def _try(self, method: str, path: str, body: dict[str, Any] | None = None) -> "httpx2.Response":
        """Sends a request until there is a reply that is not "try again later"."""
        end = time.monotonic() + self.patience
        wait = FIRST_WAIT
        while True:
            started = time.perf_counter()
            try:
                reply = self._http.request(method, path, json=body, headers=self._headers(method))
            except self._lost as error:
                problem = first_line(error)
                seconds = wait
            else:
                if self._on_reply is not None:
                    self._on_reply(method, path, time.perf_counter() - started)
                if reply.status_code != 429 and reply.status_code < 500:
                    return reply
                problem = _problem(reply)
                seconds = _retry_after(reply, wait)
            if time.monotonic() + seconds > end:
                raise ServerGone(f"{self.origin}: no reply for {self.patience:g} s ({problem}): is the server running?")
            time.sleep(seconds)
            wait = min(2 * wait, LONGEST_WAIT)

    def _headers(self, method: str) -> dict[str, str]:
        if method == "GET":
            return {}
        return {"X-CSRF-Token": self._csrf or "", "Origin": self.origin}

    def _checked(self, reply: "httpx2.Response", expected: set[int]) -> "httpx2.Response":
        if reply.status_code not in expected:
            raise ServerRefused(f"{self.origin}: {_problem(reply)}", reply.status_code)
        return reply


class Answering(Protocol):
    """What answers tasks: `hf_rlhf_ext.collect.simulated.SimulatedPerson`, or another class with these methods."""

    def answer(self, prompt: str | list[dict[str, str]], completions: list[str]) -> dict[str, Any]: ...

    def seconds_for(self, prompt: str | list[dict[str, str]], completions: list[str]) -> float: ...


def work(
    client: JudgeClient,
    person: Answering,
    *,
    may_go_on: Callable[[], bool] = lambda: True,
    think_seconds: float = 0.0,
    on_saved: Callable[[TaskOnPage, dict[str, Any], Saved], None] | None = None,
) -> int:
    """Lets a person answer tasks until there is none now.

    Args:
        client: the person's session.
        person: gives the answers.
        may_go_on: asked before each answer. False ends the work.
        think_seconds: time to wait before each answer.
        on_saved: called with the task, the answer and the reply after each judgment that was saved.

    Returns:
        The number of answers that were saved, including skipped tasks.
    """
    saved = 0
    task = client.task()
    while task is not None and may_go_on():
        if think_seconds:
            time.sleep(think_seconds)
        answer = person.answer(task.prompt, task.completions)
        seconds = person.seconds_for(task.prompt, task.completions)
        try:
            reply = client.judge(answer, seconds)
        except ServerRefused as error:
            if error.status != 409:
                raise
            refused = task
            task = client.task()
            if task is not None and task.id == refused.id:
                raise  # a task that others have judged since the lease expired is not shown again
            continue
        saved += 1
        if on_saved is not None:
            on_saved(task, answer, reply)
        task = reply.task
    return saved


def new_key() -> str:
    """A new idempotency key."""
    return uuid.uuid4().hex


def _problem(reply: "httpx2.Response") -> str:
    """The reason in an answer of the server, in one line."""
    try:
        return str(reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        if reply.status_code == 404:
            return "the link is not valid (404): ask for a new one"
        return f"status {reply.status_code}"


def _retry_after(reply: "httpx2.Response", otherwise: float) -> float:
    """Seconds that the server asks to wait."""
    try:
        return max(0.0, float(reply.headers["Retry-After"]))
    except (KeyError, ValueError):
        return otherwise

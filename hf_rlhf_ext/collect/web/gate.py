"""The gate in front of every endpoint: who asks, may they, and then the work in a thread.

A request of a signed-in person takes one hop into a thread: there, the person is looked up, the work is done (it may
wait for the disk), and the answer is written as JSON. The event loop itself never waits.
"""

import json
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..store import Store
from .rendering import RenderCache
from .security import (
    RateLimiter,
    Session,
    Sessions,
    check_csrf,
    check_origin,
    client_address,
    origin_of,
    refuse_too_many,
)

STORE_THREADS = 40
PERSON_BURST = 60  # requests of one person at once, counted apart for GET and POST
ADDRESS_BURST = 300  # requests without a session at once: a class of thirty opens the page behind one address
SIGN_IN_AGAIN = "You are not signed in: open your personal link again."


class Gate:
    """Everything that the endpoints share. One for each app, as `app.state.gate`.

    Args:
        store: the tasks and judgments.
        url: the public address of the site, or None if it is the address that the browser names.
        secure: whether people reach the site by https.
        person_limit, address_limit, link_limit: as in `create_app`.
    """

    def __init__(
        self,
        store: Store,
        *,
        url: str | None,
        secure: bool,
        person_limit: float | None,
        address_limit: float | None,
        link_limit: float | None,
    ):
        self.store = store
        self.url = url.rstrip("/") if url else None
        self.secure = secure
        self.sessions = Sessions(store.secret_key())
        self.cache = RenderCache()
        self._person_limiter = RateLimiter(person_limit, burst=PERSON_BURST)
        self._address_limiter = RateLimiter(address_limit, burst=ADDRESS_BURST)
        self._link_limiter = RateLimiter(link_limit, burst=link_limit or 0)
        self._threads: anyio.CapacityLimiter | None = None

    def base_url(self, request: Request) -> str:
        """The address of the site for links, without a slash at its end."""
        if self.url:
            return self.url
        scheme = "https" if self.is_https(request) else "http"
        return f"{scheme}://{request.url.netloc}"

    def link(self, request: Request, token: str) -> str:
        """The secret link of a person, to be opened in the browser."""
        return f"{self.base_url(request)}/join/{token}"

    def is_https(self, request: Request) -> bool:
        """Whether the browser reaches the site by https. A proxy may hide it, but then the public address tells."""
        if self.secure or request.url.scheme == "https":
            return True
        host = request.headers.get("host", "").lower()
        return self.url is not None and origin_of(self.url) == f"https://{host}"

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        """Runs a function in one of our own threads. Those that read static files do not wait for these."""
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(STORE_THREADS)  # needs the running event loop
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    def count_stranger(self, request: Request) -> None:
        """Counts a request without a valid session. Raises a 429 if its address has sent too many of them."""
        wait = self._address_limiter.take(client_address(request))
        if wait:
            refuse_too_many(wait, "requests without a session from this address")

    def count_failing_link(self, request: Request) -> None:
        """Counts a link that nobody has. Raises a 429 if its address has tried too many of them."""
        wait = self._link_limiter.take(client_address(request))
        if wait:
            refuse_too_many(wait, "links that do not exist from this address")

    def cookie_name(self, request: Request) -> str:
        """The name of the cookie that holds the session."""
        return self.sessions.cookie_name(is_https=self.is_https(request))

    def has_cookie(self, request: Request) -> bool:
        """Whether the request has a cookie of ours, valid or not."""
        return self.cookie_name(request) in request.cookies

    def count_if_stranger(self, request: Request) -> None:
        """Counts a request for something that anybody may have, if it comes without a valid session."""
        if self._read_session(request) is None:
            self.count_stranger(request)

    def session_of(self, request: Request) -> Session:
        """The session of the request's cookie. Only its signature is checked here.

        Raises a 401 without a session, and a 429 if the person has sent too many requests.
        """
        session = self._read_session(request)
        if session is None:
            self.count_stranger(request)
            raise HTTPException(401, SIGN_IN_AGAIN)
        is_post = request.method == "POST"
        wait = self._person_limiter.take((session.annotator_id, is_post))
        if wait:
            refuse_too_many(wait, "requests")
        return session

    def _read_session(self, request: Request) -> Session | None:
        return self.sessions.read(request.cookies.get(self.cookie_name(request)))

    def check_post(self, request: Request, session: Session) -> None:
        """Refuses a POST that the person's own page did not send."""
        check_origin(request, url=self.url, secure=self.is_https(request))
        check_csrf(request, self.sessions, session)

    async def run(self, request: Request, session: Session, work: Callable, *, role: str | None = None) -> Any:
        """Does the work of a signed-in person.

        Args:
            request: for its address.
            session: from `session_of`.
            work: called in a thread with the `store.Annotator`.
            role: "admin" refuses everybody else with a 403.

        Returns:
            What the work returned. Raises a 401 if the link of the session is not the person's link any more.
        """

        def look_up_and_work():
            annotator = self.store.annotator(session.annotator_id)
            if not self.sessions.is_current(session, annotator):
                return None, False
            if role is not None and annotator.role != role:
                raise HTTPException(403, f"This is only for people with the role {role}.")
            return work(annotator), True

        result, is_signed_in = await self.in_thread(look_up_and_work)
        if not is_signed_in:
            self.count_stranger(request)
            raise HTTPException(401, SIGN_IN_AGAIN)
        return result

    async def answer(self, request: Request, session: Session, work: Callable, *, role: str | None = None) -> Response:
        """As `run`. The work returns what is sent as JSON."""

        def work_and_write(annotator) -> bytes:
            return to_json(work(annotator))

        content = await self.run(request, session, work_and_write, role=role)
        return Response(content, media_type="application/json")


def to_json(value: Any) -> bytes:
    """JSON in UTF-8. Not-a-number becomes an error here instead of broken JSON in the browser."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")

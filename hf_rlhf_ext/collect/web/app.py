"""The judging site as a Starlette app: pages, the API of the page, and errors in one line."""

import logging
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from ...errors import UserError
from ..answers import FLAGS, Conflict, NotLeased
from ..store import Store, StoreUnavailable
from .admin import admin_routes
from .gate import Gate
from .rendering import show_task
from .security import (
    COOKIE_SECONDS,
    MAX_BODY_BYTES,
    SECURITY_HEADERS,
    AnnouncedSizeLimit,
    SecurityHeaders,
    TrustedProxy,
    check_seconds,
    check_task_id,
    read_fields,
)

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
MAX_TOKEN_CHARACTERS = 200
MAX_MESSAGE_CHARACTERS = 300
BUSY_SECONDS = 1  # after which a browser should try again if the store was busy

# What Starlette's own errors say, and what we say instead.
STARLETTE_MESSAGES = {
    "Not Found": "There is no such page.",
    "Method Not Allowed": "This address does not know this method.",
    "Content Too Large": f"The request is too large: at most {MAX_BODY_BYTES:,} bytes are accepted.",
}

ERROR_PAGES = {
    401: "landing.html",
    403: "not_admin.html",
    404: "unknown_link.html",
    429: "too_many.html",
}

# A cookie with SameSite=Strict is not sent while a browser follows a link from a web mail, nor on the redirect to
# /judge. This page opens /judge once more, now from our own site, so that the cookie is sent.
SAME_SITE_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={path}">
<title>Opening</title></head><body><p><a href="{path}">Continue</a></p></body></html>
"""


def create_app(
    store: Store,
    *,
    url: str | None = None,
    secure: bool = False,
    trusted_proxy: bool = False,
    person_limit: float | None = 900,
    address_limit: float | None = 600,
    link_limit: float | None = 10,
) -> Starlette:
    """The site on which people judge the tasks of a store.

    Args:
        store: the tasks and judgments. The caller closes it.
        url: the public address, such as `https://judge.example`, for links and for the check of origins. By default,
            the address that the browser names.
        secure: whether people reach the site by https: cookies are then sent by https only.
        trusted_proxy: whether all requests come through one reverse proxy. Only then the last entries of
            `X-Forwarded-For` and `X-Forwarded-Proto` are believed.
        person_limit: POSTs a minute of one person in the long run, after a burst of 60, and as many GETs. None means no
            limit, here and below.
        address_limit: requests a minute of one address that have no valid session, after a burst of 300.
        link_limit: failing links a minute of one address. Good links always work.

    Returns:
        The app. `app.state.notices` may be set to a function that returns lines for the admin page.
    """
    middleware = [Middleware(SecurityHeaders)]
    if trusted_proxy:
        middleware.append(Middleware(TrustedProxy))
    middleware.append(Middleware(AnnouncedSizeLimit, max_bytes=MAX_BODY_BYTES))
    middleware.append(Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES))

    app = Starlette(
        routes=_routes(),
        middleware=middleware,
        exception_handlers={
            HTTPException: _http_error,
            UserError: _user_error,
            StoreUnavailable: _store_error,
            Exception: _own_error,
        },
    )
    app.router.redirect_slashes = False  # such a redirect would name the host that the client sent
    app.state.gate = Gate(
        store,
        url=url,
        secure=secure,
        person_limit=person_limit,
        address_limit=address_limit,
        link_limit=link_limit,
    )
    return app


def _routes() -> list[BaseRoute]:
    return [
        Route("/", landing),
        Route("/join/{token}", join),
        Route("/judge", judge_page),
        Route("/admin", admin_page),
        Route("/api/session", get_session),
        Route("/api/task", get_task),
        Route("/api/judgments", post_judgment, methods=["POST"]),
        Route("/api/undo", post_undo, methods=["POST"]),
        *admin_routes(),
        Mount("/static", CountedStaticFiles(directory=STATIC)),
    ]


class CountedStaticFiles(StaticFiles):
    """Static files. Requests without a session count against their address."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        gate: Gate = request.app.state.gate
        gate.count_if_stranger(request)
        await super().__call__(scope, receive, send)


# ---- Pages ------------------------------------------------------------------------------------------------------


async def landing(request: Request) -> Response:
    """The page for people who have not opened their link."""
    gate: Gate = request.app.state.gate
    gate.count_if_stranger(request)
    return FileResponse(STATIC / "landing.html")


async def join(request: Request) -> Response:
    """Signs the owner of a secret link in. A good link works also from an address that tried too many bad ones."""
    gate: Gate = request.app.state.gate
    token = request.path_params["token"]
    annotator = None
    if len(token) <= MAX_TOKEN_CHARACTERS and token.isascii():
        annotator = await gate.in_thread(lambda: gate.store.annotator_of(token))
    if annotator is None:
        gate.count_failing_link(request)
        raise HTTPException(404, "This link is not valid (any more): ask for a new one.")

    path = "/admin" if annotator.role == "admin" else "/judge"
    response = RedirectResponse(path, status_code=303)
    response.set_cookie(
        gate.cookie_name(request),
        gate.sessions.cookie_for(annotator),
        max_age=COOKIE_SECONDS,
        path="/",
        secure=gate.is_https(request),
        httponly=True,
        samesite="strict",
    )
    return response


async def judge_page(request: Request) -> Response:
    """The page on which a person judges."""
    return await _page(request, "judge.html", role=None)


async def admin_page(request: Request) -> Response:
    """The page of the admin."""
    return await _page(request, "admin.html", role="admin")


async def _page(request: Request, name: str, *, role: str | None) -> Response:
    gate: Gate = request.app.state.gate
    comes_from_elsewhere = request.headers.get("sec-fetch-site") == "cross-site"
    if comes_from_elsewhere and not gate.has_cookie(request):
        gate.count_stranger(request)
        return HTMLResponse(SAME_SITE_PAGE.format(path=request.scope["path"]))

    session = gate.session_of(request)
    await gate.run(request, session, lambda annotator: None, role=role)
    return FileResponse(STATIC / name)


# ---- API --------------------------------------------------------------------------------------------------------


async def get_session(request: Request) -> Response:
    """Who is signed in, and what the page needs once."""
    gate: Gate = request.app.state.gate
    session = gate.session_of(request)

    def work(annotator) -> dict:
        settings = gate.store.settings()
        return {
            "name": annotator.name,
            "role": annotator.role,
            "csrf": gate.sessions.csrf_token(session),
            "title": settings.title,
            "instructions_html": gate.cache.render(settings.instructions or ""),
            "categories": list(settings.categories),
            "flags": list(FLAGS),
            "paused": settings.paused,
            "progress": gate.store.progress(annotator.id),
        }

    return await gate.answer(request, session, work)


async def get_task(request: Request) -> Response:
    """The task that the person should judge now."""
    gate: Gate = request.app.state.gate
    session = gate.session_of(request)

    def work(annotator) -> dict:
        shown = gate.store.next_task(annotator.id)
        return _with_progress(gate, annotator, shown)

    return await gate.answer(request, session, work)


async def post_judgment(request: Request) -> Response:
    """Saves an answer. When the reply leaves, the answer is on disk."""
    gate: Gate = request.app.state.gate
    session = gate.session_of(request)
    gate.check_post(request, session)
    body = await read_fields(request, {"task": int, "key": str, "seconds": (int, float), "answer": dict})
    check_task_id(body["task"])
    check_seconds(body["seconds"])

    def work(annotator) -> dict:
        judged, shown = gate.store.judge_and_next(
            annotator.id, body["task"], body["key"], body["answer"], float(body["seconds"])
        )
        return {"saved": True, "repeat": judged.is_repeat, "next": _with_progress(gate, annotator, shown)}

    return await gate.answer(request, session, work)


async def post_undo(request: Request) -> Response:
    """Takes the person's last judgment back and shows its task again."""
    gate: Gate = request.app.state.gate
    session = gate.session_of(request)
    gate.check_post(request, session)
    body = await read_fields(request, {"key": str})

    def work(annotator) -> dict:
        shown = gate.store.undo(annotator.id, body["key"])
        if shown is None:
            shown = gate.store.next_task(annotator.id)
            return {"undone": False, "task": _with_progress(gate, annotator, shown), "answer": None}
        return {"undone": True, "task": _with_progress(gate, annotator, shown), "answer": shown.answer}

    return await gate.answer(request, session, work)


def _with_progress(gate: Gate, annotator, shown) -> dict:
    """A task as the page gets it, or null if there is none now."""
    return {
        "name": annotator.name,  # a page notices by it that its browser is signed in as someone else by now
        "task": None if shown is None else show_task(shown, gate.cache),
        "paused": gate.store.settings().paused,
        "progress": gate.store.progress(annotator.id),
    }


# ---- Errors -----------------------------------------------------------------------------------------------------


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    line = " ".join(message.split())
    if len(line) > MAX_MESSAGE_CHARACTERS:
        line = line[:MAX_MESSAGE_CHARACTERS] + "…"
    line = line.encode("utf-8", "replace").decode("utf-8")
    return JSONResponse({"error": line}, status_code=status, headers=headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    page = ERROR_PAGES.get(error.status_code)
    is_browser = "text/html" in request.headers.get("accept", "")
    if page and is_browser and not request.scope["path"].startswith("/api/"):
        return FileResponse(STATIC / page, status_code=error.status_code, headers=error.headers)

    message = STARLETTE_MESSAGES.get(error.detail, error.detail)
    return _error(error.status_code, message, headers=error.headers)


async def _user_error(request: Request, error: UserError) -> Response:
    is_conflict = isinstance(error, Conflict | NotLeased)
    return _error(409 if is_conflict else 400, str(error))


async def _store_error(request: Request, error: StoreUnavailable) -> Response:
    # The words may name files of this machine. They are for the person who runs the server.
    log.error("The store could not be used: %s", error)
    message = "The store could not be used just now, nothing was changed: try again."
    return _error(503, message, headers={"Retry-After": str(BUSY_SECONDS)})


async def _own_error(request: Request, error: Exception) -> Response:
    # Outside of all middleware, so it has to bring the headers itself. Starlette raises the error again for the log.
    response = _error(500, "The server has an error, which its log explains: try again.")
    response.headers.update(SECURITY_HEADERS)
    response.headers["Cache-Control"] = "no-store"
    return response

"""Who may do what on the judging site: sessions, CSRF tokens, origins, response headers, rate limits, sizes.

A person signs in by a secret link. The cookie that follows holds the person's id, a fingerprint of the link and a
signature. The key of the signature is in the store, so a restart signs nobody out. The fingerprint is compared with the
person's current link on every request, so a new link or a deactivation ends all older sessions at once.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE_SECONDS = 90 * 24 * 3600
MAX_BODY_BYTES = 128 * 1024  # the longest answer and comment have 22,000 characters, of up to 4 bytes each
MAX_ID_DIGITS = 18  # larger integers do not fit into SQLite
MAX_SECONDS = 30 * 24 * 3600

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex, nofollow",
}


# ---- Middleware -------------------------------------------------------------------------------------------------


class SecurityHeaders:
    """Pure ASGI middleware: adds `SECURITY_HEADERS` to every response. Only static files may be kept by a cache."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        is_static = scope["path"].startswith("/static/")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                # "no-cache" keeps the file, but asks each time whether it is still the same.
                headers["Cache-Control"] = "no-cache" if is_static else "no-store"
            await send(message)

        await self.app(scope, receive, send_with_headers)


class TrustedProxy:
    """Pure ASGI middleware for a site behind one reverse proxy: reads address and scheme that the proxy added.

    Only the last entry of `X-Forwarded-For` comes from our own proxy. All earlier ones can be made up by the client.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            address = _last_entry(headers.getlist("x-forwarded-for"))
            scheme = _last_entry(headers.getlist("x-forwarded-proto"))
            if address:
                scope["client"] = (address, 0)
            if scheme in ("http", "https"):
                scope["scheme"] = scheme
        await self.app(scope, receive, send)


def _last_entry(values: list[str]) -> str:
    if not values:
        return ""
    return values[-1].split(",")[-1].strip()


class AnnouncedSizeLimit:
    """Pure ASGI middleware: answers 413 to a request whose `Content-Length` is too large, before its body is read.

    A body without `Content-Length` is counted while it arrives, by Starlette's `RequestBodyLimitMiddleware`.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length = Headers(scope=scope).get("content-length", "0")
            if not length.isdecimal() or len(length) > 18 or int(length) > self.max_bytes:
                message = f"The request is too large: at most {self.max_bytes:,} bytes are accepted."
                response = JSONResponse({"error": message}, status_code=413, headers={"Connection": "close"})
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


# ---- Rate limits ------------------------------------------------------------------------------------------------


class RateLimiter:
    """Token buckets, one for each key. Used in the event loop only, so it needs no lock.

    Args:
        per_minute: how many calls a key may make in the long run. None means no limit.
        burst: how many of them at once.
        max_keys: the least recently used keys are forgotten beyond this number, so the memory is bounded.
    """

    def __init__(self, per_minute: float | None, burst: float, *, max_keys: int = 20_000):
        self.per_second = None if per_minute is None else per_minute / 60
        self.burst = burst
        self.max_keys = max_keys
        self._buckets: OrderedDict[Any, tuple[float, float]] = OrderedDict()  # key -> (tokens, time of them)

    def take(self, key: Any, now: float | None = None) -> float:
        """Takes one token.

        Args:
            key: who calls.
            now: seconds of a monotonic clock. For tests.

        Returns:
            0.0 if the call is allowed, else the seconds to wait.
        """
        if self.per_second is None:
            return 0.0
        now = time.monotonic() if now is None else now
        tokens, then = self._buckets.pop(key, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)

        is_allowed = tokens >= 1
        if is_allowed:
            tokens -= 1
        self._buckets[key] = (tokens, now)
        if len(self._buckets) > self.max_keys:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1 - tokens) / self.per_second

    def __len__(self) -> int:
        return len(self._buckets)


def client_address(request: Request) -> str:
    """The address that limits count against. Of IPv6, the network of one customer (/64)."""
    if request.client is None:
        return "unknown"
    host = _without_port(request.client.host)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]  # what a proxy sent; cut, as it is kept in memory
    if address.version == 4:
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)  # else all of IPv4 would be one network
    return str(ipaddress.ip_network((address, 64), strict=False))


def _without_port(host: str) -> str:
    """`192.0.2.7:5678` and `[2001:db8::1]:5678` without the port, which some proxies send too."""
    if host.startswith("["):
        return host[1:].split("]")[0]
    if host.count(":") == 1:
        return host.split(":")[0]
    return host


def refuse_too_many(seconds: float, what: str) -> NoReturn:
    """Raises the 429 with `Retry-After` in whole seconds."""
    wait = max(1, math.ceil(seconds))
    raise HTTPException(429, f"Too many {what}: wait {wait} s and try again.", headers={"Retry-After": str(wait)})


# ---- Sessions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """A cookie whose signature is right. Whether its link is still the person's link is another question."""

    annotator_id: int
    fingerprint: str  # of the secret link
    cookie: str


class Sessions:
    """Makes and checks the values of cookies and CSRF tokens.

    Args:
        key: 32 secret bytes, from the store.
    """

    def __init__(self, key: bytes):
        self._key = key
        # Browsers keep one cookie of a name for all ports of a host. So each store has a name of its own, and somebody
        # can work at two sites of one machine.
        self._cookie_name = f"session_{self._mac('name', '')[:8]}"

    def cookie_name(self, *, is_https: bool) -> str:
        """The name of the cookie. On https, its prefix keeps other hosts of our domain from setting it."""
        return f"__Host-{self._cookie_name}" if is_https else self._cookie_name

    def cookie_for(self, annotator) -> str:
        """The value of the cookie for a `store.Annotator`, who has just shown the secret link."""
        return self._signed(annotator.id, self._fingerprint(annotator))

    def read(self, cookie: str | None) -> Session | None:
        """The session of a cookie. None if there is no cookie or we did not make it. Needs no look into the store."""
        parts = (cookie or "").split(".")
        if len(parts) != 3 or not parts[0].isascii() or not parts[0].isdecimal() or len(parts[0]) > MAX_ID_DIGITS:
            return None
        annotator_id, fingerprint = int(parts[0]), parts[1]
        if not _is_same(cookie, self._signed(annotator_id, fingerprint)):
            return None
        return Session(annotator_id, fingerprint, cookie)

    def is_current(self, session: Session, annotator) -> bool:
        """Whether the person is active and the session was opened with the person's current link."""
        if annotator is None or not annotator.active:
            return False
        return _is_same(session.fingerprint, self._fingerprint(annotator))

    def csrf_token(self, session: Session) -> str:
        """What each POST of this session has to carry in `X-CSRF-Token`."""
        return self._mac("csrf", session.cookie)

    def _fingerprint(self, annotator) -> str:
        return self._mac("link", f"{annotator.id}.{annotator.token_hash}")[:22]

    def _signed(self, annotator_id: int, fingerprint: str) -> str:
        mac = self._mac("session", f"{annotator_id}.{fingerprint}")
        return f"{annotator_id}.{fingerprint}.{mac}"

    def _mac(self, purpose: str, text: str) -> str:
        digest = hmac.new(self._key, f"{purpose}:{text}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _is_same(left: str, right: str) -> bool:
    # As bytes: compare_digest refuses text that is not ASCII.
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode("utf-8", "replace"))


# ---- Checks of a POST -------------------------------------------------------------------------------------------


def check_origin(request: Request, *, url: str | None, secure: bool) -> None:
    """Refuses a POST that another site made the browser send.

    Args:
        request: has `Origin`, or at least `Sec-Fetch-Site`. Browsers send them and pages cannot change them.
        url: the public address of this site, if it is known.
        secure: whether people reach this site by https.
    """
    fetch_site = request.headers.get("sec-fetch-site")
    if fetch_site not in (None, "same-origin", "none"):
        raise HTTPException(403, "This request comes from another site and was refused.")

    origin = request.headers.get("origin")
    if origin is None:
        if fetch_site is None:
            raise HTTPException(403, "A POST needs the header Origin with the address of this site.")
        return

    scheme = "https" if secure else request.url.scheme
    ours = {f"{scheme}://{request.headers.get('host', '')}".lower()}
    if url:
        ours.add(origin_of(url))
    if origin.lower() in ours:
        return
    if origin.lower() == f"https://{request.headers.get('host', '')}".lower():
        # Our own page, behind a proxy for https of which nobody told us.
        raise HTTPException(403, "The server does not know its https address: start it with --url, the public address.")
    raise HTTPException(403, "This request comes from another site and was refused.")


def origin_of(url: str) -> str:
    """Scheme, host and port of an address, as browsers write them in `Origin`."""
    parts = urlsplit(url)
    default_port = {"http": 80, "https": 443}.get(parts.scheme)
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{host}]"
    port = "" if parts.port in (None, default_port) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}".lower()


def check_csrf(request: Request, sessions: Sessions, session: Session) -> None:
    """Refuses a POST without the CSRF token of its session."""
    token = request.headers.get("x-csrf-token", "")
    if not _is_same(token, sessions.csrf_token(session)):
        raise HTTPException(403, "The CSRF token does not fit this session: reload the page.")


async def read_fields(request: Request, fields: dict[str, type | tuple[type, ...]]) -> dict:
    """The JSON object in the body of a POST.

    Args:
        request: with `Content-Type: application/json`. A form of another site cannot send that.
        fields: name and type of each field. All are required, and no other is accepted.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, "The body must be JSON: send Content-Type: application/json.")

    try:
        data = await request.body()
    except ClientDisconnect:
        # Nobody reads this answer. It only keeps the log free of a traceback.
        raise HTTPException(400, "The request ended before its end.") from None
    body = _parse_json(data)
    if not isinstance(body, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    for name in body:
        if name not in fields:
            raise HTTPException(400, f"Unknown field {name[:40]!r}: send {', '.join(fields)}.")
    for name, kind in fields.items():
        if name not in body:
            raise HTTPException(400, f"The field {name} is missing.")
        # bool is a subclass of int, but true is no number.
        is_wrong_bool = isinstance(body[name], bool) and kind is not bool
        if is_wrong_bool or not isinstance(body[name], kind):
            raise HTTPException(400, f"The field {name} has the wrong type.")
    return body


def check_task_id(task_id: int) -> None:
    """Refuses a number that no task can have."""
    if not 0 <= task_id < 10**MAX_ID_DIGITS:
        raise HTTPException(400, "The field task is no number of a task.")


def check_seconds(seconds: float) -> None:
    """Refuses a time that nobody can have spent on a task."""
    if not 0 <= seconds <= MAX_SECONDS:
        raise HTTPException(400, f"The field seconds must be between 0 and {MAX_SECONDS:,}.")


def _parse_json(data: bytes) -> Any:
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
        # Refuses 1e999, which is no finite number, and replaces halves of surrogate pairs, which UTF-8 cannot hold.
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return json.loads(text.encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not valid JSON.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

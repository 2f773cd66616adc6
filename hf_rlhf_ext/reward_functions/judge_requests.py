"""Requests to an OpenAI-compatible endpoint for chat, with retries. Of httpx2, which comes with huggingface-hub.

`huggingface_hub.InferenceClient` takes a `base_url` too, but it does not retry, refuses every request in offline mode,
a server of this machine included, and sends the user's Hub token where no key is given.
"""

import contextlib
import ipaddress
import json
import os
import random
import re
import socket
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from ..errors import UserError

TRY_AGAIN = frozenset((408, 409, 425, 429))
"""Statuses, besides those of servers (500 and above), after which the same request may succeed."""
FIRST_WAIT = 0.5
"""Seconds before the second try; each further wait is twice as long."""
LONGEST_WAIT = 60.0
"""Seconds. A server that asks for a longer wait is not asked again for this completion."""


LARGEST_REPLY = 16 * 2**20
"""Bytes of one reply."""
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class Unanswered(Exception):
    """No usable reply to one request, also after retries. The message is the reason in a few words.

    Args:
        reason: the reason.
        is_of_server: whether it says nothing of this request: another one may fail in the same way.
    """

    def __init__(self, reason: str, *, is_of_server: bool = True):
        super().__init__(reason)
        self.is_of_server = is_of_server


class _TryAgain(Exception):
    """One try has failed, and the next may not. It has the reason, and how long the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Stopped(Exception):
    """The caller has stopped waiting."""


class ChatEndpoint:
    """A server with the route `chat/completions`. Threads may share it.

    Args:
        base_url: address of the server up to that route, such as `http://127.0.0.1:8000/v1`.
        key_variable: name of the environment variable with the key; `None` sends no key. The key is read when a request
            is made, and stored nowhere.
        timeout: seconds for one try.
        retries: number of further tries.

    Raises:
        UserError: the address is none, has a user or a password, or would send a key without encryption.
    """

    def __init__(self, base_url: str, *, key_variable: str | None, timeout: float, retries: int):
        self.url = f"{_checked_url(base_url, key_variable)}/chat/completions"
        self.host = urlsplit(self.url).netloc
        self.key_variable = key_variable
        self.timeout = timeout
        self.retries = retries
        self._client: httpx2.Client | None = None
        self._streams: list[Any] = []
        self._stopping = threading.Event()
        self._random = random.SystemRandom()  # the generators of training are not touched

    def __enter__(self) -> "ChatEndpoint":
        self._stopping.clear()
        self._streams.clear()
        headers = {}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {_key(self.key_variable)}"
        # A proxy does not reach a server of this machine.
        self._client = httpx2.Client(headers=headers, timeout=self.timeout, trust_env=not is_loopback(self.url))
        return self

    def __exit__(self, *error: Any) -> None:
        self._client.close()
        self._client = None

    def stop(self) -> None:
        """Ends all requests that are being made, and waits between tries: they raise `Stopped`."""
        self._stopping.set()
        for stream in self._streams.copy():
            _end_connection(stream)

    def reply(self, body: dict[str, Any]) -> str:
        """Text of the first choice.

        Raises:
            Unanswered: there is none, after all tries or because the server refuses this request.
            UserError: the server refuses every request: a wrong key or a wrong address.
            Stopped: `stop` was called.
        """
        for tried in range(self.retries + 1):
            try:
                return self._one_try(body)
            except _TryAgain as error:
                problem = error
            wait = self._backoff(tried) if problem.wait is None else problem.wait
            if wait > LONGEST_WAIT:
                raise Unanswered(f"{problem}, to be asked again in {wait:.0f} seconds")
            if self._stopping.wait(wait if tried < self.retries else 0):
                raise Stopped
        raise Unanswered(str(problem))

    def _one_try(self, body: dict[str, Any]) -> str:
        if self._stopping.is_set():
            raise Stopped
        deadline = time.monotonic() + self.timeout
        content = bytearray()
        try:
            with self._client.stream("POST", self.url, json=body, extensions={"trace": self._note}) as response:
                for part in response.iter_bytes():
                    content += part
                    # The client's own limit is for each part: a server may send one every second for ever.
                    if time.monotonic() > deadline:
                        raise _TryAgain("no reply in time")
                    if len(content) > LARGEST_REPLY:
                        raise Unanswered("a reply of more than 16 MB")
        except httpx2.TransportError as error:
            raise _TryAgain(_problem_of_connection(error)) from None
        except httpx2.RequestError:
            raise _TryAgain("a reply that cannot be decoded") from None
        status = response.status_code
        if status in TRY_AGAIN or status >= 500:
            raise _TryAgain(f"status {status}", _asked_wait(response.headers.get("Retry-After", "")))
        if status != 200:
            raise self._refusal(status, bytes(content))
        return _text_of(bytes(content))

    def _note(self, event: str, details: dict[str, Any]) -> None:
        """Notes each connection when it is made, so that `stop` can end it."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._streams.append(details["return_value"])
            if self._stopping.is_set():
                _end_connection(details["return_value"])

    def _refusal(self, status: int, content: bytes) -> Exception:
        """The error of a status after which the same request would fail again."""
        if status in (401, 403):
            key = "set api_key_env to the environment variable with your key"
            if self.key_variable is not None:
                key = f"check the key in {self.key_variable}"
            return UserError(f"judge: {self.host} refuses access (status {status}): {key}.")
        said = self._said(content)
        if status in (404, 405) or 300 <= status < 400:
            return UserError(
                f"judge: {self.url} is not there (status {status}{said}): check model and base_url, which ends before "
                "/chat/completions, as in http://127.0.0.1:8000/v1."
            )
        return Unanswered(f"status {status}{said}", is_of_server=False)

    def _said(self, content: bytes) -> str:
        """What a server says of an error, shortened to one line; empty where it says nothing, or the key."""
        try:
            error = json.loads(content)["error"]
            text = error if isinstance(error, str) else error["message"]
            line = " ".join(text.split())[:160]
        except (ValueError, LookupError, TypeError, AttributeError):
            return ""
        key = os.environ.get(self.key_variable or "", "").strip()
        return "" if not line or (key and (key in text or key[-4:] in text)) else f", {line!r}"

    def _backoff(self, tried: int) -> float:
        """Seconds before the next try. A random part keeps parallel requests from coming back together."""
        return min(LONGEST_WAIT, FIRST_WAIT * 2**tried) * self._random.uniform(0.75, 1.25)


def _end_connection(stream: Any) -> None:
    """Ends a connection, which wakes the thread that waits for a reply."""
    connection = stream.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):  # closed already
            connection.shutdown(socket.SHUT_RDWR)


def is_loopback(url: str) -> bool:
    """Whether an address is one of this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked_url(base_url: str, key_variable: str | None) -> str:
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_address = is_address and not parts.query and not parts.fragment and not re.search(r"\s", base_url)
    except (ValueError, AttributeError, TypeError):
        is_address = False
    if not is_address:
        raise UserError("judge: base_url is no address: write it as http://127.0.0.1:8000/v1.")
    if parts.username is not None or parts.password is not None:
        raise UserError("judge: base_url has a user or a password, which would be recorded: use api_key_env.")
    if key_variable is not None and not VARIABLE.fullmatch(key_variable):  # it may be the key itself
        raise UserError(
            "judge: api_key_env is no name of an environment variable in capital letters: give the name, such as "
            "OPENAI_API_KEY, and never the key."
        )
    if key_variable is not None and parts.scheme == "http" and not is_loopback(base_url):
        raise UserError(f"judge: a key would be sent to {parts.netloc} in plain text: use https, or no api_key_env.")
    return base_url.rstrip("/").removesuffix("/chat/completions")


def _key(variable: str) -> str:
    """The key in an environment variable. Messages name the variable only."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"judge: the environment variable {variable} has no key: set it, or leave api_key_env out.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"judge: the environment variable {variable} has characters that no key has: check its value.")
    return key


def _problem_of_connection(error: httpx2.TransportError) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "no reply in time"
    return "no connection" if isinstance(error, httpx2.ConnectError) else "the connection was lost"


def _text_of(content: bytes) -> str:
    """The text of the first choice of a reply."""
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _TryAgain("a reply that is no chat completion") from None  # some servers send errors with status 200
    if choice.get("finish_reason") == "length":  # `Score: 10` may have become `Score: 1`
        raise Unanswered("a reply that is cut off: raise max_tokens", is_of_server=False)
    if isinstance(text, list):  # parts
        text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
    if not isinstance(text, str):
        raise Unanswered("a reply without text", is_of_server=False)
    return text


def _asked_wait(header: str) -> float | None:
    """Seconds of the header `Retry-After`, which is a number or a date; `None` without a readable one."""
    text = header.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())

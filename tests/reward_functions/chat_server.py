"""A server with the route `chat/completions` on loopback: it answers as a test tells it to, and keeps what it got."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One answer of the server.

    Attributes:
        text: the reply of the judge.
        status: HTTP status.
        headers: further headers.
        seconds: how long the server takes.
        body: sent in place of a chat completion.
    """

    text: str = "Fine.\nScore: 7"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    body: bytes | None = None


@dataclass
class ChatServer:
    """What the server got and does.

    Attributes:
        base_url: its address, up to the route.
        answer: called with the text of each request and its number, from 0.
        requests: bodies, in the order of arrival.
        keys: headers `Authorization`.
        paths: paths of the requests.
        largest: largest number of requests at the same time.
    """

    base_url: str
    answer: Callable[[str, int], Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    largest: int = 0
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self.paths.append(handler.path)
            self._running += 1
            self.largest = max(self.largest, self._running)
        try:
            answer = self.answer(body["messages"][-1]["content"], number)
            time.sleep(answer.seconds)
            content = answer.body
            if content is None:
                content = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer.text}}]}).encode()
        finally:
            with self._lock:
                self._running -= 1
        handler.send_response(answer.status)
        for name, value in {"Content-Length": str(len(content)), **answer.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def chat_server(answer: Callable[[str, int], Answer] | None = None) -> Iterator[ChatServer]:
    """Runs a server for the length of a block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            try:
                state.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a client that did not wait

        def log_message(self, *values):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1", answer or (lambda text, number: Answer()))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

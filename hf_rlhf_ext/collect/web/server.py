"""Running the judging site with uvicorn: in a thread for programs and tests, or in the foreground for a command."""

import ipaddress
import socket
import sys
import threading
import time
from asyncio import Transport

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import UserError, first_line

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8347
START_SECONDS = 20.0
REQUEST_SECONDS = 20.0  # until the first request of a new connection has arrived
STOP_SECONDS = 5  # to finish requests that are being answered


class Server:
    """Runs an app in a thread, as a context manager.

    Args:
        app: any ASGI app, such as that of `create_app`.
        host: address to listen on. Only this machine can reach the default.
        port: 0 takes a free one.

    Attributes:
        url: the address of the site, without a slash at its end.

    Raises:
        UserError: if the address cannot be used.
    """

    def __init__(self, app, host: str = DEFAULT_HOST, port: int = 0):
        self._socket = open_socket(host, port)
        self.url = url_of(self._socket, host)
        self._server = uvicorn.Server(_config(app))
        self._thread = threading.Thread(target=self._run, name="judging-site", daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        end = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                self._socket.close()
                raise UserError(f"{self.url}: the server did not start, see the messages above.")
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Lets requests that are being answered finish, then stops."""
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS + 5)
        self._socket.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


def serve_forever(app, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> None:
    """Runs an app until Ctrl-C or a signal to end.

    Args:
        app: any ASGI app.
        host: address to listen on. Another one than this machine's own is announced with a warning.
        port: 0 takes a free one.

    Raises:
        UserError: if the address cannot be used.
    """
    listener = open_socket(host, port)
    if not is_loopback(host):
        warning = (
            f"Warning: {host} may be reached by other machines, without encryption: put a reverse proxy with https"
        )
        print(f"{warning} in front of it.", file=sys.stderr, flush=True)
    server = uvicorn.Server(_config(app))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again after it has stopped in good order
    finally:
        listener.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. With it, the port is known before the server runs.

    Raises:
        UserError: if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        message = f"cannot listen on {host} port {port} ({first_line(error)}): choose another --port or --host."
        raise UserError(message) from None

    # Its connections inherit this. Without it, the second packet of each reply waits 40 ms for an acknowledgment, as
    # asyncio turns the delay off only for sockets that were made in another way.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """The address of a site for a browser on this machine."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):
        host = DEFAULT_HOST
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"


class HttpProtocol(H11Protocol):
    """HTTP by h11, which limits the size of headers. Connections on which nobody asks for anything are closed.

    uvicorn keeps such connections forever, so that one machine could use up all that the process may open.
    """

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self._close_without_request)

    def _close_without_request(self) -> None:
        has_request = self.cycle is not None
        if not has_request and not self.transport.is_closing():
            self.transport.close()


def _config(app) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        log_level="warning",
        access_log=False,  # it would hold the secret links
        proxy_headers=False,  # else uvicorn believes X-Forwarded-For of every client on this machine
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=STOP_SECONDS,
    )

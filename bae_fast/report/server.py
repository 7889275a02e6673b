"""A page and its calls over HTTP, on this machine alone.

    GET  /             the page
    POST /api/NAME     a JSON object in, a JSON object out

Only names of this machine are answered to (``Host``), so a page of another site cannot reach the
server through a name that it points here; a browser's request must come from the page itself
(``Origin``), and a call must be JSON, which no form of another site can send. Whatever goes wrong
is a JSON object with one line, ``error``, and a fitting status.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Call = Callable[[dict[str, Any]], dict[str, Any]]

# bytes of a call; a prompt is text that a person types
MAX_BYTES = 2**16

# seconds without a byte after which a connection is closed
_PATIENCE = 30

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class PageServer(ThreadingHTTPServer):
    """Serves one page and its calls until it is shut down; calls run one at a time.

    Attributes:
        address: where a browser finds the page.
        n_calls: calls that were answered, errors included.
    """

    daemon_threads = True

    def __init__(
        self,
        page: str,
        calls: Mapping[str, Call],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Listen.

        Args:
            page: HTML.
            calls: function by name; a ValueError or TypeError of one is the caller's fault.
            host: an address of this machine, such as 127.0.0.1, ::1 or localhost.
            port: 0 takes a free one.
            max_bytes: the largest body of a call.

        Raises:
            ValueError: a host that is not of this machine, or a port out of range.
            OSError: the port is taken.
        """
        if not _is_loopback(host):
            raise ValueError(f"host must be an address of this machine alone; got {host!r}")
        if not 0 <= port < 2**16:
            raise ValueError(f"port must lie in 0 to 65535; got {port}")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.publish(page, calls)
        self.max_bytes = max_bytes
        self.turn = threading.Lock()
        self.n_calls = 0
        super().__init__((host, port), _Handler)

    def publish(self, page: str, calls: Mapping[str, Call]) -> None:
        """Serve this page and these calls from now on."""
        self.page, self.calls = page.encode("utf-8"), dict(calls)

    @property
    def address(self) -> str:
        """The address that a browser on this machine opens."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def server_bind(self) -> None:
        """Bind without asking a name server who this machine is."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def server_close(self) -> None:
        """Close the address, wait for the call that is running, and answer no other: a thread of
        torch that outlives the interpreter would end it with an abort."""
        super().server_close()
        with self.turn:
            self.calls = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is the browser's affair."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, make: Callable[[], tuple[int, str, bytes]]) -> None:
        headers: dict[str, str] = {}
        try:
            self._check_caller()
            status, kind, body = make()
        except _RefusedError as error:
            status, kind, body = error.status, "application/json", _error(error)
            headers = error.headers
            self.close_connection = True  # what the call still sends is not read
        self._send(status, kind, body, headers)

    def _check_caller(self) -> None:
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name is None or not _is_loopback(name):
            raise _RefusedError(403, f"Host must be a name of this machine alone; got {host!r}")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise _RefusedError(403, f"Origin must be this server's; got {origin!r}")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _RefusedError(403, "Sec-Fetch-Site must be same-origin")

    def _asked(self) -> str:
        """The path of the request's address."""
        try:
            return urlsplit(self.path).path
        except ValueError as error:
            raise _RefusedError(
                400, f"the address must be a path on this server; got {self.path[:100]!r}"
            ) from error

    def _get(self) -> tuple[int, str, bytes]:
        path = self._asked()
        if path == "/":
            return 200, "text/html; charset=utf-8", self.server.page
        if path == "/favicon.ico":  # every browser asks
            return 204, "", b""
        if path.removeprefix("/api/") in self.server.calls:
            raise _RefusedError(405, f"{path} must be called with POST", Allow="POST")
        raise _RefusedError(404, f"no such page: {path[:100]}")

    def _post(self) -> tuple[int, str, bytes]:
        path = self._asked()
        if path == "/":
            raise _RefusedError(405, "/ must be read with GET", Allow="GET, HEAD")
        call = self.server.calls.get(path.removeprefix("/api/"))
        if call is None or not path.startswith("/api/"):
            raise _RefusedError(404, f"no such call: {path[:100]}")
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(415, "Content-Type must be application/json")
        value = self._body()
        try:
            with self.server.turn:
                if not self.server.calls:
                    raise _RefusedError(503, "the server has ended")
                self.server.n_calls += 1
                found = call(value)
        except _RefusedError:
            raise
        except (ValueError, TypeError) as error:
            raise _RefusedError(400, str(error)) from error
        except Exception as error:
            raise _RefusedError(500, f"{type(error).__name__}: {error}") from error
        try:
            text = json.dumps(found, separators=(",", ":"), allow_nan=False)
        except ValueError as error:  # NaN is no JSON
            raise _RefusedError(500, f"the answer is no JSON: {error}") from error
        return 200, "application/json", text.encode("ascii")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length")
        if length is None:
            raise _RefusedError(411, "Content-Length must be given")
        if not (length.isascii() and length.isdigit()):
            raise _RefusedError(400, f"Content-Length must be a number; got {length[:40]!r}")
        if len(length) > 18 or int(length) > self.server.max_bytes:
            raise _RefusedError(413, f"a call must have at most {self.server.max_bytes:,} bytes")
        body = self.rfile.read(int(length))
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, f"a call must be JSON: {error}") from error
        if not isinstance(value, dict):
            raise _RefusedError(400, f"a call must be an object; got {type(value).__name__}")
        return value

    def _send(self, status: int, kind: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **headers}.items():
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What Python's server refuses by itself, such as a method or a line that is too long."""
        self.close_connection = True
        self.command = getattr(self, "command", None) or "GET"
        text = message or HTTPStatus(code).phrase
        self._send(code, "application/json", _error(Exception(text)), {})

    def version_string(self) -> str:
        """What the answers say of the server."""
        return "bae-fast"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what a reader types stays out of logs."""


def _error(error: Exception) -> bytes:
    return json.dumps({"error": " ".join(str(error).split())[:500]}).encode("ascii")

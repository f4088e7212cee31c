"""A page and what it asks, served on this machine alone by the standard library.

Why: the device's own HTTP refuses pages on purpose; a demo needs one.

Invariants: it listens on 127.0.0.1 only. A request counts if it names that address as its host, and
a question if it is JSON, which no other site's page can send: so none can ask through somebody's
browser. The page may load nothing and speak to nobody but its own server. What is refused has
changed nothing.

Knows nothing about what is asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, Final

from edge_runtime.errors import ConfigError, HeadwaterError, RequestError

Answer = Callable[[bytes], bytes]
"""JSON to JSON. Raises: HeadwaterError, which the page is told."""

ADDRESS: Final = "127.0.0.1"
BODY_BYTES_MAX = 1 << 16
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageServer(ThreadingHTTPServer):
    """Serves `page` at `/`, and `answers`, as soon as there are some, by their names. It takes the
    port at once (0: any that is free), and serves from `serve_forever` on.

    Raises: ConfigError `port_taken`.
    """

    answers: Mapping[str, Answer] = MappingProxyType({})

    def __init__(self, port: int, page: bytes) -> None:
        self.page = page
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ConfigError(
                "port_taken",
                f"port {port} of {ADDRESS} cannot be used: {error.strerror}; nothing is served",
                "give another --port; 0 takes any that is free",
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of defects; a browser that went away is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # of a connection on which nothing comes
    wbufsize = -1  # an answer leaves in one piece: of two, the second would wait 40 ms

    def do_GET(self) -> None:
        if self.headers["Host"] not in self.server.hosts or self.path != "/":
            self._send(404, "text/plain", b"The page is at /\n")
            return
        self._send(200, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        try:
            answer = self._answer()
        except HeadwaterError as error:
            told = {"code": error.code, "error": error.message, "hint": error.hint}
            self._send(400, "application/json", json.dumps(told).encode())
        else:
            self._send(200, "application/json", answer)

    def _answer(self) -> bytes:
        answer = self.server.answers.get(self.path.removeprefix("/"))
        length = self.headers["Content-Length"] or ""
        fits = length.isdecimal() and int(length) <= BODY_BYTES_MAX
        self.close_connection = not fits  # what was not read would be taken for a request
        own = self.headers["Host"] in self.server.hosts
        if not (answer and fits and own and self.headers["Content-Type"] == "application/json"):
            raise RequestError(
                "bad_request", "this is no question that the page asks", "open the page at /"
            )
        return answer(self.rfile.read(int(length)))

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_said: object) -> None:
        """Nothing: the page shows what there is to see."""

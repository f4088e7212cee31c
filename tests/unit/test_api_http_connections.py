"""HTTP connections: how many there may be, and whose mistake ends one."""

from __future__ import annotations

import resource
import socket
from typing import Any

import httptools
import pytest

from edge_runtime.api.http import CONNECTIONS_MAX
from edge_runtime.api.http_connection import HttpConnection

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: device\r\n\r\n"


def connect(served: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), 10)


def answers(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    chunks = []
    while chunk := client.recv(1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def answered(client: socket.socket) -> bool:
    """Whether an answer comes that says yes."""
    data = b""
    while not data.endswith(b"}"):
        chunk = client.recv(1 << 16)
        assert chunk, f"closed after {data!r}"
        data += chunk
    return data.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_connection_above_the_bound_is_told_so_and_closed(served: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    open_ones = [connect(served) for _ in range(CONNECTIONS_MAX)]
    try:
        with connect(served) as one_more:
            said = answers(one_more)  # though it asked nothing
        assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"too_many_connections" in said
        assert b"connection: close" in said
        for client in open_ones[::200]:
            client.sendall(LIVE)
            assert answered(client)
        open_ones.pop().close()
        while served.server.statistics()["open"] >= CONNECTIONS_MAX:
            open_ones[0].sendall(LIVE)
            assert answered(open_ones[0])
        assert served.ask("GET", "/v2/health/live")[0] == 200
    finally:
        for client in open_ones:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_breaks_here_is_not_blamed_on_the_client(served: Any) -> None:
    class Faulty(HttpConnection):
        def on_url(self, target: bytes) -> None:
            raise AssertionError(target)

    with pytest.raises(httptools.HttpParserCallbackError):
        Faulty(served.server).data_received(LIVE)

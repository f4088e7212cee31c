"""Texts of any kind, over socket and HTTP: answered or refused, and the next is answered."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.api.http import HttpServer
from edge_runtime.api.socket import SocketServer
from edge_runtime.inference.checks import TEXT_MAX
from edge_runtime.runtime import Runtime

COUNT = pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
PREDICTED, FAILED = 130, 255
REFUSALS = {"out_of_range", "bad_request"}

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
surrogates = st.text(st.characters(categories=["Cs", "L"]), max_size=8)
texts = (
    unicode.map(str.encode)
    | st.tuples(unicode, st.integers(1, 3000)).map(lambda each: (each[0] * each[1]).encode())
    | surrogates.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=40)
)


class Served:
    """A runtime that reads texts behind a socket, and a device's HTTP."""

    def __init__(self, wire: socket.socket, web: http.client.HTTPConnection) -> None:
        self.wire, self.web = wire, web

    def over_socket(self, text: bytes) -> str:
        """What the text with these bytes is refused with; "" where it was answered."""
        start = msgpack.packb([2, 7, "intent", "asked", 10.0, {"text": ""}])
        body = start[:-1] + b"\xdb" + len(text).to_bytes(4, "big") + text
        self.wire.sendall(len(body).to_bytes(4, "little") + body)
        length = int.from_bytes(self._exactly(4), "little")
        tag, number, *rest = msgpack.unpackb(self._exactly(length))
        assert (tag in (PREDICTED, FAILED), number) == (True, 7)
        return "" if tag == PREDICTED else str(rest[0])

    def over_http(self, text: bytes) -> str:
        """As `over_socket`; what JSON would have to escape is left out."""
        return self._posted(b'"' + text.translate(None, bytes(range(32)) + b'"\\') + b'"')

    def escaped(self, text: str) -> str:
        """As `over_http`, each character that is not ASCII as an escape."""
        return self._posted(json.dumps(text).encode())

    def _posted(self, text: bytes) -> str:
        body = b'{"kind": "asked", "time_s": 10.0, "fields": {"text": ' + text + b"}}"
        self.web.request("POST", "/edge/v1/predict/intent", body)
        response = self.web.getresponse()
        said = json.loads(response.read())
        assert (response.status == 200) == ("id" in said), said
        return "" if response.status == 200 else str(said["code"])

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.wire.recv(count - len(data))
            assert piece
            data += piece
        return data


@pytest.fixture
def served(tmp_path: Path, write_text_package: Callable[..., tuple[Path, str]]) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    with contextlib.ExitStack() as ends:
        runtime = ends.enter_context(Runtime.open(package=write_text_package()[0]))
        web, wire = HttpServer(runtime, runtime.statistics), SocketServer(runtime, dict)
        run(web.start(0))
        run(wire.start(tmp_path / "edge.sock"))
        client = http.client.HTTPConnection("127.0.0.1", web.port, 10)
        end = ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        end.settimeout(10)
        end.connect(str(tmp_path / "edge.sock"))
        yield Served(end, ends.enter_context(contextlib.closing(client)))
        run(wire.close())
        run(web.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def verdict(text: bytes) -> bool:
    """Whether a text must be answered."""
    try:
        return len(text.decode()) <= TEXT_MAX
    except UnicodeDecodeError:
        return False


@COUNT
def test_any_bytes_for_a_text_are_answered_or_refused(served: Served, count: int) -> None:
    @settings(max_examples=count)
    @given(texts)
    def attack(text: bytes) -> None:
        refusal = served.over_socket(text)
        assert (refusal == "") == verdict(text)
        assert refusal in REFUSALS | {""}
        assert served.over_http(text) in REFUSALS | {""}

    attack()
    assert served.over_socket(b"my card") == served.over_http(b"my card") == ""


@COUNT
def test_any_escapes_for_a_text_are_answered_or_refused(served: Served, count: int) -> None:
    @settings(max_examples=count)
    @given(surrogates | unicode)
    def attack(text: str) -> None:
        whole = json.loads(json.dumps(text))  # in which two halves may have met
        carried = not any("\ud800" <= each <= "\udfff" for each in whole)
        assert (served.escaped(text) == "") == carried

    attack()
    assert served.escaped("my card") == ""


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", ""),
        (b"\0", ""),
        ("😀 где моя карта 我的卡".encode(), ""),
        (b"x" * TEXT_MAX, ""),
        (b"x" * (TEXT_MAX + 1), "out_of_range"),
        (b"x" * 100_000, "out_of_range"),
        (b"card \xff\xfe", "bad_request"),
        (b"\xed\xa0\x80", "bad_request"),
    ],
)
def test_these_texts_have_these_answers(served: Served, text: bytes, code: str) -> None:
    assert served.over_socket(text) == code
    if b"\0" not in text:
        assert served.over_http(text) == code

"""Texts and what is none, in every way that a device is asked: each has an answer or an error that
names what is wrong, an error leaves nothing in the log, and the next text is answered.

Once by a model that answers in the loop's own thread, once by one that takes the worker.
"""

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
import numpy as np
import pytest

from edge_runtime.api.http import HttpServer
from edge_runtime.api.socket import SocketServer
from edge_runtime.errors import RequestError
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.runtime import Event, Runtime

FAILED = 255
FIELDS = {"text": "@@"}
CANDIDATES = [{"text": "my card"}, FIELDS]
ON_THE_WIRE = {
    "predict": [2, 7, "intent", "asked", 10.0, FIELDS],
    "session": [8, 7, "intent", "ada", "asked", 10.0, FIELDS],
    "rank": [9, 7, "intent", "ada", "asked", 10.0, {}, CANDIDATES, 1],
}
EVENT = {"kind": "asked", "time_s": 10.0, "fields": FIELDS}
OVER_HTTP = {
    "predict/intent": EVENT,
    "session/intent/predict": {"key": "ada"} | EVENT,
    "session/intent/rank": {"key": "ada", "candidates": CANDIDATES, "k": 1}
    | (EVENT | {"fields": {}}),
}
ABSENT = None, None
TEXTS = ["", "\0", "\x00 card\x07", "😀 где моя карта 我的卡 ບັດ", "q" * 1024, "[SEP]", "\ufffe"]


def sent(value: Any) -> tuple[bytes, bytes]:
    return msgpack.packb(value), json.dumps(value).encode()


REFUSED = {
    "too long": (*sent("x" * 100_000), "out_of_range"),
    "a number": (*sent(3), "wrong_type"),
    "nothing": (*sent(None), "wrong_type"),
    "true": (*sent(True), "wrong_type"),
    "a list": (*sent(["card"]), ("bad_request", "wrong_type")),
    "a map": (*sent({}), ("bad_request", "wrong_type")),
    "no UTF-8": (b"\xa2\xff\xfe", b'"\xff\xfe"', "bad_request"),
    "half a pair": (b"\xa3\xed\xa0\x80", b'"\\ud800"', "bad_request"),
    "bytes": (b"\xc4\x04card", b"card", "bad_request"),
    "a missing field": (*ABSENT, "missing_field"),
}


class Served:
    """A runtime that reads texts, behind both of its servers."""

    def __init__(self, runtime: Runtime, port: int, path: Path) -> None:
        self.runtime, self._port, self._path = runtime, port, path

    def over_socket(self, way: str, value: bytes | None) -> str:
        """What is refused with; "" where it was answered. None: the field is not there."""
        return self._said(
            put(msgpack.packb(ON_THE_WIRE[way]), sent(FIELDS)[0], sent("@@")[0], value)
        )

    def over_http(self, path: str, value: bytes | None) -> str:
        body = put(json.dumps(OVER_HTTP[path]).encode(), sent(FIELDS)[1], sent("@@")[1], value)
        status, said = self.post(f"/edge/v1/{path}", body)
        return "" if status == 200 else str(said["code"])

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        with contextlib.closing(client):
            client.request("POST", path, body)
            response = client.getresponse()
            return response.status, json.loads(response.read())

    def _said(self, body: bytes) -> str:
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(10)
            end.connect(str(self._path))
            end.sendall(len(body).to_bytes(4, "little") + body)
            with end.makefile("rb") as replies:
                tag, number, *rest = msgpack.unpackb(
                    replies.read(int.from_bytes(replies.read(4), "little"))
                )
        assert number == 7
        return str(rest[0]) if tag == FAILED else ""

    @property
    def logged(self) -> int:
        """How many events are in the log."""
        return self.runtime.journal.next_seq()


def put(body: bytes, fields: bytes, mark: bytes, value: bytes | None) -> bytes:
    if value is None:
        return body.replace(fields, b"{}" if fields.startswith(b"{") else b"\x80")
    return body.replace(mark, value)


@pytest.fixture(params=["inline"])
def served(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write_text_package: Callable[..., tuple[Path, str]],
) -> Iterator[Served]:
    eye = np.eye(9, dtype=np.float32)
    policy = Policy(Prior("binary", eye[0] * 0, eye, 3.0, 50.0))
    heavy = request.param == "heavy"
    package, _ = write_text_package(
        512 if heavy else 32, heavy=heavy, policy=policy, also={"embedding": "pooled"}
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    with Runtime.open(package=package) as runtime:
        assert runtime.resident("intent")[0].runner.inline is not heavy
        web, wire = HttpServer(runtime, dict), SocketServer(runtime, dict)
        run(web.start(0))
        run(wire.start(tmp_path / "edge.sock"))
        yield Served(runtime, web.port, tmp_path / "edge.sock")
        run(wire.close())
        run(web.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


both = pytest.mark.parametrize("served", ["inline", "heavy"], indirect=True)


@both
def test_any_text_is_answered_in_every_way_and_logged_once(served: Served) -> None:
    for text in TEXTS:
        packed, written = sent(text)
        for asked, way, value in ways(served, packed, written):
            before = served.logged
            assert (way, asked(way, value)) == (way, "")
            assert served.logged == before + 1


@both
def test_what_is_no_text_is_refused_in_every_way_and_leaves_no_trace(served: Served) -> None:
    good = sent("my card")
    for name, (packed, written, code) in REFUSED.items():
        for asked, way, value in ways(served, packed, written):
            before = served.logged
            refusal = asked(way, value)
            assert refusal in (code if isinstance(code, tuple) else (code,)), (name, way, refusal)
            assert served.logged == before
    for asked, way, value in ways(served, *good):
        assert asked(way, value) == ""


def ways(
    served: Served, packed: bytes | None, written: bytes | None
) -> Iterator[tuple[Callable[[str, bytes | None], str], str, bytes | None]]:
    yield from ((served.over_socket, way, packed) for way in ON_THE_WIRE)
    yield from ((served.over_http, path, written) for path in OVER_HTTP)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "missing_field"),
        ({"text": "a", "language": "xx"}, "unknown_field"),
        ({"text": None}, "wrong_type"),
        ({"text": 3}, "wrong_type"),
        ({"text": ["card"]}, "wrong_type"),
        ({"text": b"card"}, "wrong_type"),
        ({"text": "a\ud800"}, "out_of_range"),
        ({"text": "x" * 100_000}, "out_of_range"),
    ],
)
def test_in_process_the_same_is_refused_by_the_same_words(
    served: Served, fields: Any, code: str
) -> None:
    runtime, event, before = served.runtime, Event("asked", 10.0, fields), served.logged
    session, good = runtime.session("intent", "ada"), {"text": "my card"}
    asks: list[Callable[[], Any]] = [
        lambda: runtime.predict("intent", event),
        lambda: asyncio.run(runtime.predict_async("intent", event)),
        lambda: session.predict(event),
        lambda: session.rank(Event("asked", 10.0, {}), [good, fields], 1),
        lambda: asyncio.run(session.rank_async(Event("asked", 10.0, {}), [good, fields], 1)),
        lambda: runtime.observe("intent", event),
    ]
    for ask in asks:
        with pytest.raises(RequestError) as caught:
            ask()
        assert caught.value.code == code
    [many] = runtime.predict_many("intent", [event])
    assert isinstance(many, RequestError)
    assert served.logged == before
    assert runtime.predict("intent", Event("asked", 10.0, good)).outputs


@pytest.mark.parametrize("wrong", [-100.0, 1e6, 3e38])
def test_tensors_of_ids_that_no_vocabulary_has_fail_alone(served: Served, wrong: float) -> None:
    length, before = served.runtime.model("intent").inputs[0].shape[1], served.logged

    def answered(first: float, columns: int = length) -> tuple[int, Any]:
        given = {"name": "features", "datatype": "FP32", "shape": [1, columns]}
        data = [first, 4.0, 5.0, 3.0] + [0.0] * (columns - 4)
        return served.post(
            "/v2/models/intent/infer", json.dumps({"inputs": [given | {"data": data}]}).encode()
        )

    assert answered(2.0)[0] == 200
    status, said = answered(wrong)
    assert (status, "could not be run" in said["error"]) == (500, True)
    assert answered(2.0, 8)[0] == 400
    row = np.zeros((1, length), np.float32)
    for value in (wrong, np.nan, np.inf):
        row[0, 0] = value
        with pytest.raises(Exception, match="could not be run") as caught:
            served.runtime.infer("intent", {"features": row})
        assert getattr(caught.value, "code", "") == "run_failed"
    assert answered(2.0)[0] == 200
    assert served.logged == before

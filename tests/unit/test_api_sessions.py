"""Sessions over the Unix socket and HTTP: the words of the process, on a real runtime."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import uvloop
from click.testing import CliRunner

from edge_runtime.api.client import AsyncClient, Client
from edge_runtime.api.exposition import exposition
from edge_runtime.api.http import HttpServer
from edge_runtime.api.socket import SocketServer
from edge_runtime.api.telling import told
from edge_runtime.cli import main
from edge_runtime.errors import CapacityError, RequestError
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.runtime import Event, Runtime

NOW_S = 1_360_000_000.0
KEY = "ada-7f3a"
FIELDS = {"carrier": "UA", "distance": 998.0}
EVENT = ("scheduled", NOW_S, FIELDS)
ASKED = {"kind": "scheduled", "time_s": NOW_S, "fields": FIELDS}
FLIGHTS = [{"distance": 100.0 * number} for number in range(1, 21)]
WIDTH = 5


class Served:
    """A real runtime behind both of its servers, on a loop in a thread of its own."""

    def __init__(self, runtime: Runtime, folder: Path, ends: contextlib.ExitStack) -> None:
        self.runtime, self.path = runtime, folder / "edge.sock"
        loop = uvloop.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        ends.callback(loop.close)
        ends.callback(thread.join)
        ends.callback(loop.call_soon_threadsafe, loop.stop)

        def run(coroutine: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

        server, self.http = SocketServer(runtime, runtime.statistics), HttpServer(runtime, dict)
        run(server.start(self.path))
        ends.callback(lambda: run(server.close()))
        run(self.http.start(0))
        ends.callback(lambda: run(self.http.close()))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of the answer to a POST below /edge/v1."""
        import http.client

        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        address = "127.0.0.1", self.http.port, 10
        with contextlib.closing(http.client.HTTPConnection(*address)) as client:
            client.request("POST", f"/edge/v1/{path}", data)
            response = client.getresponse()
            return response.status, json.loads(response.read())

    def said(self, *message: Any) -> Any:
        """The reply to a frame of any content, on a connection of its own."""
        import socket

        body = msgpack.packb(list(message))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.settimeout(10)
            end.connect(str(self.path))
            end.sendall(len(body).to_bytes(4, "little") + body)
            data = bytearray(end.recv(1 << 16))
            while len(data) < 4 + int.from_bytes(data[:4], "little"):
                data += end.recv(1 << 16)
        return msgpack.unpackb(data[4:])


@pytest.fixture
def device(
    write_package: Callable[..., tuple[Path, str]], tmp_path: Path
) -> Iterator[Callable[..., Served]]:
    """`device()` is a device of the family `toy`, whose release knows sessions."""
    eye = np.eye(WIDTH + 1, dtype=np.float32)
    prior = Prior("binary", np.zeros(WIDTH + 1, np.float32), eye, region=2.0, norm_max=10.0)
    with contextlib.ExitStack() as ends:

        def start(**options: Any) -> Served:
            given = {"policy": Policy(prior, optimism=1.0)} | options
            runtime = ends.enter_context(Runtime.open(package=write_package(**given)[0]))
            return Served(runtime, tmp_path, ends)

        yield start


def teach(session: Any, labels: int = 5) -> None:
    """It is always late."""
    for _ in range(labels):
        session.label(session.predict(*EVENT).id, 1.0)


def test_the_socket_has_the_words_of_the_process(device: Callable[..., Served]) -> None:
    served = device()
    with Client(served.path) as client:
        session = client.session("toy", KEY)
        first = session.predict(*EVENT)
        assert (first.adapted, first.outputs, first.arm) == (False, first.base, "stable")
        label = session.label(first.id, 1.0, NOW_S + 60)
        assert (label.seq, label.adapted) == (1, True)
        teach(session)
        again = session.predict(*EVENT)
        assert again.adapted
        assert again.outputs[0] > again.base[0] == pytest.approx(first.base[0])
        here = served.runtime.session("toy", KEY)
        found = session.explain()
        assert (found.labels, found.with_model) == (6, False)
        assert [(each.weight, each.now) for each in found.moved] == [
            (each.weight, each.now) for each in here.explain().moved
        ]
        assert client.session("toy", "another").predict(*EVENT).adapted is False
        session.reset()
        assert session.predict(*EVENT).adapted is False
        teach(session)
        session.close()
        assert session.explain().labels == 0
        teach(session)
        assert client.forget_sessions("toy").sessions == 1
        assert client.forget_sessions().sessions == 0


def test_http_has_the_words_of_the_process(device: Callable[..., Served]) -> None:
    served = device()

    def ask(word: str, **body: Any) -> Any:
        status, answer = served.post(f"session/toy/{word}", {"key": KEY} | body)
        assert status == 200, answer
        return answer

    def teach_it() -> None:
        for _ in range(5):
            ask("label", prediction_id=ask("predict", **ASKED)["id"], value=1.0)

    first = ask("predict", **ASKED)
    assert sorted(first) == ["adapted", "arm", "base", "id", "outputs", "release"]
    assert (first["adapted"], first["outputs"]) == (False, first["base"])
    assert ask("label", prediction_id=first["id"], value=1, final=False) == {
        "seq": 1,
        "adapted": False,
    }
    teach_it()
    again = ask("predict", **ASKED)
    assert again["adapted"]
    assert again["outputs"][0] > again["base"][0]
    found = ask("explain")
    assert (found["labels"], found["falls"]) == (5, 0)
    assert found["moved"] == [
        {"weight": each.weight, "before": each.before, "now": each.now, "sure": each.sure}
        for each in served.runtime.session("toy", KEY).explain().moved
    ]
    assert ask("reset") == {}
    assert not ask("predict", **ASKED)["adapted"]
    teach_it()
    assert ask("close") == {}
    assert ask("explain")["labels"] == 0
    teach_it()
    assert served.post("sessions/forget", {"family": "toy"}) == (200, {"sessions": 1})
    assert served.post("sessions/forget", {}) == (200, {"sessions": 0})


def test_a_ranking_is_the_same_from_wherever_it_is_asked(device: Callable[..., Served]) -> None:
    served = device()
    event = "scheduled", NOW_S, {"carrier": "UA"}
    rows = np.linspace(0, 1, len(FLIGHTS) * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    body = {"key": KEY, "kind": "scheduled", "time_s": NOW_S, "fields": {"carrier": "UA"}}
    body |= {"candidates": FLIGHTS, "k": 3}
    with Client(served.path) as client:
        session = client.session("toy", KEY)
        for features in (None, rows):
            here = served.runtime.session("toy", KEY).rank(Event(*event), FLIGHTS, 3, features)
            there = session.rank(*event, FLIGHTS, 3, features=features).places
            given = {} if features is None else {"features": features.tolist()}
            status, answer = served.post("session/toy/rank", body | given)
            assert status == 200, answer
            expected = [(each.index, each.score, each.base, each.chance) for each in here]
            assert len(expected) == 3
            assert [(each.index, each.score, each.base, each.chance) for each in there] == expected
            assert [
                (each["index"], each["score"], each["base"], each["chance"])
                for each in answer["places"]
            ] == expected
        best = there[0]
        assert session.label(best.id, 1.0).adapted
        assert session.rank(*event, FLIGHTS, 1).places[0].score != best.base
    assert served.runtime.log.handed_out("event") == 3 * 3 * 2 + 1


def test_both_clients_speak_the_same_words(device: Callable[..., Served]) -> None:
    served = device()

    async def scene() -> tuple[Any, ...]:
        async with await AsyncClient.connect(served.path) as client:
            session = client.session("toy", KEY)
            answers = await asyncio.gather(*[session.predict(*EVENT) for _ in range(300)])
            assert sorted(answers, key=lambda each: int(each.id.rsplit(".", 1)[1])) == answers
            labels = [session.label(each.id, 1.0) for each in answers[:4]]
            assert [(await each).seq for each in labels] == [1, 2, 3, 4]
            [place] = (await session.rank(*EVENT, [{}], 1)).places
            found = await session.explain()
            await session.reset()
            await session.close()
            return (
                place.index,
                place.chance,
                found.labels,
                (await client.forget_sessions()).sessions,
            )

    assert asyncio.run(scene()) == (0, 1.0, 4, 0)


SESSION_EVENT = ["toy", KEY, "scheduled", NOW_S, FIELDS]
DEEP: Any = 1
for _ in range(200):
    DEEP = [DEEP]
WRONG = [
    ("unknown_family", [8, 1, "other", *SESSION_EVENT[1:]]),
    ("bad_session_key", [8, 1, "toy", "", *SESSION_EVENT[2:]]),
    ("bad_session_key", [11, 1, "toy", "k" * 400_000]),
    ("bad_request", [8, 1, "toy", 7, *SESSION_EVENT[2:]]),
    ("bad_request", [8, 1, "toy", KEY, "scheduled", NOW_S]),
    ("unknown_kind", [8, 1, "toy", KEY, "landed", NOW_S, FIELDS]),
    ("missing_field", [8, 1, "toy", KEY, "scheduled", NOW_S, {"carrier": "UA"}]),
    ("wrong_type", [8, 1, "toy", KEY, "scheduled", NOW_S, FIELDS | {"distance": True}]),
    ("not_finite", [8, 1, "toy", KEY, "scheduled", NOW_S, FIELDS | {"distance": float("nan")}]),
    ("bad_request", [8, 1, "toy", KEY, "scheduled", NOW_S, {"carrier": DEEP}]),
    ("no_candidates", [9, 1, *SESSION_EVENT, [], 3]),
    ("no_candidates", [9, 1, *SESSION_EVENT, FLIGHTS, 0]),
    ("too_many_candidates", [9, 1, *SESSION_EVENT, [{}] * 100_000, 3]),
    ("bad_request", [9, 1, *SESSION_EVENT, [{}] * 5, "3"]),
    ("bad_request", [9, 1, *SESSION_EVENT, {"a": 1}, 3]),
    ("bad_request", [9, 1, *SESSION_EVENT, [{"distance": DEEP}], 3]),
    ("not_finite", [9, 1, *SESSION_EVENT, [{}, {"distance": float("nan")}], 2]),
    ("unknown_field", [9, 1, *SESSION_EVENT, [{}, {"altitude": 1.0}], 2]),
    ("wrong_shape", [9, 1, *SESSION_EVENT, FLIGHTS, 3, bytes(399)]),
    ("wrong_shape", [9, 1, *SESSION_EVENT, FLIGHTS, 3, bytes(20 * 4)]),
    ("wrong_shape", [9, 1, *SESSION_EVENT, [], 3, bytes(20)]),
    ("bad_request", [9, 1, *SESSION_EVENT, FLIGHTS, 3, "text"]),
    ("unknown_prediction", [10, 1, "toy", KEY, "no id", 1.0]),
    ("unknown_prediction", [10, 1, "toy", KEY, "local.1.99", 1.0]),
    ("bad_request", [10, 1, "toy", KEY, "local.1.1", None]),
    ("unknown_family", [14, 1, "other"]),
    ("bad_request", [14, 1, None]),
    ("too_large", [9, 1, *SESSION_EVENT, [{"x": "y" * 600_000}], 3]),
]


@pytest.mark.parametrize(("code", "message"), WRONG)
def test_what_is_wrong_on_the_socket_says_why_and_leaves_no_trace(
    device: Callable[..., Served], code: str, message: list[Any]
) -> None:
    served = device()

    reply = served.said(*message)

    assert reply[:3] == [255, 1, code]
    assert len(str(reply)) < 1000
    assert KEY not in str(reply)
    assert_no_trace(served)


def assert_no_trace(served: Served) -> None:
    assert served.runtime.log.handed_out("event") == 0
    assert served.runtime.log.handed_out("label") == 0
    assert served.runtime.statistics()["sessions"]["open"] == 0
    assert served.post("session/toy/predict", {"key": KEY} | ASKED)[0] == 200


RANK = {"key": KEY} | ASKED | {"candidates": FLIGHTS, "k": 3}
WRONG_BODIES = [
    (404, "unknown_family", "session/other/predict", {"key": KEY} | ASKED),
    (404, "not_found", f"session/toy/{KEY}/predict", ASKED),
    (404, "not_found", "session/toy/forget", {"key": KEY}),
    (404, "not_found", "sessions/toy", {}),
    (400, "bad_session_key", "session/toy/predict", {"key": ""} | ASKED),
    (400, "bad_session_key", "session/toy/explain", {"key": "k" * 400_000}),
    (413, "body_too_large", "session/toy/explain", {"key": "k" * 600_000}),
    (400, "bad_request", "session/toy/predict", {"key": 7} | ASKED),
    (400, "bad_request", "session/toy/predict", ASKED),
    (400, "bad_request", "session/toy/predict", {"key": KEY, "fields": FIELDS}),
    (400, "bad_request", "session/toy/predict", {"key": KEY, "more": 1} | ASKED),
    (400, "bad_request", "session/toy/predict", b""),
    (400, "bad_request", "session/toy/predict", b"[" * 100_000),
    (
        400,
        "wrong_type",
        "session/toy/predict",
        {"key": KEY} | ASKED | {"fields": FIELDS | {"distance": DEEP}},
    ),
    (400, "bad_request", "session/toy/predict", {"key": KEY} | ASKED | {"time_s": float("nan")}),
    (400, "missing_field", "session/toy/predict", {"key": KEY} | ASKED | {"fields": {}}),
    (400, "no_candidates", "session/toy/rank", RANK | {"candidates": []}),
    (400, "no_candidates", "session/toy/rank", RANK | {"k": -1}),
    (400, "bad_request", "session/toy/rank", RANK | {"k": 1.5}),
    (400, "too_many_candidates", "session/toy/rank", RANK | {"candidates": [{}] * 100_000}),
    (400, "bad_request", "session/toy/rank", RANK | {"candidates": [1]}),
    (400, "wrong_type", "session/toy/rank", RANK | {"candidates": [{"distance": DEEP}]}),
    (400, "bad_request", "session/toy/rank", RANK | {"candidates": [{"distance": float("nan")}]}),
    (400, "unknown_field", "session/toy/rank", RANK | {"candidates": [{"altitude": 1.0}]}),
    (400, "wrong_shape", "session/toy/rank", RANK | {"features": [[1.0], [1.0, 2.0]]}),
    (400, "wrong_shape", "session/toy/rank", RANK | {"features": [[1.0]] * 20}),
    (400, "wrong_shape", "session/toy/rank", RANK | {"features": []}),
    (400, "bad_request", "session/toy/rank", RANK | {"features": [[1e300]] * 20}),
    (400, "bad_request", "session/toy/rank", RANK | {"features": 1}),
    (
        400,
        "unknown_prediction",
        "session/toy/label",
        {"key": KEY, "prediction_id": "a" * 400_000, "value": 1},
    ),
    (400, "bad_request", "session/toy/label", {"key": KEY, "prediction_id": "local.1.1"}),
    (
        400,
        "bad_request",
        "session/toy/label",
        {"key": KEY, "prediction_id": "local.1.1", "value": "1"},
    ),
    (404, "unknown_family", "sessions/forget", {"family": "other"}),
    (400, "bad_request", "sessions/forget", {"families": "toy"}),
]


@pytest.mark.parametrize(("status", "code", "path", "body"), WRONG_BODIES)
def test_what_is_wrong_in_a_body_says_why_and_leaves_no_trace(
    device: Callable[..., Served], status: int, code: str, path: str, body: Any
) -> None:
    served = device()

    found, said = served.post(path, body)

    assert (found, said["code"], sorted(said)) == (status, code, ["code", "error", "hint"])
    assert len(str(said)) < 1000
    assert_no_trace(served)


def test_an_answer_within_another_session_is_not_labelled(device: Callable[..., Served]) -> None:
    served = device()
    with Client(served.path) as client:
        own, other = client.session("toy", KEY), client.session("toy", "eve")
        answer = own.predict(*EVENT)
        with pytest.raises(RequestError, match="other_session") as caught:
            other.label(answer.id, 0.0)
        assert KEY not in str(caught.value)
        body = {"key": "eve", "prediction_id": answer.id, "value": 0}
        status, said = served.post("session/toy/label", body)
        assert (status, said["code"]) == (400, "other_session")
        assert served.runtime.log.handed_out("label") == 0
        assert own.label(answer.id, 1.0).adapted
        outside = client.predict("toy", *EVENT)
        assert not own.label(outside.id, 1.0).adapted


def test_sessions_of_a_heavy_model_stall_nobody(device: Callable[..., Served]) -> None:
    """Others are answered long before its answers are all there."""
    served = device(ballast=3000)
    assert not served.runtime.model("toy").inline

    async def scene() -> None:
        async with (
            await AsyncClient.connect(served.path) as client,
            await AsyncClient.connect(served.path) as other,
        ):
            session = client.session("toy", KEY)
            answers = [session.predict(*EVENT) for _ in range(40)]
            rankings = [session.rank(*EVENT, FLIGHTS, 2) for _ in range(10)]
            await other.status()
            while not answers[0].done():
                await other.hello()
            assert not rankings[-1].done()
            label = session.label((await answers[0]).id, 1.0)
            assert [len((await each).places) for each in rankings] == [2] * 10
            assert (await label).adapted
            assert (await session.predict(*EVENT)).adapted

    asyncio.run(scene())
    status, answer = served.post("session/toy/predict", {"key": KEY} | ASKED)
    assert (status, answer["adapted"]) == (200, True)
    status, answer = served.post("session/toy/rank", RANK)
    assert (status, len(answer["places"])) == (200, 3)


def test_rankings_beyond_the_queue_are_refused_and_leave_no_trace(
    device: Callable[..., Served],
) -> None:
    served = device(ballast=3000)

    async def scene() -> list[Any]:
        clients = [await AsyncClient.connect(served.path) for _ in range(3)]
        sessions = [client.session("toy", KEY) for client in clients]
        asked = [session.rank(*EVENT, [{}, {}], 1) for session in sessions for _ in range(128)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        for client in clients:
            await client.close()
        return found

    found = asyncio.run(scene())
    refused = [each for each in found if isinstance(each, CapacityError)]
    assert {error.code for error in refused} == {"overloaded"}
    assert served.runtime.log.handed_out("event") == len(found) - len(refused) > 0


def test_metrics_status_and_command_tell_of_sessions(device: Callable[..., Served]) -> None:
    served = device()
    with Client(served.path) as client:
        teach(client.session("toy", KEY))
        status = client.status().status
    page = exposition(status, {})
    assert "edge_sessions_open 1" in page
    assert "edge_sessions_opened_total 1" in page
    [line] = [each for each in told(status).splitlines() if each.startswith("sessions")]
    assert line.startswith(f"sessions  1 open in {status['sessions']['bytes']} bytes, 1 opened")

    def forget(*names: str) -> str:
        options = "forget-sessions", "--socket", str(served.path), *names
        return CliRunner().invoke(main, options, catch_exceptions=False).stdout

    assert (forget("toy"), forget(), served.runtime.session("toy", KEY).explain().labels) == (
        "1\n",
        "0\n",
        0,
    )


def test_a_release_without_sessions_answers_as_the_model_does(
    device: Callable[..., Served],
) -> None:
    served = device(policy=None)
    with Client(served.path) as client:
        session = client.session("toy", KEY)
        teach(session)
        answer = session.predict(*EVENT)
        assert (answer.adapted, answer.outputs) == (False, answer.base)
        assert session.explain().with_model
        assert [each.base for each in session.rank(*EVENT, FLIGHTS, 3).places]
        session.reset()
        session.close()
        assert client.forget_sessions().sessions == 0

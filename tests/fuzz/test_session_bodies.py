"""Sessions over HTTP under garbage: what comes is answered or refused, and spoils no other."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.api.http import HttpServer
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior
from edge_runtime.runtime import Event, Runtime

COUNT = pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
EVENT = {"kind": "scheduled", "time_s": 10.0, "fields": {"carrier": "AA", "distance": 100.0}}
LAST = "the last that was answered"
RIGHT: dict[str, dict[str, Any]] = {
    "predict": EVENT,
    "rank": EVENT | {"candidates": [{}, {"distance": 5.0}], "k": 1, "features": [[0.5] * 5] * 2},
    "label": {"prediction_id": LAST, "value": 1.0, "final": True},
    "explain": {},
    "reset": {},
    "close": {},
}

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["toy", "scheduled", "carrier", "ada"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["distance", "carrier"]) | st.text(max_size=4), inner)
    ),
    max_leaves=10,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """A word, and a body for it of which parts are changed, missing or beyond what is known."""
    word = draw(st.sampled_from(sorted(RIGHT)))
    body = {"key": draw(st.sampled_from(["ada", "eve"]))} | RIGHT[word]
    for name in draw(st.lists(st.sampled_from([*sorted(body), "more"]), max_size=2)):
        if draw(st.booleans()):
            body[name] = draw(values)
        else:
            body.pop(name, None)
    return word, body


@pytest.fixture
def runtime(write_package: Callable[..., tuple[Path, str]]) -> Iterator[Runtime]:
    eye = np.eye(6, dtype=np.float32)
    prior = Prior("binary", np.zeros(6, np.float32), eye, region=2.0, norm_max=10.0)
    package, _ = write_package(policy=Policy(prior, explore=0.5, optimism=1.0))
    with Runtime.open(package=package, step=lambda: 1) as runtime:
        yield runtime


@pytest.fixture
def client(runtime: Runtime) -> Iterator[http.client.HTTPConnection]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = HttpServer(runtime, runtime.statistics)
    asyncio.run_coroutine_threadsafe(server.start(0), loop).result(10)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, 10)) as client:
        yield client
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@COUNT
def test_whatever_a_body_holds_is_answered_or_refused(
    runtime: Runtime, client: http.client.HTTPConnection, count: int
) -> None:
    bystander, ada = runtime.session("toy", "bystander"), runtime.session("toy", "ada")
    event = Event(**EVENT)
    assert bystander.label(bystander.predict(event).id, 1.0).adapted
    learned, statuses, answered = bystander.explain(), set(), list[str]()

    def ask(word: str, body: Any) -> None:
        if body.get("prediction_id") == LAST:
            body = body | {"prediction_id": answered[-1]}
        client.request("POST", f"/edge/v1/session/toy/{word}", json.dumps(body).encode())
        response = client.getresponse()
        said = json.loads(response.read())
        statuses.add(response.status)
        assert response.status in (200, 400), said
        assert (response.status == 200) == ("code" not in said)
        answered.extend([said["id"]] if "id" in said else [])

    @settings(max_examples=count)
    @given(st.lists(bodies(), max_size=8))
    def attack(asked: list[tuple[str, Any]]) -> None:
        answered.append(ada.predict(event).id)
        for word, body in asked:
            ask(word, body)
        assert bystander.explain() == learned

    attack()
    assert statuses == {200, 400}
    assert bystander.predict(event).adapted

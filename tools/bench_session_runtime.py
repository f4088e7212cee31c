"""What sessions cost within a runtime: answers, labels, rankings, and a swap under open sessions.

How: one runtime over a package of 32 features, twelve windows and an embedding of 64 numbers, with
its log on the disk. Calls are hot, back to back in blocks; blocks of answers within a session and
without take turns, so that what the session adds is a difference of the same second. In the swap,
requests come one after the other on a thread of their own while a thousand sessions are moved to
the new release.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from bench_rows import Row
from bench_serving_model import DESTINATIONS, FAMILY, HIDDEN, Stream, rows, write_package
from bench_session_costs import prior_of

from edge_runtime.config import SessionsConfig, local_config
from edge_runtime.daemon import SWITCH_INTERVAL_S
from edge_runtime.inference.slot import load_arm
from edge_runtime.personal.policy import Policy
from edge_runtime.runtime import Event, Runtime

CANDIDATES, SHOWN = 200, (5, 10)
BLOCK = 100  # calls back to back
OPEN_SESSIONS, LABELS = 1000, 10
EXPLORE, OPTIMISM = 0.05, 0.5

assert prior_of("binary").width == HIDDEN


def policy() -> Policy:
    return Policy(prior_of("binary"), EXPLORE, OPTIMISM)


@contextmanager
def opened(lean: float = 0.0) -> Iterator[tuple[Runtime, Stream, Path]]:
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        home = Path(folder)
        package = write_package(home / "package.onnx", lean, policy())
        config = local_config(package, FAMILY, home / "state")
        bounds = SessionsConfig(bytes_max_mb=64)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        stream = Stream()
        with Runtime.open(msgspec.structs.replace(config, sessions=bounds)) as runtime:
            for event in stream.observations(2000):
                runtime.observe(FAMILY, event)
            yield runtime, stream, home


def answers(count: int) -> list[Row]:
    """Answers without and within a session, and the labels of the latter, each back to back."""
    without, within, labels = list[int](), list[int](), list[int]()
    with opened() as (runtime, stream, _):
        session = runtime.session(FAMILY, "hot")
        for number in range(count // BLOCK):
            events, answered = stream.questions(BLOCK), list[str]()

            def plain(events: list[Event] = events) -> None:
                without.extend(
                    _timed(lambda e=event: runtime.predict(FAMILY, e)) for event in events
                )

            def personal(events: list[Event] = events, ids: list[str] = answered) -> None:
                for event in events:
                    began_ns = time.perf_counter_ns()
                    answer = session.predict(event)
                    within.append(time.perf_counter_ns() - began_ns)
                    ids.append(answer.id)

            for call in (plain, personal) if number % 2 else (personal, plain):
                call()
            labels += [
                _timed(lambda n=name, t=float(at % 3 == 0): session.label(n, t))
                for at, name in enumerate(answered)
            ]
        told = session.explain()
        assert told.labels > count // 2, f"nothing was measured but refusals: {told}"
    skip = count // 10
    added = float(np.median(within[skip:]) - np.median(without[skip:]))
    what = "session.label update, 64-dim embedding, hot, with its log"
    return [
        Row("added to predict, hot, p50", added / 1000, "µs", 3),
        Row("predict without a session, p50", *_micro(without[skip:], 0.5)),
        Row("predict within a session, p50", *_micro(within[skip:], 0.5)),
        Row("predict within a session, p99", *_micro(within[skip:], 0.99)),
        Row(f"{what}, p50", *_micro(labels[skip:], 0.5), 20),
        Row(f"{what}, p99", *_micro(labels[skip:], 0.99), 60),
    ]


def rankings(count: int) -> list[Row]:
    """Rankings of many candidates, their features given or asked of the windows."""
    found = []
    with opened() as (runtime, stream, _):
        session = runtime.session(FAMILY, "hot")
        for event in stream.questions(30):
            session.label(session.predict(event).id, 1.0)
        fields = [
            {"dest": DESTINATIONS[n % len(DESTINATIONS)], "distance": 50.0 + n}
            for n in range(CANDIDATES)
        ]
        features = rows(CANDIDATES)
        for given, reach, way in (
            (features, 200, "features given"),
            (None, 1200, "through the window engine"),
        ):
            for shown in SHOWN:
                took = []
                for event in stream.questions(count):
                    context = Event(event.kind, event.time_s, _without(event.fields, fields[0]))
                    began_ns = time.perf_counter_ns()
                    ranked = session.rank(context, fields, shown, given)
                    took.append(time.perf_counter_ns() - began_ns)
                    assert len(ranked) == shown
                what = f"rank of {CANDIDATES} candidates, {way}, {shown} shown and logged"
                wanted = reach if shown == SHOWN[0] else None
                found += [
                    Row(f"{what}, p50", *_micro(took[count // 10 :], 0.5), wanted),
                    Row(f"{what}, p99", *_micro(took[count // 10 :], 0.99)),
                ]
    return found


def swap(count: int) -> list[Row]:
    """A thousand open sessions and requests without a pause, while another release takes over."""
    with opened() as (runtime, stream, home):
        for number in range(count):
            session = runtime.session(FAMILY, f"user-{number}")
            for event in stream.questions(LABELS):
                session.label(session.predict(event).id, float(number % 2))
        steady, _ = _load(runtime, stream, lambda: time.sleep(0.5))
        prior = dataclasses.replace(prior_of("binary"), noise=2.0)
        path = write_package(home / "next.onnx", 0.1, Policy(prior, EXPLORE, OPTIMISM))
        arm = load_arm(path, None, "stable", "next", 1.0)
        took_s: list[float] = []

        def change() -> None:
            began_s = time.perf_counter()
            runtime.swap(FAMILY, [arm], None)
            while runtime.statistics()["sessions"]["rebased"] < count:
                time.sleep(0.005)
            took_s.append(time.perf_counter() - began_s)

        asked, failed = _load(runtime, stream, change)
    what = f"swap with {count:,} open sessions of {LABELS} labels"
    return [
        Row(f"{what}: failed requests, of {len(asked):,}", failed, "", 0),
        Row(f"{what}: re-based within", took_s[0], "s", 1),
        Row(f"{what}: p99 of requests meanwhile", *_micro(asked, 0.99)),
        Row(f"{what}: p99 of requests before it", *_micro(steady, 0.99)),
    ]


def _load(runtime: Runtime, stream: Stream, meanwhile: Callable[[], None]) -> tuple[list[int], int]:
    """Nanoseconds of requests within sessions, one after the other, while `meanwhile` lasts."""
    took, failed, over = list[int](), [0], threading.Event()
    session = runtime.session(FAMILY, "user-1")

    def ask() -> None:
        while not over.is_set():
            for event in stream.questions(50):
                began_ns = time.perf_counter_ns()
                try:
                    session.predict(event)
                except Exception:
                    failed[0] += 1
                took.append(time.perf_counter_ns() - began_ns)
                time.sleep(0.0005)

    asking = threading.Thread(target=ask)
    asking.start()
    meanwhile()
    over.set()
    asking.join()
    return took, failed[0]


def _without(fields: dict[str, object], others: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in others}


def _timed(call: Callable[[], object]) -> int:
    began_ns = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - began_ns


def _micro(took: list[int], share: float) -> tuple[float, str]:
    return float(np.quantile(took, share)) / 1000, "µs"

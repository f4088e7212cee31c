"""The player's order and its books, against a device that crashes as the test says.

`FakeDevice` speaks the protocol of proto/socket.md and numbers what it accepts as a log would; what
the real one does is in tests/integration/test_simulate_fleet.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from math import inf
from pathlib import Path

import pytest

from cloud_learner.experiment.replay import DataRow
from cloud_learner.simulate.player import Player
from edge_runtime.api import frames
from edge_runtime.api.frames import (
    Done,
    Failed,
    Hello,
    Label,
    Observe,
    Predict,
    Predicted,
    Reply,
    Status,
    StatusReply,
    Survived,
    Welcome,
)
from edge_runtime.errors import ConfigError, TransportError
from edge_runtime.inference.package import Interface


class FakeDevice:
    """Crashes at the request numbers in `crashes`, which are logged first, but not answered; a
    crash takes as many of the newest events and labels as stand there. None: only the connection
    breaks.
    """

    def __init__(
        self, path: Path, crashes: dict[int, tuple[int, int] | None] | None = None
    ) -> None:
        self.path, self.name, self.epoch = path, "EWR", 1
        self.crashes = crashes or {}
        self.refused_at: set[float] = set()
        self.ends: list[Survived] = []
        self.kept: list[tuple[int, str, int, object]] = []
        self.log: dict[str, list[object]] = {"event": [], "label": []}
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        splitter = frames.Splitter()
        while data := await reader.read(1 << 16):
            for body in splitter.feed(data)[0]:
                reply = self.answer(frames.decode_request(body))
                if reply is None:
                    writer.close()
                    return
                writer.write(frames.frame(reply))
        writer.close()

    def answer(self, request: frames.Request) -> Reply | None:
        number = request.request_id
        if isinstance(request, Hello):
            return Welcome(number, self.name, self.epoch, self.ends)
        if isinstance(request, Status):
            sizes = {f"{name}_{what}": len(self.log[name]) for name in self.log for what in _SEQS}
            return StatusReply(number, {"log": sizes})
        if isinstance(request, Predict | Observe) and request.time_s in self.refused_at:
            return Failed(number, "no_release", "not yet")
        name = "label" if isinstance(request, Label) else "event"
        what = request.prediction_id if isinstance(request, Label) else request.time_s
        self.log[name].append(what)
        self.requests += 1
        if self.requests in self.crashes:
            self.crash(self.crashes[self.requests])
            return None
        seq = len(self.log[name])
        if isinstance(request, Predict):
            return Predicted(number, f"EWR.{self.epoch}.{seq}", [0.5], "r", "stable")
        return Done(number, seq)

    def crash(self, taken: tuple[int, int] | None) -> None:
        if taken is None:
            return
        for (name, records), take in zip(self.log.items(), taken, strict=True):
            left = records[: max(0, len(records) - take)]
            self.ends.append(Survived(self.epoch, name, len(left)))
            self.kept += [(self.epoch, name, seq, what) for seq, what in enumerate(left, 1)]
        self.epoch += 1
        self.log = {"event": [], "label": []}

    def records(self, name: str) -> list[object]:
        """What the log holds of a class, over all epochs."""
        return [what for _, kept, _, what in self.kept if kept == name] + self.log[name]


_SEQS = ("appended", "durable")


def asks(time_s: float, label_time_s: float | None = None, device: str = "EWR") -> DataRow:
    label = None if label_time_s is None else 1.0
    return DataRow(time_s, "scheduled", device, {}, label, label_time_s)


def tells(time_s: float) -> DataRow:
    return DataRow(time_s, "departed", "EWR", {}, None, None)


def playing(
    rows: Iterable[DataRow],
    interface: Interface,
    device: FakeDevice,
    prepare: Callable[[Player], Awaitable[None] | None] = lambda _player: None,
    horizon: Callable[[], float] = lambda: inf,
) -> Player:
    """Play `rows` to the end, `prepare` running beside."""

    async def main() -> Player:
        server = await asyncio.start_unix_server(device.serve, device.path)
        sockets = {"EWR": device.path}
        player = Player(rows, sockets, interface, horizon=horizon, patience_s=5.0)
        async with server, asyncio.timeout(20), asyncio.TaskGroup() as group:
            run = group.create_task(player.run())
            beside = prepare(player)
            if beside is not None:
                await beside
            await run
        return player

    return asyncio.run(main())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_labels_come_when_they_are_due_and_in_their_order(
    path: Path, toy_interface: Interface
) -> None:
    device = FakeDevice(path)
    rows = [asks(1, 9), asks(2, 4), asks(2, 3), tells(4), asks(5), tells(20)]
    player = playing(rows, toy_interface, device)
    assert device.log["event"] == [1, 2, 2, 4, 5, 20]
    assert device.log["label"] == ["EWR.1.3", "EWR.1.2", "EWR.1.1"]
    numbers = player.statistics()
    assert [numbers[kind] for kind in ("predictions", "observations", "labels")] == [4, 2, 3]
    assert numbers["events_answered"] == 9
    assert player.latency.total == 4


def test_labels_due_after_the_last_row_are_still_sent(path: Path, toy_interface: Interface) -> None:
    device = FakeDevice(path)
    playing([asks(1, 1e6)], toy_interface, device, horizon=lambda: 2.0)
    assert device.log["label"] == ["EWR.1.1"]


def test_an_unanswered_prediction_that_was_logged_gets_its_label_by_its_number(
    path: Path, toy_interface: Interface
) -> None:
    device = FakeDevice(path, {2: (0, 0)})
    numbers = playing([tells(1), asks(2, 3), tells(4)], toy_interface, device).statistics()
    assert device.records("event") == [1, 2, 4]
    assert device.records("label") == ["EWR.1.2"]
    assert numbers["answers_recovered"] == 1
    assert numbers["asked_again"] == 0
    assert numbers["events_answered"] == 4


def test_unanswered_requests_that_were_not_logged_are_asked_again(
    path: Path, toy_interface: Interface
) -> None:
    device = FakeDevice(path, {2: (1, 0)})
    numbers = playing([tells(1), tells(2), asks(3, 4)], toy_interface, device).statistics()
    assert device.records("event") == [1, 2, 3]
    assert device.records("label") == ["EWR.2.2"]
    assert numbers["asked_again"] == 2
    assert (numbers["events_answered"], numbers["events_lost_in_linger"]) == (4, 0)


def test_what_a_crash_took_after_its_answer_is_counted_and_sent_again_in_order(
    path: Path, toy_interface: Interface
) -> None:
    device = FakeDevice(path, {5: (3, 2)})
    rows = [asks(1, 2), asks(3), tells(4), asks(5)]  # requests: 1, 2 is the label, 3, 4, 5
    numbers = playing(rows, toy_interface, device).statistics()
    assert numbers["lost_in_linger"] == {"predictions": 1, "observations": 1, "labels": 1}
    assert device.records("event") == [1, 3, 4, 5]
    assert device.records("label") == ["EWR.1.1"]
    assert numbers["events_answered"] - numbers["events_lost_in_linger"] == 5
    assert numbers["asked_again"] == 1


def test_a_label_that_outlived_its_prediction_is_sent_again_for_the_new_one(
    path: Path, toy_interface: Interface
) -> None:
    device = FakeDevice(path, {3: (9, 0)})
    numbers = playing([asks(1, 2), asks(3)], toy_interface, device).statistics()
    assert device.records("event") == [1, 3]
    assert device.records("label") == ["EWR.1.1", "EWR.2.1"]
    assert numbers["labels_orphaned"] == 1
    assert numbers["events_answered"] - numbers["events_lost_in_linger"] == 4


def test_a_connection_that_breaks_alone_loses_nothing(path: Path, toy_interface: Interface) -> None:
    device = FakeDevice(path, {2: None, 5: None})
    rows = [asks(float(time_s)) for time_s in range(8)]
    numbers = playing(rows, toy_interface, device).statistics()
    assert device.log["event"] == [row.time_s for row in rows]
    assert (numbers["reconnects"], numbers["answers_recovered"]) == (2, 2)


@pytest.mark.parametrize("seed", range(12))
def test_the_books_are_exact_whenever_a_crash_comes(
    seed: int, path: Path, toy_interface: Interface
) -> None:
    random_ = random.Random(seed)
    rows = [
        asks(t, t + random_.choice([0.5, 3.5, 30.5])) if random_.random() < 0.5 else tells(t)
        for t in map(float, range(150))
    ]
    moments = random_.sample(range(1, 250), 6)
    crashes = {m: (random_.randrange(12), random_.randrange(12)) for m in moments}
    device = FakeDevice(path, crashes | {moments[0]: None})
    numbers = playing(rows, toy_interface, device).statistics()
    events, labels = device.records("event"), device.records("label")
    kept = numbers["events_answered"] - numbers["events_lost_in_linger"]
    assert kept == len(events) + len(labels), (seed, numbers)
    assert events == [row.time_s for row in rows], seed
    ids = {f"EWR.{e}.{s}": what for e, name, s, what in device.kept if name == "event"}
    ids |= {f"EWR.{device.epoch}.{s}": what for s, what in enumerate(device.log["event"], 1)}
    joined = sorted(ids[label] for label in labels if label in ids)
    assert set(joined) == {row.time_s for row in rows if row.label is not None}, seed


def test_a_refused_question_has_no_label(path: Path, toy_interface: Interface) -> None:
    device = FakeDevice(path)
    device.refused_at = {1.0, 2.0}
    numbers = playing([asks(1.0, 3.0), tells(2.0), asks(4.0)], toy_interface, device).statistics()
    assert numbers["refused"] == {"no_release": 2}
    assert numbers["labels_unasked"] == 1
    assert numbers["events_answered"] == 1
    assert device.log == {"event": [4.0], "label": []}


def test_nothing_is_sent_beyond_the_horizon(path: Path, toy_interface: Interface) -> None:
    device = FakeDevice(path)
    horizon_s = [2.0]

    async def move(player: Player) -> None:
        for expected in ([1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]):
            waits = len(expected) - 1
            while player.statistics()["horizon_waits"] < waits:  # noqa: ASYNC110 - nothing tells when
                await asyncio.sleep(0)
            assert device.log["event"] == expected
            assert player.event_times() == {"EWR": expected[-1]}
            horizon_s[0] += 1
            player.advance()

    rows = [tells(float(time_s)) for time_s in range(1, 6)]
    player = playing(rows, toy_interface, device, move, lambda: horizon_s[0])
    assert player.statistics()["horizon_waits"] == 3
    assert len(device.log["event"]) == 5


def test_an_action_starts_once_when_its_time_is_reached(
    path: Path, toy_interface: Interface
) -> None:
    device, reached = FakeDevice(path), []

    def prepare(player: Player) -> None:
        async def note() -> None:
            reached.append(player.event_times()["EWR"])

        player.at(2.5, note)
        player.at(3.0, note, device="EWR")
        player.at(99.0, note)

    playing([asks(float(time_s)) for time_s in range(1, 6)], toy_interface, device, prepare)
    assert reached == [3.0, 3.0]


def test_an_action_that_fails_fails_the_run(path: Path, toy_interface: Interface) -> None:
    async def fail() -> None:
        raise ConfigError("planned", "as planned")

    with pytest.raises(ExceptionGroup) as caught:
        playing([asks(1.0), asks(2.0)], toy_interface, FakeDevice(path), lambda p: p.at(1.0, fail))
    assert caught.group_contains(ConfigError, match="planned")


def test_a_row_of_an_unknown_device_is_refused(path: Path, toy_interface: Interface) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        playing([asks(1.0, device="SFO")], toy_interface, FakeDevice(path))
    assert caught.group_contains(ConfigError, match="SFO")


def test_a_socket_that_belongs_to_another_device_is_refused(
    path: Path, toy_interface: Interface
) -> None:
    device = FakeDevice(path)
    device.name = "JFK"
    with pytest.raises(ExceptionGroup) as caught:
        playing([asks(1.0)], toy_interface, device)
    assert caught.group_contains(ConfigError, match="other_device")


def test_a_device_that_stays_away_ends_the_run(path: Path, toy_interface: Interface) -> None:
    player = Player([asks(1.0)], {"EWR": path}, toy_interface, patience_s=0.1)
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(player.run())
    assert caught.group_contains(TransportError, match="unreachable")

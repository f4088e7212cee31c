"""The fleet and the player against real device processes, killed in the middle."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_learner.experiment.replay import DataRow
from cloud_learner.simulate.books import Question
from cloud_learner.simulate.exchange import Exchange
from cloud_learner.simulate.fleet import DeviceProcess, Fleet
from cloud_learner.simulate.player import Player
from edge_runtime import factory
from edge_runtime.errors import ConfigError
from edge_runtime.events.log import EventLog
from edge_runtime.inference.package import Interface
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord, PredictionRecord, Record

START_S = 1_360_000_000.0
LINGER_MS = 25  # long enough for a kill to take something, most of the time
WritePackage = Callable[..., tuple[Path, str]]


def rows_of(device: str, predictions: int, seed: int) -> list[DataRow]:
    """Predictions with labels, and observations, a few seconds apart."""
    random_ = random.Random(seed)
    rows, time_s = [], START_S
    for _ in range(predictions):
        for kind, value in (("scheduled", "distance"), ("departed", "delay")):
            time_s += random_.choice([0.0, 1.0, 17.0])
            fields = {"carrier": random_.choice(["AA", "UA"]), value: random_.uniform(0, 99)}
            label = (1.0, time_s + random_.uniform(5, 90)) if kind == "scheduled" else (None, None)
            rows.append(DataRow(time_s, kind, device, fields, *label))
    return rows


@pytest.fixture
def device(tmp_path: Path, write_package: WritePackage) -> Callable[[str], DeviceProcess]:
    """A device that has the toy's factory package, and was not started."""

    def make(name: str) -> DeviceProcess:
        package, _ = write_package()
        made = DeviceProcess(name, tmp_path / name, families=["toy"], linger_ms=LINGER_MS)
        factory.install(made.configure(), package, factory.inspect(package))
        return made

    return make


def logged(device: DeviceProcess) -> list[tuple[int, int, Record]]:
    """(epoch, seq, record) of all that a stopped device's log holds, its labels last."""
    with EventLog(device.home / "state" / "log", device=device.name) as log:
        return [
            (epoch, seq, codec.decode_record(data))
            for event_class in ("event", "label")
            for epoch, seq, data in log.tail(event_class, 0, 0)
        ]


def seen(device: DeviceProcess) -> list[tuple[str, float, bytes]]:
    """Events in the order of the log, with the feature bytes of predictions."""
    return [
        (r.kind, r.time_s, r.features if isinstance(r, PredictionRecord) else b"")
        for _, _, r in logged(device)
        if not isinstance(r, LabelRecord)
    ]


async def play(
    device: DeviceProcess, rows: list[DataRow], interface: Interface, kills_s: list[float]
) -> tuple[Player, Fleet]:
    """Play `rows`; SIGKILL the device at each of the event times `kills_s`."""
    fleet = Fleet([device])
    async with fleet, asyncio.TaskGroup() as group:
        supervisor = group.create_task(fleet.supervise())
        player = Player(rows, fleet.sockets, interface)
        for kill_s in kills_s:
            player.at(kill_s, lambda: asyncio.to_thread(device.kill), device=device.name)
        await player.run()
        supervisor.cancel()
    return player, fleet


@pytest.mark.parametrize("seed", [1, 2])
def test_after_kills_the_log_holds_what_was_answered_less_what_was_lost(
    seed: int, device: Callable[[str], DeviceProcess], toy_interface: Interface
) -> None:
    rows = rows_of("EWR", 600, seed)
    random_ = random.Random(seed)
    kills_s = sorted(row.time_s for row in random_.sample(rows, 2))
    victim = device("EWR")
    player, fleet = asyncio.run(play(victim, rows, toy_interface, kills_s))

    numbers, found = player.statistics(), logged(victim)
    assert fleet.restarts == numbers["reconnects"] >= 1, seed
    assert numbers["refused"] == {}, seed
    assert numbers["events_answered"] - numbers["events_lost_in_linger"] == len(found), numbers
    events = [(e, s, r) for e, s, r in found if not isinstance(r, LabelRecord)]
    assert [r.time_s for _, _, r in events] == [row.time_s for row in rows], seed
    asked = {(e, s): r.time_s for e, s, r in events if isinstance(r, PredictionRecord)}
    labelled = [asked.get((r.epoch, r.seq)) for *_, r in found[len(events) :]]
    times = [time_s for time_s in labelled if time_s is not None]
    assert sorted(times) == [row.time_s for row in rows if row.label is not None], seed
    assert len(labelled) - len(times) <= numbers["labels_orphaned"], seed


def test_windows_after_a_kill_are_those_of_an_undisturbed_run(
    device: Callable[[str], DeviceProcess], toy_interface: Interface
) -> None:
    rows = rows_of("EWR", 300, seed=3)
    disturbed = device("EWR")
    asyncio.run(play(disturbed, rows, toy_interface, [rows[250].time_s]))
    rows_elsewhere = rows_of("JFK", 300, seed=3)
    calm = device("JFK")
    asyncio.run(play(calm, rows_elsewhere, toy_interface, []))
    assert seen(disturbed) == seen(calm)


def test_a_lane_at_the_horizon_mends_what_a_kill_took(
    device: Callable[[str], DeviceProcess], toy_interface: Interface
) -> None:
    """The learner may be waiting for just these rows, so the horizon would never move."""
    rows = rows_of("EWR", 100, seed=4)
    horizon_s = [rows[100].time_s]

    async def main(victim: DeviceProcess) -> Player:
        async with Fleet([victim]) as fleet, asyncio.TaskGroup() as group:
            player = Player(rows, fleet.sockets, toy_interface, horizon=lambda: horizon_s[0])
            run = group.create_task(player.run())
            await until(lambda: player.statistics()["horizon_waits"] == 1)
            victim.kill()
            await victim.start()
            await until(lambda: player.statistics()["reconnects"] == 1)
            assert not run.done()
            horizon_s[0] = rows[-1].time_s
            player.advance()
        return player

    victim = device("EWR")
    numbers = asyncio.run(main(victim)).statistics()
    assert numbers["horizon_wait_ms"] > 0
    assert numbers["events_answered"] - numbers["events_lost_in_linger"] == len(logged(victim))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0)


def test_a_broken_connection_alone_costs_nothing(
    device: Callable[[str], DeviceProcess], toy_interface: Interface
) -> None:
    rows = [row for row in rows_of("EWR", 100, seed=5) if row.kind == "scheduled"]

    async def main(lonely: DeviceProcess) -> Exchange:
        async with Fleet([lonely]):
            exchange = Exchange("EWR", lonely.socket, "toy")
            await exchange.open()
            for index, row in enumerate(rows):
                if index % 10 == 5:
                    await exchange._client.close()
                await exchange.send(Question(row))
            await exchange.settle_durable()
            await exchange.close()
        return exchange

    lonely = device("EWR")
    exchange = asyncio.run(main(lonely))
    assert exchange.reconnects == 10
    assert (exchange.books.answered.total(), exchange.books.lost.total()) == (100, 0)
    assert [r.time_s for _, _, r in logged(lonely)] == [row.time_s for row in rows]


def test_a_device_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = DeviceProcess("EWR", tmp_path / "EWR", families=["toy"])
    (broken.home / "state").mkdir(parents=True)
    (broken.home / "state" / "log").write_text("in the way")
    with pytest.raises(ConfigError, match="device_failed") as caught:
        asyncio.run(broken.start())
    assert "state/log" in str(caught.value)
    assert not broken.running


def test_a_home_with_a_long_name_gets_a_socket_elsewhere(
    tmp_path: Path, device: Callable[[str], DeviceProcess]
) -> None:
    made = DeviceProcess("EWR", tmp_path / ("long" * 25), families=["toy"])

    async def main() -> None:
        async with Fleet([made]) as fleet:
            assert fleet.statistics() == {"devices": 1, "running": 1, "restarts": 0}
            assert len(str(made.socket)) < 108

    asyncio.run(main())
    assert not made.running
    assert not made.socket.parent.exists()


_PARENT = """
import asyncio, signal, sys
from pathlib import Path
from cloud_learner.simulate.fleet import DeviceProcess, Fleet
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background

async def main():
    async with Fleet([DeviceProcess("EWR", Path(sys.argv[1]), families=["toy"])]) as fleet:
        print(fleet.devices["EWR"].pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_device_outlives_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path / "EWR")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout is not None
        watched = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(how)
        parent.wait(20)
    gone = asyncio.run(_readable(watched))
    os.close(watched)
    assert gone


async def _readable(fd: int) -> bool:
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, over.set)
    async with asyncio.timeout(10):
        return await over.wait()

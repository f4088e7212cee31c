"""A real daemon beside a real broker sums up what its model is given, while it answers.

That sketches travel in reports, and what is made of them, is tested with a clock that can be moved
(tests/unit/test_evaluate_hearing.py); a daemon's minute is a minute.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cloud_learner.simulate.fleet import DeviceProcess
from cloud_learner.streams import make_streams
from edge_runtime import factory
from edge_runtime.api.client import Client
from edge_runtime.bus.nats import connect
from edge_runtime.device.sketching import RECORDS_MAX, ROWS_MIN
from edge_runtime.features.histogram import counts_of
from edge_runtime.wire import codec, subjects

WAIT_S = 100.0


def ask(client: Client, count: int) -> None:
    for at in range(count):
        client.predict("toy", "scheduled", 1.36e9 + at, {"carrier": "UA", "distance": 40.0 + at})


def device_at(url, tmp_path, write_package) -> DeviceProcess:
    root = tmp_path / "root.json"
    root.write_text("{}")  # no updates come: what is asked here needs none
    package, _ = write_package()
    device = DeviceProcess("EWR", tmp_path / "EWR", families=["toy"], nats=url, root=root)
    factory.install(device.configure(), package, factory.inspect(package))
    return device


def test_a_daemon_sums_up_what_it_was_asked(run_server, tmp_path: Path, write_package) -> None:
    async def story() -> None:
        device = device_at(run_server(""), tmp_path, write_package)
        await device.start()
        try:
            with Client(device.socket) as client:
                ask(client, RECORDS_MAX)
                while not client.status().status["agent"]["sketched_rows"]:
                    pass
        finally:
            await device.stop()

    asyncio.run(asyncio.wait_for(story(), WAIT_S))


@pytest.mark.slow
def test_a_daemons_report_brings_the_sketch_after_a_minute(
    run_server, tmp_path: Path, write_package
) -> None:
    async def story():
        url = run_server("")
        bus = await connect(url, name="learner")
        await make_streams(bus)
        device, told = device_at(url, tmp_path, write_package), asyncio.Queue()

        async def take(message) -> None:
            await told.put((codec.decode_report(message.data), len(message.data)))

        listening = await bus.subscribe(subjects.report("*"), take)
        await device.start()
        try:
            with Client(device.socket) as client:
                while True:
                    ask(client, RECORDS_MAX)
                    report, size = await told.get()
                    if report.sketches:
                        return report.sketches, size
        finally:
            await device.stop()
            await listening.close()
            await bus.close()

    [sketch], size = asyncio.run(asyncio.wait_for(story(), WAIT_S))
    print(f"{sketch.rows} rows, a report of {size} bytes")

    assert sketch.rows >= ROWS_MIN
    assert all(counts_of(each, sketch.rows) for each in sketch.columns)

"""A broker that is replaced by another release of it, and back, under a device that publishes.

The older server is the one that NATS_SERVER_OLD names, or what `make old-server` put below var/.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edge_runtime.bus.base import Bus
from edge_runtime.bus.nats import connect
from edge_runtime.errors import TransportError

ROOT = Path(__file__).parents[2]
OLD = Path(os.environ.get("NATS_SERVER_OLD", ROOT / "var" / "old-server" / "nats-server"))
CONFIG = "feature_flags { js_ack_fc_v2: false }\n"
CHANGES = 4
WAIT_S = 20.0
MB = 1 << 20


class Device:
    """Publishes numbers in order, each until it is stored, from one connection."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.stored = 0
        self.refused = 0
        self.enough = False

    async def run(self) -> None:
        while not self.enough:
            body = b"%d" % self.stored
            try:
                await self._bus.publish("up.a", body, message_id=f"up/{self.stored}")
                self.stored += 1
            except TransportError:
                self.refused += 1
                await asyncio.sleep(0.01)

    async def until(self, stored: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.stored < stored:  # noqa: ASYNC110 # it is the state of another task
                await asyncio.sleep(0.01)


@pytest.mark.skipif(not OLD.exists(), reason="no older nats-server: make old-server")
def test_servers_of_two_releases_take_turns_and_nothing_is_lost_or_doubled(run_server):
    said = subprocess.run([OLD, "--version"], capture_output=True, text=True, check=True).stdout
    assert "v2.14" in said, said
    url = run_server(CONFIG, server=OLD)
    port = urlsplit(url).port

    async def scenario() -> None:
        bus = await connect(url, name="device")
        await bus.ensure_stream("UP", ["up.>"], max_bytes=64 * MB, discard_new=True)
        device = Device(bus)
        publishing = asyncio.create_task(device.run())
        read: list[bytes] = []
        reader_bus = await connect(url, name="learner")
        async with reader_bus.pull("UP", "learner", "up.>") as reader:
            for change in range(CHANGES):
                await device.until(device.stored + 200)
                for message in await reader.next_batch(100, WAIT_S):
                    read.append(message.data)
                    await message.ack()
                await asyncio.to_thread(run_server.stop, url)
                server = None if change % 2 == 0 else OLD
                await asyncio.to_thread(run_server, CONFIG, server=server, port=port)
            await device.until(device.stored + 200)
            device.enough = True
            await publishing
            while not read or read[-1] != b"%d" % (device.stored - 1):
                read += [each.data for each in await reader.next_batch(500, WAIT_S)]
        whole = [b"%d" % number for number in range(device.stored)]
        async with reader_bus.pull("UP", "audit", "up.>") as audit:
            held: list[bytes] = []
            while len(held) < device.stored:
                batch = await audit.next_batch(500, WAIT_S)
                assert batch, f"{len(held)} of {device.stored} are held"
                held += [each.data for each in batch]
            assert await audit.next_batch(1, 0.1) == []
        assert held == whole
        assert set(read) == set(whole)  # what comes again is cut by the learner's watermark
        assert bus.statistics()["reconnects"] == CHANGES
        assert device.refused > 0
        await reader_bus.close()
        await bus.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))

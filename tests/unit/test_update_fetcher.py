"""The fetcher: what a broker that goes, comes back, trickles or lies does to a file in chunks."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError

from cloud_learner.release.metadata import blob_messages, push
from edge_runtime.bus.base import Message
from edge_runtime.bus.memory import MemoryBroker, MemoryBus
from edge_runtime.clock import ManualClock
from edge_runtime.errors import TransportError
from edge_runtime.update.fetcher import PATIENCE_S, BusFetcher
from edge_runtime.update.shelf import Shelf
from edge_runtime.update.trust import CHUNK_BYTES
from edge_runtime.wire import subjects

DATA = random.Random(3).randbytes(40 * CHUNK_BYTES + 17)
SHA = hashlib.sha256(DATA).hexdigest()


class Line:
    """A device's bus to a broker that holds DATA; `asked` are the subjects of each question.

    `trouble`, called before each question, may raise. `pause` is how the fetcher waits: it moves
    the clock, and calls `meanwhile`.
    """

    def __init__(self, broker: MemoryBroker, bus: MemoryBus) -> None:
        self.broker, self._bus = broker, bus
        self.clock = ManualClock()
        self.asked: list[list[str]] = []
        self.pauses: list[float] = []
        self.trouble: Callable[[list[str]], None] = lambda _names: None
        self.meanwhile: Callable[[], None] = lambda: None

    async def last_many(self, stream: str, names: list[str]) -> list[Message | None]:
        self.asked.append(names)
        self.trouble(names)
        return await self._bus.last_many(stream, names)

    def pause(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.clock.advance(pause_s)
        self.meanwhile()


Scene = Callable[[Line, BusFetcher], Awaitable[None]]


def play(scene: Scene) -> None:
    async def run() -> None:
        broker = MemoryBroker()
        bus = await broker.connect()
        await bus.ensure_stream(
            subjects.TRUST_STREAM,
            subjects.TRUST_ALL,
            max_bytes=1 << 30,
            per_subject=1,
            discard_new=False,
        )
        await push(bus, blob_messages(DATA))
        line = Line(broker, bus)
        loop = asyncio.get_running_loop()
        fetcher = BusFetcher(line, loop, clock=line.clock, pause=line.pause)  # type: ignore[arg-type]
        await scene(line, fetcher)

    asyncio.run(run())


async def fetched(fetcher: BusFetcher, first: int = 0) -> bytes:
    return await asyncio.to_thread(lambda: b"".join(fetcher.chunks(SHA, len(DATA), first)))


def index_of(name: str) -> int:
    return int(name.rsplit(".", 1)[1])


def test_a_file_is_fetched_in_few_questions_and_from_any_chunk_on() -> None:
    async def scene(line: Line, fetcher: BusFetcher) -> None:
        assert await fetched(fetcher) == DATA
        assert [len(names) for names in line.asked] == [16, 16, 9]
        assert await fetched(fetcher, 39) == DATA[39 * CHUNK_BYTES :]
        assert len(line.asked[-1]) == 2

    play(scene)


def test_a_broker_that_comes_back_in_the_middle_is_asked_for_the_rest_only() -> None:
    async def scene(line: Line, fetcher: BusFetcher) -> None:
        def kill_once(names: list[str]) -> None:
            if index_of(names[0]) == 16 and not line.pauses:
                line.broker.down()

        def come_back() -> None:
            if len(line.pauses) == 5:
                line.broker.up()

        line.trouble, line.meanwhile = kill_once, come_back
        assert await fetched(fetcher) == DATA
        assert [index_of(names[0]) for names in line.asked] == [0, *[16] * 6, 32]
        assert line.pauses == [0.05, 0.1, 0.2, 0.4, 0.8]
        assert fetcher.statistics()["retries"] == 5

    play(scene)


def test_a_broker_that_stays_away_is_given_up_by_name() -> None:
    async def scene(line: Line, fetcher: BusFetcher) -> None:
        line.broker.down()
        with pytest.raises(DownloadError, match="unreachable"):
            await fetched(fetcher)
        assert PATIENCE_S <= line.clock.monotonic_s() <= PATIENCE_S + 1

    play(scene)


def test_a_line_that_trickles_is_asked_for_less_and_then_given_up_by_name() -> None:
    async def scene(line: Line, fetcher: BusFetcher) -> None:
        def trickle(_names: list[str]) -> None:
            line.clock.advance(10.0)
            raise TransportError("timeout", "one byte a second")

        line.trouble = trickle
        with pytest.raises(SlowRetrievalError, match="no whole chunk"):
            await fetched(fetcher)
        assert [len(names) for names in line.asked] == [16, 8, 4]

    play(scene)


def test_a_line_that_carries_few_chunks_at_a_time_gets_there() -> None:
    async def scene(line: Line, fetcher: BusFetcher) -> None:
        def narrow(names: list[str]) -> None:
            if len(names) > 2:
                raise TransportError("timeout", "too much at once")

        line.trouble = narrow
        assert await fetched(fetcher) == DATA
        assert [len(names) for names in line.asked[:6]] == [16, 8, 4, 2, 2, 2]

    play(scene)


def test_what_arrived_before_a_failure_is_not_fetched_again_by_a_new_process(
    tmp_path: Path,
) -> None:
    async def scene(line: Line, fetcher: BusFetcher) -> None:
        def put() -> Path:
            return Shelf(tmp_path).put(
                SHA, len(DATA), lambda first: fetcher.chunks(SHA, len(DATA), first)
            )

        def fail(names: list[str]) -> None:
            if index_of(names[0]) == 32:
                line.broker.down()

        line.trouble = fail
        with pytest.raises(DownloadError):
            await asyncio.to_thread(put)
        line.broker.up()
        line.trouble = lambda _names: None
        line.asked.clear()
        path = await asyncio.to_thread(put)
        assert path.read_bytes() == DATA
        assert [index_of(names[0]) for names in line.asked] == [32]

    play(scene)


def test_an_absent_chunk_is_not_waited_for() -> None:
    async def scene(line: Line, fetcher: BusFetcher) -> None:
        def ask() -> bytes:
            return b"".join(fetcher.chunks("0" * 64, 5))

        with pytest.raises(DownloadHTTPError, match="not on the broker"):
            await asyncio.to_thread(ask)
        assert line.pauses == []

    play(scene)

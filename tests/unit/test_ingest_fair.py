"""The fair queue: a device that floods delays nobody but itself."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.ingest.fair import TURN_BYTES, FairQueue
from cloud_learner.ingest.opening import Incoming

SIZE = TURN_BYTES // 2


def message(device, number, size=SIZE):
    return Incoming(f"hw.ev.{device}.event", bytes(size - 1), 0.0, (device, number))


def names(taken):
    return "".join(each.token[0] for each in taken)


def test_a_flood_that_came_first_does_not_delay_the_others():
    async def scenario():
        queue = FairQueue()
        await queue.put([message("A", at) for at in range(100)])
        await queue.put([message("B", 0), message("C", 0)])
        return names(await queue.take(6 * SIZE, 1.0))

    assert asyncio.run(scenario()) == "AABCAA"


def test_devices_that_all_have_much_get_the_same_bytes_whatever_the_size_of_their_messages():
    async def scenario():
        queue = FairQueue()
        await queue.put([message("A", at) for at in range(100)])
        await queue.put([message("B", at, SIZE // 8) for at in range(800)])
        return [each for _ in range(10) for each in await queue.take(4 * TURN_BYTES, 1.0)]

    taken = asyncio.run(scenario())
    shares = [sum(m.size for m in taken if m.token[0] == device) for device in "AB"]
    assert abs(shares[0] - shares[1]) <= TURN_BYTES


def test_who_fills_the_queue_waits_until_there_is_room():
    async def scenario():
        queue = FairQueue(bytes_max=4 * SIZE)
        await queue.put([message("A", at) for at in range(4)])
        more = asyncio.ensure_future(queue.put([message("A", 4)]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(more), 0.01)
        first = await queue.take(SIZE, 1.0)
        await asyncio.wait_for(more, 10.0)
        return first + await queue.take(100 * SIZE, 1.0), queue.bytes

    taken, left = asyncio.run(scenario())
    assert [each.token[1] for each in taken] == [0, 1, 2, 3, 4]
    assert left == 0


def test_nothing_comes_when_nothing_is_there():
    assert asyncio.run(FairQueue().take(1, 0.0)) == []


@given(
    sent=st.lists(st.tuples(st.sampled_from("ABC"), st.integers(1, 2 * TURN_BYTES)), max_size=40),
    size=st.integers(1, 4 * TURN_BYTES),
)
def test_everything_leaves_once_and_each_device_in_its_order(sent, size):
    async def scenario():
        queue = FairQueue()
        await queue.put([message(device, at, each) for at, (device, each) in enumerate(sent)])
        taken = []
        while queue.bytes:
            taken += await queue.take(size, 1.0)
        return [each.token for each in taken]

    left = asyncio.run(scenario())
    for device in "ABC":
        numbers = [number for name, number in left if name == device]
        assert numbers == [at for at, (name, _) in enumerate(sent) if name == device]

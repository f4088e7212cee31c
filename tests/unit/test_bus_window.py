"""The window: what may be under way, by number and bytes, in order, and never past a deadline."""

from __future__ import annotations

import asyncio
import random

import pytest

from edge_runtime.bus.window import Window
from edge_runtime.errors import TransportError

NOTHING = {"out": 0, "out_bytes": 0, "waiting": 0}
LONG_S = 30.0


def test_room_is_given_in_the_order_that_it_was_asked_for():
    async def scenario() -> None:
        window, order, held = Window(2, 100), [], asyncio.Event()

        async def send(number: int, size: int) -> None:
            async with window.room(size, LONG_S):
                order.append(number)
                await held.wait()

        tasks = [asyncio.create_task(send(n, size)) for n, size in enumerate((60, 60, 10, 10))]
        await asyncio.sleep(0)
        assert order == [0], "the second has no room, and the third does not overtake it"
        held.set()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3]
        assert window.statistics() == NOTHING

    asyncio.run(scenario())


def test_one_that_is_larger_than_all_room_goes_alone():
    async def scenario() -> None:
        window = Window(8, 100)
        async with window.room(1000, LONG_S):
            with pytest.raises(TransportError) as caught:
                async with window.room(1, 0.001):
                    pass
            assert caught.value.code == "timeout"
        async with window.room(1, LONG_S):
            pass
        assert window.statistics() == NOTHING

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_left_behind_however_it_ends(seed):
    async def scenario() -> None:
        rng = random.Random(seed)
        window = Window(3, 100)
        most = 0

        async def send() -> None:
            nonlocal most
            async with window.room(rng.randint(1, 120), rng.choice([0.0, 0.001, LONG_S])):
                counted = window.statistics()
                most = max(most, counted["out"])
                assert counted["out_bytes"] <= 100 or counted["out"] == 1
                for _ in range(rng.randint(0, 3)):
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(send()) for _ in range(60)]
        for task in rng.sample(tasks, 20):
            await asyncio.sleep(0)
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        odd = [end for end in ends if end is not None and not isinstance(end, TransportError)]
        assert all(isinstance(end, asyncio.CancelledError) for end in odd), (seed, odd)
        assert most <= 3, seed
        assert window.statistics() == NOTHING, seed

    asyncio.run(scenario())

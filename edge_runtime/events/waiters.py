"""Who waits for a record to become durable, on whatever event loop.

Why: the commit thread knows when a record is durable, or that it never will be; who waits for it
lives on a loop of its own, which may be gone by then.

Invariants: called under its owner's lock; each future is settled on its own loop, once.
"""

from __future__ import annotations

import asyncio
import contextlib

from edge_runtime.errors import CapacityError


class Waiters:
    """The futures of those who wait, by the sequence number that they wait for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def add(self, seq: int) -> asyncio.Future[None]:
        """What the running loop may await until `seq` is durable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append((seq, loop, future))
        return future

    def tell(self, first: int, last: int, error: CapacityError | None) -> None:
        """Settle those who wait for `first` to `last`: with `error`, or well."""
        if not self._waiting:
            return
        told = [each for each in self._waiting if first <= each[0] <= last]
        self._waiting = [each for each in self._waiting if not first <= each[0] <= last]
        for _, loop, future in told:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future, error)


def _settle(future: asyncio.Future[None], error: CapacityError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)

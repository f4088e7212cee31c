"""The fair queue: what was read ahead, handed on by turns, so that no device holds up the others.

Why: a device that floods fills the stream, and whoever reads that in order makes all others wait.

Invariants: bounded in bytes; who fills it waits. Messages of one device leave in the order in which
they came; among devices that wait, each gets about the same number of bytes. What is taken out is
not acknowledged by that.

Knows nothing about what a message says.
"""

from __future__ import annotations

import asyncio
from collections import deque

from cloud_learner.ingest.opening import Incoming
from edge_runtime.wire import subjects

AHEAD_BYTES = 32 << 20
TURN_BYTES = 64 << 10


class FairQueue:
    """Messages that wait for a commit; belongs to one event loop."""

    def __init__(self, bytes_max: int = AHEAD_BYTES) -> None:
        self._bytes_max = bytes_max
        self._waiting: dict[str, deque[Incoming]] = {}
        self._turns: deque[str] = deque()
        self._left_bytes = TURN_BYTES  # of the turn of the first device
        self._changed = asyncio.Condition()
        self.bytes = 0

    async def put(self, messages: list[Incoming]) -> None:
        """Add messages; waits while the queue is full."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.bytes < self._bytes_max)
            for message in messages:
                self._add(message)
            self._changed.notify_all()

    async def take(self, bytes_max: int, wait_s: float) -> list[Incoming]:
        """Messages of about `bytes_max` as soon as there are any; none when `wait_s` passes."""
        async with self._changed:
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait_for(lambda: self.bytes > 0)
            except TimeoutError:
                return []
            taken, size = [], 0
            while self._turns and size < bytes_max:
                taken.append(self._next())
                size += taken[-1].size
            self._changed.notify_all()
            return taken

    def _add(self, message: Incoming) -> None:
        device = subjects.device_of(message.subject)
        if device not in self._waiting:
            self._waiting[device] = deque()
            self._turns.append(device)
        self._waiting[device].append(message)
        self.bytes += message.size

    def _next(self) -> Incoming:
        device = self._turns[0]
        message = self._waiting[device].popleft()
        self.bytes -= message.size
        self._left_bytes -= message.size
        if not self._waiting[device]:
            del self._waiting[device]
            self._turns.popleft()
            self._left_bytes = TURN_BYTES
        elif self._left_bytes <= 0:
            self._turns.rotate(-1)
            self._left_bytes = TURN_BYTES
        return message

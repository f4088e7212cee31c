"""How much may be under way: messages and bytes, given out in the order that was asked.

Why: what waits for an acknowledgement is held in memory and in the socket; a frozen broker must not
let it grow, and must not keep a caller longer than its deadline.

Invariants: no more than `messages` are out, nor more than `bytes_max`, but for one message alone
that is larger. Who waits is served in order.

Knows nothing about what a message is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_runtime.errors import TransportError


class Window:
    """A bound on what is under way at a time."""

    def __init__(self, messages: int, bytes_max: int) -> None:
        self._messages, self._bytes = messages, bytes_max
        self._out = self._out_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, size: int, timeout_s: float) -> AsyncIterator[None]:
        """Hold room for a message of `size` bytes. Raises: TransportError `timeout`."""
        await self._enter(size, timeout_s)
        try:
            yield
        finally:
            self._leave(size)

    def statistics(self) -> dict[str, int]:
        """What is under way, and how many wait for room."""
        return {"out": self._out, "out_bytes": self._out_bytes, "waiting": len(self._waiting)}

    async def _enter(self, size: int, timeout_s: float) -> None:
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave(size)
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove((size, turn))
                self._admit()
            if isinstance(error, TimeoutError):
                text = f"no room to send within {timeout_s} s: the broker acknowledges nothing"
                raise TransportError("timeout", text) from None
            raise

    def _fits(self, size: int) -> bool:
        roomy = not self._out or self._out_bytes + size <= self._bytes
        return roomy and self._out < self._messages

    def _take(self, size: int) -> None:
        self._out += 1
        self._out_bytes += size

    def _leave(self, size: int) -> None:
        self._out -= 1
        self._out_bytes -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._take(size)
                turn.set_result(None)

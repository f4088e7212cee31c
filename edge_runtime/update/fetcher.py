"""How signed metadata and packages arrive: direct gets over the bus, for a thread that waits.

Why: python-tuf asks for files one after another and knows no event loop. This turns each question
into a direct get on the bus's loop, and asks ahead where the next questions are known.

Invariants: called from a thread that is not the bus's loop; every wait has a deadline; what fails
raises one of python-tuf's DownloadErrors, an absent file DownloadHTTPError 404. A file in chunks
outlives a broker that comes back within `patience_s`: what has arrived is never asked for again,
and a line too slow for many chunks at once is asked for fewer. Nothing that arrives here is
trusted: bounds come from signed lengths, content is judged by the caller.

Implements proto/asyncapi.yaml (channels hw.meta, hw.blob) on the reading side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    SlowRetrievalError,
)
from tuf.ngclient.fetcher import FetcherInterface

from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import HeadwaterError, TransportError
from edge_runtime.update.trust import chunk_sizes
from edge_runtime.wire import subjects

BASE_URL = "hw://meta/"

PATIENCE_S = 30.0
"""How long a file in chunks waits for the next one, whatever the broker does meanwhile."""

_WINDOW = 16
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.05, 1.0

T = TypeVar("T")


class BusFetcher(FetcherInterface):
    """Fetches over `bus`, whose calls run on `loop`; `timeout_s` bounds each wait.

    `patience_s`, by `clock`, bounds how long a file in chunks goes on without a new one; `pause` is
    how it waits between two tries.
    """

    def __init__(
        self,
        bus: Bus,
        loop: asyncio.AbstractEventLoop,
        *,
        timeout_s: float = 10.0,
        patience_s: float = PATIENCE_S,
        clock: Clock | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bus, self._loop = bus, loop
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._clock, self._pause = clock or SystemClock(), pause
        self._ahead: dict[str, bytes | None] = {}
        self._counts = {"round_trips": 0, "bytes": 0, "retries": 0}

    def prefetch(self, names: list[str]) -> None:
        """Ask for these metadata files at once; each answer serves the next fetch of its name.

        Raises: DownloadError.
        """
        answers = self._many([subjects.metadata(name) for name in names])
        self._ahead = dict(zip(names, answers, strict=True))

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The file at `url`, kept in memory: a message of the bus is bounded already."""
        data = b"".join(self.fetch(url))
        if len(data) > max_length:
            raise DownloadLengthMismatchError(f"{url} has {len(data)} bytes, above {max_length}")
        return data

    def chunks(self, sha256: str, length: int, first: int = 0) -> Iterator[bytes]:
        """The chunks of a file of `length` bytes from chunk `first` on, several asked for at once.

        Raises: DownloadError (nobody answered for so long), SlowRetrievalError (somebody did, and
        no chunk was whole in time), DownloadHTTPError (a chunk is absent),
        DownloadLengthMismatchError.
        """
        sizes, at, window = chunk_sizes(length), first, _WINDOW
        patience = _Patience(self._clock, self._patience_s)
        while at < len(sizes):
            some = range(at, min(at + window, len(sizes)))
            try:
                answers = self._many([subjects.chunk(sha256, index) for index in some])
            except _UnansweredError as error:
                window = max(window // 2, 1) if error.late else window
                self._counts["retries"] += 1
                self._pause(patience.next_pause_s(error))
                continue
            for index, data in zip(some, answers, strict=True):
                yield _checked(data, sizes[index], f"chunk {index} of {sha256[:12]}")
            at, patience = some.stop, _Patience(self._clock, self._patience_s)

    def statistics(self) -> dict[str, int]:
        """Round trips made, bytes received, and how often chunks were asked for again."""
        return dict(self._counts)

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(BASE_URL)
        if name in self._ahead:
            data = self._ahead.pop(name)
        else:
            [data] = self._many([subjects.metadata(name)])
        if data is None:
            raise DownloadHTTPError(f"{name} is not on the broker", 404)
        return iter([data])

    def _many(self, names: list[str]) -> list[bytes | None]:
        messages: list[Message | None] = self._wait(
            self._bus.last_many(subjects.TRUST_STREAM, names)
        )
        self._counts["round_trips"] += 1
        found = [None if message is None else message.data for message in messages]
        self._counts["bytes"] += sum(len(data) for data in found if data is not None)
        return found

    def _wait(self, question: Coroutine[Any, Any, T]) -> T:
        try:
            future = asyncio.run_coroutine_threadsafe(question, self._loop)
        except RuntimeError as error:
            question.close()
            raise DownloadError("the bus's event loop is closed") from error
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            future.cancel()
            raise _UnansweredError(f"no answer within {self._timeout_s} s", late=True) from error
        except CancelledError as error:
            raise DownloadError("the bus is gone") from error
        except TransportError as error:
            raise _UnansweredError(str(error), late=error.code == "timeout") from error
        except HeadwaterError as error:
            raise DownloadError(str(error)) from error


class _UnansweredError(DownloadError):
    """Worth another try; `late` when an answer was on its way, as far as is known."""

    def __init__(self, what: str, *, late: bool) -> None:
        super().__init__(what)
        self.late = late


class _Patience:
    """How long to go on without a chunk, and how long to wait before the next try."""

    def __init__(self, clock: Clock, patience_s: float) -> None:
        self._clock, self._patience_s = clock, patience_s
        self._until_s = clock.monotonic_s() + patience_s
        self._pause_s = _PAUSE_FIRST_S
        self._late = False

    def next_pause_s(self, error: _UnansweredError) -> float:
        """Raises: SlowRetrievalError, or `error`, when it has lasted too long."""
        self._late |= error.late
        if self._clock.monotonic_s() >= self._until_s:
            if self._late:
                raise SlowRetrievalError(
                    f"no whole chunk arrived within {self._patience_s:g} s: {error}"
                ) from error
            raise error
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _PAUSE_MAX_S)
        return pause_s


def _checked(data: bytes | None, size: int, what: str) -> bytes:
    if data is None:
        raise DownloadHTTPError(f"{what} is not on the broker", 404)
    if len(data) != size:
        raise DownloadLengthMismatchError(f"{what} has {len(data)} bytes, not {size}")
    return data

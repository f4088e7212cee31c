"""How signed metadata and packages arrive: direct gets over the bus, for a thread that waits.

Why: python-tuf asks for files one after another and knows no event loop. This turns each question
into a direct get on the bus's loop, and asks ahead where the next questions are known.

Invariants: called from a thread that is not the bus's loop; every wait has a deadline; what fails
raises one of python-tuf's DownloadErrors, an absent file DownloadHTTPError 404. Nothing that
arrives here is trusted: bounds come from signed lengths, content is judged by the caller.

Implements proto/asyncapi.yaml (channels hw.meta, hw.blob) on the reading side.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError
from tuf.ngclient.fetcher import FetcherInterface

from edge_runtime.bus.base import Bus, Message
from edge_runtime.errors import HeadwaterError
from edge_runtime.update.trust import chunk_sizes
from edge_runtime.wire import subjects

_WINDOW = 16

T = TypeVar("T")


class Fetcher(FetcherInterface):
    """What the client asks of a way to the files, beyond what python-tuf asks.

    Metadata lies below `base_url`.
    """

    base_url: str

    @abstractmethod
    def prefetch(self, names: list[str]) -> None:
        """Ask for these metadata files ahead, where that saves time. Raises: DownloadError."""

    @abstractmethod
    def chunks(self, sha256: str, length: int) -> Iterator[bytes]:
        """The file with this content, never more than `length` bytes. Raises: DownloadError."""

    @abstractmethod
    def statistics(self) -> dict[str, int]:
        """Counts since the start."""


class BusFetcher(Fetcher):
    """Fetches over `bus`, whose calls run on `loop`; `timeout_s` bounds each wait."""

    base_url = "hw://meta/"

    def __init__(
        self, bus: Bus, loop: asyncio.AbstractEventLoop, *, timeout_s: float = 10.0
    ) -> None:
        self._bus = bus
        self._loop = loop
        self._timeout_s = timeout_s
        self._ahead: dict[str, bytes | None] = {}
        self._counts = {"round_trips": 0, "bytes": 0}

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

    def chunks(self, sha256: str, length: int) -> Iterator[bytes]:
        """The chunks of a file of `length` bytes, several requests outstanding.

        Raises: DownloadError, DownloadHTTPError (a chunk is absent), DownloadLengthMismatchError.
        """
        sizes = chunk_sizes(length)
        for start in range(0, len(sizes), _WINDOW):
            window = range(start, min(start + _WINDOW, len(sizes)))
            answers = self._many([subjects.chunk(sha256, index) for index in window])
            for index, data in zip(window, answers, strict=True):
                yield _checked(data, sizes[index], f"chunk {index} of {sha256[:12]}")

    def ask_time(self, question: bytes) -> bytes:
        """What is answered to a question of the time. Raises: DownloadError."""
        return self._wait(self._bus.ask(subjects.TIME, question))

    def statistics(self) -> dict[str, int]:
        """Round trips made and bytes received."""
        return dict(self._counts)

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(self.base_url)
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
            raise DownloadError(f"no answer within {self._timeout_s} s") from error
        except (HeadwaterError, CancelledError) as error:
            raise DownloadError(str(error)) from error


def _checked(data: bytes | None, size: int, what: str) -> bytes:
    if data is None:
        raise DownloadHTTPError(f"{what} is not on the broker", 404)
    if len(data) != size:
        raise DownloadLengthMismatchError(f"{what} has {len(data)} bytes, not {size}")
    return data

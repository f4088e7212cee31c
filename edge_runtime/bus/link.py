"""One connection to a NATS server, from the dial to its loss; it never mends itself.

Why: nats-py can hang while it reconnects over a half-open connection, replays stale bytes after
that and closes for good on some errors. So its own reconnect is off: a lost link is thrown away
whole and `nats.py` dials a new one. All that touches the inside of nats-py is in this file.

Invariants: every question gets an answer, its deadline, or the loss of the link, whichever is
first. Answers arrive on one shared inbox, so thousands of questions may be outstanding.

Knows nothing about streams beyond the shape of an API answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from nats import errors as nats_errors
from nats.aio.client import Client

from edge_runtime.errors import CapacityError, HeadwaterError, RequestError, TransportError

_DIAL_TIMEOUT_S = 2.0
_FLUSH_WAIT_S = 0.5  # how long one sender is held back when 2 MB wait for the socket
_API_TIMEOUT_S = 5.0
_FULL_CODES = {10023, 10047, 10077}  # insufficient resources, storage limit, stream limit
_FULL_WORDS = ("maximum", "insufficient", "exceeded")

RawCallback = Callable[[Any], Awaitable[None]]
log = logging.getLogger("headwater.bus")


class ApiError(msgspec.Struct):
    """What JetStream says when it refuses."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Place(msgspec.Struct):
    """How far a consumer is: all up to `stream_seq` is acknowledged."""

    stream_seq: int = 0


class ConsumerInfo(msgspec.Struct):
    """What JetStream says of a consumer."""

    ack_floor: Place


class ApiReply(msgspec.Struct):
    """The part of any JetStream answer that is read here; the rest is ignored.

    `total` counts what a list has in all, which may be more than one answer holds.
    """

    seq: int = 0
    duplicate: bool = False
    consumers: list[ConsumerInfo] | None = None
    total: int = 0
    purged: int = 0
    error: ApiError | None = None


_reply_decoder = msgspec.json.Decoder(ApiReply)


@dataclass(slots=True)
class Question:
    """A request on its way; await `answer` or call `forget`."""

    future: asyncio.Future[Any]
    forget: Callable[[], None]

    async def answer(self) -> Any:
        """The raw reply. Raises: TransportError `timeout`, `unreachable`."""
        try:
            reply = await self.future
        finally:
            self.forget()
        if isinstance(reply, HeadwaterError):
            raise reply
        return reply


class Link:
    """A dialled connection; make it with `dial`, end it with `abandon`."""

    def __init__(self, client: Any, on_doubt: Callable[[], None]) -> None:
        self._client = client
        self._on_doubt = on_doubt
        self._loop = asyncio.get_running_loop()
        self._tokens = itertools.count()
        self._inbox = client.new_inbox() + "."
        self._waiting: dict[str, asyncio.Future[Any]] = {}

    @classmethod
    async def dial(cls, url: str, name: str, on_doubt: Callable[[], None]) -> Link:
        """Connect once. `on_doubt` is called whenever the connection may be lost.

        Raises: TransportError `unreachable`.
        """
        link = cls(Client(), on_doubt)
        try:
            await link._open(url, name)
        except (nats_errors.Error, OSError, TimeoutError) as error:
            await link.abandon()
            raise TransportError("unreachable", f"no broker answers at {url}: {error!r}") from error
        except BaseException:
            await link.abandon()
            raise
        return link

    async def _open(self, url: str, name: str) -> None:
        await self._client.connect(
            url,
            name=name,
            allow_reconnect=False,
            max_reconnect_attempts=1,  # 0 would retry for ever within connect
            reconnect_time_wait=0.05,
            connect_timeout=_DIAL_TIMEOUT_S,
            flush_timeout=_FLUSH_WAIT_S,
            error_cb=self._reported,
            closed_cb=self._reported,
        )
        await self.listen(f"{self._inbox}*", self._answered)

    @property
    def open(self) -> bool:
        """Whether the connection stands as far as the client library knows."""
        return bool(self._client.is_connected)

    async def ask(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout_s: float
    ) -> Question:
        """Send a request; the deadline starts now. Raises: TransportError `unreachable`."""
        token = str(next(self._tokens))
        future = self._loop.create_future()
        late = TransportError("timeout", f"no answer on {subject} within {timeout_s} s")
        timer = self._loop.call_later(timeout_s, _settle, future, late)

        def forget() -> None:
            timer.cancel()
            future.cancel()
            self._waiting.pop(token, None)

        self._waiting[token] = future
        try:
            await self.send(subject, data, reply=self._inbox + token, headers=headers)
        except BaseException:
            forget()
            raise
        return Question(future, forget)

    async def api(self, subject: str, body: dict[str, Any]) -> ApiReply:
        """Ask the JetStream API. Raises: TransportError, CapacityError."""
        payload = msgspec.json.encode(body) if body else b""
        question = await self.ask(f"$JS.API.{subject}", payload, None, _API_TIMEOUT_S)
        return read_reply(await question.answer(), subject)

    async def send(
        self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Hand a message to the connection. Raises: TransportError `unreachable`."""
        task = asyncio.current_task()
        cancels = task.cancelling() if task else 0
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except nats_errors.Error as error:
            raise TransportError("unreachable", f"cannot send on {subject}: {error!r}") from error
        if task and task.cancelling() > cancels:  # nats-py swallows a cancellation while it flushes
            raise asyncio.CancelledError

    async def listen(self, subject: str, callback: RawCallback) -> Any:
        """Subscribe with a raw callback; the result has `unsubscribe()`.

        Raises: TransportError `unreachable`.
        """
        try:
            return await self._client.subscribe(subject, cb=callback)
        except nats_errors.BadSubjectError as error:
            raise RequestError("bad_subject", f"{subject!r} is not a subject") from error
        except nats_errors.Error as error:
            raise TransportError("unreachable", f"cannot listen on {subject}: {error!r}") from error

    async def silence(self, subscription: Any) -> None:
        """End what `listen` began; on a lost connection it has ended already."""
        with contextlib.suppress(nats_errors.Error):
            await subscription.unsubscribe()

    def inbox(self) -> str:
        """A new subject that nobody else uses."""
        return str(self._client.new_inbox())

    async def probe(self, timeout_s: float) -> bool:
        """Whether a message of our own comes back, or at least any other does."""
        heard = self._client.stats["in_msgs"]
        token = str(next(self._tokens))
        self._waiting[token] = future = self._loop.create_future()
        timer = self._loop.call_later(timeout_s, _settle, future, None)
        try:
            await self.send(self._inbox + token, b"")
            await future
        except TransportError:
            return False
        finally:
            timer.cancel()
            self._waiting.pop(token, None)
        return self.open and self._client.stats["in_msgs"] != heard

    def fail(self, reason: str) -> None:
        """Answer every waiting question with `unreachable`."""
        error = TransportError("unreachable", f"the connection to the broker is lost: {reason}")
        for future in list(self._waiting.values()):
            _settle(future, error)

    async def abandon(self) -> None:
        """Drop the connection without waiting for a peer that may be gone."""
        self.fail("closed here")
        await _discard(self._client)

    async def _reported(self, error: Exception | None = None) -> None:
        """Nats-py closes itself right after some reports, so look when it has had its turn."""
        log.debug("nats reports %r", error)
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        if self._client.is_closed:
            self.fail("the server closed it")
        self._on_doubt()

    async def _answered(self, message: Any) -> None:
        future = self._waiting.get(message.subject[len(self._inbox) :])
        if future is not None:
            _settle(future, message)


def read_reply(message: Any, what: str) -> ApiReply:
    """The JetStream answer in `message`. Raises: TransportError, CapacityError."""
    if status_of(message) == "503":
        raise TransportError("no_stream", f"nothing at the broker answers on {what}")
    try:
        reply = _reply_decoder.decode(message.data)
    except msgspec.DecodeError as error:
        raise TransportError("refused", f"the answer on {what} is not JetStream's") from error
    if reply.error is None:
        return reply
    text = f"{what}: {reply.error.description} ({reply.error.err_code})"
    if reply.error.err_code in _FULL_CODES and _says_full(reply.error.description):
        raise CapacityError("stream_full", text, "the learner frees room when it catches up")
    raise TransportError("refused", text)


def status_of(message: Any) -> str:
    """The status code of a control message, such as `503`; empty for any other."""
    return (message.headers or {}).get("Status", "") if not message.reply else ""


def own_headers(message: Any) -> dict[str, str]:
    """The headers that the publisher set, without those of the broker."""
    headers = message.headers or {}
    return {key: value for key, value in headers.items() if not key.startswith("Nats-")}


def _says_full(description: str) -> bool:
    return any(word in description for word in _FULL_WORDS)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


async def _discard(client: Any) -> None:
    """Close `client` at once: unsent bytes and a silent peer would hold up its own close."""
    writer = getattr(client._transport, "_io_writer", None)  # noqa: SLF001 # no public abort
    if writer is not None:
        writer.transport.abort()
    client._pending, client._pending_data_size = [], 0  # noqa: SLF001 # as above
    for subscription in list(client._subs.values()):  # noqa: SLF001 # its close may not get there
        subscription._stop_processing()  # noqa: SLF001
    try:
        await client.close()
    except (OSError, RuntimeError, nats_errors.Error) as error:  # uvloop raises RuntimeError
        log.debug("closing a lost connection: %r", error)

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
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from nats import errors as nats_errors
from nats.aio.client import Client

from edge_runtime.bus.access import Access, Identity
from edge_runtime.bus.answers import ApiReply, dial_error, not_allowed, read_reply, refusal_of
from edge_runtime.bus.questions import Question, Questions
from edge_runtime.errors import RequestError, TransportError

_DIAL_TIMEOUT_S = 2.0
_FLUSH_WAIT_S = 0.5  # how long one sender is held back when 2 MB wait for the socket
_API_TIMEOUT_S = 5.0
_UNREAD_MAX = 1 << 16  # answers and pulled messages; both are bounded by what was asked for
_UNREAD_BYTES_MAX = 32 << 20

RawCallback = Callable[[Any], Awaitable[None]]
log = logging.getLogger("headwater.bus")


class Events(Protocol):
    """Who is told what a link cannot tell in an answer."""

    def on_doubt(self) -> None:
        """The connection may be lost."""

    def on_refused(self, error: TransportError) -> None:
        """The broker refused a permission."""

    def on_dropped(self) -> None:
        """A message was dropped because its subscriber is slow."""


class Link:
    """A dialled connection; make it with `dial`, end it with `abandon`."""

    def __init__(self, client: Any, events: Events) -> None:
        self._client = client
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._inbox = ""
        self._questions = Questions()

    @classmethod
    async def dial(cls, url: str, name: str, events: Events, access: Access | None = None) -> Link:
        """Connect once.

        Raises: TransportError (unreachable, not_admitted, untrusted_broker, tls_failed, not_tls);
        ConfigError as `Access.open`.
        """
        access = access or Access()
        identity = access.open(url)
        link = cls(Client(), events)
        try:
            await link._open(url, name, identity, access.inbox)
        except (nats_errors.Error, OSError, TimeoutError) as error:
            await link.abandon()
            raise dial_error(error, url, identity) from error
        except BaseException:
            await link.abandon()
            raise
        return link

    async def _open(self, url: str, name: str, identity: Identity, inbox: str) -> None:
        await self._client.connect(
            url,
            name=name,
            inbox_prefix=inbox,
            **self._proof(identity, url),
            allow_reconnect=False,
            max_reconnect_attempts=1,  # 0 would retry for ever within connect
            reconnect_time_wait=0.05,
            connect_timeout=_DIAL_TIMEOUT_S,
            flush_timeout=_FLUSH_WAIT_S,
            error_cb=self._reported,
            closed_cb=self._reported,
        )
        if identity.tls:
            self._check_tls(url)
        self._inbox = self._client.new_inbox() + "."
        await self.listen(f"{self._inbox}*", self._answered)

    def _proof(self, identity: Identity, url: str) -> dict[str, Any]:
        """The options of nats-py that say who we are: its own ways to do so need another library.

        The library connects in the clear where the server does not ask for TLS; so the signature,
        the first thing of worth that is said, waits until it is known whether TLS is spoken.
        """
        options: dict[str, Any] = {"tls": identity.tls} if identity.tls else {}
        if identity.sign is None:
            return options
        self._client._auth_configured = True  # noqa: SLF001 # what its own key options set
        self._client._public_nkey = identity.public or None  # noqa: SLF001 # as above
        if identity.jwt:
            options["user_jwt_cb"] = identity.jwt.encode
        sign = identity.sign

        def signed(nonce: str) -> bytes:
            if identity.tls:
                self._check_tls(url)
            return sign(nonce)

        return options | {"signature_cb": signed}

    def _check_tls(self, url: str) -> None:
        writer = self._client._transport._io_writer  # noqa: SLF001 # nothing public says it
        if writer.get_extra_info("ssl_object") is None:
            hint = "give it tls { } in its configuration, or leave the tls settings out"
            raise TransportError("not_tls", f"the broker at {url} speaks no TLS", hint)

    @property
    def open(self) -> bool:
        """Whether the connection stands as far as the client library knows."""
        return bool(self._client.is_connected)

    async def ask(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout_s: float
    ) -> Question:
        """Send a request; the deadline starts now. Raises: TransportError `unreachable`."""
        question = self._questions.ask(subject, timeout_s)
        try:
            await self.send(subject, data, reply=self._inbox + question.token, headers=headers)
        except BaseException:
            question.forget()
            raise
        return question

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

    async def listen(
        self, subject: str, callback: RawCallback, messages_max: int = _UNREAD_MAX
    ) -> Any:
        """Subscribe with a raw callback; the result has `unsubscribe()`.

        At most `messages_max` wait for the callback; what comes then is dropped, and reported.

        Raises: TransportError `unreachable`.
        """
        try:
            return await self._client.subscribe(
                subject,
                cb=callback,
                pending_msgs_limit=messages_max,
                pending_bytes_limit=_UNREAD_BYTES_MAX,
            )
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
        """Whether a message of our own comes back, and so both directions work.

        It gets the time a second time where others came meanwhile: it may stand behind them.
        """
        heard = self._client.stats["in_msgs"]
        echo = self._questions.ask("", 2 * timeout_s)
        early = self._loop.call_later(timeout_s, self._give_up, echo, heard)
        try:
            await self.send(self._inbox + echo.token, b"")
            await echo.answer()
        except TransportError:
            return False
        finally:
            early.cancel()
            echo.forget()
        return self.open

    def _give_up(self, echo: Question, heard: int) -> None:
        if self._client.stats["in_msgs"] == heard:
            echo.settle(TransportError("timeout", "nothing comes back"))

    def fail(self, reason: str) -> None:
        """Answer every waiting question with `unreachable`."""
        text = f"the connection to the broker is lost: {reason}"
        self._questions.fail(TransportError("unreachable", text))

    async def abandon(self) -> None:
        """Drop the connection without waiting for a peer that may be gone."""
        self.fail("closed here")
        await _discard(self._client)

    async def _reported(self, error: Exception | None = None) -> None:
        """Nats-py closes itself right after some reports, so look when it has had its turn."""
        log.debug("nats reports %r", error)
        if isinstance(error, nats_errors.SlowConsumerError):
            self._events.on_dropped()
        elif refused := refusal_of(error):
            self._refused(*refused)
        else:
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        if self._client.is_closed:
            self.fail("the server closed it")
        self._events.on_doubt()

    def _refused(self, what: str, subject: str) -> None:
        """The server answers no question that it refuses; the report names only the subject."""
        error = not_allowed(what, subject)
        self._events.on_refused(error)
        if what == "publish":
            self._questions.refused(subject, error)

    async def _answered(self, message: Any) -> None:
        self._questions.answered(message.subject[len(self._inbox) :], message)


async def _discard(client: Any) -> None:
    """Close `client` at once: unsent bytes, a silent peer or a failed TLS would hold up its own."""
    transport = client._transport  # noqa: SLF001 # no public abort
    if transport is not None and transport._io_writer is not None:  # noqa: SLF001
        transport._io_writer.transport.abort()  # noqa: SLF001
        transport._io_writer = None  # noqa: SLF001 # after a failed TLS it never says it is closed
    client._pending, client._pending_data_size = [], 0  # noqa: SLF001 # as above
    for subscription in list(client._subs.values()):  # noqa: SLF001 # its close may not get there
        subscription._stop_processing()  # noqa: SLF001
    try:
        await client.close()
    except (OSError, RuntimeError, nats_errors.Error) as error:  # uvloop raises RuntimeError
        log.debug("closing a lost connection: %r", error)

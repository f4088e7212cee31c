"""The seam to the broker: what a room may ask of it, and nothing of how it is asked.

Why: devices and learner speak NATS JetStream, tests speak to a broker in memory; both pass the
same contract suite (tests/contract/test_bus.py), so no room above can tell them apart.

Invariants: a publish that returned is stored; one that raised may be stored too, so publish again
with the same `message_id`. Nothing here waits for ever: every wait has a deadline.
What an implementation cannot deliver it raises as TransportError (retry) or CapacityError (wait).

Knows nothing about envelopes, releases or plans: subjects and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from edge_runtime.errors import RequestError

PAYLOAD_BYTES_MAX = 1 << 20
"""The largest message that a bus carries, its headers included."""

UNHEARD_MAX = 4096
"""How many messages wait for a subscriber's callback; what comes beyond is dropped."""

_SUBJECT = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
COUNTERS = (
    *("published", "duplicates", "reconnects", "callback_errors", "acks_lost"),
    *("dropped", "not_allowed"),
)

_HEADER_BYTES = 64  # what the broker's own headers and the framing take at most


async def no_ack() -> None:
    """The acknowledgement of a message that needs none."""


async def no_answer(_data: bytes) -> None:
    """The answer to a message that asks for none."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: where it was sent, its bytes and headers, and its place in the stream.

    `seq` counts from 1 within the stream and is 0 for a message that no stream holds. `ack` tells
    the broker that a pulled message is dealt with, `answer` sends to whom that sent it with
    `Bus.ask`; for any other message they do nothing.
    """

    subject: str
    data: bytes
    headers: dict[str, str] = field(default_factory=dict)
    seq: int = 0
    ack: Callable[[], Awaitable[None]] = no_ack
    answer: Callable[[bytes], Awaitable[None]] = no_answer


def check_message(subject: str, data: bytes, headers: dict[str, str]) -> None:
    """Refuse what no bus can carry. Raises: RequestError `bad_subject`, `too_large`."""
    if not _SUBJECT.fullmatch(subject):
        raise RequestError("bad_subject", f"{subject!r} is not a subject to publish on")
    size = len(data) + _HEADER_BYTES + sum(len(k) + len(v) + 4 for k, v in headers.items())
    if size > PAYLOAD_BYTES_MAX:
        raise RequestError(
            "too_large",
            f"a message of {size} bytes for {subject} is above the limit of {PAYLOAD_BYTES_MAX}",
            "split it: the broker refuses it whole",
        )


class Subscription(Protocol):
    """A running subscription to a core subject."""

    async def close(self) -> None:
        """Stop the deliveries; closing twice is no error."""


class PullSubscription(Protocol):
    """The one reader of a durable consumer; requests to the broker overlap with the reading.

    Messages come in stream order, starting after the highest one up to which all is acknowledged.
    An outage sets the reading back to there, so a message may come again, acknowledged or not;
    so may one that stays unacknowledged for half a minute.
    """

    async def next_batch(self, max_messages: int, wait_s: float) -> list[Message]:
        """Up to `max_messages` as soon as there is one; an empty list when `wait_s` passes.

        An unreachable broker is waited for, not an error: see `Bus.connected`. May be cancelled
        without losing a message.
        """


class Bus(Protocol):
    """A connection to the broker. All calls belong to the event loop that opened it."""

    @property
    def connected(self) -> bool:
        """Whether the broker is reachable now, as far as is known."""

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        headers: dict[str, str] | None = None,
        message_id: str | None = None,
        timeout_s: float = 5.0,
    ) -> int:
        """Store a message and return its stream sequence number; many calls may be outstanding.

        A `message_id` that the stream stored a short while ago is a success that stores nothing
        and returns the sequence number of the first.

        Raises: TransportError `unreachable` (not connected, connection lost), `timeout`,
        `no_stream` (no stream holds the subject), `not_allowed` (this key may not publish there),
        `refused` (any other answer of the broker);
        CapacityError `stream_full`; RequestError as `check_message`.
        """

    async def send(self, subject: str, data: bytes) -> None:
        """Send to whoever listens now; not stored.

        Raises: TransportError `unreachable`; RequestError as `check_message`.
        """

    async def ask(self, subject: str, data: bytes, *, timeout_s: float = 5.0) -> bytes:
        """Send to whoever listens now, and return the first `Message.answer` to it.

        Raises: TransportError `unreachable`, `timeout`, `nobody` (no one listens there),
        `not_allowed`; RequestError as `check_message`.
        """

    async def subscribe(
        self, subject: str, callback: Callable[[Message], Awaitable[None]]
    ) -> Subscription:
        """Call back for each message on `subject`, one at a time, also after a reconnect.

        `*` stands for one token, a last `>` for one or more. What the callback raises is counted
        and logged, and the deliveries go on. Where UNHEARD_MAX messages wait for it, further ones
        are dropped and counted.
        """

    async def last(self, stream: str, subject: str) -> Message | None:
        """The newest message of `stream` on exactly `subject`; None when there is none.

        Raises: TransportError `unreachable`, `timeout`, `no_stream`, `refused`.
        """

    async def last_many(self, stream: str, subjects: list[str]) -> list[Message | None]:
        """As `last` for each of `subjects`, overlapped; answers in their order."""

    async def ensure_stream(
        self,
        name: str,
        subjects: list[str],
        *,
        max_bytes: int,
        per_subject: int | None = None,
        discard_new: bool,
    ) -> None:
        """Create the durable stream, or bring an existing one to these settings.

        `per_subject` messages are kept of each subject (None: all). At either limit a publish is
        refused as `stream_full` if `discard_new`, so that a subject that is full refuses alone,
        and all do when `max_bytes` is reached; else the oldest messages go.

        Raises: TransportError `unreachable`, `timeout`, `refused`.
        """

    async def purge(self, stream: str) -> int:
        """Drop what every reader of `stream` has acknowledged; returns how many messages.

        That is all up to the lowest message that some reader still needs. A stream that nobody
        reads keeps everything.

        Raises: TransportError as `last`.
        """

    def pull(
        self, stream: str, durable: str, subject: str
    ) -> AbstractAsyncContextManager[PullSubscription]:
        """Read the messages on `subject` (may hold wildcards), each until it is acknowledged.

        The broker keeps the place under the name `durable`; at most one reader at a time.

        Raises on entry: TransportError as `last`.
        """

    def statistics(self) -> dict[str, int]:
        """Counters of this bus.

        `published`, `duplicates`, `reconnects`, `callback_errors`, `acks_lost`; `dropped` messages
        of slow subscribers; `not_allowed`, what the broker refused this key.
        """

    async def close(self) -> None:
        """Close the connection; calls still waiting raise `unreachable`. Twice is no error."""

"""Streams in memory: limits, purges and consumers, as the fake bus keeps them.

Why: what a stream holds and refuses is one idea, how a bus reaches it another.

Invariants: messages stand in sequence order; a consumer's floor only rises, and all up to it is
acknowledged.

Knows nothing about buses, connections or outages.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import deque
from dataclasses import dataclass, field

from edge_runtime.bus.base import Message
from edge_runtime.errors import CapacityError


@dataclass
class Limits:
    """What `ensure_stream` was asked for."""

    subjects: list[str] = field(default_factory=list)
    max_bytes: int = 0
    per_subject: int | None = None
    discard_new: bool = False


class Stream:
    """Messages in sequence order, with the newest of each subject at hand."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.ids: dict[str, int] = {}
        self.consumers: dict[str, Consumer] = {}
        self.messages: dict[int, Message] = {}
        self.next_seq = 1
        self._bytes = 0
        self._by_subject: dict[str, deque[int]] = {}

    def store(
        self, subject: str, data: bytes, headers: dict[str, str], message_id: str | None
    ) -> Message:
        """Append and enforce the limits. Raises: CapacityError `stream_full`."""
        message = Message(subject, data, dict(headers), self.next_seq)
        if self.limits.discard_new:
            self._check_room(message)
        self.next_seq += 1
        self.messages[message.seq] = message
        self._by_subject.setdefault(subject, deque()).append(message.seq)
        self._bytes += _size(message)
        if message_id is not None:
            self.ids[message_id] = message.seq
        self.trim()
        for consumer in self.consumers.values():
            consumer.wake.set()
        return message

    def last(self, subject: str) -> Message | None:
        """The newest message on `subject`."""
        seqs = self._by_subject.get(subject)
        return self.messages[seqs[-1]] if seqs else None

    def trim(self) -> None:
        """Drop the oldest messages above the limits."""
        if self.limits.per_subject is not None:
            for seqs in list(self._by_subject.values()):
                while len(seqs) > self.limits.per_subject:
                    self._drop(seqs[0])
        while self._bytes > self.limits.max_bytes and self.messages:
            self._drop(next(iter(self.messages)))

    def purge(self) -> int:
        """Drop all up to the lowest floor of the consumers; returns how many."""
        floor = min((consumer.floor for consumer in self.consumers.values()), default=0)
        dealt_with = list(itertools.takewhile(lambda seq: seq <= floor, self.messages))
        for seq in dealt_with:
            self._drop(seq)
        return len(dealt_with)

    def _check_room(self, message: Message) -> None:
        if self._bytes + _size(message) > self.limits.max_bytes:
            raise CapacityError("stream_full", "the stream holds its maximum of bytes")
        held = len(self._by_subject.get(message.subject, ()))
        if self.limits.per_subject is not None and held >= self.limits.per_subject:
            raise CapacityError("stream_full", f"{message.subject} holds its maximum of messages")

    def _drop(self, seq: int) -> None:
        message = self.messages.pop(seq)
        seqs = self._by_subject[message.subject]
        seqs.remove(seq)
        if not seqs:
            del self._by_subject[message.subject]
        self._bytes -= _size(message)


class Consumer:
    """The place of a durable reader: all up to the floor is acknowledged."""

    def __init__(self, stream: Stream, subject: str) -> None:
        self.wake = asyncio.Event()
        self._stream = stream
        self._subject = subject
        self.floor = 0
        self._delivered = 0
        self._waiting: list[int] = []  # delivered, not acknowledged; ascending

    def start_over(self) -> None:
        """Deliver again from the acknowledgement floor."""
        self._delivered = self.floor
        self._waiting.clear()
        self.wake.set()

    def take(self, count: int) -> list[Message]:
        """The next messages, at most `count`."""
        fresh = range(self._delivered + 1, self._stream.next_seq)
        batch: list[Message] = []
        for seq in fresh:
            if len(batch) == count:
                break
            self._delivered = seq
            message = self._stream.messages.get(seq)
            if message is not None and matches(self._subject, message.subject):
                batch.append(message)
                self._waiting.append(seq)
        return batch

    def ack(self, seq: int) -> None:
        """One message is dealt with."""
        index = bisect.bisect_left(self._waiting, seq)
        if index < len(self._waiting) and self._waiting[index] == seq:
            del self._waiting[index]
            self.floor = self._waiting[0] - 1 if self._waiting else self._delivered


def _size(message: Message) -> int:
    headers = sum(len(key) + len(value) + 4 for key, value in message.headers.items())
    return len(message.subject) + len(message.data) + headers + 32


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject pattern, `*` for one token and a last `>` for one or more, fits."""
    if pattern == subject:
        return True
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted, rest = wanted[:-1], tokens[len(wanted) - 1 :]
        tokens = tokens[: len(wanted)]
        if not rest:
            return False
    return len(wanted) == len(tokens) and all(
        want in ("*", token) for want, token in zip(wanted, tokens, strict=True)
    )

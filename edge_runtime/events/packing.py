"""From the log to envelopes that are ready to go: read, kept back where it must be, and packed.

Why: to read and to deflate 64 KB takes longer than an answer may wait. What was just committed is
in memory and small, and is packed on the spot; all else is packed on a thread, several envelopes
in a row, so that a drain never waits for the disk between two of them. The broker makes each
message durable by itself, so one message is as large as 64 KB allow once it is deflated.

Invariants: an envelope goes on exactly where the one before it ended; what the log says is lost is
told in the envelope that comes next. Nothing that is not durable is packed.

Knows nothing about who is sent what when. Implements proto/asyncapi.yaml (message envelope).
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import accumulate
from typing import NamedTuple

import msgspec

from edge_runtime.clock import Clock
from edge_runtime.events.log import EventLog, Piece
from edge_runtime.wire import codec
from edge_runtime.wire.messages import NO_PRIOR, WIRE_VERSION, Envelope, EventClass

ENVELOPE_BYTES, RECORDS_BYTES_MAX = 64 * 1024, 192 * 1024
CE_TYPE = "headwater.records.v1"
CE_DATASCHEMA = f"urn:headwater:schema:envelope:{WIRE_VERSION}"
_OVERHEAD_BYTES = 256
_RECORDS_MAX = 2048
_AT_ONCE_BYTES, _AT_ONCE_RECORDS = 6 * 1024, 32  # packed in 60 microseconds

Keeping = Callable[[EventClass, int, int, list[bytes]], list[msgspec.Raw]]
"""(class, epoch, base_seq, records) to what may leave the device, each in its place."""


class Packed(NamedTuple):
    """An envelope as it travels; it tells of the numbers after `after_seq`, to `last_seq`."""

    event_class: EventClass
    epoch: int
    after_seq: int
    last_seq: int
    records: int
    skipped: int
    is_full: bool
    name: str
    data: bytes
    headers: dict[str, str]


class Packer:
    """Packs the log of `device`; `withhold`, if any, decides what of it may leave the device."""

    def __init__(
        self, log: EventLog, device: str, clock: Clock, withhold: Keeping | None = None
    ) -> None:
        self._log, self._device, self._clock, self._withhold = log, device, clock, withhold
        self._room = ENVELOPE_BYTES - _OVERHEAD_BYTES  # how many bytes of records fill an envelope

    def at_once(
        self, event_class: EventClass, epoch: int, after_seq: int, last_seq: int
    ) -> Packed | None:
        """All from `after_seq` to `last_seq`, when it is small and in memory."""
        if epoch != self._log.epoch or last_seq - after_seq > _AT_ONCE_RECORDS:
            return None
        piece = self._recent(event_class, after_seq, _AT_ONCE_BYTES, _AT_ONCE_RECORDS)
        if piece is None or len(piece.records) < last_seq - after_seq:
            return None
        if sum(map(len, piece.records)) > _AT_ONCE_BYTES:
            return None  # one large record
        return self._pack(event_class, epoch, piece, last_seq)

    def read(
        self, event_class: EventClass, epoch: int, after_seq: int, last_seq: int, count: int
    ) -> list[Piece]:
        """What about `count` envelopes after `after_seq` will hold, all but the first of them full,
        and the last where its epoch ends; touches the disk.
        """
        room = self._room
        piece = self._read(event_class, epoch, after_seq, count * room, count * _RECORDS_MAX)
        cuts = [] if piece is None else list(_cuts(piece, room))
        if len(cuts) > 1 and sum(map(len, cuts[-1].records)) < room // 2:
            end = cuts[-1].base_seq + len(cuts[-1].records) - 1
            if end < last_seq or epoch == self._log.epoch:
                cuts.pop()  # it may grow
        return cuts

    def pack(
        self, event_class: EventClass, epoch: int, pieces: list[Piece], last_seq: int
    ) -> list[Packed]:
        """An envelope of each of `pieces`; takes a millisecond or so for a full one."""
        found = [self._pack(event_class, epoch, piece, last_seq) for piece in pieces]
        if found and found[0].is_full:
            used = sum(map(len, pieces[0].records))
            self._room = _room(used * ENVELOPE_BYTES // len(found[0].data))
        return found

    def _read(
        self, event_class: EventClass, epoch: int, after_seq: int, max_bytes: int, max_records: int
    ) -> Piece | None:
        """What follows, within bounds: from memory, or from disk what is not there any more."""
        if epoch == self._log.epoch:
            piece = self._recent(event_class, after_seq, max_bytes, max_records)
            if piece is not None:
                return piece
        return self._log.piece(event_class, epoch, after_seq, max_bytes, max_records)

    def _recent(
        self, event_class: EventClass, after_seq: int, max_bytes: int, max_records: int
    ) -> Piece | None:
        found = self._log.recent(event_class, after_seq, max_bytes, max_records)
        if not found or found[-1][0] != after_seq + len(found):
            return None  # not all in memory, or not all there: the log knows why
        return Piece(0, "", after_seq + 1, [data for _, data in found])

    def _pack(self, event_class: EventClass, epoch: int, piece: Piece, last_seq: int) -> Packed:
        records = self._kept(event_class, epoch, piece)
        first = piece.base_seq - piece.skipped
        last = piece.base_seq + len(records) - 1
        envelope = Envelope(
            WIRE_VERSION,
            self._device,
            epoch,
            event_class,
            piece.base_seq,
            records,
            piece.skipped,
            piece.reason,
            self._log.prior(epoch) or NO_PRIOR,
        )
        data, encoding = codec.pack_envelope(envelope)
        name = f"{self._device}/{epoch}/{event_class}/{first}-{last}"
        return Packed(
            event_class,
            epoch,
            first - 1,
            last,
            len(records),
            piece.skipped,
            bool(records) and last < last_seq,
            name,
            data,
            self._headers(name) | encoding,
        )

    def _kept(self, event_class: EventClass, epoch: int, piece: Piece) -> list[msgspec.Raw]:
        if self._withhold is None:
            return [msgspec.Raw(data) for data in piece.records]
        return self._withhold(event_class, epoch, piece.base_seq, piece.records)

    def _headers(self, name: str) -> dict[str, str]:
        """CloudEvents attributes, in the NATS binding's binary mode, and W3C Trace Context."""
        return {
            "ce-id": name,
            "ce-source": f"/headwater/{self._device}",
            "ce-type": CE_TYPE,
            "ce-specversion": "1.0",
            "ce-time": datetime.fromtimestamp(self._clock.now_s(), UTC).isoformat(),
            "ce-dataschema": CE_DATASCHEMA,
            "ce-datacontenttype": "application/msgpack",
            "traceparent": _traceparent(),
        }


def _cuts(piece: Piece, room: int) -> Iterator[Piece]:
    """`piece` as one or more that each have room in an envelope, or hold one large record."""
    ends = list(accumulate(map(len, piece.records)))
    lost, start, used = piece, 0, 0
    while start < len(ends) or lost.skipped:
        end = min(bisect_right(ends, used + room, start), start + _RECORDS_MAX)
        end = min(max(end, start + 1), len(ends))
        yield lost._replace(base_seq=piece.base_seq + start, records=piece.records[start:end])
        lost, start, used = Piece(0, "", 0, []), end, ends[end - 1] if end else 0


def _room(wanted: int) -> int:
    return max(ENVELOPE_BYTES, min(RECORDS_BYTES_MAX, wanted)) - _OVERHEAD_BYTES


def _traceparent() -> str:
    """A trace of its own, to be followed: version, trace, span, flags (W3C Trace Context)."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"

"""Opening an envelope: from the bytes of a message to valid records, whole envelopes at a time.

Why: at a million records a second there is no time to look at each one by itself; nearly always all
records of an envelope are fine, and one look at all of them shows it.

Invariants: garbage never raises anything but RequestError or ConfigError, and a bad record stops
none of the others. `records` come back as many as they were: a good one decoded, an omitted one as
its key in OMITTED, a refused one as REFUSED with its reason and bytes in `refused`. `data` decodes
to the same records with none of the refused ones in it.

Knows nothing about what is new or held already. Implements proto/asyncapi.yaml (channel events).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cloud_learner.ingest.guard import NO_TASKS, NUMBER_MAX, Indices, Tasks, all_fine, refusal
from cloud_learner.ingest.sequencer import Arrival
from edge_runtime.bus.base import PAYLOAD_BYTES_MAX
from edge_runtime.errors import RequestError
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import (
    LOSSES,
    NO_PRIOR,
    OMITTED,
    WIRE_VERSION,
    Envelope,
    EventClass,
    Record,
)

REFUSED = 0
_REFUSED_RAW = msgspec.Raw(msgspec.msgpack.encode(REFUSED))
_INFLATES = 3  # what deflate saves of the records of a device, on average


class Incoming(msgspec.Struct):
    """A message as it came; `token` is handed back when it may be acknowledged."""

    subject: str
    data: bytes
    arrived_s: float
    token: Any
    headers: Mapping[str, str] = {}

    @property
    def size(self) -> int:
        """About how many bytes it is when it is inflated; more than none."""
        return 1 + len(self.data) * (_INFLATES if self.headers else 1)


class Refused(msgspec.Struct, frozen=True):
    """A record that must not be taken for a fact."""

    reason: str
    data: bytes


class Opened(msgspec.Struct):
    """What an envelope says, and the message that it came in."""

    message: Incoming
    data: bytes
    records: list[Record | int]
    refused: dict[int, Refused]
    reason: str
    prior: int


class _Typed(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An envelope with its records decoded; the fields are those of messages.Envelope."""

    version: int
    device: str
    epoch: int
    event_class: EventClass
    base_seq: int
    records: list[Record | int]
    skipped: int = 0
    reason: str = ""
    prior: int = 0


_typed = msgspec.msgpack.Decoder(_Typed)
_number = msgspec.msgpack.Decoder(int)


def opened(message: Incoming, indices: Indices, tasks: Tasks = NO_TASKS) -> Arrival[Opened]:
    """The envelope, if it is one and says what its subject says.

    `indices` are those of the columns of known specs, by hash; `tasks` those of the known
    families, by name. Raises: RequestError, ConfigError.
    """
    device = subjects.checked_name(subjects.device_of(message.subject), "device")
    data = _inflated(message)
    try:
        envelope = _typed.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _opened_singly(message, device, data, indices, tasks)
    _check(message.subject, device, envelope)
    if not all_fine(envelope.records, envelope.event_class, indices, tasks):
        return _opened_singly(message, device, data, indices, tasks)
    return _arrival(message, envelope, data, envelope.records, {})


def _opened_singly(
    message: Incoming, device: str, data: bytes, indices: Indices, tasks: Tasks
) -> Arrival[Opened]:
    """The same, looking at each record by itself."""
    envelope = codec.decode_envelope(data)
    _check(message.subject, device, envelope)
    records: list[Record | int] = []
    refused: dict[int, Refused] = {}
    for index, raw in enumerate(envelope.records):
        record, reason = _record(bytes(raw), envelope.event_class, indices, tasks)
        records.append(record)
        if reason:
            refused[index] = Refused(reason, bytes(raw))
    kept = [_REFUSED_RAW if at in refused else raw for at, raw in enumerate(envelope.records)]
    data = codec.encode(msgspec.structs.replace(envelope, records=kept))
    return _arrival(message, envelope, data, records, refused)


def _record(
    data: bytes, event_class: EventClass, indices: Indices, tasks: Tasks
) -> tuple[Record | int, str]:
    """One record, or REFUSED and the reason."""
    omitted = _omitted(data)
    if omitted is not None:
        return (omitted, "") if omitted in OMITTED else (REFUSED, "bad_message")
    try:
        record = codec.decode_record(data)
    except RequestError as error:
        return REFUSED, error.code
    reason = refusal(record, event_class, indices, tasks)
    return (REFUSED, reason) if reason else (record, "")


def _omitted(data: bytes) -> int | None:
    """The number that stands in the place of a record; None where no number stands."""
    try:
        return _number.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _inflated(message: Incoming) -> bytes:
    """The envelope's own bytes; no message is larger than the bus carries, packed or not."""
    if len(message.data) > PAYLOAD_BYTES_MAX:
        raise RequestError("too_large", f"a message of {len(message.data)} bytes")
    return codec.unpack_envelope(message.data, message.headers)


def _check(subject: str, device: str, envelope: Envelope | _Typed) -> None:
    """Raises: RequestError when the envelope claims what it may not."""
    if envelope.version != WIRE_VERSION:
        raise RequestError(
            "bad_version", f"envelope has version {envelope.version}; this reads {WIRE_VERSION}"
        )
    said = subjects.events(device, envelope.event_class)
    if subject != said or envelope.device != device:
        raise RequestError("wrong_subject", f"{subject} carries what belongs to {said}")
    highest = max(envelope.epoch, envelope.prior, envelope.base_seq + len(envelope.records))
    lowest = min(envelope.epoch, envelope.base_seq, envelope.base_seq - envelope.skipped)
    if lowest < 1 or envelope.skipped < 0 or envelope.prior < NO_PRIOR or highest > NUMBER_MAX:
        raise RequestError("bad_number", f"{subject}: an epoch or sequence number out of range")
    if bool(envelope.skipped) != bool(envelope.reason):
        raise RequestError("bad_reason", f"{subject}: a loss without a reason, or none with one")


def _arrival(
    message: Incoming,
    envelope: Envelope | _Typed,
    data: bytes,
    records: list[Record | int],
    refused: dict[int, Refused],
) -> Arrival[Opened]:
    reason = envelope.reason if envelope.reason in LOSSES else "other"  # of a later release
    return Arrival(
        (envelope.device, envelope.epoch, envelope.event_class),
        envelope.base_seq,
        len(records),
        envelope.skipped,
        message.token,
        4 * len(data),  # about what the decoded records weigh beside their bytes
        Opened(message, data, records, refused, reason, envelope.prior),
    )

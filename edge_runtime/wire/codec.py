"""Bytes to messages and back: MessagePack through msgspec, validated on the way in.

Why: a decoder that validates is the border at which garbage stops.

Invariants: decoding never raises anything but RequestError (code `bad_message`); what the
independent `msgpack` library writes is read here, and the other way round.

Implements proto/asyncapi.yaml (payloads).
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edge_runtime.errors import RequestError
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LearnerStatus,
    Record,
    Report,
    Watermark,
)

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_record: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)
_envelope = msgspec.msgpack.Decoder(Envelope)
_watermark = msgspec.msgpack.Decoder(Watermark)
_report = msgspec.msgpack.Decoder(Report)
_status = msgspec.msgpack.Decoder(LearnerStatus)

encode = _encoder.encode


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    try:
        message = decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RequestError(
            "bad_message", f"{what} of {len(data)} bytes is not valid: {error}"
        ) from error
    version = getattr(message, "version", WIRE_VERSION)
    if version != WIRE_VERSION:
        raise RequestError(
            "bad_version", f"{what} has version {version}; this reads {WIRE_VERSION}"
        )
    return message


def decode_record(data: bytes) -> Record:
    """One record of an event log or envelope. Raises: RequestError."""
    return _decode(_record, data, "record")


def decode_envelope(data: bytes) -> Envelope:
    """An envelope, its records still encoded. Raises: RequestError."""
    return _decode(_envelope, data, "envelope")


def decode_watermark(data: bytes) -> Watermark:
    """A watermark. Raises: RequestError."""
    return _decode(_watermark, data, "watermark")


def decode_report(data: bytes) -> Report:
    """A device report. Raises: RequestError."""
    return _decode(_report, data, "report")


def decode_status(data: bytes) -> LearnerStatus:
    """A learner status. Raises: RequestError."""
    return _decode(_status, data, "status")

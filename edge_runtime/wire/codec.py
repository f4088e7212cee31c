"""Bytes to messages and back: MessagePack through msgspec, validated on the way in.

Why: a decoder that validates is the border at which garbage stops. Envelopes are many records that
look alike, so on the wire they are deflated where that pays.

Invariants: decoding never raises anything but RequestError (codes `bad_message`, `bad_version`,
`bad_encoding`); what the independent `msgpack` library writes is read here, and the other way
round. However little a sender sends, to inflate it never costs more than INFLATED_BYTES_MAX.

Implements proto/asyncapi.yaml (payloads, Content-Encoding, Hw-Signature).
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from edge_runtime.errors import RequestError
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LearnerStatus,
    Record,
    Report,
    TimeAnswer,
    TimeQuestion,
    Watermark,
)

T = TypeVar("T")

INFLATED_BYTES_MAX = 1 << 20
"""The largest envelope that is inflated; no more fits into a message that is not deflated."""

ENCODING_HEADER, ENCODING = "Content-Encoding", "deflate"
SIGNATURE_HEADER = "Hw-Signature"
_LEVEL = 1  # 62 bytes of a 187 byte event at 240 MB/s; level 6 saves a tenth more at a third of it
_MEMORY_LEVEL = 9  # 400 KB while it runs; a tenth faster than the default of 8
_PAYS = 0.9
_PAYS_FROM_BYTES = 256

_encoder = msgspec.msgpack.Encoder()
_record: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)
_envelope = msgspec.msgpack.Decoder(Envelope)
_watermark = msgspec.msgpack.Decoder(Watermark)
_report = msgspec.msgpack.Decoder(Report)
_status = msgspec.msgpack.Decoder(LearnerStatus)
_time_question = msgspec.msgpack.Decoder(TimeQuestion)
_time_answer = msgspec.msgpack.Decoder(TimeAnswer)

encode = _encoder.encode


def signature_headers(signature: bytes | None) -> dict[str, str]:
    """The headers that tell of a signature; none where there is none."""
    return {} if signature is None else {SIGNATURE_HEADER: b64encode(signature).decode()}


def signature_in(headers: Mapping[str, str]) -> bytes | None:
    """The signature that `headers` tell of; None where they do not, empty where it is no base64."""
    try:
        text = headers.get(SIGNATURE_HEADER)
        return None if text is None else b64decode(text, validate=True)
    except ValueError:
        return b""


def signed_report(subject: str, data: bytes) -> bytes:
    """What a device's key signs of the report `data` that it publishes on `subject`."""
    return b"headwater-report-1|" + subject.encode() + b"|" + data


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


def decode_time_question(data: bytes) -> TimeQuestion:
    """A question of the time. Raises: RequestError."""
    return _decode(_time_question, data, "question")


def decode_time_answer(data: bytes) -> TimeAnswer:
    """A signed time. Raises: RequestError."""
    return _decode(_time_answer, data, "signed time")


def pack_envelope(envelope: Envelope) -> tuple[bytes, dict[str, str]]:
    """An envelope as it travels: its bytes, and the headers that say how to read them.

    It is deflated (zlib's format, RFC 1950) where that saves a tenth or more.
    """
    data = encode(envelope)
    if len(data) >= _PAYS_FROM_BYTES:
        packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, _MEMORY_LEVEL)
        packed = packer.compress(data) + packer.flush()
        if len(packed) + len(ENCODING_HEADER) + len(ENCODING) <= _PAYS * len(data):
            return packed, {ENCODING_HEADER: ENCODING}
    return data, {}


def unpack_envelope(data: bytes, headers: Mapping[str, str]) -> bytes:
    """What `decode_envelope` reads, of an envelope as it came with `headers`.

    Raises: RequestError `bad_encoding` for an encoding that is not known, for bytes that are not
    of that encoding, and for more than INFLATED_BYTES_MAX.
    """
    encoding = headers.get(ENCODING_HEADER)
    if encoding is None:
        return data
    if encoding != ENCODING:
        raise _bad_encoding(data, f"{encoding[:64]!r} is not known; this reads {ENCODING}")
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, INFLATED_BYTES_MAX + 1)
    except zlib.error as error:
        raise _bad_encoding(data, str(error)) from error
    if len(plain) > INFLATED_BYTES_MAX:
        raise _bad_encoding(data, f"it inflates to more than {INFLATED_BYTES_MAX} bytes")
    if not inflater.eof or inflater.unused_data:
        raise _bad_encoding(data, "it is cut short, or goes on behind its end")
    return plain


def _bad_encoding(data: bytes, why: str) -> RequestError:
    return RequestError(
        "bad_encoding", f"envelope of {len(data)} bytes is not valid {ENCODING_HEADER}: {why}"
    )

"""What the bodies of /edge/v1 hold: events and labels, as JSON.

Why: what the socket offers, for whatever can speak HTTP and has no MessagePack.

Invariants: a body is small, and read whole or refused; a field that is unknown is refused.

Knows nothing about HTTP and runtimes. See proto/openapi.yaml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from edge_runtime.api.oip import not_json
from edge_runtime.errors import RequestError
from edge_runtime.runtime import Event

BODY_BYTES_MAX = 512 << 10
"""The log takes no larger records."""


class LabelBody(msgspec.Struct, forbid_unknown_fields=True):
    """A label: what turned out to be true of a prediction; without `time_s`, now."""

    prediction_id: str
    value: float
    time_s: float | None = None
    final: bool = True
    family: str | None = None


class EventBody(msgspec.Struct, forbid_unknown_fields=True):
    """An event, to be predicted or observed."""

    kind: str
    time_s: float
    fields: dict[str, Any]


_decode_event: Callable[[bytes], EventBody] = msgspec.json.Decoder(EventBody).decode
_decode_label: Callable[[bytes], LabelBody] = msgspec.json.Decoder(LabelBody).decode
Decoded = TypeVar("Decoded")
_UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)


def event_in(body: bytes) -> Event:
    """The event in a body. Raises: RequestError (bad_request, body_too_large)."""
    event = read(_decode_event, body)
    return Event(event.kind, event.time_s, event.fields)


def label_in(body: bytes) -> LabelBody:
    """The label in a body. Raises: RequestError (bad_request, body_too_large)."""
    return read(_decode_label, body)


def read(decode: Callable[[bytes], Decoded], body: bytes) -> Decoded:
    """What `decode` makes of a body. Raises: RequestError (bad_request, body_too_large)."""
    if len(body) > BODY_BYTES_MAX:
        raise RequestError("body_too_large", f"this takes at most {BODY_BYTES_MAX} bytes")
    try:
        return decode(body)
    except _UNREADABLE as error:
        raise not_json(error) from error

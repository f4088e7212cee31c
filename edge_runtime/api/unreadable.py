"""What is answered to a body that is no request: the reason, in words that name the field.

Why: whoever writes a client in another language learns from these errors.

Invariants: a body that is not even an array of tag and request id, ... means that the stream may be
out of step: then nothing after it can be trusted.

Knows nothing about sockets. Implements the section Garbage of proto/socket.md.
"""

from __future__ import annotations

import re

import msgspec

from edge_runtime.api.frames import (
    Failed,
    Hello,
    Infer,
    Label,
    Observe,
    Predict,
    RawTensor,
    Rollback,
    Status,
)
from edge_runtime.errors import RequestError

UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
"""What `frames.decode_request` raises for a body that is no request."""

_REQUESTS: dict[int, type[msgspec.Struct]] = {
    1: Hello,
    2: Predict,
    3: Observe,
    4: Label,
    5: Status,
    6: Infer,
    7: Rollback,
}
_POSITION = re.compile(r"\$\[(\d+)\](?:\[(\d+)\]\[(\d+)\])?")

_decode_any = msgspec.msgpack.Decoder().decode


def why_invalid(body: memoryview, error: Exception) -> Failed:
    """What to answer to a body that `decode_request` refused with `error`.

    Raises: RequestError `bad_frame` when the body is not even an array that begins with tag and
    request id.
    """
    try:
        message = _decode_any(body)
    except UNREADABLE as reason:
        raise RequestError("bad_frame", f"frame of {len(body)} bytes: {reason}") from reason
    head = message[:2] if isinstance(message, list) else []
    if [type(item) for item in head] != [int, int]:
        raise RequestError(
            "bad_frame", f"frame of {len(body)} bytes is not an array of tag, request id, ..."
        )
    tag, request_id = head
    if tag not in _REQUESTS:
        known = ", ".join(f"{number} {struct.__name__}" for number, struct in _REQUESTS.items())
        return Failed(request_id, "unknown_op", f"no request has tag {tag}", f"requests: {known}")
    return Failed(request_id, "bad_request", _explain(_REQUESTS[tag], str(error)))


def _explain(struct: type[msgspec.Struct], text: str) -> str:
    """`text` of a decoder, a position such as `$[3][0][2]` replaced by `inputs[0].shape`."""

    def name(match: re.Match[str]) -> str:
        field, row, inner = match.groups()
        where = _field(struct, int(field) - 1)
        if inner is not None:
            where += f"[{row}].{_field(RawTensor, int(inner))}"
        return f"field {where}"

    return f"{struct.__name__}: {_POSITION.sub(name, text).replace('`', '')}"


def _field(struct: type[msgspec.Struct], position: int) -> str:
    names = struct.__struct_fields__
    return names[position] if position < len(names) else str(position)

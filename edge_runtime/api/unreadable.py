"""What is answered to a body that is no request: the reason, in words that name the field.

Why: whoever writes a client in another language learns from these errors.

Invariants: a body that is not even an array of tag and request id, ... means that the stream may be
out of step: then nothing after it can be trusted. Nothing but tag and request id is ever made of a
body here, so that none costs more than its bytes.

Knows nothing about sockets. Implements the sections Garbage and Bounds of proto/socket.md.
"""

from __future__ import annotations

import re
from typing import get_args

import msgspec

from edge_runtime.api.frames import PLAIN_BYTES_MAX, Failed, Infer, RawTensor, Request
from edge_runtime.errors import RequestError

UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
"""What `frames.decode_request` raises for a body that is no request."""

_REQUESTS: dict[int, type[msgspec.Struct]] = {
    struct.__struct_config__.tag: struct for struct in get_args(Request)
}
_POSITION = re.compile(r"\$\[(\d+)\](?:\[(\d+)\]\[(\d+)\])?")

_ARRAYS = {0xDC: 3, 0xDD: 5}  # opcode of an array whose length follows: bytes of both
_TAG_OF_INFER = 6


class _Head(msgspec.Struct, array_like=True, frozen=True):
    """How each request begins; what follows is skipped, and must be sound."""

    tag: int
    request_id: int


_decode_head = msgspec.msgpack.Decoder(_Head).decode


def check_large(body: memoryview) -> None:
    """Let a body above PLAIN_BYTES_MAX be decoded only if it begins as Infer does.

    Raises: ValueError.
    """
    tag, _ = _begins_with(body)
    if tag != _TAG_OF_INFER:
        raise ValueError("only infer may be large")


def why_invalid(body: memoryview, error: Exception) -> Failed:
    """What to answer to a body that `decode_request` or `check_large` refused with `error`.

    Raises: RequestError `bad_frame` when the body is not even an array that begins with tag and
    request id.
    """
    large = len(body) > PLAIN_BYTES_MAX
    try:
        if large:
            tag, request_id = _begins_with(body)
        else:
            head = _decode_head(body)
            tag, request_id = head.tag, head.request_id
    except UNREADABLE as reason:
        raise RequestError(
            "bad_frame",
            f"frame of {len(body)} bytes is not an array of tag, request id, ...: {reason}",
        ) from reason
    if tag not in _REQUESTS:
        known = ", ".join(f"{number} {struct.__name__}" for number, struct in _REQUESTS.items())
        return Failed(request_id, "unknown_op", f"no request has tag {tag}", f"requests: {known}")
    struct = _REQUESTS[tag]
    if large and struct is not Infer:
        return Failed(
            request_id,
            "too_large",
            f"{struct.__name__} of {len(body)} bytes; at most {PLAIN_BYTES_MAX}",
            "only Infer may be larger",
        )
    return Failed(request_id, "bad_request", _explain(struct, str(error)))


def _begins_with(body: memoryview) -> tuple[int, int]:
    """Tag and request id, from the first bytes alone. Raises: ValueError."""
    first = body[0]
    at = _ARRAYS.get(first, 1 if 0x92 <= first <= 0x9F else 0)
    if not at:
        raise ValueError("no array of two or more")
    tag, at = _integer(body, at)
    request_id, _ = _integer(body, at)
    return tag, request_id


def _integer(body: memoryview, at: int) -> tuple[int, int]:
    """The integer of MessagePack at `at`, and where it ends. Raises: ValueError."""
    first, at = body[at], at + 1
    if first < 0x80:
        return first, at
    if first >= 0xE0:
        return first - 0x100, at
    if not 0xCC <= first <= 0xD3:
        raise ValueError("no integer")
    end = at + (1 << (first & 3))  # 0xCC to 0xCF are unsigned, 0xD0 to 0xD3 signed, 1 to 8 bytes
    return int.from_bytes(body[at:end], "big", signed=first >= 0xD0), end


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

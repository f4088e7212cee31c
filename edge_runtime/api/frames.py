"""The frames of the Unix socket: their bytes, their messages, and how a stream is cut into them.

Why: server and clients share one declaration; a client in another language has proto/socket.md.

Invariants: a frame is a length (u32, little-endian, at most FRAME_BYTES_MAX) and one MessagePack
array `[tag, request_id, ...]`; tags are never used twice; fields are only appended, with defaults.

Knows nothing about sockets and models. Implements proto/socket.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from edge_runtime.errors import CapacityError, HeadwaterError, RequestError, TransportError

PROTOCOL_VERSION = 1
FRAME_BYTES_MAX = 1 << 20


class Hello(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """Who are you, and what did you keep? `version` is the client's protocol version."""

    request_id: int
    version: int = PROTOCOL_VERSION


class Predict(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Answer this event. Values of `fields` are checked by the family's interface."""

    request_id: int
    family: str
    kind: str
    time_s: float
    fields: dict[str, Any]


class Observe(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Remember this event; no answer wanted."""

    request_id: int
    family: str
    kind: str
    time_s: float
    fields: dict[str, Any]


class Label(msgspec.Struct, array_like=True, frozen=True, tag=4, gc=False):
    """What turned out to be true; `time_s` None means now."""

    request_id: int
    family: str
    prediction_id: str
    value: float
    time_s: float | None = None
    final: bool = True


class Status(msgspec.Struct, array_like=True, frozen=True, tag=5, gc=False):
    """How are you?"""

    request_id: int


class Survived(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The last sequence number of an epoch and class that a restart left; 0: none."""

    epoch: int
    event_class: str
    seq: int


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag=129):
    """The answer to Hello: this process's epoch, and what is left of earlier ones."""

    request_id: int
    device: str
    epoch: int
    survived: list[Survived]
    version: int = PROTOCOL_VERSION


class Predicted(msgspec.Struct, array_like=True, frozen=True, tag=130):
    """The answer to Predict."""

    request_id: int
    id: str
    outputs: list[float]
    release: str
    arm: str


class Done(msgspec.Struct, array_like=True, frozen=True, tag=131, gc=False):
    """The answer to Observe and Label: the sequence number in the log, class event or label."""

    request_id: int
    seq: int


class StatusReply(msgspec.Struct, array_like=True, frozen=True, tag=133):
    """The answer to Status: a map of texts, numbers, lists and maps."""

    request_id: int
    status: dict[str, Any]


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=255, gc=False):
    """The request had no effect, for this reason. `request_id` 0: the frame had none.

    `retry` says that the very same request may succeed later.
    """

    request_id: int
    code: str
    message: str
    hint: str = ""
    retry: bool = False


Request = Hello | Predict | Observe | Label | Status
Reply = Welcome | Predicted | Done | StatusReply | Failed

_REQUESTS: dict[int, type[msgspec.Struct]] = {1: Hello, 2: Predict, 3: Observe, 4: Label, 5: Status}
_POSITION = re.compile(r"\$\[(\d+)\]")

_encode = msgspec.msgpack.Encoder().encode
_decode_any = msgspec.msgpack.Decoder().decode
decode_request: Callable[[memoryview], Request] = msgspec.msgpack.Decoder(Request).decode
_decode_reply: Callable[[memoryview], Reply] = msgspec.msgpack.Decoder(Reply).decode


def frame(message: Request | Reply) -> bytes:
    """The bytes of a message, its length first.

    Raises: RequestError (bad_request: a value that MessagePack cannot carry; frame_too_large).
    """
    try:
        body = _encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError("bad_request", f"a value cannot be sent: {error}") from error
    if len(body) > FRAME_BYTES_MAX:
        raise too_large(len(body))
    return len(body).to_bytes(4, "little") + body


def reply_in(body: memoryview) -> Reply:
    """The reply in a body. Raises: TransportError `bad_reply`."""
    try:
        return _decode_reply(body)
    except (ValueError, RecursionError) as error:
        raise TransportError("bad_reply", f"the runtime answered with garbage: {error}") from error


def error_in(reply: Failed) -> HeadwaterError:
    """The error that a caller gets for a failed request."""
    family = CapacityError if reply.retry else RequestError
    return family(reply.code, reply.message, reply.hint)


def why_invalid(body: memoryview, error: Exception) -> Failed:
    """What to answer to a body that `decode_request` refused with `error`.

    Raises: RequestError `bad_frame` when the body is not even an array that begins with tag and
    request id: then the stream cannot be trusted to be in step.
    """
    try:
        message = _decode_any(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as reason:
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
    """`text` of a decoder, its position `$[3]` replaced by the name of the field there."""
    names = struct.__struct_fields__

    def name(match: re.Match[str]) -> str:
        position = int(match[1]) - 1
        return f"field {names[position]}" if position < len(names) else match[0]

    return f"{struct.__name__}: {_POSITION.sub(name, text).replace('`', '')}"


def too_large(size: int) -> RequestError:
    """The error about a frame of `size` bytes."""
    return RequestError("frame_too_large", f"frame of {size} bytes; at most {FRAME_BYTES_MAX}")


class Splitter:
    """Cuts a stream of bytes into the bodies of its frames; keeps the started one."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def started(self) -> bool:
        """Whether the beginning of a frame waits for its end."""
        return bool(self._rest)

    def reset(self) -> None:
        """Forget the started frame."""
        self._rest = b""

    def feed(self, data: bytes) -> tuple[list[memoryview], RequestError | None]:
        """The bodies that `data` completes, and what is wrong with the frame after them, if so.

        After an error the stream is out of step and must be closed.
        """
        data = self._rest + data if self._rest else data
        bodies: list[memoryview] = []
        view, at, end = memoryview(data), 0, len(data)
        while end - at >= 4:
            size = int.from_bytes(view[at : at + 4], "little")
            if size > FRAME_BYTES_MAX:
                return bodies, too_large(size)
            if end - at - 4 < size:
                break
            bodies.append(view[at + 4 : at + 4 + size])
            at += 4 + size
        self._rest = data[at:]
        return bodies, None

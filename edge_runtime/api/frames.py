"""The frames of the Unix socket: their bytes, their messages, and how a stream is cut into them.

Why: server and clients share one declaration; a client in another language has proto/socket.md.

Invariants: a frame is a length (u32, little-endian, at most FRAME_BYTES_MAX) and one MessagePack
array `[tag, request_id, ...]`; tags are never used twice; fields are only appended, with defaults.

Messages are hidden from the garbage collector (`gc=False`), which thousands at once keep busy.

Knows no sockets and no models, and loads no numpy. Implements proto/socket.md.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from edge_runtime.api.session_frames import Fields, SessionReply, SessionRequest
from edge_runtime.errors import CapacityError, HeadwaterError, RequestError, TransportError

if TYPE_CHECKING:
    from edge_runtime.inference.tensors import Array

PROTOCOL_VERSION = 1
FRAME_BYTES_MAX = 1 << 24
"""16 MiB: an image of 1024 x 1024 x 3 floats fits."""
PLAIN_BYTES_MAX = 512 * 1024
"""Any request but Infer: a decoded one may take many times its bytes, and the log takes no more."""


class Hello(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """Who are you, and what did you keep? `version` is the client's protocol version."""

    request_id: int
    version: int = PROTOCOL_VERSION


class Predict(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """Answer this event. Values of `fields` are checked by the family's interface."""

    request_id: int
    family: str
    kind: str
    time_s: float
    fields: Fields


class Observe(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    """Remember this event; no answer wanted."""

    request_id: int
    family: str
    kind: str
    time_s: float
    fields: Fields


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


class RawTensor(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A named tensor as bytes; `datatype` is a word of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=64)]
    data: bytes


class Infer(msgspec.Struct, array_like=True, frozen=True, tag=6, gc=False):
    """Tensors in, tensors out, unlogged. No `outputs`: all of them; no `release`: what serves."""

    request_id: int
    family: str
    inputs: Annotated[tuple[RawTensor, ...], msgspec.Meta(max_length=4096)]
    outputs: Annotated[tuple[str, ...], msgspec.Meta(max_length=4096)] = ()
    release: str = ""


class Rollback(msgspec.Struct, array_like=True, frozen=True, tag=7, gc=False):
    """Go back to the release that served before; `reason` is for people."""

    request_id: int
    family: str
    reason: str


class Survived(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The last sequence number of an epoch and class that a restart left; 0: none."""

    epoch: int
    event_class: str
    seq: int


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag=129, gc=False):
    """The answer to Hello: this process's epoch, and what is left of earlier ones."""

    request_id: int
    device: str
    epoch: int
    survived: list[Survived]
    version: int = PROTOCOL_VERSION


class Predicted(msgspec.Struct, array_like=True, frozen=True, tag=130, gc=False):
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


class StatusReply(msgspec.Struct, array_like=True, frozen=True, tag=133, gc=False):
    """The answer to Status: a map of texts, numbers, lists and maps."""

    request_id: int
    status: dict[str, Any]


class Inferred(msgspec.Struct, array_like=True, frozen=True, tag=134, gc=False):
    """The answer to Infer; reads like a dict of arrays: `answer["name"]`, `dict(answer)`."""

    request_id: int
    release: str
    outputs: tuple[RawTensor, ...]

    def keys(self) -> list[str]:
        """The names of the outputs, in the model's order."""
        return [tensor.name for tensor in self.outputs]

    def __getitem__(self, name: str) -> Array:
        from edge_runtime.api.raw import array_of

        for tensor in self.outputs:
            if tensor.name == name:
                return array_of(tensor)
        raise KeyError(name)


class RolledBack(msgspec.Struct, array_like=True, frozen=True, tag=135, gc=False):
    """The answer to Rollback: the release that serves now."""

    request_id: int
    release: str


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=255, gc=False):
    """The request had no effect, for this reason. `request_id` 0: the frame had none.

    `retry` says that the very same request may succeed later.
    """

    request_id: int
    code: str
    message: str
    hint: str = ""
    retry: bool = False


Request = Hello | Predict | Observe | Label | Status | Infer | Rollback | SessionRequest
Reply = Welcome | Predicted | Done | StatusReply | Inferred | RolledBack | Failed | SessionReply

_LENGTH = struct.Struct("<I")

_encode = msgspec.msgpack.Encoder().encode
decode_request: Callable[[memoryview], Request] = msgspec.msgpack.Decoder(Request).decode
_decode_reply: Callable[[memoryview], Reply] = msgspec.msgpack.Decoder(Reply).decode


def frame(request: Request | Reply) -> bytes:
    """The bytes of a message, its length first.

    Raises: RequestError (bad_request: a value that MessagePack cannot carry; frame_too_large).
    """
    try:
        body = _encode(request)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError("bad_request", f"a value cannot be sent: {error}") from error
    if len(body) > FRAME_BYTES_MAX:
        raise too_large(len(body))
    return _LENGTH.pack(len(body)) + body


def frames_of(replies: Iterable[Reply]) -> bytes:
    """The bytes of replies; one that is too large becomes a Failed."""
    parts: list[bytes] = []
    for reply in replies:
        body = _encode(reply)
        if len(body) > FRAME_BYTES_MAX:
            body = _encode(failed(reply.request_id, too_large(len(body))))
        parts += (_LENGTH.pack(len(body)), body)
    return b"".join(parts)


def only_body(data: bytes) -> memoryview | None:
    """The body in `data`, when that is one whole frame, not large, and nothing else."""
    whole = 4 <= len(data) <= PLAIN_BYTES_MAX and _LENGTH.unpack_from(data)[0] == len(data) - 4
    return memoryview(data)[4:] if whole else None


def reply_in(body: memoryview) -> Reply:
    """The reply in a body. Raises: TransportError `bad_reply`."""
    try:
        return _decode_reply(body)
    except (ValueError, RecursionError) as error:
        raise TransportError("bad_reply", f"the runtime answered with garbage: {error}") from error


def failed(request_id: int, error: HeadwaterError) -> Failed:
    """What a request is answered with that had no effect because of `error`."""
    retry = isinstance(error, CapacityError)
    return Failed(request_id, error.code, error.message, error.hint, retry)


def error_in(reply: Failed) -> HeadwaterError:
    """The error that a caller gets for a failed request."""
    family = CapacityError if reply.retry else RequestError
    return family(reply.code, reply.message, reply.hint)


def too_large(size: int) -> RequestError:
    """The error about a frame of `size` bytes."""
    return RequestError("frame_too_large", f"frame of {size} bytes; at most {FRAME_BYTES_MAX}")


class Splitter:
    """Cuts a stream of bytes into the bodies of its frames; keeps what is not cut yet.

    `ready` says that more than a started frame is kept: `feed` again, with nothing, gives it.
    """

    def __init__(self) -> None:
        self._kept = bytearray()
        self._wanted = 0
        self.ready = False

    @property
    def held(self) -> int:
        """How many bytes are kept."""
        return len(self._kept)

    def feed(
        self, data: bytes | bytearray, most: int = sys.maxsize
    ) -> tuple[list[memoryview], RequestError | None]:
        """The next bodies, at most `most`, and what is wrong with the frame after them, if so.

        After an error the stream is out of step and must be closed; nothing is kept.
        """
        if self._kept:
            # Grown in place, so that a large frame costs its size, not the square of its size.
            self._kept += data
            if len(self._kept) < self._wanted:
                return [], None
            data, self._kept = self._kept, bytearray()
        bodies: list[memoryview] = []
        view, at, end = memoryview(data), 0, len(data)
        self._wanted, self.ready = 4, False
        while end - at >= 4:
            size = _LENGTH.unpack_from(data, at)[0]
            if size > FRAME_BYTES_MAX:
                return bodies, too_large(size)
            if end - at - 4 < size:
                self._wanted = 4 + size
                break
            if len(bodies) == most:
                self.ready = True
                break
            bodies.append(view[at + 4 : at + 4 + size])
            at += 4 + size
        if at < end:
            self._kept = bytearray(view[at:])
        return bodies, None

"""The Open Inference Protocol v2: a request's bytes to tensors, tensors to an answer's bytes.

Why: clients of Triton, KServe and others talk to a device as they talk to a server, with JSON or,
faster and exact, with binary tensors behind the JSON.

Invariants: what is read has the shape, element type and number of elements that it claims, and
every byte of the body is accounted for; whether a model takes it is for the runtime to say. A
parameter that would change the meaning of a request is honoured or refused, never passed over.

Knows nothing about HTTP, models and clocks. The protocol: kserve/open-inference-protocol,
inference_rest.md; binary tensors: Triton's extension_binary_data.md. See proto/openapi.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal

import msgspec

from edge_runtime.api.listed import listed, unlisted
from edge_runtime.api.raw import packed, unpacked
from edge_runtime.errors import RequestError
from edge_runtime.inference.tensors import Array, Tensor, datatype_of

EXTENSIONS = ["binary_tensor_data"]
PLATFORM = "onnx_onnxv1"
NOT_BUILT = frozenset(
    (
        *("config", "generate", "generate_stream", "index", "load", "logging", "register"),
        *("setting", "stats", "status", "unload", "unregister"),
    )
)
"""Last words of the paths of extensions that other servers have and this one has not."""

_LARGE_BYTES = 512 << 10
_PARTS_MAX = {b",": 1 << 20, b"{": 1 << 16, b":": 1 << 16}
"""Two bytes of JSON may take 64 of memory in a list, and 200 in an object: so many may come."""

_WHY_MAX = 200

# fmt: off
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
]
# fmt: on
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Parameters = dict[str, Any]


class _Input(msgspec.Struct):
    name: str
    shape: Annotated[list[Size], msgspec.Meta(max_length=32)]
    datatype: Datatype
    data: msgspec.Raw = msgspec.Raw()
    parameters: Parameters = {}


class _Wanted(msgspec.Struct):
    name: str
    parameters: Parameters = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    outputs: list[_Wanted] = []
    parameters: Parameters = {}


class _Output(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: Sequence[int]
    parameters: Parameters = {}
    data: list[Any] | None = None


class _Answer(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_Output]
    id: str | None = None


class Question(msgspec.Struct):
    """What a request asks: no `outputs` means all; no `timeout_s`, no deadline of its own.

    `binary` says how outputs leave, unless `binary_by_name` says otherwise for one of them.
    """

    inputs: dict[str, Array]
    outputs: list[str]
    id: str | None = None
    timeout_s: float | None = None
    binary: bool = False
    binary_by_name: dict[str, bool] = {}


_decode: Callable[[bytes | memoryview], _Request] = msgspec.json.Decoder(_Request).decode
_encode = msgspec.json.Encoder().encode
_UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError, OverflowError)


def question(body: bytes, json_bytes: int | None, declared: Sequence[Tensor]) -> Question:
    """The question in a body whose first `json_bytes` are JSON (None: all of it; 0: a raw tensor).

    `declared` are the model's inputs, needed for a raw tensor alone.
    Raises: RequestError (bad_request, unsupported).
    """
    if json_bytes is None:
        text: bytes | memoryview = body
        rest = b""
    elif json_bytes == 0:
        return _raw_question(body, declared)
    elif 0 < json_bytes <= len(body):
        text, rest = memoryview(body)[:json_bytes], body[json_bytes:]
    else:
        raise bad(f"the header claims {json_bytes} bytes of JSON; the body has {len(body)}")
    if len(text) > _LARGE_BYTES:
        _check_parts(body, len(text))
    try:
        request = _decode(text)
    except _UNREADABLE as error:
        raise not_json(error) from error
    asked = Question(
        _inputs(request.inputs, rest), _names(request.outputs) if request.outputs else []
    )
    asked.id = request.id
    if request.parameters:
        _obey(asked, request.parameters)
    for each in request.outputs:
        if each.parameters:
            _refuse(
                each.parameters, ("classification", "shared_memory_"), f"output {each.name!r:.64}"
            )
            if "binary_data" in each.parameters:
                asked.binary_by_name[each.name] = _flag(each.parameters, "binary_data")
    return asked


def answer(
    asked: Question, family: str, release: str, outputs: Mapping[str, Array]
) -> tuple[bytes, list[bytes]]:
    """The JSON of an answer, and the tensors that follow it in binary.

    Raises: RequestError `not_json` for an output that JSON cannot carry.
    """
    described, blobs = [], []
    for name, array in outputs.items():
        output = _Output(name, datatype_of(array), array.shape)
        if asked.binary_by_name.get(name, asked.binary):
            blob = packed(array)
            output.parameters = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            output.data = listed(name, array)
        described.append(output)
    return _encode(_Answer(family, release, described, asked.id)), blobs


def server_metadata() -> dict[str, Any]:
    """What the protocol tells about a server."""
    return {"name": "headwater", "version": version("headwater"), "extensions": EXTENSIONS}


def model_metadata(
    family: str, releases: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> dict[str, Any]:
    """What the protocol tells about a model."""
    return {
        "name": family,
        "versions": releases,
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": outputs,
    }


def bad(message: str, hint: str = "") -> RequestError:
    """The error about a request that is no request of this protocol."""
    return RequestError("bad_request", message, hint)


def not_json(error: Exception) -> RequestError:
    """The error about JSON that a decoder refused with `error`."""
    hint = "JSON has no NaN and no infinity; binary tensors have"
    why = str(error)
    if len(why) > _WHY_MAX:  # it quotes what was sent, and ends with where that stood
        why = f"{why[:64]} ... {why[-64:]}"
    return bad(
        f"the JSON cannot be read: {why}".replace("`", ""), hint if "malformed" in why else ""
    )


def _check_parts(body: bytes, json_bytes: int) -> None:
    """Refuse JSON that would take much more memory than its bytes, before it does."""
    for part, parts_max in _PARTS_MAX.items():
        if body.count(part, 0, json_bytes) > parts_max:
            text = f"JSON above {_LARGE_BYTES} bytes has at most {parts_max} {part.decode()!r}"
            hint = "send binary tensors, or fewer rows at once"
            raise RequestError("body_too_large", f"{text}; nothing was done", hint)


def _names(outputs: list[_Wanted]) -> list[str]:
    names = [each.name for each in outputs]
    if len(names) > 1 and len(set(names)) < len(names):
        raise bad("two outputs have the same name")
    return names


def _inputs(inputs: list[_Input], rest: bytes) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    at = 0
    for each in inputs:
        size = _binary_size(each) if each.parameters else None
        try:
            if size is None:
                if not each.data:
                    raise ValueError("neither data nor binary_data_size")
                arrays[each.name] = unlisted(each.datatype, each.shape, each.data)
            elif each.data:
                raise ValueError("both data and binary_data_size")
            else:
                arrays[each.name] = unpacked(each.datatype, each.shape, rest[at : at + size])
                at += size
        except _UNREADABLE as error:
            raise bad(f"input {each.name!r:.64}: {error}".replace("`", "")) from error
    if len(arrays) < len(inputs):
        raise bad("two inputs have the same name")
    if at != len(rest):
        raise bad(f"{len(rest)} bytes follow the JSON; its inputs claim {at}")
    return arrays


def _binary_size(each: _Input) -> int | None:
    _refuse(each.parameters, ("shared_memory_",), f"input {each.name!r:.64}")
    size = each.parameters.get("binary_data_size")
    if size is None or (type(size) is int and size >= 0):
        return size
    raise bad(f"input {each.name!r:.64}: binary_data_size is {size!r:.64}, not a number of bytes")


def _raw_question(body: bytes, declared: Sequence[Tensor]) -> Question:
    """A body that is nothing but the tensor of a model with one input; answered in binary."""
    if len(declared) != 1:
        raise bad(f"a raw body is for models with one input; this one has {len(declared)}")
    tensor = declared[0]
    shape = list(tensor.shape)
    free = [index for index, size in enumerate(shape) if size < 0]
    for index in free[:-1]:
        shape[index] = 1
    if free:
        elements = 1 if tensor.datatype == "BYTES" else len(body) // tensor.dtype.itemsize
        shape[free[-1]] = 1
        shape[free[-1]] = elements // (math.prod(shape) or 1)
    if tensor.datatype == "BYTES":  # the whole body is one text
        body = len(body).to_bytes(4, "little") + body
    try:
        array = unpacked(tensor.datatype, shape, body)
    except ValueError as error:
        raise bad(f"input {tensor.name!r}: {error}") from error
    return Question({tensor.name: array}, [], binary=True)


def _obey(asked: Question, parameters: Parameters) -> None:
    """Take what the parameters of a request ask for; refuse what is not built. 0 is no timeout."""
    asked.binary = _flag(parameters, "binary_data_output")
    timeout_us = parameters.get("timeout", 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise bad(f"timeout is {timeout_us!r:.64}, not a number of microseconds")
    asked.timeout_s = timeout_us / 1e6 or None
    _refuse(parameters, ("sequence_", "priority", "headers", "triton_"), "the request")


def _flag(parameters: Parameters, name: str) -> bool:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise bad(f"{name} is {value!r:.64}, neither true nor false")
    return value


def _refuse(parameters: Parameters, reserved: tuple[str, ...], where: str) -> None:
    """Refuse reserved parameters; a 0, a false and an empty text ask for nothing."""
    for name, value in parameters.items():
        if value and name.startswith(reserved):
            raise RequestError(
                "unsupported",
                f"parameter {name!r:.64} of {where} asks for what is not built here",
                f"the extensions served are: {', '.join(EXTENSIONS)}",
            )

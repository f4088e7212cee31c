"""Every golden vector of proto/vectors, read by the codec and by the msgpack library."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest

from edge_runtime.errors import RequestError
from edge_runtime.wire import codec

FOLDER = Path(__file__).parents[2] / "proto" / "vectors"
INDEX = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))["vectors"]
VALID = {vector["id"]: vector for vector in INDEX if "error" not in vector}
INVALID = {vector["id"]: vector for vector in INDEX if "error" in vector}
DECODERS = {
    "record": codec.decode_record,
    "envelope": codec.decode_envelope,
    "watermark": codec.decode_watermark,
    "report": codec.decode_report,
    "learner-status": codec.decode_status,
    "time-question": codec.decode_time_question,
    "time-answer": codec.decode_time_answer,
}


def data_of(kind: str, name: str) -> bytes:
    """What a decoder is given: the file's bytes, unpacked as their headers say."""
    headers = (VALID | INVALID)[name].get("headers", {})
    return codec.unpack_envelope((FOLDER / kind / f"{name}.msgpack").read_bytes(), headers)


def inflated(kind: str, name: str) -> bytes:
    """The same as any other program would unpack it. Raises: ValueError."""
    data = (FOLDER / kind / f"{name}.msgpack").read_bytes()
    headers = (VALID | INVALID)[name].get("headers", {})
    if not headers:
        return data
    if headers != {"Content-Encoding": "deflate"}:
        raise ValueError(headers)
    try:
        return zlib.decompress(data)
    except zlib.error as error:
        raise ValueError(name) from error


def plain(value: Any) -> Any:
    """A value as the index writes it: bytes in hex, all else as JSON has it."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def typed(value: Any) -> Any:
    """A value that also shows its types, so that 1, 1.0 and true differ."""
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return type(value).__name__, value


@pytest.mark.parametrize("name", VALID)
def test_any_messagepack_reader_sees_what_the_index_says(name):
    seen = msgpack.unpackb(inflated("valid", name))

    assert typed(plain(seen)) == typed(VALID[name]["plain"])


@pytest.mark.parametrize("name", VALID)
def test_the_codec_reads_a_valid_message_and_writes_what_it_means(name):
    vector = VALID[name]

    message = DECODERS[vector["schema"]](data_of("valid", name))

    written = plain(msgpack.unpackb(codec.encode(message)))
    assert typed(written) == typed(vector.get("expected", vector["plain"]))


@pytest.mark.parametrize("name", INVALID)
def test_the_codec_refuses_an_invalid_message_by_its_code(name):
    vector = INVALID[name]

    with pytest.raises(RequestError) as caught:
        DECODERS[vector["schema"]](data_of("invalid", name))

    assert caught.value.code == vector["error"]


@pytest.mark.parametrize("name", INVALID)
def test_the_index_knows_which_invalid_messages_are_messagepack(name):
    try:
        msgpack.unpackb(inflated("invalid", name))
    except ValueError:  # msgpack's own errors are ValueErrors too
        well_formed = False
    else:
        well_formed = True

    assert well_formed == INVALID[name]["well_formed"]


@pytest.mark.parametrize(
    ("name", "refused"),
    [("envelope-events", 0), ("envelope-unknown-record", 1), ("envelope-deflate", 0)],
)
def test_a_record_that_is_refused_does_not_spoil_its_envelope(name, refused):
    envelope = codec.decode_envelope(data_of("valid", name))

    assert sum(is_refused(bytes(record)) for record in envelope.records) == refused


def is_refused(record: bytes) -> bool:
    try:
        codec.decode_record(record)
    except RequestError:
        return True
    return False


def test_the_index_names_each_file_once():
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.msgpack")}
    named = [f"valid/{name}.msgpack" for name in VALID]
    named += [f"invalid/{name}.msgpack" for name in INVALID]

    assert sorted(named) == sorted(files)
    assert len(INDEX) == len(files)


def test_every_message_has_valid_and_invalid_vectors():
    assert {vector["schema"] for vector in VALID.values()} == set(DECODERS)
    assert {vector["schema"] for vector in INVALID.values()} == set(DECODERS)


def test_vector_names_are_plain():
    assert [name for name in VALID | INVALID if not re.fullmatch(r"[a-z0-9-]+", name)] == []

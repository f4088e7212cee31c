"""Envelopes are deflated where it pays, and inflating one is bounded whatever a sender sends."""

from __future__ import annotations

import random
import tracemalloc
import zlib

import msgspec
import pytest

from edge_runtime.errors import RequestError
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Envelope, ObservationRecord

DEFLATE = {"Content-Encoding": "deflate"}


def envelope_of(records: list[bytes]) -> Envelope:
    return Envelope(1, "EWR", 2, "event", 7, [msgspec.Raw(data) for data in records], 3, "dropped")


def alike(count: int) -> list[bytes]:
    return [
        codec.encode(ObservationRecord("flight_delay", "landed", float(n), {"carrier": "UA"}))
        for n in range(count)
    ]


def test_many_records_that_look_alike_are_deflated_and_come_back_as_they_were() -> None:
    envelope = envelope_of(alike(100))

    data, headers = codec.pack_envelope(envelope)

    assert headers == DEFLATE
    assert len(data) < len(codec.encode(envelope)) / 3
    assert codec.unpack_envelope(data, headers) == codec.encode(envelope)


@pytest.mark.parametrize("count", [0, 1])
def test_an_envelope_too_small_to_gain_travels_as_it_is(count: int) -> None:
    envelope = envelope_of(alike(count))

    assert codec.pack_envelope(envelope) == (codec.encode(envelope), {})


def test_what_does_not_shrink_by_a_tenth_travels_as_it_is() -> None:
    noise = codec.encode(random.Random(7).randbytes(20_000))
    envelope = envelope_of([noise])

    assert codec.pack_envelope(envelope) == (codec.encode(envelope), {})


def test_what_came_without_an_encoding_is_taken_as_it_is() -> None:
    assert codec.unpack_envelope(b"\x01", {"ce-id": "EWR/2/event/1-1"}) == b"\x01"


def test_the_largest_envelope_is_inflated_and_one_byte_more_is_not() -> None:
    largest = bytes(codec.INFLATED_BYTES_MAX)
    assert codec.unpack_envelope(zlib.compress(largest), DEFLATE) == largest

    with pytest.raises(RequestError, match="more than 1048576 bytes") as caught:
        codec.unpack_envelope(zlib.compress(largest + b"\0"), DEFLATE)
    assert caught.value.code == "bad_encoding"


def test_a_bomb_costs_no_more_than_the_largest_envelope() -> None:
    bomb = zlib.compress(bytes(64 << 20), 9)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="inflates to more"):
            codec.unpack_envelope(bomb, DEFLATE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(bomb) < 1 << 17
    assert peak < 3 * codec.INFLATED_BYTES_MAX  # zlib gathers it in blocks and joins them


@pytest.mark.parametrize("seed", range(200))
def test_what_is_damaged_and_cut_is_refused_by_its_code(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(zlib.compress(codec.encode(envelope_of(alike(20)))))
    for _ in range(rng.randint(0, 3)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    del data[rng.randrange(len(data)) :]

    with pytest.raises(RequestError) as caught:
        codec.unpack_envelope(bytes(data), DEFLATE)

    assert caught.value.code == "bad_encoding", f"seed {seed}"

"""Envelopes: full where there is enough, whole in sequence, one for a record that is large."""

from __future__ import annotations

import itertools
import random

import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.events.log import Piece
from edge_runtime.events.packing import ENVELOPE_BYTES, Packer
from edge_runtime.wire import codec
from edge_runtime.wire.messages import EventClass

RUNNING = 9


class Shelf:
    """A log of one epoch, from which a piece starts where it is asked for."""

    epoch = RUNNING

    def __init__(self, records: list[bytes], skipped: int = 0) -> None:
        self.records, self.skipped = records, skipped

    def piece(
        self, _name: EventClass, _epoch: int, after_seq: int, max_bytes: int, max_records: int
    ) -> Piece | None:
        left = self.records[max(0, after_seq - self.skipped) :][:max_records]
        sizes = itertools.accumulate(map(len, left))
        left = left[: max(1, sum(size <= max_bytes for size in sizes))]
        skipped = max(0, self.skipped - after_seq)
        reason = "dropped" if skipped else ""
        return Piece(skipped, reason, after_seq + skipped + 1, left) if skipped or left else None

    def recent(
        self, _name: EventClass, after_seq: int, max_bytes: int, max_records: int
    ) -> list[tuple[int, bytes]]:
        piece = self.piece(_name, self.epoch, after_seq, max_bytes, max_records)
        return [] if piece is None else list(enumerate(piece.records, piece.base_seq))

    def prior(self, _epoch: int) -> int:
        return 4


def packer(shelf: Shelf) -> Packer:
    return Packer(shelf, "EWR", ManualClock(1.7e9))  # type: ignore[arg-type]


def drained(shelf: Shelf, epoch: int, count: int = 4) -> list[Piece]:
    found, last_seq = [], shelf.skipped + len(shelf.records)
    after_seq = 0
    while after_seq < last_seq:
        found += packer(shelf).read("event", epoch, after_seq, last_seq, count)
        after_seq = found[-1].base_seq + len(found[-1].records) - 1
    return found


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("epoch", [RUNNING, 4])
def test_pieces_hold_every_record_once_in_order_and_keep_to_the_bound(
    seed: int, epoch: int
) -> None:
    rng = random.Random(seed)
    sizes = rng.choice([[8], [200], [200, 8, 70_000], [33_000], [300_000]])
    records = [
        rng.randbytes(rng.choice(sizes))
        for _ in range(rng.randint(1, 600 if max(sizes) < 1000 else 9))
    ]
    shelf = Shelf(records, skipped=rng.choice([0, 5]))

    pieces = drained(shelf, epoch)

    assert [data for piece in pieces for data in piece.records] == records, f"seed {seed}"
    assert [piece.skipped for piece in pieces] == [shelf.skipped] + [0] * (len(pieces) - 1)
    expected = shelf.skipped + 1
    for piece in pieces:
        assert piece.base_seq == expected, f"seed {seed}"
        assert len(piece.records) == 1 or sum(map(len, piece.records)) < ENVELOPE_BYTES
        expected += len(piece.records)


@pytest.mark.parametrize("epoch", [RUNNING, 4])
def test_all_but_the_last_envelope_are_full(epoch: int) -> None:
    pieces = drained(Shelf([bytes(200)] * 5000), epoch)

    assert len(pieces) == -(-5000 // len(pieces[0].records))
    assert {len(piece.records) for piece in pieces[:-1]} == {len(pieces[0].records)}


@pytest.mark.parametrize(("is_noise", "at_least"), [(True, 60_000), (False, 190_000)])
def test_an_envelope_holds_more_where_records_deflate(*, is_noise: bool, at_least: int) -> None:
    rng = random.Random(3)
    records = [codec.encode(rng.randbytes(200) if is_noise else "x" * 200) for _ in range(5000)]
    packing = packer(Shelf(records))

    first, *_ = packing.pack("event", 4, packing.read("event", 4, 0, 5000, 2), 5000)
    (second,) = packing.read("event", 4, first.last_seq, 5000, 1)

    assert at_least < sum(map(len, second.records)) < at_least + 10_000


def test_a_loss_alone_is_a_piece() -> None:
    assert drained(Shelf([], skipped=40), 4) == [Piece(40, "dropped", 41, [])]


def test_what_is_small_and_in_memory_is_packed_at_once() -> None:
    shelf = Shelf([codec.encode("x" * 200)] * 20)

    packed = packer(shelf).at_once("event", RUNNING, 10, 20)

    assert packed is not None
    assert (packed.after_seq, packed.last_seq, packed.records, packed.is_full) == (
        10,
        20,
        10,
        False,
    )
    data = codec.unpack_envelope(packed.data, packed.headers)
    envelope = codec.decode_envelope(data)
    assert (envelope.base_seq, len(envelope.records), envelope.prior) == (11, 10, 4)


@pytest.mark.parametrize(
    ("epoch", "records"),
    [
        (4, [bytes(8)]),
        (RUNNING, [bytes(8)] * 33),
        (RUNNING, [bytes(7000)]),
        (RUNNING, [bytes(700)] * 9),
    ],
)
def test_what_is_large_or_not_in_memory_is_left_to_the_thread(
    epoch: int, records: list[bytes]
) -> None:
    assert packer(Shelf(records)).at_once("event", epoch, 0, len(records)) is None


def test_what_memory_holds_behind_a_hole_is_left_to_the_log() -> None:
    assert packer(Shelf([bytes(8)] * 3, skipped=2)).at_once("event", RUNNING, 0, 5) is None

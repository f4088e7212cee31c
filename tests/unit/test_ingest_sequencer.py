"""The sequencer: each record once and in order, whatever the broker and the device send."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.ingest.sequencer import (
    ASIDE_BYTES_MAX,
    ASIDE_LANE_MAX,
    ASIDE_MAX,
    Arrival,
    Sequencer,
)

LANE = ("A", 1, "event")


def envelope(base_seq, last_seq, lane=LANE, skipped=0):
    count = last_seq + 1 - base_seq
    token = (lane, base_seq, last_seq)
    return Arrival(lane, base_seq, count, skipped, token, 1, None)


def seqs(parts):
    """The numbers of the records that were accepted."""
    return [
        part.arrival.base_seq + at for part in parts for at in range(part.cut, part.arrival.count)
    ]


def made(marks=None) -> Sequencer[Any]:
    return Sequencer(marks or {})


def test_what_comes_twice_is_accepted_once_and_acknowledged_twice():
    sequencer = made()
    assert seqs(sequencer.accept(envelope(1, 3))) == [1, 2, 3]
    assert sequencer.accept(envelope(1, 3)) == []
    assert sequencer.done() == [(LANE, 1, 3)] * 2
    assert sequencer.statistics() == {"duplicates": 3, "beyond_gap": 0}


def test_an_envelope_that_overlaps_is_cut():
    sequencer = made({LANE: 4})
    (part,) = sequencer.accept(envelope(3, 6))
    assert (part.cut, seqs([part])) == (2, [5, 6])
    assert sequencer.marks == {LANE: 6}


def test_nothing_beyond_a_gap_is_accepted_until_the_gap_is_filled():
    sequencer = made({LANE: 1})
    assert sequencer.accept(envelope(5, 6)) == []
    assert sequencer.accept(envelope(4, 4)) == []
    assert sequencer.marks == {LANE: 1}
    assert seqs(sequencer.accept(envelope(2, 3))) == [2, 3, 4, 5, 6]
    assert sequencer.statistics()["beyond_gap"] == 0


def test_a_redelivery_beyond_a_gap_takes_no_second_place():
    sequencer = made()
    again = msgspec.structs.replace(envelope(2, 2), token="again")
    sequencer.accept(envelope(2, 2))
    sequencer.accept(again)
    assert sequencer.statistics()["beyond_gap"] == 1
    assert seqs(sequencer.accept(envelope(1, 1))) == [1, 2]
    assert sequencer.done() == [(LANE, 2, 2), "again", (LANE, 1, 1)]


def test_a_gap_that_is_never_filled_keeps_nothing_from_being_acknowledged():
    sequencer = made()
    sequencer.accept(envelope(5, 6))
    assert sequencer.done() == [(LANE, 5, 6)]


def test_too_much_beyond_the_gaps_of_a_lane_is_given_up_and_other_lanes_are_not():
    sequencer = made()
    for at in range(ASIDE_LANE_MAX + 1):
        sequencer.accept(envelope(2 * at + 2, 2 * at + 2))
    assert sequencer.counters["given_up_beyond_gap"] == 1
    sequencer.accept(envelope(5, 6, ("B", 1, "event")))
    assert sequencer.statistics()["beyond_gap"] == ASIDE_LANE_MAX + 1


def test_too_much_beyond_all_gaps_is_given_up():
    sequencer = made()
    for at in range(ASIDE_MAX + 1):
        sequencer.accept(envelope(2, 2, (f"device-{at}", 1, "event")))
    assert sequencer.statistics()["beyond_gap"] == ASIDE_MAX
    assert sequencer.counters["given_up_beyond_gap"] == 1


@pytest.mark.parametrize("other", [("B", 1, "event"), ("A", 2, "event"), ("A", 1, "label")])
def test_devices_epochs_and_classes_count_apart(other):
    sequencer = made({LANE: 5})
    assert seqs(sequencer.accept(envelope(1, 2, other))) == [1, 2]
    assert sequencer.marks == {LANE: 5, other: 2}


def test_an_empty_envelope_is_acknowledged():
    sequencer = made()
    assert sequencer.accept(envelope(1, 0)) == []
    assert sequencer.done() == [(LANE, 1, 0)]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), max_size=40))
def test_any_envelopes_yield_each_number_once_in_order_up_to_the_first_gap(spans):
    sequencer = made()
    accepted = [
        seq for base, extra in spans for seq in seqs(sequencer.accept(envelope(base, base + extra)))
    ]
    sent = {seq for base, extra in spans for seq in range(base, base + extra + 1)}
    reach = next(seq for seq in range(1, 100) if seq not in sent)
    assert accepted == list(range(1, reach))


def test_what_is_lost_before_an_envelope_moves_the_mark_and_is_counted_once():
    sequencer = made({LANE: 2})
    (part,) = sequencer.accept(envelope(6, 7, skipped=3))
    assert (part.lost, seqs([part]), sequencer.marks) == (3, [6, 7], {LANE: 7})
    assert sequencer.accept(envelope(6, 7, skipped=3)) == []


def test_of_a_loss_only_what_lies_above_the_mark_is_counted():
    sequencer = made({LANE: 4})
    (part,) = sequencer.accept(envelope(9, 8, skipped=7))
    assert (part.lost, seqs([part]), sequencer.marks) == (4, [], {LANE: 8})


def test_a_loss_beyond_a_gap_waits_as_records_do():
    sequencer = made({LANE: 1})
    assert sequencer.accept(envelope(6, 6, skipped=2)) == []
    parts = sequencer.accept(envelope(2, 3))
    assert [(part.lost, part.cut) for part in parts] == [(0, 0), (2, 0)]
    assert sequencer.marks == {LANE: 6}


def test_what_waits_beyond_gaps_is_bounded_in_bytes():
    sequencer = made()
    heavy = msgspec.structs.replace(envelope(2, 2), size=ASIDE_BYTES_MAX)
    sequencer.accept(heavy)
    sequencer.accept(envelope(4, 4))
    assert sequencer.counters["given_up_beyond_gap"] == 1
    assert seqs(sequencer.accept(envelope(1, 1))) == [1, 2]
    sequencer.accept(envelope(4, 4))
    assert sequencer.statistics()["beyond_gap"] == 1


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(-1, 4), st.integers(0, 4)), max_size=40))
def test_every_number_is_a_record_or_lost_once_and_in_order(spans):
    sequencer, told = made(), []
    for first, extra, skipped in spans:
        for part in sequencer.accept(
            envelope(first + skipped, first + skipped + extra, LANE, skipped)
        ):
            base = part.arrival.base_seq
            told += range(base - part.lost, base)
            told += seqs([part])
    assert told == list(range(1, len(told) + 1))
    assert sequencer.marks.get(LANE, 0) == len(told)

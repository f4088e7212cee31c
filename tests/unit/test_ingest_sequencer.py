"""The sequencer: each record once and in order, whatever the broker and the device send."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.ingest.sequencer import ASIDE_MAX, Arrival, Sequencer

LANE = ("A", 1, "event")


def envelope(base_seq, last_seq, lane=LANE):
    records = [msgspec.Raw(b"%d" % seq) for seq in range(base_seq, last_seq + 1)]
    return Arrival(lane, base_seq, records, (lane, base_seq, last_seq), 0.0)


def seqs(parts):
    return [int(bytes(raw)) for part in parts for raw in part.records]


def test_what_comes_twice_is_accepted_once_and_acknowledged_twice():
    sequencer = Sequencer({})
    assert seqs(sequencer.accept(envelope(1, 3))) == [1, 2, 3]
    assert sequencer.accept(envelope(1, 3)) == []
    assert sequencer.done() == [(LANE, 1, 3)] * 2
    assert sequencer.statistics() == {"duplicates": 3, "beyond_gap": 0}


def test_an_envelope_that_overlaps_is_cut():
    sequencer = Sequencer({LANE: 4})
    (part,) = sequencer.accept(envelope(3, 6))
    assert (part.base_seq, seqs([part])) == (5, [5, 6])
    assert sequencer.marks == {LANE: 6}


def test_nothing_beyond_a_gap_is_accepted_until_the_gap_is_filled():
    sequencer = Sequencer({LANE: 1})
    assert sequencer.accept(envelope(5, 6)) == []
    assert sequencer.accept(envelope(4, 4)) == []
    assert (sequencer.marks, sequencer.done()) == ({LANE: 1}, [])
    assert seqs(sequencer.accept(envelope(2, 3))) == [2, 3, 4, 5, 6]
    assert len(sequencer.done()) == 3
    assert sequencer.statistics()["beyond_gap"] == 0


def test_a_redelivery_beyond_a_gap_takes_no_second_place_and_its_token_counts():
    sequencer = Sequencer({})
    again = msgspec.structs.replace(envelope(2, 2), token="again")
    sequencer.accept(envelope(2, 2))
    sequencer.accept(again)
    assert sequencer.statistics()["beyond_gap"] == 1
    assert seqs(sequencer.accept(envelope(1, 1))) == [1, 2]
    assert sequencer.done() == [(LANE, 1, 1), "again"]


def test_too_much_beyond_gaps_is_given_up_and_acknowledged():
    sequencer = Sequencer({})
    for at in range(ASIDE_MAX):
        sequencer.accept(envelope(2 * at + 2, 2 * at + 2))
    assert sequencer.done() == []
    sequencer.accept(envelope(9999, 9999))
    assert sequencer.done() == [(LANE, 9999, 9999)]
    assert sequencer.counters["given_up_beyond_gap"] == 1


@pytest.mark.parametrize("other", [("B", 1, "event"), ("A", 2, "event"), ("A", 1, "label")])
def test_devices_epochs_and_classes_count_apart(other):
    sequencer = Sequencer({LANE: 5})
    assert seqs(sequencer.accept(envelope(1, 2, other))) == [1, 2]
    assert sequencer.marks == {LANE: 5, other: 2}


def test_an_empty_envelope_is_acknowledged():
    sequencer = Sequencer({})
    assert sequencer.accept(envelope(1, 0)) == []
    assert sequencer.done() == [(LANE, 1, 0)]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), max_size=40))
def test_any_envelopes_yield_each_number_once_in_order_up_to_the_first_gap(spans):
    sequencer = Sequencer({})
    accepted = [
        seq for base, extra in spans for seq in seqs(sequencer.accept(envelope(base, base + extra)))
    ]
    sent = {seq for base, extra in spans for seq in range(base, base + extra + 1)}
    reach = next(seq for seq in range(1, 100) if seq not in sent)
    assert accepted == list(range(1, reach))

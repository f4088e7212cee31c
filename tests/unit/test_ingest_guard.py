"""The guard: what is refused, and how batches are cut."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.ingest.guard import WAITING_BATCHES, Batcher, all_fine, refusal
from cloud_learner.store.examples import Example
from edge_runtime.errors import ConfigError
from edge_runtime.wire.messages import LabelRecord, ObservationRecord, PredictionRecord, Scored

NAN, INF = float("nan"), float("inf")


def prediction(**changes):
    facts = {
        "family": "fam",
        "kind": "k",
        "time_s": 1.0,
        "fields": {},
        "spec": "spec",
        "features": struct.pack("<2f", 3e38, 3e38),
        "propensity": 0.5,
        "scored": [Scored("r1", "stable", [0.5])],
    }
    return PredictionRecord(**{**facts, **changes})


def label(**changes):
    return LabelRecord(
        **{"family": "f", "epoch": 1, "seq": 1, "value": 1.0, "time_s": 1, **changes}
    )


@pytest.mark.parametrize(
    ("record", "event_class", "reason"),
    [
        (prediction(), "event", ""),
        (prediction(features=b""), "event", "bad_features"),
        (prediction(features=b"", spec="unknown"), "event", ""),
        (prediction(features=b"12345", spec="unknown"), "event", "bad_features"),
        (prediction(features=struct.pack("<2f", 1.0, NAN)), "event", "bad_features"),
        (prediction(features=struct.pack("<2f", INF, -INF)), "event", "bad_features"),
        (prediction(time_s=NAN), "event", "bad_time"),
        (prediction(time_s=1e300), "event", "bad_time"),
        (label(time_s=-1e12), "label", "bad_time"),
        (prediction(propensity=0.0), "event", "bad_propensity"),
        (prediction(propensity=1.5), "event", "bad_propensity"),
        (prediction(propensity=NAN), "event", "bad_propensity"),
        (prediction(scored=[]), "event", "bad_outputs"),
        (prediction(scored=[Scored("r", "stable", [])]), "event", "bad_outputs"),
        (prediction(scored=[Scored("r", "stable", [INF])]), "event", "bad_outputs"),
        (prediction(), "label", "wrong_class"),
        (ObservationRecord("f", "k", 1.0, {}), "event", ""),
        (ObservationRecord("f", "k", INF, {}), "event", "bad_time"),
        (ObservationRecord("f", "k", 1.0, {}), "label", "wrong_class"),
        (label(), "label", ""),
        (label(), "event", "wrong_class"),
        (label(value=NAN), "label", "bad_label"),
        (label(value=-INF), "label", "bad_label"),
        (label(seq=0), "label", "bad_number"),
        (label(epoch=1 << 60), "label", "bad_number"),
    ],
)
def test_a_record_that_would_ruin_learning_is_refused_by_name(record, event_class, reason):
    assert refusal(record, event_class, {"spec": 2}) == reason
    good = label() if event_class == "label" else ObservationRecord("f", "k", 1.0, {})
    assert all_fine([good, record, good], event_class, {"spec": 2}) == (reason == "")


def test_omitted_records_are_fine_when_their_key_is_known():
    assert all_fine([1, prediction(), 2], "event", {"spec": 2})
    assert all_fine([1, 2], "event", {})
    assert not all_fine([9, prediction()], "event", {"spec": 2})


def example(device, seq):
    return Example(device, 1, seq, "fam", float(seq), 0.0, b"", "spec", 1.0, 1.0, [], 0.0, 0.0)


def examples(devices):
    return [example(device, seq) for seq, device in enumerate(devices, start=1)]


def drained(batcher):
    found = []
    while (batch := batcher.next()) is not None:
        found.append(batch)
    return found


def names(batch):
    return "".join(each.device for each in batch.examples)


def test_a_batch_comes_out_when_it_is_full_and_not_before():
    batcher = Batcher(size=4, cap=4)
    batcher.add(examples("AAA"))
    assert batcher.next() is None
    batcher.add(examples("B"))
    assert [(batch.number, names(batch)) for batch in drained(batcher)] == [(1, "AAAB")]


def test_what_is_over_the_cap_waits_for_the_next_batch_and_is_counted():
    batcher = Batcher(size=4, cap=2)
    batcher.add(examples("AAAAABCBB"))
    first, second = drained(batcher)
    assert [each.seq for each in first.examples] == [1, 2, 6, 7]
    assert [each.seq for each in second.examples] == [3, 4, 8, 9]
    assert batcher.statistics() == {"deferred_over_cap": 3, "batches": 2, "unbatched": 1}


def test_one_device_alone_fills_no_batch_beyond_its_cap():
    batcher = Batcher(size=4, cap=2)
    batcher.add(examples("AAAAAAAA"))
    assert batcher.next() is None


def test_a_flood_over_the_cap_is_dropped_at_a_bound_and_handed_back():
    batcher = Batcher(size=4, cap=2)
    flood = 2 + 2 * WAITING_BATCHES
    dropped = batcher.add(examples("A" * (flood + 3)))
    assert [each.seq for each in dropped] == [flood + 1, flood + 2, flood + 3]
    assert batcher.counters["dropped_over_cap"] == 3


@pytest.mark.parametrize(("size", "cap"), [(4, 0), (4, 5)])
def test_a_cap_that_cannot_work_is_refused(size, cap):
    with pytest.raises(ConfigError) as caught:
        Batcher(size, cap)
    assert caught.value.code == "bad_cap"


stream = st.text("ABC", max_size=60)


@given(devices=stream, cuts=st.lists(st.integers(1, 9), max_size=30))
def test_how_examples_are_portioned_changes_no_batch(devices, cuts):
    whole, portions = Batcher(size=5, cap=2), Batcher(size=5, cap=2)
    whole.add(examples(devices))
    rest = examples(devices)
    for cut in cuts:
        portions.add(rest[:cut])
        rest = rest[cut:]
    portions.add(rest)
    assert drained(portions) == drained(whole)


@given(devices=stream, more=stream)
def test_a_restart_changes_no_batch(devices, more):
    whole, before = Batcher(size=5, cap=2), Batcher(size=5, cap=2)
    both = examples(devices + more)
    whole.add(both)
    before.add(both[: len(devices)])
    done = drained(before)
    batched = {each.id for batch in done for each in batch.examples}
    after = Batcher(size=5, cap=2)
    after.restore(len(done), [e for e in both[: len(devices)] if e.id not in batched])
    after.add(both[len(devices) :])
    assert done + drained(after) == drained(whole)


@given(devices=stream)
def test_every_batch_is_full_capped_in_order_and_every_example_is_in_one_place(devices):
    batcher = Batcher(size=5, cap=2)
    batcher.add(examples(devices))
    batches = drained(batcher)
    for batch in batches:
        seqs = [each.seq for each in batch.examples]
        assert len(seqs) == 5
        assert seqs == sorted(seqs)
        assert max(names(batch).count(device) for device in "ABC") <= 2
    batched = [each.seq for batch in batches for each in batch.examples]
    assert len(set(batched)) == len(batched)
    assert batcher.statistics()["unbatched"] == len(devices) - len(batched)

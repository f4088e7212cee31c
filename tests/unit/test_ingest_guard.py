"""The guard: what is refused, and how batches are cut."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_learner.ingest.accounting import Accounting
from cloud_learner.ingest.guard import WAITING_BATCHES, Batcher, all_fine, refusal
from cloud_learner.ingest.opening import Incoming, opened
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Certificate, Example
from edge_runtime.errors import ConfigError
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

NAN, INF = float("nan"), float("inf")
SPECS = {"spec": [0, 0], "words": [3, 0]}


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
        (prediction(spec="words", features=struct.pack("<2f", 2.0, -9.0)), "event", ""),
        (prediction(spec="words", features=struct.pack("<2f", 3.0, 0.0)), "event", "bad_features"),
        (prediction(spec="words", features=struct.pack("<2f", -1.0, 0.0)), "event", "bad_features"),
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
    assert refusal(record, event_class, SPECS) == reason
    good = label() if event_class == "label" else ObservationRecord("f", "k", 1.0, {})
    others = [] if event_class == "label" else [prediction()]
    assert all_fine([good, record, good, *others], event_class, SPECS) == (reason == "")


def test_omitted_records_are_fine_when_their_key_is_known():
    assert all_fine([1, prediction(), 2], "event", SPECS)
    assert all_fine([1, 2], "event", {})
    assert not all_fine([9, prediction()], "event", SPECS)


TASKS = {
    "binary": Task(),
    "classes": Task(kind="multiclass", classes=3),
    "value": Task(kind="regression"),
    "order": Task(kind="ranking", group="g"),
}


@pytest.mark.parametrize(
    ("family", "value", "reason"),
    [
        ("binary", 0.25, ""),
        ("binary", -0.01, "bad_label"),
        ("binary", 1.5, "bad_label"),
        ("classes", 2.0, ""),
        ("classes", 3.0, "bad_label"),
        ("classes", 0.5, "bad_label"),
        ("value", -1e9, ""),
        ("value", INF, "bad_label"),
        ("order", 7.0, ""),
        ("order", -1.0, "bad_label"),
        ("unknown", 1e9, ""),
        ("unknown", NAN, "bad_label"),
    ],
)
def test_a_label_that_is_none_of_its_familys_task_is_refused(family, value, reason):
    record = label(family=family, value=value)
    assert refusal(record, "label", {}, TASKS) == reason
    good = [label(family=name, value=0.0) for name in TASKS]
    for labels in ([record], [record] * 3, [*good, record, *good]):
        assert all_fine(labels, "label", {}, TASKS) == (reason == "")


def test_a_refused_label_is_quarantined_by_name_and_the_account_stays_exact():
    records = [label(family="binary", value=value) for value in (1.0, 2.0, 0.0)]
    raws = [msgspec.Raw(codec.encode(record)) for record in records]
    sent = codec.encode(Envelope(WIRE_VERSION, "A", 7, "label", 1, raws))
    arrival = opened(Incoming("hw.ev.A.label", sent, 0.0, None), {}, TASKS)
    assert {at: each.reason for at, each in arrival.what.refused.items()} == {1: "bad_label"}
    accounting = Accounting({})
    accounting.enter(arrival.lane, 0, "", arrival.what.records, 0, newest_s={})
    account = accounting.accounts[arrival.lane]
    assert (account.seq, account.archived, account.quarantined) == (3, 2, 1)


def example(device, seq, time_s=None, *, early=False):
    time_s = float(seq) if time_s is None else time_s
    plain = Example(device, 1, seq, "fam", time_s, 0.0, b"", "spec", 1.0, 1.0, [], 0.0, 0.0)
    return msgspec.structs.replace(plain, early=early)


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


def timed(device_times):
    """Examples of `A0 B10`: a device, and the second at which its example is due."""
    words = enumerate(device_times.split(), start=1)
    return [example(word[0], seq, float(word[1:])) for seq, word in words]


def cut(device_times, *, size=9, cap=9, batch_s=10.0):
    batcher = Batcher(size, cap, batch_s)
    batcher.add(timed(device_times))
    return [[f"{each.device}{each.time_s:g}" for each in b.examples] for b in drained(batcher)]


def test_a_batch_is_cut_when_its_examples_span_its_time_by_what_is_due_after_it():
    assert cut("A0 B1 A9 B10 A11 B19 A20") == [["A0", "B1", "A9"], ["B10", "A11", "B19"]]


def test_a_batch_is_never_cut_with_fewer_than_two_examples():
    assert cut("A0") == cut("A0 B5") == []
    assert cut("A0 B50 A99") == [["A0", "B50"]]


def test_a_batch_that_is_full_is_cut_before_its_time():
    assert cut("A0 B1 A2 B3 A4", size=2, cap=2) == [["A0", "B1"], ["A2", "B3"]]


def test_a_device_alone_learns_where_batches_are_cut_by_time_and_its_cap_holds():
    batches = cut("A0 A1 A2 A3 A4 A12 A13 A23", size=9, cap=3)
    assert batches == [["A0", "A1", "A2"], ["A3", "A4", "A12"], ["A13", "A23"]]


def test_what_is_over_the_cap_is_learned_later_and_not_lost_where_batches_are_cut_by_time():
    times = " ".join(f"A{at}" for at in range(60))
    batches = cut(times, size=9, cap=3)
    assert all(len(batch) == 3 for batch in batches)
    assert [name for batch in batches for name in batch] == times.split()[: 3 * len(batches)]
    assert len(batches) == 17


def test_early_and_mature_examples_of_a_device_share_its_cap():
    batcher = Batcher(size=4, cap=2)
    batcher.add([example("A", 1, early=True), example("A", 1), example("A", 2, early=True)])
    batcher.add(examples("BB"))
    (batch,) = drained(batcher)
    assert names(batch) == "AABB"
    assert batcher.statistics()["unbatched"] == 1


def test_a_certificate_says_how_much_of_a_batch_a_device_decided_and_could_have():
    batcher = Batcher(size=4, cap=2)
    batcher.add(examples("AABC"))
    (batch,) = drained(batcher)
    expected = Certificate(
        batch=1, size=4, devices=3, largest_share=0.5, cap=2, bound_per_device=0.5
    )
    assert batch.certificate(2) == expected
    with pytest.raises(AssertionError):
        batch.certificate(1)


@given(
    steps=st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 6)), max_size=50),
    at=st.integers(0, 50),
    hostile=st.sets(st.sampled_from("ABC")),
)
def test_no_share_of_devices_is_above_its_bound_and_a_restart_changes_no_batch(steps, at, hostile):
    time_s, both = 0.0, []
    for seq, (device, step_s) in enumerate(steps, start=1):
        time_s += step_s
        both.append(example(device, seq, time_s))
    whole, before, after = (Batcher(size=5, cap=2, batch_s=8.0) for _ in range(3))
    whole.add(both)
    batches = drained(whole)
    for batch in batches:
        count = sum(each.device in hostile for each in batch.examples)
        assert count <= len(hostile) * 2
        assert 2 <= len(batch.examples) <= 5
    before.add(both[:at])
    done = drained(before)
    batched = {each.id for batch in done for each in batch.examples}
    after.restore(len(done), [each for each in both[:at] if each.id not in batched])
    after.add(both[at:])
    assert done + drained(after) == batches

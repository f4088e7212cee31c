"""The intake: every number of every lane is accounted for, once, and garbage stops nothing."""

from __future__ import annotations

import random
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_learner.ingest.accounting import LANES_MAX, LANES_TOLD_MAX
from cloud_learner.ingest.guard import NUMBER_MAX, Batcher
from cloud_learner.ingest.intake import Intake, Strand
from cloud_learner.ingest.joiner import Rules
from cloud_learner.ingest.opening import Incoming
from cloud_learner.store.archive import Archive
from cloud_learner.store.ingest_db import IngestDb, read_accounts
from cloud_learner.store.raw import RawLog
from edge_runtime.bus.base import PAYLOAD_BYTES_MAX
from edge_runtime.clock import ManualClock
from edge_runtime.wire import codec
from edge_runtime.wire.codec import ENCODING, ENCODING_HEADER
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    Mark,
    ObservationRecord,
    PredictionRecord,
    Scored,
)

LANE = ("A", 7, "event")
BAD = msgspec.Raw(msgspec.msgpack.encode([77, "from", "the", "future"]))


def opened(home: Path, **more: float) -> Intake:
    rules = Rules(family="fam", label_window_s=100.0, idle_s=60.0, **more)
    db, raw, archive = (
        IngestDb(home / "db", ["fam"]),
        RawLog(home / "raw"),
        Archive(home / "archive"),
    )
    return Intake(
        db, raw, archive, [Strand(rules, Batcher(10, 10))], clock=ManualClock(), indices={}
    )


@pytest.fixture
def intake(tmp_path):
    made = opened(tmp_path)
    yield made
    made.close()


def seen(time_s=1.0):
    return msgspec.Raw(codec.encode(ObservationRecord("fam", "seen", time_s, {})))


def omitted(key):
    return msgspec.Raw(msgspec.msgpack.encode(key))


def envelope(records, base_seq=1, *, skipped=0, reason="", prior=0, lane=LANE):
    return Envelope(WIRE_VERSION, *lane, base_seq, list(records), skipped, reason, prior)


def incoming(what, subject="hw.ev.A.event", headers=None):
    data = what if isinstance(what, bytes) else codec.encode(what)
    return Incoming(subject, data, 0.0, "token", headers or {})


def account(intake, lane=LANE):
    found = intake.accounting.accounts[lane]
    return found.seq, found.archived, found.quarantined, found.dropped


def test_what_is_lost_omitted_or_refused_is_accounted_for_beside_what_is_archived(intake):
    records = [seen(), omitted(1), BAD, omitted(2), omitted(1), seen()]
    intake.commit([incoming(envelope(records, 5, skipped=4, reason="damaged"))])
    dropped = {"damaged": 4, "sampled_out": 2, "over_quota": 1}
    assert account(intake) == (10, 2, 1, dropped)
    intake.commit([incoming(envelope([], 21, skipped=20, reason="dropped"))])
    assert account(intake) == (20, 2, 1, dropped | {"dropped": 10})
    assert intake.accounting.totals() == {
        "held": 20,
        "archived": 2,
        "quarantined": 1,
        "dropped": 17,
        "under_way": 0,
        "balanced": 1,
    }
    assert intake.counters()["dropped_damaged"] == 4


def test_the_accounts_go_on_after_a_restart(tmp_path):
    first = opened(tmp_path)
    first.commit([incoming(envelope([seen(), BAD], 4, skipped=3, reason="trimmed", prior=3))])
    first.commit([], {"A": [Mark(7, "event", 9), Mark(8, "label", 2)]})
    before, totals = first.accounting.accounts, first.accounting.totals()
    first.close()
    second = opened(tmp_path)
    assert (second.accounting.accounts, second.accounting.totals()) == (before, totals)
    assert totals["under_way"] == 4 + 2
    assert [mark.seq for watermark in second.watermarks() for mark in watermark.marks] == [5, 0]
    second.close()


def test_a_device_hears_that_nothing_is_held_of_what_lies_beyond_a_gap(intake):
    commit = intake.commit([incoming(envelope([seen()], base_seq=500))])
    assert [watermark.marks for watermark in commit.watermarks] == [[Mark(7, "event", 0)]]
    commit = intake.commit([incoming(envelope([], 500, skipped=499, reason="trimmed"))])
    assert [watermark.marks for watermark in commit.watermarks] == [[Mark(7, "event", 500)]]


def test_a_reason_of_a_later_release_is_counted_and_never_becomes_a_name(intake):
    for number in range(50):
        what = envelope([], 2 + number, skipped=1, reason=f"invented{number}")
        intake.commit([incoming(what)])
    assert account(intake) == (50, 0, 0, {"other": 50})
    assert [name for name in intake.counters() if name.startswith("dropped_")] == ["dropped_other"]


def test_what_a_device_claims_of_itself_is_bounded(intake):
    wild = [Mark(-1, "event", 5), Mark(3, "event", 1 << 60), Mark(1 << 60, "label", 1)]
    intake.commit([], {"A": [*wild, Mark(3, "event", NUMBER_MAX), Mark(4, "event", NUMBER_MAX)]})
    assert intake.counters()["bad_marks"] == 3
    assert intake.accounting.totals()["under_way"] == NUMBER_MAX
    marks = [Mark(epoch, "event", 1) for epoch in range(1, LANES_MAX + 100)]
    intake.commit([], {"A": marks})
    assert len(intake.accounting.accounts) == LANES_MAX
    commit = intake.commit([incoming(envelope([seen()], lane=("A", 1 << 40, "event")))])
    assert commit.counters["quarantined_too_many_epochs"] == 1
    assert commit.done == ["token"]


def test_a_device_hears_first_of_the_lanes_that_came_last(intake):
    for epoch in range(1, LANES_TOLD_MAX + 3):
        intake.commit([incoming(envelope([seen()], lane=("A", epoch, "event")))])
    commit = intake.commit([incoming(envelope([seen()], 2, lane=("A", 1, "event")))])
    told = {mark.epoch: mark.seq for mark in commit.watermarks[0].marks}
    assert len(told) == LANES_TOLD_MAX
    assert told[1] == 2
    assert 2 not in told


def test_a_clock_that_was_ahead_moves_a_devices_time_no_further_than_its_arrival(tmp_path):
    intake = opened(tmp_path, ahead_s_max=10.0)
    intake.commit([incoming(envelope([seen(3e8)]))])
    assert intake.accounting.accounts[LANE].newest_s == {"fam": 10.0}
    intake.close()


def test_two_logs_under_one_name_are_an_alarm_and_both_are_accepted(tmp_path):
    first = opened(tmp_path)
    for epoch, prior in ((7, 0), (9, 7), (12, 9)):
        first.commit([incoming(envelope([seen()], prior=prior, lane=("A", epoch, "event")))])
    assert first.accounting.duplicates == set()
    first.commit([incoming(envelope([seen()], prior=7, lane=("A", 11, "event")))])
    first.commit([incoming(envelope([seen()], 2, prior=7, lane=("A", 11, "event")))])
    assert (first.accounting.duplicates, first.counters()["duplicate_identity"]) == ({"A"}, 1)
    assert account(first, ("A", 11, "event"))[0] == 2
    first.close()
    second = opened(tmp_path)
    assert (second.accounting.duplicates, second.counters()["duplicate_identity"]) == ({"A"}, 1)
    second.close()


def garbage(seed):
    """Envelopes that nobody should have sent, and what each is refused as."""
    draw = random.Random(seed)
    good = codec.encode(envelope([seen()]))
    bomb = zlib.compress(bytes(64 << 20))
    deflated = {ENCODING_HEADER: ENCODING}
    huge = msgspec.msgpack.encode([WIRE_VERSION, "A", 1 << 63, "event", 1, []])
    return [
        (incoming(draw.randbytes(1 << 20)), "bad_message"),
        (incoming(draw.randbytes(draw.randrange(200))), "bad_message"),
        (incoming(b"\x93" * 4000), "bad_message"),
        (incoming(bytes(PAYLOAD_BYTES_MAX + 1)), "too_large"),
        (incoming(good[: draw.randrange(1, len(good))]), "bad_message"),
        (incoming(bomb, headers=deflated), "bad_encoding"),
        (incoming(good, headers=deflated), "bad_encoding"),
        (incoming(zlib.compress(good), headers={ENCODING_HEADER: "zstd"}), "bad_encoding"),
        (incoming(msgspec.structs.replace(envelope([seen()]), version=99)), "bad_version"),
        (incoming(envelope([seen()], lane=("B", 7, "event"))), "wrong_subject"),
        (incoming(envelope([seen()], lane=("A", 7, "label"))), "wrong_subject"),
        (incoming(envelope([seen()]), subject="hw.ev.A?.event"), "bad_name"),
        (incoming(huge), "bad_number"),
        (incoming(envelope([seen()], base_seq=NUMBER_MAX)), "bad_number"),
        (incoming(envelope([seen()], base_seq=-5)), "bad_number"),
        (incoming(envelope([seen()], 3, skipped=3, reason="dropped")), "bad_number"),
        (incoming(envelope([seen()], 3, skipped=-1, reason="dropped")), "bad_number"),
        (incoming(envelope([seen()], 3, skipped=2)), "bad_reason"),
        (incoming(envelope([seen()], reason="dropped")), "bad_reason"),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_garbage_is_quarantined_by_name_and_what_is_good_goes_on(intake, seed):
    sent = garbage(seed)
    random.Random(seed).shuffle(sent)
    for at, (message, _) in enumerate(sent):
        good = incoming(envelope([seen()], base_seq=at + 1))
        commit = intake.commit([message, good])
        assert len(commit.done) == 2
    found = Counter(
        {
            name.removeprefix("quarantined_"): number
            for name, number in intake.counters().items()
            if name.startswith("quarantined_")
        }
    )
    assert found == Counter(reason for _, reason in sent), seed
    assert account(intake) == (len(sent), len(sent), 0, {})


def test_a_record_with_absurd_numbers_is_quarantined_and_its_neighbours_are_not(intake):
    scored = [Scored("r1", "stable", [0.5])]
    asked = PredictionRecord("fam", "k", 1.0, {}, "spec", b"", 1.0, scored)
    absurd = [
        msgspec.structs.replace(asked, time_s=1e300),
        msgspec.structs.replace(asked, time_s=float("-inf")),
        msgspec.structs.replace(asked, propensity=float("nan")),
        msgspec.structs.replace(asked, scored=[Scored("r1", "stable", [1e308, 1e308])]),
        LabelRecord("fam", 1, 1, 1.0, 1.0),
    ]
    raws = [msgspec.Raw(codec.encode(each)) for each in absurd]
    wild = (b"\xc0", b"\x09", b"\xff", msgspec.msgpack.encode(1 << 63), b"\x91\x01")
    raws += map(msgspec.Raw, wild)
    good = msgspec.Raw(codec.encode(asked))
    commit = intake.commit([incoming(envelope([good, *raws, good]))])
    assert account(intake) == (12, 2, 10, {})
    assert (commit.counters["predictions"], commit.counters["pending"]) == (2, 2)


def test_quarantine_is_bounded(tmp_path):
    first = opened(tmp_path)
    first.commit([incoming(b"junk" * 5000) for _ in range(1100)])
    first.close()
    db = IngestDb(tmp_path / "db")
    kept = db.quarantined()
    db.close()
    assert (len(kept), {len(data) for *_, data in kept}) == (1000, {4096})


class Device:
    """A log of one class: what each number is, and envelopes of it cut anyhow."""

    def __init__(self, draw: random.Random, length: int) -> None:
        self.draw = draw
        self.kinds = [draw.choice(["good", "good", "bad", 1, 2, "lost"]) for _ in range(length)]

    def envelope(self):
        """Numbers from anywhere on, often ones that were sent before; losses where they are."""
        first = self.draw.randrange(len(self.kinds))
        part = self.kinds[first : first + self.draw.randrange(1, 9)]
        skipped = next((at for at, kind in enumerate(part) if kind != "lost"), len(part))
        records = []
        for kind in part[skipped:]:
            if kind == "lost":
                break
            records.append(seen() if kind == "good" else BAD if kind == "bad" else omitted(kind))
        reason = "dropped" if skipped else ""
        return envelope(records, first + skipped + 1, skipped=skipped, reason=reason)

    def expected(self, mark):
        """What the account must say when the mark is there."""
        held = Counter(self.kinds[:mark])
        dropped = {"dropped": held["lost"], "sampled_out": held[1], "over_quota": held[2]}
        return mark, held["good"], held["bad"], {k: v for k, v in dropped.items() if v}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_whatever_comes_in_whatever_order_every_number_is_accounted_for_once(seed):
    draw = random.Random(seed)
    device = Device(draw, draw.randrange(1, 60))
    with tempfile.TemporaryDirectory() as folder:
        intake = opened(Path(folder))
        for _ in range(draw.randrange(1, 25)):
            intake.commit([incoming(device.envelope()) for _ in range(draw.randrange(5))])
            if LANE in intake.accounting.accounts:
                mark = intake.accounting.accounts[LANE].seq
                assert account(intake) == device.expected(mark), seed
            if draw.random() < 0.1:
                intake.close()
                intake = opened(Path(folder))
        accounts = intake.accounting.accounts
        held = {lane: each for lane, each in accounts.items() if each.seq}
        assert read_accounts(Path(folder) / "db") == held
        intake.close()


def record(what):
    return msgspec.Raw(codec.encode(what))


def labels(*values, first=1, time_s=2.0):
    told = [LabelRecord("fam", 7, first + at, v, time_s + at) for at, v in enumerate(values)]
    lane = ("A", 7, "label")
    return incoming(envelope(map(record, told), first, lane=lane), "hw.ev.A.label")


def test_a_label_outside_of_its_familys_task_is_quarantined_and_its_neighbours_are_not(intake):
    commit = intake.commit([labels(1.0, 2.0, 0.0)])
    assert account(intake, ("A", 7, "label")) == (3, 2, 1, {})
    assert commit.counters["quarantined_bad_label"] == 1


def test_early_and_mature_form_of_an_example_lie_in_batches_once_each_through_restarts(tmp_path):
    rules = {"policy": "weighted", "early_s": 10.0}
    first = opened(tmp_path, **rules)
    scored = [Scored("r1", "stable", [0.5])]
    asked = [
        record(PredictionRecord("fam", "k", 1.0 + at, {}, "spec", b"", 1.0, scored))
        for at in range(10)
    ]
    first.commit([incoming(envelope(asked)), labels(*[1.0] * 10)])
    first.commit([incoming(envelope([seen(8.0)], 11)), labels(1.0, first=11, time_s=8.0)])
    first.abandon()
    second = opened(tmp_path, **rules)
    second.commit([incoming(envelope([seen(500.0)], 12)), labels(1.0, first=12, time_s=500.0)])
    batches = list(second.batches_after("fam", 0))
    forms = [each.form for batch in batches for each in batch.examples]
    assert len(forms) == len(set(forms)) == 20
    assert [sum(each.early for each in batch.examples) for batch in batches] == [10, 0]
    second.commit([], flush=True)
    rows = second.query("SELECT early, count(*) FROM examples GROUP BY early ORDER BY early")
    assert rows == [(False, 10), (True, 10)]
    second.close()

"""Several families in one intake: each comes out as if it were alone; lanes hold all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_learner.ingest.guard import Batcher
from cloud_learner.ingest.intake import Intake, Strand
from cloud_learner.ingest.joiner import ANSWERS_OF_PORTION, Rules
from cloud_learner.ingest.opening import Incoming
from cloud_learner.store.archive import Archive
from cloud_learner.store.examples import Batch, Example
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.raw import RawLog
from cloud_learner.store.rocks import Rocks, Table
from edge_runtime.clock import ManualClock
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

SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))]
START_S = {"now": 2e9, "past": 1e6}
WINDOW_S = {"now": 20.0, "past": 50.0}
COUNTED = ("examples", "expired", "pending", "labels_joined", "labels_waiting", "unbatched")


def opened(home: Path, *families: str) -> Intake:
    strands = [
        Strand(Rules(family=name, label_window_s=WINDOW_S[name], idle_s=60.0), Batcher(10, 10))
        for name in families
    ]
    db, raw, archive = IngestDb(home / "db", families), RawLog(home / "raw"), Archive(home / "a")
    return Intake(db, raw, archive, strands, clock=ManualClock(), indices={})


def life(device: str, chance: random.Random) -> list[Incoming]:
    """Envelopes of a device: records of both families anyhow beside each other, and labels."""
    base = {"event": 1, "label": 1}
    at_s = dict(START_S)
    sent: list[Incoming] = []

    def send(event_class: str, records: list[Any]) -> None:
        raws = [msgspec.Raw(codec.encode(record)) for record in records]
        whole = Envelope(WIRE_VERSION, device, 3, event_class, base[event_class], raws)  # type: ignore[arg-type]
        base[event_class] += len(raws)
        sent.append(Incoming(f"hw.ev.{device}.{event_class}", codec.encode(whole), 0.0, len(sent)))

    for _ in range(40):
        events: list[Any] = []
        labels: list[Any] = []
        for _ in range(chance.randrange(1, 7)):
            name = chance.choice(["now", "past"])
            at_s[name] += chance.choice([1.0, 3.0])
            scored = [Scored("r1", "stable", [0.5])]
            asked = PredictionRecord(name, "k", at_s[name], {}, name, b"", 1.0, scored)
            if chance.random() < 0.7:
                seq = base["event"] + len(events)
                labels.append(LabelRecord(name, 3, seq, 1.0, at_s[name] + 5.0))
            events.append(asked)
        order = [("event", events), ("label", labels)]
        for event_class, records in chance.sample(order, 2):
            if records:
                send(event_class, records)
    for name in START_S:
        at_s[name] += 1000.0
    send("event", [ObservationRecord(name, "o", time_s, {}) for name, time_s in at_s.items()])
    send("label", [LabelRecord(name, 3, 10**6, 0.0, time_s) for name, time_s in at_s.items()])
    return sent


def played(
    home: Path, messages: Sequence[Incoming], families: Sequence[str], chance: random.Random
) -> dict[str, tuple[list[Example], list[Batch], float, dict[str, int]]]:
    """What comes out for each family, over restarts now and then."""
    intake, examples = opened(home, *families), {name: [] for name in families}
    left = list(messages)
    while left:
        count = chance.randrange(1, 9)
        commit = intake.commit(left[:count], flush=chance.random() < 0.1)
        del left[:count]
        for name, released in commit.families.items():
            examples[name] += released.examples
        if chance.random() < 0.1:
            intake.close() if chance.random() < 0.5 else intake.abandon()
            intake = opened(home, *families)
    found = {}
    for name in families:
        counters = commit.families[name].counters
        found[name] = (
            examples[name],
            list(intake.batches_after(name, 0)),
            intake.clock_s(name),
            {each: counters.get(each, 0) for each in COUNTED},
        )
    intake.close()
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_what_comes_out_for_a_family_is_what_comes_out_when_it_is_alone(tmp_path, seed):
    chance = random.Random(seed)
    lives = [life("A", chance), life("B", chance)]
    messages = []
    while any(lives):
        messages.append(chance.choice([each for each in lives if each]).pop(0))

    both = played(tmp_path / "both", messages, ["now", "past"], chance)

    assert both == {
        name: played(tmp_path / name, messages, [name], chance)[name] for name in ("now", "past")
    }
    assert all(len(examples) > 50 for examples, *_ in both.values())


def test_a_commit_hands_out_the_newest_answers_of_each_envelope_by_family(tmp_path):
    def asked(name, at):
        scored = [Scored("r1", "stable", [at / 100]), Scored("r2", "canary", [0.0])]
        return PredictionRecord(name, "k", START_S[name] + at, {}, name, b"", 1.0, scored)

    def sent(first, records):
        raws = [msgspec.Raw(codec.encode(record)) for record in records]
        whole = Envelope(WIRE_VERSION, "A", 3, "event", first, raws)
        return Incoming("hw.ev.A.event", codec.encode(whole), 0.0, first)

    intake = opened(tmp_path, "now", "past")
    first = sent(1, [asked("now", at) for at in range(2 * ANSWERS_OF_PORTION)] + [asked("past", 7)])
    both = intake.commit([first, sent(2 * ANSWERS_OF_PORTION + 2, [asked("now", 99)])])
    after = intake.commit([])
    intake.close()

    newest = range(ANSWERS_OF_PORTION, 2 * ANSWERS_OF_PORTION)
    assert both.families["now"].answers == [(at / 100,) for at in (*newest, 99)]
    assert both.families["past"].answers == [(0.07,)]
    assert [each.answers for each in after.families.values()] == [[], []]


def test_an_account_counts_the_records_of_all_families(tmp_path):
    chance = random.Random(1)
    messages = life("A", chance)
    intake = opened(tmp_path, "now", "past")
    commits = [intake.commit(messages[at : at + 20]) for at in range(0, len(messages), 20)]
    alone = opened(tmp_path / "alone", "now")
    counted = alone.commit(messages).counters

    assert commits[-1].totals["archived"] == sum(commit.records for commit in commits)
    assert "other_family" not in commits[-1].counters
    said = [
        codec.decode_record(bytes(raw))
        for message in messages
        for raw in codec.decode_envelope(message.data).records
    ]
    strange = [r for r in said if r.family == "past" and not isinstance(r, ObservationRecord)]
    assert commits[-1].counters["examples"] == sum(
        released.counters["examples"] for released in commits[-1].families.values()
    )
    assert counted["other_family"] == len(strange) > 0
    assert alone.accounting.totals() == intake.accounting.totals()
    intake.close()
    alone.close()


def test_a_lane_of_many_strange_families_keeps_no_name_of_theirs(tmp_path):
    intake = opened(tmp_path, "now")
    records = [ObservationRecord(f"made up {at}", "o", 1.0, {}) for at in range(50)]
    raws = [msgspec.Raw(codec.encode(record)) for record in records]
    whole = codec.encode(Envelope(WIRE_VERSION, "A", 3, "event", 1, raws))
    intake.commit([Incoming("hw.ev.A.event", whole, 0.0, None)])

    assert intake.accounting.accounts["A", 3, "event"].newest_s == {}
    intake.close()


def test_a_family_that_is_added_later_is_counted_from_its_first_record(tmp_path):
    first = opened(tmp_path, "now")
    messages = life("A", random.Random(2))
    half = len(messages) // 2
    first.commit(messages[:half])
    held = first.accounting.totals()["held"]
    first.close()

    both = opened(tmp_path, "now", "past")
    assert both.accounting.totals()["held"] == held
    commit = both.commit(messages[half:])
    assert commit.families["past"].counters["examples"] > 0
    both.close()


def test_what_was_taken_in_for_a_family_is_not_left_behind(tmp_path):
    opened(tmp_path, "now", "past").close()

    with pytest.raises(ConfigError, match="past") as caught:
        IngestDb(tmp_path / "db", ["now"])

    assert caught.value.code == "family_gone"
    opened(tmp_path, "now", "past").close()
    assert IngestDb(tmp_path / "db").families == ["now", "past"]


def test_a_database_that_knew_one_family_is_refused_and_left_as_it_is(tmp_path):
    Rocks(tmp_path / "db", {"meta": Table(), "rows": Table()}, damaged="x").close()
    before = {path.name for path in (tmp_path / "db").glob("*.sst")}

    with pytest.raises(ConfigError) as caught:
        IngestDb(tmp_path / "db", ["now"])

    assert caught.value.code == "bad_version"
    assert {path.name for path in (tmp_path / "db").glob("*.sst")} == before

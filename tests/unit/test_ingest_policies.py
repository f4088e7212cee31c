"""Label policies: what is released, when and with which weight follows from event time alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_learner.ingest.early import EARLY_OF_ONE_MAX
from cloud_learner.ingest.joiner import Joiner, Portion, Rules
from cloud_learner.ingest.shares import MEMORY, Shares
from cloud_learner.stats.tasks import Task
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.ingest_state import Account, Lane
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    Mark,
    ObservationRecord,
    PredictionRecord,
    Record,
    Scored,
)

WINDOW_S, EARLY_S, END_S = 100.0, 10.0, 2000.0
NOBODY = 10**6


class Item(NamedTuple):
    """A record and its lane."""

    lane: Lane
    record: Record


def predict(time_s, device="A"):
    scored = [Scored("r1", "stable", [0.5])]
    record = PredictionRecord("fam", "k", time_s, {}, "spec", b"", 1.0, scored)
    return Item((device, 1, "event"), record)


def label(seq, time_s, value=1.0, device="A", *, final=True):
    return Item((device, 1, "label"), LabelRecord("fam", 1, seq, value, time_s, final))


def beat(time_s, device="A"):
    """Nothing but time passes for the device."""
    seen = ObservationRecord("fam", "o", time_s, {})
    return [Item((device, 1, "event"), seen), label(NOBODY, time_s, device=device)]


class Stage:
    """A joiner over a database of its own, to which records come in lanes."""

    def __init__(self, folder: Path, at_once: int = 10**6, **rules) -> None:
        self.rules = Rules(family="fam", label_window_s=WINDOW_S, idle_s=5.0, **rules)
        self.db, self.at_once = IngestDb(folder / "db", ["fam"]), at_once
        self.accounts: dict[Lane, Account] = {}
        self.counts: Counter[str] = Counter()
        self.examples: list = []
        self.amended: list = []
        self.joiner = self.made(float("-inf"))

    def made(self, clock_s):
        return Joiner(self.rules, self.db, self.accounts, clock_s, 0.0, at_once=self.at_once)

    def restart(self):
        self.counts += self.joiner.counters
        self.joiner = self.made(self.joiner.clock_s)

    def commit(self, *items):
        """Returns what was released, as (time, label, weight)."""
        lanes: dict[Lane, list[Record]] = {}
        for lane, record in items:
            lanes.setdefault(lane, []).append(record)
        change = self.db.begin()
        portions = [self.portion(*each) for each in lanes.items()]
        self.joiner.join(portions, lanes, change, 0.0)
        released = self.joiner.settle(0.0, 0.0)
        self.db.commit(change, self.db.meta(), {})
        self.examples += released
        self.amended += self.joiner.amended
        rest = self.commit() if self.joiner.is_behind else []
        return [(each.time_s, each.label, each.weight) for each in released] + rest

    def portion(self, lane, records):
        account = self.accounts.setdefault(lane, Account())
        first, account.seq = account.seq + 1, account.seq + len(records)
        newest_s = max(record.time_s for record in records)
        account.newest_s["fam"] = max(account.newest_s.get("fam", newest_s), newest_s)
        raws = [msgspec.Raw(codec.encode(record)) for record in records]
        envelope = codec.encode(Envelope(WIRE_VERSION, *lane, first, raws))
        return Portion(lane, first, records, envelope, 7.0)

    def count(self, name):
        return self.counts[name] + self.joiner.counters[name]


@contextlib.contextmanager
def staged(**rules):
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), **rules)
        yield stage
        stage.db.close()


@pytest.fixture
def arrival():
    with staged(policy="arrival", amend_s=50.0) as stage:
        yield stage


@pytest.fixture
def weighted():
    with staged(policy="weighted", early_s=EARLY_S, amend_s=50.0) as stage:
        yield stage


def test_on_arrival_an_example_is_released_when_the_clock_has_passed_its_label(arrival):
    assert arrival.commit(predict(10.0), label(1, 20.0), *beat(20.0)) == []  # that second goes on
    assert arrival.commit(*beat(20.5)) == [(10.0, 1.0, 1.0)]
    assert arrival.commit(*beat(500.0)) == []
    assert (arrival.count("pending"), arrival.count("examples")) == (0, 1)


def test_on_arrival_examples_leave_in_the_order_of_their_labels(arrival):
    arrival.commit(predict(10.0), predict(11.0), predict(12.0))
    arrival.commit(label(2, 13.0), label(3, 50.0), label(1, 50.0))
    released = arrival.commit(*beat(60.0))
    assert [time_s for time_s, *_ in released] == [11.0, 10.0, 12.0]


def test_on_arrival_a_later_label_amends_what_the_first_one_brought_out(arrival):
    arrival.commit(predict(10.0), label(1, 20.0, 0.0, final=False), label(1, 30.0, 1.0))
    assert arrival.commit(*beat(25.0)) == [(10.0, 0.0, 1.0)]
    assert arrival.amended == []
    arrival.commit(*beat(31.0))
    assert [(each.label, each.revision) for each in arrival.amended] == [(1.0, 1)]


def test_on_arrival_what_has_no_label_is_out_when_its_window_is_over():
    with staged(policy="arrival", expiry="negative") as stage:
        assert stage.commit(predict(10.0), *beat(110.0)) == []
        assert stage.commit(*beat(110.5)) == [(10.0, 0.0, 1.0)]
        (example,) = stage.examples
        assert (example.label_time_s - example.time_s, example.final) == (WINDOW_S, False)


def test_on_arrival_what_the_bootstrap_learned_is_not_handed_out():
    with staged(policy="arrival", learn_from_s=15.0) as stage:
        stage.commit(predict(14.0), predict(16.0), label(1, 17.0), label(2, 18.0))
        assert stage.commit(*beat(50.0)) == [(16.0, 1.0, 1.0)]
        assert [each.time_s for each in stage.joiner.for_files_only] == [14.0]


def test_an_early_label_brings_out_an_early_example_and_later_the_mature_one(weighted):
    weighted.commit(predict(10.0), label(1, 20.0), *beat(20.0))
    assert weighted.examples == []
    weighted.commit(*beat(20.5))
    assert [(each.early, each.label_time_s) for each in weighted.examples] == [(True, 20.0)]
    assert (weighted.count("pending"), weighted.count("examples_early")) == (1, 1)
    weighted.restart()
    weighted.commit(*beat(110.5))
    assert [each.early for each in weighted.examples] == [True, False]
    assert len({each.form for each in weighted.examples}) == 2
    assert (weighted.count("pending"), weighted.count("examples")) == (0, 1)


@pytest.mark.parametrize(("delay_s", "forms"), [(EARLY_S, 2), (EARLY_S + 0.5, 1)])
def test_a_label_is_early_only_within_the_time_that_the_family_says(weighted, delay_s, forms):
    weighted.commit(predict(10.0), label(1, 10.0 + delay_s), *beat(500.0))
    assert [each.early for each in weighted.examples] == [True, False][-forms:]


def test_an_early_example_is_weighed_by_how_rarely_its_outcome_comes_early(weighted):
    items = [predict(float(at)) for at in range(8)]
    # Of the outcome 1 one label in four comes early, of the outcome 0 each one does.
    items += [label(at + 1, at + (5.0 if at == 0 else 50.0), 1.0) for at in range(4)]
    items += [label(at + 1, at + 5.0, 0.0) for at in range(4, 8)]
    weighted.commit(*items, *beat(300.0))
    assert [each.weight for each in weighted.examples if each.early] == [1.0] * 5  # nothing known
    weighted.restart()
    weighted.commit(predict(301.0), predict(302.0), label(10, 303.0, 1.0), label(11, 304.0, 0.0))
    assert weighted.commit(*beat(310.0)) == [(301.0, 1.0, 5 / 2), (302.0, 0.0, 1.0)]
    assert {each.weight for each in weighted.examples if not each.early} == {1.0}


def test_what_matures_at_the_same_time_weighs_only_what_goes_out_after_it(weighted):
    asked = [predict(0.0), predict(95.0), predict(101.0)]
    said = [label(1, 50.0), label(2, 99.0), label(3, 103.0)]
    released = weighted.commit(*asked, *said, *beat(150.0))
    assert released == [(95.0, 1.0, 1.0), (0.0, 1.0, 1.0), (101.0, 1.0, 2.0)]


def test_an_outcome_that_changed_by_maturity_is_counted_and_the_memory_gets_the_true_one(weighted):
    weighted.commit(predict(10.0), label(1, 12.0, 1.0, final=False), label(1, 60.0, 0.0))
    assert weighted.commit(*beat(30.0)) == [(10.0, 1.0, 1.0)]
    assert weighted.commit(*beat(200.0)) == [(10.0, 0.0, 1.0)]
    assert (weighted.count("early_corrected"), weighted.count("examples")) == (1, 1)
    assert weighted.amended == []


def test_a_weighted_example_is_amended_after_its_window_as_any_other(weighted):
    weighted.commit(predict(10.0), label(1, 12.0), label(1, 130.0, 0.0), *beat(200.0))
    assert [(each.early, each.label) for each in weighted.examples] == [(True, 1.0), (False, 1.0)]
    assert [(each.label, each.revision, each.early) for each in weighted.amended] == [
        (0.0, 1, False)
    ]


def test_nothing_goes_out_early_once_it_has_matured(weighted):
    weighted.commit(*beat(0.0), *beat(0.0, "B"))
    weighted.joiner.clock.hear("A", "event", 1000.0, 50.0)
    weighted.joiner.clock.advance(50.0)  # B was silent for long, and A went on without it
    weighted.commit(predict(10.0, "B"))
    weighted.commit(label(2, 12.0, device="B"))
    assert [each.early for each in weighted.examples] == [False]


def test_weights_are_bounded_follow_change_and_are_one_where_there_are_no_outcomes():
    shares = Shares(Task(), weight_max=4.0)
    for _ in range(100):
        shares.count(1.0, is_early=False)
    assert (shares.weight(1.0), shares.weight(0.9), shares.weight(0.0)) == (4.0, 4.0, 1.0)
    for _ in range(int(2 * MEMORY)):
        shares.count(1.0, is_early=True)
    again = Shares(Task(), 4.0, shares.packed())
    assert again.weight(1.0) == shares.weight(1.0) == pytest.approx(1.0, abs=0.01)
    for task in (Task(kind="regression"), Task(kind="ranking", group="g")):
        shares = Shares(task, weight_max=4.0)
        shares.count(1.0, is_early=False)
        assert shares.weight(1.0) == 1.0
    classes = Shares(Task(kind="multiclass", classes=3), weight_max=9.0)
    classes.count(2.0, is_early=False)
    assert [classes.weight(value) for value in (1.0, 2.0, 7.0)] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("policy", ["mature", "arrival", "weighted"])
def test_final_labels_that_contradict_are_counted_and_the_newest_wins(policy):
    with staged(policy=policy, amend_s=50.0) as stage:
        stage.commit(predict(10.0), label(1, 30.0, 0.0), label(1, 40.0, 1.0), *beat(60.0))
        stage.commit(label(1, 60.0, 1.0, final=False), *beat(300.0))
        assert stage.count("labels_contradicting") == 1
        assert (stage.examples + stage.amended)[-1].label == 1.0


@pytest.mark.parametrize("policy", ["mature", "arrival", "weighted"])
def test_a_device_whose_time_runs_backwards_loses_nothing(policy):
    with staged(policy=policy, early_s=EARLY_S) as stage:
        stage.commit(*beat(1000.0))
        stage.commit(*[label(at + 2, 905.0 - at) for at in range(5)])  # labels travel first
        stage.commit(*[predict(900.0 - at) for at in range(5)])
        stage.commit(predict(1001.0), label(7, 1002.0), *beat(1500.0))
        mature = [each for each in stage.examples if not each.early]
        assert Counter(each.time_s for each in mature) == Counter(
            [1001.0] + [900.0 - at for at in range(5)]
        )
        assert stage.count("pending") == 0


@pytest.mark.parametrize("policy", ["mature", "arrival", "weighted"])
def test_a_day_on_which_nothing_happens_is_passed_over(policy):
    with staged(policy=policy, early_s=EARLY_S) as stage:
        stage.commit(predict(10.0), label(1, 12.0), *beat(13.0))
        stage.commit()
        stage.commit(predict(100_000.0), *beat(100_001.0))
        assert [each.early for each in stage.examples] == {
            "mature": [False],
            "arrival": [False],
            "weighted": [True, False],
        }[policy]


def test_a_label_for_what_expired_is_late_under_every_policy():
    for policy in ("mature", "arrival", "weighted"):
        with staged(policy=policy, amend_s=50.0) as stage:
            stage.commit(predict(10.0), *beat(200.0))
            stage.commit(label(1, 50.0), *beat(210.0))
            assert (stage.count("expired"), stage.count("labels_late")) == (1, 1), policy
            assert stage.examples == []


def test_of_many_labels_that_overtook_their_prediction_the_first_and_what_stands_are_kept(weighted):
    said = [label(1, 11.0 + at, 1.0, final=False) for at in range(2 * EARLY_OF_ONE_MAX)]
    weighted.commit(label(1, 10.0, 0.0, final=False), *said, label(1, 99.0, 0.0))
    weighted.restart()
    weighted.commit(predict(10.0), *beat(200.0))
    assert [(each.early, each.label_time_s) for each in weighted.examples] == [
        (True, 10.0),
        (False, 99.0),
    ]
    assert weighted.joiner.waiting()["labels_waiting"] == 1  # of the beat, which speaks of nothing


@pytest.mark.parametrize("is_told", [True, False])
def test_predictions_wait_for_labels_that_their_device_says_are_under_way(is_told):
    with staged() as stage:
        stage.commit(*beat(0.0))
        stage.accounts["A", 1, "label"].durable = 2 if is_told else 0
        stage.joiner.hear("A", [Mark(1, "label", 2)], 0.0)
        for at in range(1, 30):  # a backlog drains: the events come, a label is held up
            stage.commit(predict(10.0 * at))
        stage.restart()
        stage.commit(label(2, 15.0), *beat(1000.0))
        assert stage.count("labels_late") == (0 if is_told else 1)
        assert [each.time_s for each in stage.examples] == ([10.0] if is_told else [])


delays = st.sampled_from([0.0, 1.0, 10.0, 50.0, 99.0, 100.0, 101.0, 149.0, 151.0])
labels_of_one = st.lists(st.tuples(delays, st.integers(0, 1), st.booleans()), max_size=3)
histories = st.fixed_dictionaries(
    {device: st.lists(labels_of_one, min_size=1, max_size=8) for device in "AB"}
)


def lanes_of(history):
    """A prediction every 7 s on each device, and its labels as they happen."""
    lanes = {}
    for device, predictions in history.items():
        asked = [predict(7.0 * at, device) for at in range(len(predictions))]
        said = [
            label(at + 1, 7.0 * at + delay_s, float(value), device, final=final)
            for at, labels in enumerate(predictions)
            for delay_s, value, final in labels
        ]
        said.sort(key=lambda item: item.record.time_s)
        end = beat(END_S, device)
        lanes[device, "event"] = [*asked, end[0]]
        lanes[device, "label"] = [*said, end[1]]
    return lanes


def may_come(lanes, device, event_class):
    """Events are ahead of the labels that are still to come by a window at most."""
    queue, labels = lanes[device, event_class], lanes[device, "label"]
    if not queue:
        return False
    ahead_s = queue[0].record.time_s - labels[0].record.time_s if labels else 0.0
    return event_class == "label" or ahead_s <= WINDOW_S


def played(stage, history, choose):
    """Hand over the lanes in an order and in portions that `choose` picks; now and then restart."""
    lanes = lanes_of(history)
    portion: list[Item] = []
    while open_lanes := [lane for lane in lanes if may_come(lanes, *lane)]:
        portion.append(lanes[open_lanes[choose(len(open_lanes))]].pop(0))
        if choose(3) == 0:
            stage.commit(*portion)
            portion = []
            if choose(6) == 0:
                stage.restart()
    stage.commit(*portion)


def expected(history, policy):
    """What must come out, in order, worked out from the whole history at once."""
    found = []
    for device, predictions in history.items():
        for at, labels in enumerate(predictions):
            time_s, place = 7.0 * at, (7.0 * at, device, at + 1)
            said = sorted(labels, key=lambda each: each[0])
            said = [each for each in said if each[0] <= WINDOW_S]
            if not said:
                continue
            first, best = said[0], max(said, key=lambda each: (each[2], each[0], said.index(each)))
            best = [each for each in said if (each[2], each[0]) == (best[2], best[0])][-1]
            if policy == "arrival":
                found.append((time_s + first[0], *place, False, first))
                continue
            if policy == "weighted" and first[0] <= EARLY_S:
                found.append((time_s + first[0], *place, True, first))
            found.append((time_s + WINDOW_S, *place, False, best))
    found.sort(key=lambda each: each[:4])
    shares = Shares(Task(), 10.0)
    rows = []
    for _, time_s, device, seq, early, (delay_s, value, _) in found:
        weight = shares.weight(value) if early else 1.0
        rows.append((time_s, device, seq, early, time_s + delay_s, float(value), weight))
        if policy == "weighted" and not early:
            shares.count(value, is_early=delay_s <= EARLY_S)
    return rows


def plain(each):
    early, weight = each.early, each.weight
    return (each.time_s, each.device, each.seq, early, each.label_time_s, each.label, weight)


@pytest.mark.parametrize("policy", ["mature", "arrival", "weighted"])
@settings(max_examples=15)
@given(data=st.data(), history=histories)
def test_the_same_records_in_any_portions_give_the_same_examples(policy, data, history):
    rules = {"policy": policy, "amend_s": 50.0, "early_s": EARLY_S, "awaited": ("A", "B")}
    outcomes = []
    for at_once in (10**6, data.draw(st.sampled_from([1, 3]))):
        with staged(**rules, at_once=at_once) as stage:
            played(stage, history, lambda count: data.draw(st.integers(0, count - 1)))
            assert [plain(each) for each in stage.examples] == expected(history, policy)
            assert stage.count("released_out_of_order") == stage.count("pending") == 0
            stage.amended.sort(key=lambda each: (*each.id, each.revision))
            outcomes.append([(*plain(each), each.revision) for each in stage.amended])
    assert outcomes[0] == outcomes[1]

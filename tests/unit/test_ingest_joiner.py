"""The joiner: each prediction settles once, and only what happened decides how."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from cloud_learner.ingest.joiner import Joiner, Portion, Rules
from cloud_learner.store.ingest_db import IngestDb
from cloud_learner.store.ingest_state import Account, Lane
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Envelope,
    LabelRecord,
    ObservationRecord,
    PredictionRecord,
    Record,
    Scored,
)

WINDOW_S, IDLE_S = 100.0, 5.0


class Item(NamedTuple):
    """A record and its place."""

    lane: Lane
    seq: int
    record: Record


class Records:
    """Numbers records as the log of a device does."""

    def __init__(self) -> None:
        self.seqs: dict = {}

    def seq(self, device, event_class):
        lane = (device, 1, event_class)
        self.seqs[lane] = self.seqs.get(lane, 0) + 1
        return self.seqs[lane]

    def predict(self, time_s, device="A", family="fam"):
        scored = [Scored("r1", "stable", [0.5])]
        record = PredictionRecord(family, "k", time_s, {}, "spec", b"", 1.0, scored)
        return Item((device, 1, "event"), self.seq(device, "event"), record)

    def observe(self, time_s, device="A"):
        record = ObservationRecord("fam", "o", time_s, {})
        return Item((device, 1, "event"), self.seq(device, "event"), record)

    def label(self, seq, time_s, value=1.0, *, device="A", final=True, family="fam"):
        record = LabelRecord(family, 1, seq, value, time_s, final)
        return Item((device, 1, "label"), self.seq(device, "label"), record)


class World(Records):
    """A joiner over a database of its own."""

    def __init__(self, folder: Path, at_once: int = 10**6, **options) -> None:
        super().__init__()
        self.at_once = at_once
        self.db = IngestDb(folder / "db", ["fam"])
        self.rules = Rules(family="fam", label_window_s=WINDOW_S, idle_s=IDLE_S, **options)
        self.accounts: dict = {}
        self.now_s = 0.0
        self.examples: list = []
        self.base: dict = {}
        self.joiner = self.made(float("-inf"))

    def made(self, clock_s):
        rules, db, accounts = self.rules, self.db, self.accounts
        return Joiner(rules, db, accounts, clock_s, self.now_s, at_once=self.at_once)

    def restart(self):
        self.base = self.counters()
        self.joiner = self.made(self.joiner.clock_s)

    def commit(self, *items):
        lanes: dict = {}
        for lane, seq, record in items:
            lanes.setdefault(lane, []).append((seq, record))
        portions = [self.portion(lane, *zip(*rows, strict=True)) for lane, rows in lanes.items()]
        change = self.db.begin()
        self.joiner.join(portions, lanes, change, self.now_s)
        released = self.joiner.settle(1000.0 + self.now_s, self.now_s)
        self.db.commit(change, self.db.meta(), {})
        self.examples += released
        rest = self.commit() if self.joiner.is_behind else []
        return [(each.device, each.seq, each.label) for each in released] + rest

    def portion(self, lane, seqs, records):
        assert list(seqs) == list(range(seqs[0], seqs[0] + len(seqs)))
        account = self.accounts.setdefault(lane, Account())
        account.seq = seqs[-1]
        newest_s = max(record.time_s for record in records)
        account.newest_s["fam"] = max(account.newest_s.get("fam", newest_s), newest_s)
        raws = [msgspec.Raw(codec.encode(record)) for record in records]
        envelope = codec.encode(Envelope(WIRE_VERSION, *lane, seqs[0], raws))
        return Portion(lane, seqs[0], records, envelope, 7.0)

    def counters(self):
        names = {*self.base, *self.joiner.counters}
        return {n: self.base.get(n, 0) + self.joiner.counters[n] for n in names}

    def quiet(self):
        """Let the labels, of which there are none, hold nobody any longer."""
        self.now_s += IDLE_S

    def count(self, name):
        return {**self.counters(), **self.joiner.waiting()}.get(name, 0)


@pytest.fixture(name="new_world")
def fixture_new_world(tmp_path):
    worlds = []

    def make(**options):
        worlds.append(World(tmp_path / str(len(worlds)), **options))
        return worlds[-1]

    yield make
    for each in worlds:
        each.db.close()


def test_a_labelled_prediction_is_released_only_when_its_window_is_over(new_world):
    world = new_world()
    assert world.commit(world.predict(10.0), world.label(1, 20.0)) == []
    assert world.commit(world.observe(110.0), world.label(9, 110.0)) == []  # that second goes on
    assert world.commit(world.observe(110.5), world.label(9, 110.5)) == [("A", 1, 1.0)]
    assert world.commit(world.observe(500.0), world.label(9, 500.0)) == []


def test_an_example_carries_what_was_logged_and_when_it_came(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.label(1, 20.0, 0.25))
    world.commit(world.observe(200.0), world.label(9, 200.0))
    (example,) = world.examples
    assert example.id == ("A", 1, 1)
    assert (example.time_s, example.label_time_s, example.label) == (10.0, 20.0, 0.25)
    assert (example.arrived_s, example.matured_s) == (7.0, 1000.0)
    assert example.scored == [Scored("r1", "stable", [0.5])]


def test_a_prediction_without_a_label_expires(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.label(9, 10.0))
    assert world.commit(world.observe(111.0), world.label(9, 111.0)) == []
    assert (world.count("expired"), world.count("pending")) == (1, 0)


@pytest.mark.parametrize(("time_s", "joined"), [(110.0, 1), (110.1, 0)])
def test_a_label_counts_only_when_it_happened_within_the_window(new_world, time_s, joined):
    world = new_world()
    world.commit(world.predict(10.0), world.label(1, time_s))
    assert (world.count("labels_joined"), world.count("labels_late")) == (joined, 1 - joined)


def test_a_label_for_what_has_expired_is_late(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.label(9, 10.0), world.observe(10.0))
    world.commit(world.observe(300.0), world.label(9, 300.0))
    world.commit(world.label(1, 50.0))
    assert (world.count("expired"), world.count("labels_late")) == (1, 1)


def test_a_label_for_what_was_released_changes_nothing_and_is_counted(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.label(1, 20.0))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == [("A", 1, 1.0)]
    assert world.commit(world.label(1, 50.0, 0.0), world.observe(900.0)) == []
    assert world.count("labels_after_release") == 1


def test_a_label_for_no_prediction_is_unknown(new_world):
    world = new_world()
    world.commit(world.observe(10.0), world.label(1, 10.0))
    assert world.count("labels_unknown") == 1


def test_a_final_label_beats_provisional_ones_and_the_newest_of_equals_wins(new_world):
    world = new_world()
    world.commit(
        world.predict(10.0),
        world.label(1, 20.0, 0.1, final=False),
        world.label(1, 30.0, 0.2, final=False),
        world.label(1, 40.0, 0.3),
        world.label(1, 50.0, 0.4, final=False),
    )
    assert world.commit(world.observe(200.0), world.label(9, 200.0)) == [("A", 1, 0.3)]
    assert (world.count("labels_provisional"), world.count("labels_joined")) == (3, 1)
    assert world.count("labels_replaced") == 2


def test_a_provisional_label_alone_is_learned_when_the_window_is_over(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.label(1, 20.0, 0.1, final=False))
    assert world.commit(world.observe(200.0), world.label(9, 200.0)) == [("A", 1, 0.1)]


def test_a_label_that_comes_before_its_prediction_waits_for_it(new_world):
    world = new_world()
    world.commit(world.label(1, 20.0))
    assert world.count("labels_waiting") == 1
    world.commit(world.predict(10.0))
    assert (world.count("labels_joined"), world.count("labels_waiting")) == (1, 0)


def test_an_early_label_whose_number_is_no_prediction_is_given_up(new_world):
    world = new_world()
    world.commit(world.label(1, 20.0))
    world.commit(world.observe(10.0))
    assert (world.count("labels_unknown"), world.count("labels_waiting")) == (1, 0)


def test_what_the_bootstrap_learned_is_joined_but_not_handed_out(new_world):
    world = new_world(learn_from_s=15.0)
    world.commit(world.predict(14.9), world.label(1, 20.0))
    world.commit(world.predict(15.0), world.label(2, 21.0))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == [("A", 2, 1.0)]
    assert (world.count("covered_by_bootstrap"), world.count("examples")) == (1, 1)


def test_other_families_are_left_alone(new_world):
    world = new_world()
    world.commit(world.predict(10.0, family="other"), world.label(1, 20.0, family="other"))
    assert (world.count("pending"), world.count("labels_early")) == (0, 0)
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == []
    assert world.count("pending") == 0


def test_a_device_that_lags_holds_the_others_until_it_is_silent_for_too_long(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.label(1, 20.0), world.observe(10.0, "B"))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == []
    world.quiet()
    assert world.commit(world.observe(301.0), world.label(9, 301.0)) == [("A", 1, 1.0)]


def test_a_device_that_is_awaited_holds_the_others_before_it_was_heard(new_world):
    world = new_world(awaited=("A", "B"))
    world.commit(world.predict(10.0), world.label(1, 20.0))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == []
    assert world.commit(world.observe(200.0, "B"), world.label(9, 200.0, device="B")) == [
        ("A", 1, 1.0)
    ]


def test_labels_that_lag_hold_their_device_for_at_most_one_window(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.label(9, 10.0))
    world.commit(world.observe(210.0))  # the label of the prediction may still be on its way
    assert world.count("expired") == 0
    world.commit(world.observe(210.5))
    assert world.count("expired") == 1


def test_a_device_whose_first_labels_are_on_their_way_is_held_as_well(new_world):
    world = new_world()
    world.commit(world.predict(10.0), world.observe(210.0))
    assert (world.count("expired"), world.joiner.clock.now_s) == (0, 110.0)


def test_a_family_without_labels_on_the_way_is_not_held_for_long(new_world):
    world = new_world()
    world.commit(world.predict(10.0))
    world.quiet()
    world.commit(world.observe(110.5))
    assert world.count("expired") == 1


def test_a_device_that_comes_back_behind_the_clock_gets_its_labels_joined(new_world):
    world = new_world()
    world.commit(world.observe(0.0, "B"), world.observe(0.0))
    world.quiet()
    world.commit(world.observe(1000.0), world.label(9, 1000.0))  # B is silent: the clock passes it
    assert world.joiner.clock.now_s == 1000.0
    assert world.commit(world.predict(10.0, "B")) == []  # far behind, and its label is to come
    assert world.commit(world.label(2, 20.0, device="B")) == [("B", 2, 1.0)]
    world.commit(world.predict(900.0, "B"), world.label(9, 900.0, device="B"))
    assert world.joiner.clock.now_s == 1000.0


def test_what_waited_for_its_device_leaves_in_order_with_what_comes_late(new_world):
    world = new_world()
    world.commit(world.observe(0.0, "B"), world.observe(0.0))
    world.quiet()
    world.commit(world.observe(1000.0), world.label(9, 1000.0))
    world.commit(world.predict(20.0, "B"))  # mature, and waits for its label
    released = world.commit(
        world.predict(10.0, "B"),
        world.label(2, 30.0, 0.2, device="B"),
        world.label(3, 30.0, 0.3, device="B"),
    )
    assert released == [("B", 3, 0.3), ("B", 2, 0.2)]


def test_examples_that_mature_together_leave_in_order_of_time_device_and_number(new_world):
    world = new_world()
    world.commit(
        world.predict(12.0, "B"),
        world.predict(12.0, "A"),
        world.predict(12.0, "A"),
        world.predict(11.0, "B"),
        world.label(1, 13.0),
        world.label(2, 13.0),
        world.label(1, 13.0, device="B"),
        world.label(2, 13.0, device="B"),
    )
    last = [world.observe(500.0, d) for d in "AB"] + [world.label(9, 500.0, device=d) for d in "AB"]
    assert [row[:2] for row in world.commit(*last)] == [("B", 2), ("A", 1), ("A", 2), ("B", 1)]


def test_what_matures_all_at_once_is_settled_bit_by_bit_in_order(new_world):
    world = new_world(at_once=4)
    world.commit(*[world.predict(float(at // 3)) for at in range(30)])
    world.commit(*[world.predict(0.5 + at, "B") for at in range(10)])
    labels = [world.label(at + 1, 20.0, at) for at in range(30)]
    world.commit(*labels, *[world.label(at + 1, 20.0, at, device="B") for at in range(10)])
    world.commit(world.observe(500.0), world.label(99, 500.0))
    change = world.db.begin()
    items = [world.observe(500.0, "B"), world.label(99, 500.0, device="B")]
    portions = [world.portion(lane, [seq], [record]) for lane, seq, record in items]
    world.joiner.join(portions, [item.lane for item in items], change, world.now_s)
    first = world.joiner.settle(0.0, world.now_s)
    world.db.commit(change, world.db.meta(), {})
    assert 0 < len(first) < 40
    assert world.joiner.is_behind
    assert world.joiner.clock_s < 500.0 == world.joiner.clock.now_s
    world.examples += first
    world.restart()
    world.commit()
    assert world.joiner.clock_s == 500.0
    order = [(each.time_s, each.device, each.seq) for each in world.examples]
    assert order == sorted(order)
    assert len(set(order)) == 40


def test_what_has_no_label_is_a_negative_example_where_the_family_says_so(new_world):
    world = new_world(expiry="negative")
    world.commit(world.predict(10.0), world.label(9, 10.0))
    assert world.commit(world.observe(111.0), world.label(9, 111.0)) == [("A", 1, 0.0)]
    (example,) = world.examples
    assert (example.label_time_s, example.final, example.matured_s) == (110.0, False, 1000.0)
    assert (world.count("expired"), world.count("examples"), world.count("pending")) == (1, 1, 0)


def released(new_world, **options):
    """A world in which the one example, of the label 1.0, is out; its window ended at 110 s."""
    world = new_world(**options)
    world.commit(world.predict(10.0), world.label(1, 20.0))
    assert world.commit(world.observe(150.0), world.label(9, 150.0)) == [("A", 1, 1.0)]
    return world


def test_a_label_that_comes_after_the_release_amends_the_example(new_world):
    world = released(new_world, amend_s=50.0)
    assert world.commit(world.label(1, 160.0, 0.25)) == []
    (again,) = world.joiner.amended
    assert (again.id, again.label, again.label_time_s, again.revision) == (
        *(world.examples[0].id, 0.25),
        *(160.0, 1),
    )
    assert again.features == world.examples[0].features
    world.commit(world.label(1, 160.0, 0.75))
    assert [(each.label, each.revision) for each in world.joiner.amended] == [(0.75, 2)]
    assert (world.count("amended"), world.count("examples")) == (2, 1)
    world.commit()
    assert world.joiner.amended == []


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ((160.0, 1.0, True), "it says the same"),
        ((160.0, 0.5, False), "a provisional one never beats a final one"),
        ((161.0, 0.5, True), "it happened too late"),
    ],
)
def test_a_label_that_changes_nothing_after_the_release_amends_nothing(new_world, label, why):
    world = released(new_world, amend_s=50.0)
    time_s, value, final = label
    world.commit(world.label(1, time_s, value, final=final))
    assert world.joiner.amended == [], why
    assert (world.count("amended"), world.count("labels_after_release")) == (0, 1)


def test_no_label_amends_what_may_be_amended_no_longer(new_world):
    world = released(new_world, amend_s=50.0)
    world.commit(world.observe(160.5), world.label(9, 160.5))
    world.commit(world.label(1, 20.0, 0.5))
    assert (world.joiner.amended, world.count("labels_after_release")) == ([], 1)


def test_a_label_amends_a_negative_example_that_had_none(new_world):
    world = new_world(expiry="negative", amend_s=50.0)
    world.commit(world.predict(10.0), world.label(9, 10.0))
    world.commit(world.observe(111.0), world.label(9, 111.0))
    world.restart()
    world.commit(world.label(1, 120.0, 1.0))
    assert [(each.label, each.revision) for each in world.joiner.amended] == [(1.0, 1)]


def test_what_is_settled_long_ago_is_forgotten_and_leaves_nothing(new_world):
    world = new_world()
    world.commit(*[world.predict(float(at)) for at in range(20)], world.label(3, 5.0))
    world.commit(world.observe(1000.0), world.label(9, 1000.0))
    world.restart()
    world.commit(world.observe(2000.0), world.label(9, 2000.0))
    left = {
        table: list(world.db.part("fam").scan(table, b"", b"\xff"))
        for table in ("rows", "runs", "due")
    }
    assert left == {"rows": [], "runs": [], "due": []}
    world.commit(world.label(3, 5.0))
    assert world.count("labels_unknown") == 2


def test_of_two_early_labels_the_final_one_waits(new_world):
    world = new_world()
    world.commit(world.label(1, 20.0, 0.3), world.label(1, 21.0, 0.4, final=False))
    world.restart()
    world.commit(world.label(1, 22.0, 0.5, final=False))
    assert (world.count("labels_waiting"), world.count("labels_early")) == (1, 3)
    world.commit(world.predict(10.0))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == [("A", 1, 0.3)]


def test_what_waits_for_its_device_waits_through_a_restart(new_world):
    world = new_world()
    world.commit(world.observe(0.0, "B"), world.observe(0.0))
    world.quiet()
    world.commit(world.observe(1000.0), world.label(9, 1000.0))
    world.commit(world.predict(20.0, "B"), world.predict(30.0, "B"))
    world.restart()
    world.quiet()
    world.commit(world.label(1, 1001.0), world.observe(119.0, "B"))
    assert (world.count("expired"), world.count("pending")) == (0, 2)
    world.commit(world.observe(120.5, "B"))
    assert (world.count("expired"), world.count("pending")) == (1, 1)
    assert world.commit(world.label(3, 40.0, 0.5, device="B")) == [("B", 3, 0.5)]

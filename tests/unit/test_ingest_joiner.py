"""The joiner: each prediction settles once, and only what happened decides how."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_learner.ingest.joiner import ArchivedRecord, Joiner
from cloud_learner.store.ingest_state import Changes, IngestState
from edge_runtime.wire.messages import LabelRecord, ObservationRecord, PredictionRecord, Scored

WINDOW_S, IDLE_S = 100.0, 5.0


class World:
    """A joiner with the part of the database that it asks: what became of the settled."""

    def __init__(self, **options) -> None:
        self.joiner = Joiner("fam", label_window_s=WINDOW_S, idle_s=IDLE_S, **options)
        self.joiner.restore(IngestState(), 0.0)
        self.now_s = 0.0
        self.seqs: dict = {}
        self.newest: dict = {}
        self.states: dict = {}
        self.examples: list = []

    def seq(self, device, event_class):
        lane = (device, 1, event_class)
        self.seqs[lane] = self.seqs.get(lane, 0) + 1
        return self.seqs[lane]

    def predict(self, time_s, device="A", family="fam"):
        scored = [Scored("r1", "stable", [0.5])]
        record = PredictionRecord(family, "k", time_s, {}, "spec", b"", 1.0, scored)
        return ArchivedRecord(device, 1, "event", self.seq(device, "event"), record, b"raw", 0.0)

    def observe(self, time_s, device="A"):
        record = ObservationRecord("fam", "o", time_s, {})
        return ArchivedRecord(device, 1, "event", self.seq(device, "event"), record, b"raw", 0.0)

    def label(self, seq, time_s, value=1.0, *, device="A", final=True, family="fam"):
        record = LabelRecord(family, 1, seq, value, time_s, final)
        return ArchivedRecord(device, 1, "label", self.seq(device, "label"), record, b"raw", 7.0)

    def commit(self, *records):
        changes = Changes(1)
        for item in records:
            lane = (item.device, item.epoch, item.event_class)
            self.newest[lane] = max(self.newest.get(lane, item.record.time_s), item.record.time_s)
            changes.marks[lane] = (item.seq, self.newest[lane])
        self.joiner.join(records, changes, self.states.get, self.now_s)
        released = self.joiner.settle(changes, 1000.0 + self.now_s, self.now_s)
        self.states |= {row[3:]: row[0] for row in changes.settled}
        self.examples += released
        return [(each.device, each.seq, each.label) for each in released]

    def quiet(self):
        """Let the labels, of which there are none, hold nobody any longer."""
        self.now_s += IDLE_S

    def count(self, name):
        return self.joiner.counters[name]


def test_a_labelled_prediction_is_released_only_when_its_window_is_over():
    world = World()
    assert world.commit(world.predict(10.0), world.label(1, 20.0)) == []
    assert world.commit(world.observe(110.0), world.label(9, 110.0)) == []  # that second goes on
    assert world.commit(world.observe(110.5), world.label(9, 110.5)) == [("A", 1, 1.0)]
    assert world.commit(world.observe(500.0), world.label(9, 500.0)) == []


def test_an_example_carries_what_was_logged_and_when_it_came():
    world = World()
    world.commit(world.predict(10.0), world.label(1, 20.0, 0.25))
    world.commit(world.observe(200.0), world.label(9, 200.0))
    (example,) = world.examples
    assert example.id == ("A", 1, 1)
    assert (example.time_s, example.label_time_s, example.label) == (10.0, 20.0, 0.25)
    assert (example.arrived_s, example.matured_s) == (7.0, 1000.0)
    assert example.scored == [Scored("r1", "stable", [0.5])]


def test_a_prediction_without_a_label_expires():
    world = World()
    world.commit(world.predict(10.0), world.label(9, 10.0))
    assert world.commit(world.observe(111.0), world.label(9, 111.0)) == []
    assert (world.count("expired"), world.joiner.statistics()["pending"]) == (1, 0)


@pytest.mark.parametrize(("time_s", "joined"), [(110.0, 1), (110.1, 0)])
def test_a_label_counts_only_when_it_happened_within_the_window(time_s, joined):
    world = World()
    world.commit(world.predict(10.0), world.label(1, time_s))
    assert (world.count("labels_joined"), world.count("labels_late")) == (joined, 1 - joined)


def test_a_label_for_what_has_expired_is_late():
    world = World()
    world.commit(world.predict(10.0), world.label(9, 10.0), world.observe(10.0))
    world.commit(world.observe(300.0), world.label(9, 300.0))
    world.commit(world.label(1, 50.0))
    assert (world.count("expired"), world.count("labels_late")) == (1, 1)


def test_a_label_for_what_was_released_changes_nothing_and_is_counted():
    world = World()
    world.commit(world.predict(10.0), world.label(1, 20.0))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == [("A", 1, 1.0)]
    assert world.commit(world.label(1, 50.0, 0.0), world.observe(900.0)) == []
    assert world.count("labels_after_release") == 1


def test_a_label_for_no_prediction_is_unknown():
    world = World()
    world.commit(world.observe(10.0), world.label(1, 10.0))
    assert world.count("labels_unknown") == 1


def test_a_final_label_beats_provisional_ones_and_the_newest_of_equals_wins():
    world = World()
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


def test_a_provisional_label_alone_is_learned_when_the_window_is_over():
    world = World()
    world.commit(world.predict(10.0), world.label(1, 20.0, 0.1, final=False))
    assert world.commit(world.observe(200.0), world.label(9, 200.0)) == [("A", 1, 0.1)]


def test_a_label_that_comes_before_its_prediction_waits_for_it():
    world = World()
    world.commit(world.label(1, 20.0))
    assert world.joiner.statistics()["labels_waiting"] == 1
    world.commit(world.predict(10.0))
    assert (world.count("labels_joined"), world.joiner.statistics()["labels_waiting"]) == (1, 0)


def test_an_early_label_whose_number_is_no_prediction_is_given_up():
    world = World()
    world.commit(world.label(1, 20.0))
    world.commit(world.observe(10.0))
    assert (world.count("labels_unknown"), world.joiner.statistics()["labels_waiting"]) == (1, 0)


def test_what_the_bootstrap_learned_is_joined_but_not_handed_out():
    world = World(learn_from_s=15.0)
    world.commit(world.predict(14.9), world.label(1, 20.0))
    world.commit(world.predict(15.0), world.label(2, 21.0))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == [("A", 2, 1.0)]
    assert (world.count("covered_by_bootstrap"), world.count("examples")) == (1, 1)


def test_other_families_are_counted_and_left_alone():
    world = World()
    world.commit(world.predict(10.0, family="other"), world.label(1, 20.0, family="other"))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == []
    assert world.count("other_family") == 2
    assert world.joiner.statistics()["pending"] == 0


def test_a_device_that_lags_holds_the_others_until_it_is_silent_for_too_long():
    world = World()
    world.commit(world.predict(10.0), world.label(1, 20.0), world.observe(10.0, "B"))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == []
    world.quiet()
    assert world.commit(world.observe(301.0), world.label(9, 301.0)) == [("A", 1, 1.0)]


def test_a_device_that_is_awaited_holds_the_others_before_it_was_heard():
    world = World(awaited=["A", "B"])
    world.commit(world.predict(10.0), world.label(1, 20.0))
    assert world.commit(world.observe(300.0), world.label(9, 300.0)) == []
    assert world.commit(world.observe(200.0, "B"), world.label(9, 200.0, device="B")) == [
        ("A", 1, 1.0)
    ]


def test_labels_that_lag_hold_their_device_for_at_most_one_window():
    world = World()
    world.commit(world.predict(10.0), world.label(9, 10.0))
    world.commit(world.observe(210.0))  # the label of the prediction may still be on its way
    assert world.count("expired") == 0
    world.commit(world.observe(210.5))
    assert world.count("expired") == 1


def test_a_device_whose_first_labels_are_on_their_way_is_held_as_well():
    world = World()
    world.commit(world.predict(10.0), world.observe(210.0))
    assert (world.count("expired"), world.joiner.clock.now_s) == (0, 110.0)


def test_a_family_without_labels_on_the_way_is_not_held_for_long():
    world = World()
    world.commit(world.predict(10.0))
    world.quiet()
    world.commit(world.observe(110.5))
    assert world.count("expired") == 1


def test_a_device_that_comes_back_behind_the_clock_gets_its_labels_joined():
    world = World()
    world.commit(world.observe(0.0, "B"), world.observe(0.0))
    world.quiet()
    world.commit(world.observe(1000.0), world.label(9, 1000.0))  # B is silent: the clock passes it
    assert world.joiner.clock.now_s == 1000.0
    assert world.commit(world.predict(10.0, "B")) == []  # far behind, and its label is to come
    assert world.commit(world.label(2, 20.0, device="B")) == [("B", 2, 1.0)]
    world.commit(world.predict(900.0, "B"), world.label(9, 900.0, device="B"))
    assert world.joiner.clock.now_s == 1000.0


def test_what_waited_for_its_device_leaves_in_order_with_what_comes_late():
    world = World()
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


def test_examples_that_mature_together_leave_in_order_of_time_device_and_number():
    world = World()
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


def history(draw_delays):
    """Two devices, a prediction every 7 s each; `draw_delays` are label delays, None for none."""
    lanes: dict = {(device, kind): [] for device in "AB" for kind in ("event", "label")}
    world = World()
    for device in "AB":
        moments = []
        for at, delay in enumerate(draw_delays[device]):
            moments.append((7.0 * at, 0, at))
            if delay is not None:
                moments.append((7.0 * at + delay, 1, at))
        moments.append((7.0 * len(draw_delays[device]) + 3 * WINDOW_S, 2, 0))
        seqs = {}
        for time_s, kind, at in sorted(moments):
            if kind != 1:
                item = world.predict(time_s, device) if kind == 0 else world.observe(time_s, device)
                seqs[at] = item.seq
                lanes[device, "event"].append(item)
            if kind:
                target = seqs[at] if kind == 1 else 10**6
                lanes[device, "label"].append(world.label(target, time_s, at, device=device))
    return lanes


def may_come(lanes, device, event_class):
    """Labels lag behind events by less than a window: the uplink sends them first."""
    queue, labels = lanes[device, event_class], lanes[device, "label"]
    if not queue:
        return False
    if event_class == "label" or not labels:
        return True
    return queue[0].record.time_s - labels[0].record.time_s <= WINDOW_S


def play(lanes, choose):
    """Hand over the lanes in an order and in portions that `choose` picks."""
    lanes = {lane: list(queue) for lane, queue in lanes.items()}
    world, portion = World(awaited=["A", "B"]), []
    while open_lanes := [lane for lane in lanes if may_come(lanes, *lane)]:
        portion.append(lanes[open_lanes[choose(len(open_lanes))]].pop(0))
        if choose(3) == 0:
            world.commit(*portion)
            portion = []
    world.commit(*portion)
    return world


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_order_of_arrival_changes_nothing_in_what_is_released(data):
    delay = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 50.0, 99.0, 100.0, 101.0, 150.0]))
    delays = {device: data.draw(st.lists(delay, min_size=3, max_size=12)) for device in "AB"}
    lanes = history(delays)
    expected = sorted(
        (7.0 * at, device, float(at))
        for device in "AB"
        for at, each in enumerate(delays[device])
        if each is not None and each <= WINDOW_S
    )
    world = play(lanes, lambda count: data.draw(st.integers(0, count - 1)))
    assert [(each.time_s, each.device, each.label) for each in world.examples] == expected
    assert world.count("released_out_of_order") == 0
    total = sum(map(len, delays.values()))
    assert world.count("examples") + world.count("expired") == total

"""The joint clock: time passes once it has passed for every device that goes on."""

from __future__ import annotations

from cloud_learner.ingest.joint_clock import PATIENCE, JointClock

IDLE_S = 5.0


def test_a_device_whose_events_get_no_newer_holds_nobody_for_long():
    clock = JointClock(label_window_s=10.0, idle_s=IDLE_S)
    for at_s in range(20):
        clock.hear("stuck", "event", 2001.0, float(at_s))
        clock.hear("fine", "event", 3000.0 + at_s, float(at_s))
        clock.hear("fine", "label", 3000.0 + at_s, float(at_s))
        held_s = clock.advance(float(at_s))
        assert (held_s < 2002.0) == (at_s < IDLE_S), at_s


def test_a_device_of_which_nothing_was_accepted_holds_nobody():
    clock = JointClock(label_window_s=10.0, idle_s=IDLE_S)
    clock.hear("bad", "event", float("-inf"), 0.0)
    clock.hear("fine", "event", 3000.0, 0.0)
    clock.hear("fine", "label", 3000.0, 0.0)
    assert clock.advance(0.0) == 3000.0


def lagging():
    """A clock with a device whose labels stand at 100 s while its events are at 1000 s."""
    clock = JointClock(label_window_s=10.0, idle_s=IDLE_S)
    clock.hear("A", "label", 100.0, 0.0)
    clock.hear("A", "event", 1000.0, 0.0)
    return clock


def test_labels_that_are_known_to_be_under_way_hold_time_however_far_they_lag():
    clock = lagging()
    assert (clock.of("A", 1.0), lagging().advance(1.0)) == (990.0, 990.0)
    clock.note("A", 1, 1.0, is_under_way=True)
    assert (clock.of("A", 1.0), clock.advance(1.0)) == (100.0, 100.0)
    clock.hear("A", "label", 600.0, 2.0)
    assert clock.advance(2.0) == 600.0
    clock.note("A", 1, 3.0, is_under_way=False)
    assert clock.advance(3.0) == 990.0


def test_waiting_for_labels_begins_when_they_are_known_to_be_under_way():
    clock = lagging()
    quiet_s = 100 * IDLE_S
    assert clock.of("A", quiet_s) == 1000.0
    clock.note("A", 1, quiet_s, is_under_way=True)
    assert clock.of("A", quiet_s) == 100.0


def test_labels_that_stay_away_hold_nobody_for_long_and_their_own_device_no_longer_than_patience():
    clock = lagging()
    clock.note("A", 1, 0.0, is_under_way=True)
    for at_s in range(int(2 * PATIENCE * IDLE_S)):
        clock.note("A", 1, float(at_s), is_under_way=True)  # it goes on saying so
        clock.hear("A", "event", 1000.0 + at_s, float(at_s))
        assert (clock.advance(float(at_s)) > 100.0) == (at_s >= IDLE_S), at_s
        assert (clock.of("A", float(at_s)) > 100.0) == (at_s >= PATIENCE * IDLE_S), at_s


def test_a_dead_device_whose_labels_were_under_way_does_not_hold_the_others():
    clock = lagging()
    clock.note("A", 1, 0.0, is_under_way=True)
    clock.hear("B", "event", 2000.0, IDLE_S)
    clock.hear("B", "label", 2000.0, IDLE_S)
    assert clock.advance(IDLE_S) == 2000.0

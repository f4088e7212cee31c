"""The joint clock: time passes once it has passed for every device that goes on."""

from __future__ import annotations

from cloud_learner.ingest.joint_clock import JointClock

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

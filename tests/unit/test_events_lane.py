"""A lane knows what to send next and when what was sent has to go again."""

from __future__ import annotations

from edge_runtime.events.lane import Lane


def lane_with(*, learned: int, stored: int, at_s: float = 0.0) -> Lane:
    lane = Lane("event")
    lane.learn({1: learned}, at_s)
    lane.start_over(at_s)
    lane.acknowledged(1, stored, at_s)
    lane.sent[1] = stored
    return lane


def test_a_lane_starts_from_what_is_learned() -> None:
    lane = lane_with(learned=7, stored=20)
    lane.start_over(1.0)
    assert lane.sent == {1: 7}
    assert not lane.waits_for_learner()


def test_marks_of_other_epochs_are_kept() -> None:
    lane = lane_with(learned=7, stored=7)
    assert lane.learn({2: 3}, 1.0)
    assert lane.learned == {1: 7, 2: 3}


def test_what_is_learned_already_is_not_sent_again() -> None:
    lane = lane_with(learned=7, stored=20)
    lane.start_over(1.0)
    assert lane.learn({1: 15}, 2.0)
    assert lane.sent == {1: 15}


def test_a_learner_that_stands_still_is_sent_it_again_with_growing_patience() -> None:
    lane = lane_with(learned=7, stored=20)
    assert lane.learn({1: 7}, 4.9)
    assert not lane.learn({1: 7}, 5.0)
    lane.start_over(5.0)
    lane.acknowledged(1, 20, 5.0)
    assert lane.learn({1: 7}, 14.9)
    assert not lane.learn({1: 7}, 15.0)
    assert lane.learn({1: 8}, 15.0)
    assert lane.learn({1: 8}, 19.9)
    assert not lane.learn({1: 8}, 20.0)


def test_silence_before_the_first_unlearned_envelope_is_no_standstill() -> None:
    lane = lane_with(learned=7, stored=7)
    lane.acknowledged(1, 9, 1000.0)
    assert lane.learn({1: 7}, 1001.0)


def test_a_learner_that_was_put_back_is_sent_it_again_at_once() -> None:
    lane = lane_with(learned=7, stored=7)
    assert not lane.learn({1: 3}, 0.0)
    lane.start_over(0.0)
    assert lane.sent == {1: 3}

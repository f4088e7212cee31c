"""A lane knows what to send next and when what was sent has to go again."""

from __future__ import annotations

import itertools

from edge_runtime.events.lane import WINDOW, Lane
from edge_runtime.events.log import Piece
from edge_runtime.events.packing import Packed


def lane_with(*, learned: int, stored: int, at_s: float = 0.0) -> Lane:
    lane = Lane("event")
    lane.learn({1: learned}, at_s)
    lane.start_over(at_s)
    lane.acknowledged(1, stored, at_s)
    lane.read[1] = stored
    return lane


def test_a_lane_starts_from_what_is_learned() -> None:
    lane = lane_with(learned=7, stored=20)
    lane.start_over(1.0)
    assert lane.read == {1: 7}
    assert not lane.waits_for_learner()


def test_marks_of_other_epochs_are_kept() -> None:
    lane = lane_with(learned=7, stored=7)
    assert lane.learn({2: 3}, 1.0)
    assert lane.learned == {1: 7, 2: 3}


def test_what_is_learned_already_is_not_sent_again() -> None:
    lane = lane_with(learned=7, stored=20)
    lane.start_over(1.0)
    assert lane.learn({1: 15}, 2.0)
    assert lane.read == {1: 15}


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
    assert lane.read == {1: 3}


def test_a_silent_learner_is_asked_ever_more_rarely_and_one_that_speaks_within_five_minutes() -> (
    None
):
    lane, now_s, waits_s = lane_with(learned=7, stored=20), 0.0, []
    for _ in range(9):
        waited_s = next(s for s in itertools.count(1) if lane.is_forgotten(now_s + s))
        waits_s.append(waited_s)
        now_s += waited_s
        lane.start_over(now_s)
        lane.acknowledged(1, 20, now_s)
    assert waits_s == [5 * 2**n for n in range(9)]
    assert lane.learn({1: 7}, now_s + 299)
    assert not lane.learn({1: 7}, now_s + 300)


def test_a_learner_that_holds_all_is_not_asked() -> None:
    lane = lane_with(learned=20, stored=20)
    assert not lane.is_forgotten(1e9)


def test_a_lane_that_starts_over_is_not_held_and_goes_on_with_one_envelope() -> None:
    lane = sending(10)
    lane.refused(1, 0)
    lane.under_way = 0
    lane.settle()
    lane.start_over(1.0)
    assert (lane.held, lane.window) == (False, 1)


def packed(first: int, last: int, epoch: int = 1) -> Packed:
    count = last - first + 1
    return Packed("event", epoch, first - 1, last, count, 0, True, f"{first}-{last}", b"", {})


def sending(*ends: int) -> Lane:
    """A lane with an envelope under way up to each of `ends`, and one more that waits."""
    lane = Lane("event")
    lane.start_over(0.0)
    starts = [1, *(end + 1 for end in ends)]
    pieces = [
        Piece(0, "", at, [b""] * (end + 1 - at)) for at, end in zip(starts, ends, strict=False)
    ]
    pieces.append(Piece(0, "", starts[-1], [b""] * 10))
    lane.took(1, pieces, starts[-1] + 9)
    lane.packed([packed(at, end) for at, end in zip(starts, (*ends, ends[-1] + 10), strict=True)])
    for _ in ends:
        lane.ahead.popleft()
        lane.under_way += 1
    return lane


def test_the_oldest_epoch_with_something_to_read_comes_first() -> None:
    lane = lane_with(learned=7, stored=7)
    lane.earlier = [(1, 7), (3, 5)]
    assert lane.behind(4, 9) == (3, 0, 5)
    lane.took(3, [Piece(5, "dropped", 6, [])], 5)
    assert lane.behind(4, 9) == (4, 0, 9)
    assert lane.behind(4, 0) is None


def test_what_is_refused_goes_again_from_the_first_refused_once_nothing_is_under_way() -> None:
    lane = sending(10, 20, 30)
    lane.acknowledged(1, 10, 0.0)
    lane.under_way -= 1
    lane.refused(1, 20)
    lane.refused(1, 10)
    assert not lane.may_send()
    assert not lane.may_read(8)
    assert not lane.settle()
    lane.under_way -= 2
    assert lane.settle()
    assert lane.behind(1, 40) == (1, 10, 40)
    assert not lane.settle()


def test_what_the_learner_took_meanwhile_does_not_go_again() -> None:
    lane = sending(10, 20)
    lane.refused(1, 0)
    lane.learn({1: 20}, 0.0)
    lane.under_way = 0
    assert lane.settle()
    assert lane.behind(1, 30) == (1, 20, 30)


def test_a_lane_that_is_held_sends_one_and_then_more_and_more() -> None:
    lane = sending(10)
    lane.refused(1, 0)
    lane.under_way = 0
    lane.settle()
    windows = []
    for end in range(10, 60, 10):
        windows.append((lane.held, lane.window))
        lane.acknowledged(1, end, 0.0)
    assert windows == [(True, 1), (False, 2), (False, 4), (False, WINDOW), (False, WINDOW)]


def test_what_was_read_before_a_start_over_is_void() -> None:
    lane = sending(10)
    turn = lane.turn
    lane.start_over(1.0)
    assert lane.turn != turn
    assert (lane.to_send(), lane.under_way, lane.read) == (0, 0, {})

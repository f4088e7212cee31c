"""The linger follows the rate: the log's thread is played over arrival times, without a clock."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.events.linger import GROUP, Doorbell, Linger

FLOOR_S, CEILING_S = 0.005, 0.05


def play(linger: Linger, arrivals: list[float]) -> list[tuple[float, int]]:
    """What the log's thread does with records that come at `arrivals`: each wait, its records."""
    groups: list[tuple[float, int]] = []
    free_s, index = 0.0, 0
    while index < len(arrivals):
        begins_s = max(free_s, arrivals[index])
        if begins_s > free_s:
            linger.was_idle(begins_s - free_s)
        waited_s = linger.seconds
        free_s = begins_s + waited_s
        records = sum(1 for time_s in arrivals[index : index + 10_000] if time_s <= free_s)
        linger.took(records)
        groups.append((waited_s, records))
        index += records
    return groups


def steady(rate: float, seconds: float, start_s: float = 1.0) -> list[float]:
    return [start_s + n / rate for n in range(int(rate * seconds))]


def test_records_that_come_alone_are_not_kept_waiting() -> None:
    assert set(play(Linger(FLOOR_S, CEILING_S), steady(10, 10))) == {(FLOOR_S, 1)}


def test_a_slow_steady_stream_gets_few_commits() -> None:
    groups = play(Linger(FLOOR_S, CEILING_S), steady(100, 10))
    assert sum(records for _, records in groups) == 1000
    assert {waited_s for waited_s, _ in groups[10:]} == {CEILING_S}
    assert len(groups) < 250


@pytest.mark.parametrize("rate", [30_000, 60_000, 150_000])
def test_a_faster_stream_waits_only_until_a_group_is_worth_its_commit(rate: int) -> None:
    groups = play(Linger(FLOOR_S, CEILING_S), steady(rate, 1))[10:-1]
    assert groups
    assert all(FLOOR_S < waited_s < CEILING_S for waited_s, _ in groups)
    assert all(GROUP <= records < 2 * GROUP for _, records in groups)


def test_a_stream_that_fills_groups_within_the_floor_waits_no_longer() -> None:
    groups = play(Linger(FLOOR_S, CEILING_S), [*steady(100, 1), *steady(600_000, 0.2, start_s=2.0)])
    assert {waited_s for waited_s, _ in groups[-20:]} == {FLOOR_S}


def test_after_a_pause_the_next_record_waits_no_longer_than_the_floor() -> None:
    linger = Linger(FLOOR_S, CEILING_S)
    play(linger, steady(100, 1))
    assert linger.seconds == CEILING_S
    linger.was_idle(1.0)
    assert linger.seconds == FLOOR_S


def test_a_ceiling_below_the_floor_leaves_the_wait_as_it_is() -> None:
    linger = Linger(FLOOR_S, 0.0)
    play(linger, [*steady(100, 1), *steady(600_000, 0.2, start_s=2.0), *steady(1, 3, start_s=9.0)])
    assert linger.seconds == FLOOR_S


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.one_of(st.integers(0, 1000), st.floats(0, 10))),
)
def test_the_wait_stays_within_its_bounds(
    floor_s: float, ceiling_s: float, happened: list[int | float]
) -> None:
    linger = Linger(floor_s, ceiling_s)
    for each in happened:
        if isinstance(each, int):
            linger.took(each)
        else:
            linger.was_idle(each)
        assert floor_s <= linger.seconds <= max(floor_s, ceiling_s)


def test_a_ring_before_the_wait_is_heard_and_all_rings_are_heard_at_once() -> None:
    bell = Doorbell()
    bell.ring()
    assert bell.wait() >= 0
    bell.ring()
    bell.ring()
    assert bell.pause(60.0)
    assert not bell.pause(0.0)


def test_a_ring_from_another_thread_ends_the_wait() -> None:
    bell = Doorbell()
    ringer = threading.Thread(target=bell.ring)
    ringer.start()
    assert bell.pause(60.0)
    ringer.join()

"""Sketches: exact while they are small, close when they are not, the same after a restart."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.features.keyed import Table
from edge_runtime.features.sketches import EXACT_MAX, Decayed, Distinct, depth_of

seen = st.lists(
    st.tuples(st.integers(0, 100).map(float), st.sampled_from("abcdefghijkl") | st.integers(0, 3)),
    max_size=80,
)


def filled(entries, **options) -> Distinct:
    state = Distinct(1000.0, **options)
    for time_s, value in entries:
        state.add(time_s, value)
    return state


@given(seen, st.floats(-1.0, 101.0))
def test_the_count_is_exact_while_the_values_fit(entries, start_s):
    expected = len({value for time_s, value in entries if time_s > start_s})
    assert filled(entries, exact_max=16).count(start_s) == expected


@given(seen, st.randoms(use_true_random=False))
def test_the_exact_count_does_not_depend_on_the_order(entries, chance):
    shuffled = chance.sample(entries, len(entries))
    for start_s in (-1.0, 30.0, 90.0):
        one, other = filled(entries, exact_max=16), filled(shuffled, exact_max=16)
        assert one.count(start_s) == other.count(start_s)


@given(seen, st.integers(1, 20))
def test_the_last_events_are_counted_as_they_came(entries, events):
    state = filled(entries, events=20)
    assert state.count_events(events) == len({value for _, value in entries[-events:]})


@given(seen, st.integers(2, 16), st.booleans())
def test_what_a_state_says_of_its_growth_is_true_and_its_levels_are_bounded(
    entries, exact_max, by_events
):
    state = Distinct(40.0, events=12 if by_events else 0, exact_max=exact_max)
    size = 0
    for time_s, value in entries:
        size += state.add(time_s, value)
        assert size == len(state)
        for level in state.levels:
            assert len(level.times) == len(level.values) == len(level.last) <= exact_max
            assert level.times == sorted(level.times)


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 99), st.integers(0, 30))))
def test_a_table_of_sketches_keeps_its_bounds_and_counts_truly(entries):
    table = Table(lambda: Distinct(50.0, exact_max=4), keys_max=2, entries_max=9)
    for key, time_s, value in entries:
        table.add(key, float(time_s), value)
        assert table.entries == sum(len(state) for _, state in table.items()) <= 9
        assert table.keys <= 2


@given(seen, st.integers(0, 80), st.integers(2, 8))
def test_a_state_that_was_kept_and_loaded_goes_on_as_if_it_had_never_stopped(entries, cut, limit):
    whole, loaded = Distinct(40.0, exact_max=limit), Distinct(40.0, exact_max=limit)
    for time_s, value in entries[:cut]:
        whole.add(time_s, value)
    loaded.load(*whole.dump())
    for time_s, value in entries[cut:]:
        assert loaded.add(time_s, value) == whole.add(time_s, value)
    assert loaded.dump() == whole.dump()


@pytest.mark.parametrize("names", ["{}", "user-{:06}", "AB{:x}/item"])
@pytest.mark.parametrize("count", [EXACT_MAX, 9_000])
def test_many_values_are_counted_within_a_tenth_over_any_span(names, count):
    chance, state = random.Random(count), Distinct(1e9)
    values = [names.format(number) for number in range(count)]
    for time_s in range(2 * count):
        state.add(float(time_s), values[time_s] if time_s < count else chance.choice(values))
    assert len(state) < 12 * EXACT_MAX
    assert state.count(-1.0) == pytest.approx(count, rel=0.0 if count <= EXACT_MAX else 0.1)
    late = {values[i] for i in range(count // 2, count)}
    state = Distinct(1e9)
    for time_s, value in enumerate(values):
        state.add(float(time_s), value)
    assert state.count(count // 2 - 0.5) == pytest.approx(len(late), rel=0.1)


def test_a_night_with_few_values_is_counted_exactly_after_a_day_with_many():
    state = Distinct(100.0)
    for number in range(20_000):
        state.add(number / 200.0, number)
    assert len(state.levels) > 1
    for number in range(50):
        state.add(300.0 + number, number)
    assert state.count(250.0) == 50
    assert len(state.levels) == 1


def test_numbers_that_are_equal_are_one_value_however_they_are_written():
    state = filled([(1.0, 1), (2.0, 1.0), (3.0, "1")])
    assert state.count(0.0) == 2
    assert depth_of(1) == depth_of(1.0)


def test_the_depths_of_values_never_change():
    assert [depth_of(v) for v in ("ABQ", "", 7, 2.5, "Zoë ✈", *"abcdefg")] == [
        2,
        0,
        1,
        3,
        0,
        3,
        2,
        4,
        0,
        1,
        3,
        1,
    ]


def test_the_oldest_values_are_dropped_first():
    state = filled([(float(i), i) for i in range(10)])
    state.drop(4)
    assert len(state) == 6
    assert state.count(-1.0) == 6
    assert state.count(3.5) == 6


@given(
    st.lists(st.tuples(st.floats(0, 500), st.floats(-1e6, 1e6)), min_size=1, max_size=30),
    st.floats(1.0, 1e4),
)
def test_a_decayed_mean_weighs_by_age(entries, half_life_s):
    state = Decayed(half_life_s)
    for time_s, value in entries:
        state.add(time_s, value)
    newest_s = max(time_s for time_s, _ in entries)
    weights = [0.5 ** ((newest_s - time_s) / half_life_s) for time_s, _ in entries]
    total = math.fsum(w * value for w, (_, value) in zip(weights, entries, strict=True))
    assert state.total / state.weight == pytest.approx(total / math.fsum(weights), abs=1e-3)


def test_a_decayed_mean_halves_what_is_one_half_life_older():
    state = Decayed(10.0)
    assert [state.add(0.0, 3.0), state.add(10.0, 6.0)] == [1, 0]
    assert state.total / state.weight == 5.0


def test_after_a_silence_of_ages_only_the_newest_counts():
    state = Decayed(1.0)
    state.add(0.0, 3.0)
    state.add(1e300, 6.0)
    assert state.total / state.weight == 6.0


@pytest.mark.parametrize(
    "dumped",
    [[5, []], [5, [[[1.0], []]]], [5, [[[2.0, 1.0], ["a", "b"]]]]],
)
def test_a_state_that_cannot_be_is_not_loaded(dumped):
    with pytest.raises(ValueError, match=r"its times|no level"):
        Distinct(1.0).load(*dumped)


def test_a_mean_without_weight_is_not_loaded():
    with pytest.raises(ValueError, match="weight"):
        Decayed(1.0).load(1.0, 0.0, 0.0)

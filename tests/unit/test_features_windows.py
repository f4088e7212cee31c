"""Window tables: their bounds, and values that do not drift."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.features.keyed import Table
from edge_runtime.features.windows import SCALE, Series, to_units


def table_of(span_s: float, **bounds: int) -> Table:
    """A table that keeps entries for exactly `span_s`: the reserve for rounding is in it."""
    return Table(lambda: Series(span_s - 1.0), **bounds)


def held(table: Table) -> dict:
    return {key: state.dump()[0] for key, state in table.items()}


def test_entries_stand_in_order_of_time_however_they_came():
    table = table_of(100.0)
    for time_s in (5.0, 1.0, 3.0, 9.0, 3.0):
        table.add("k", time_s, to_units(time_s))
    [(_, series)] = table.items()
    assert series.dump() == [[1.0, 3.0, 3.0, 5.0, 9.0], [1.0, 3.0, 3.0, 5.0, 9.0]]


def test_entries_behind_the_retention_are_dropped_and_not_taken():
    table = table_of(10.0)
    table.add("k", 0.0, 1)
    table.add("k", 10.0, 1)
    assert held(table) == {"k": [10.0]}
    table.add("k", 0.0, 1)
    assert held(table) == {"k": [10.0]}
    assert table.entries == 1


def test_over_the_bound_of_keys_the_least_recently_observed_key_goes():
    table = table_of(100.0, keys_max=2)
    for key in ("a", "b", "a", "c"):
        table.add(key, 1.0, 1)
    assert held(table) == {"a": [1.0, 1.0], "c": [1.0]}
    assert (table.keys_evicted, table.entries_evicted, table.entries) == (1, 1, 3)


def test_over_the_bound_of_entries_the_only_key_loses_its_oldest():
    table = table_of(100.0, entries_max=3)
    for time_s in range(5):
        table.add("k", float(time_s), to_units(time_s))
    [(_, series)] = table.items()
    assert series.dump() == [[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]
    assert (table.keys_evicted, table.entries_evicted, table.entries) == (0, 2, 3)


def test_the_memory_of_what_is_forgotten_is_taken_back():
    series = Series(10.0, squares=True, highs=True, lows=True)
    for time_s in range(10_000):
        series.add(float(time_s), to_units(time_s % 7))
    lists = (series.times, series.totals, series.squares, series.highs.units, series.lows.units)
    assert len(series) == 11
    assert max(map(len, lists)) < 200


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(0, 60).map(float), st.integers(-9, 9)),
        max_size=200,
    )
)
def test_the_bounds_hold_after_every_entry_and_the_count_is_true(entries):
    table = table_of(20.0, keys_max=3, entries_max=12)
    for key, time_s, units in entries:
        table.add(key, time_s, units)
        assert table.entries == sum(len(times) for times in held(table).values()) <= 12
        assert table.keys <= 3
        assert all(times == sorted(times) for times in held(table).values())


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1))
def test_what_a_snapshot_stores_maps_back_to_the_same_units(value):
    units = to_units(value)
    assert to_units(units / SCALE) == units


@given(st.floats(-1e9, 1e9))
def test_fixed_point_is_off_by_at_most_half_a_unit(value):
    assert abs(to_units(value) / SCALE - value) <= 0.5 / SCALE

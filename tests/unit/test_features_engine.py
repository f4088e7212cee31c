"""The engine against a reference that recomputes everything, and against its own past."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import RequestError
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec

LATENESS_S = 600.0
SPEC = Spec.from_toml("""
version = 1
[[features]]
name = "carrier"
field = "carrier"
vocabulary = ["AA", "UA"]
[[features]]
name = "count"
window = { over = "departed", statistic = "count", span_s = 1000.0 }
[[features]]
name = "mean"
fill = -1.0
window = { over = "departed", value = "delay", statistic = "mean", span_s = 300.0 }
[[features]]
name = "sum_by_carrier"
window = { over = "departed", key = "carrier", value = "delay", statistic = "sum", span_s = 1000.0 }
[[features]]
name = "mean_by_carrier"
window = { over = "departed", key = "carrier", value = "delay", statistic = "mean", span_s = 50.0 }
""")

# Steps of event time: back at most by the lateness, forward at most beyond every span.
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "departed", "departed", "landed"]),
        st.integers(-int(LATENESS_S), 1200) | st.floats(-LATENESS_S, 200.0),
        st.sampled_from(["AA", "UA", "ZZ"]),
        st.floats(-1e4, 1e4) | st.integers(-60, 300),
    ),
    max_size=60,
)


def timed(steps):
    newest_s = 1.4e9
    for kind, step_s, carrier, delay in steps:
        time_s = newest_s + step_s
        newest_s = max(newest_s, time_s)
        yield kind, time_s, {"carrier": carrier, "delay": delay}


def reference(events, now_s, carrier):
    """What the features mean, computed from all events in the plainest way."""

    def delays(span_s, key):
        return [
            fields["delay"]
            for kind, time_s, fields in events
            if kind == "departed" and now_s - span_s < time_s <= now_s
            if key is None or fields["carrier"] == key
        ]

    def mean(values, fill):
        return math.fsum(values) / len(values) if values else fill

    return [
        {"AA": 1, "UA": 2}.get(carrier, 0),
        len(delays(1000.0, None)),
        mean(delays(300.0, None), -1.0),
        math.fsum(delays(1000.0, carrier)),
        mean(delays(50.0, carrier), 0.0),
    ]


@given(steps)
def test_every_vector_equals_the_reference(steps):
    engine, past = Engine(SPEC, lateness_s=LATENESS_S), []
    for kind, time_s, fields in timed(steps):
        if kind == "ask":
            vector = engine.vector(time_s, fields)
            expected = reference(past, time_s, fields["carrier"])
            assert vector.dtype == np.float32
            np.testing.assert_allclose(vector, expected, rtol=1e-6, atol=1e-6)
        else:
            engine.observe(kind, time_s, fields)
            past.append((kind, time_s, fields))


@given(steps, st.data())
def test_snapshot_and_replay_give_the_same_bits_as_never_stopping(steps, data):
    events = list(timed(steps))
    cut = data.draw(st.integers(0, len(events)))
    engine, restored = Engine(SPEC, lateness_s=LATENESS_S), Engine(SPEC, lateness_s=LATENESS_S)
    for at, (kind, time_s, fields) in enumerate(events):
        if at == cut:
            restored.restore(engine.snapshot())
        for each in (engine, restored) if at >= cut else (engine,):
            each.observe(kind, time_s, fields)
        if at >= cut:
            one, other = engine.vector(time_s, fields), restored.vector(time_s, fields)
            assert other.tobytes() == one.tobytes()
    if cut < len(events):
        assert restored.snapshot() == engine.snapshot()


@given(st.permutations(range(12)))
def test_the_order_of_arrival_does_not_show_in_the_bits(order):
    def state(sequence):
        engine = Engine(SPEC, lateness_s=LATENESS_S)
        for i in sequence:
            engine.observe(
                "departed", 20.0 * i, {"carrier": "AA", "delay": 0.1 * i + 1e6 * (i % 3)}
            )
        return engine.vector(250.0, {"carrier": "AA"}).tobytes()

    assert state(order) == state(range(12))


def test_asking_changes_nothing():
    engine = Engine(SPEC)
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": 3})
    before = engine.snapshot()
    engine.vector(1e9, {"carrier": "UA"})
    assert engine.snapshot() == before


def test_a_window_excludes_its_far_end_and_includes_its_near_one():
    engine = Engine(SPEC)
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": 3})
    counts = [engine.vector(now_s, {"carrier": "AA"})[1] for now_s in (99.9, 100, 1099.9, 1100)]
    assert counts == [0, 1, 1, 0]


def test_a_window_skips_an_event_without_its_field_or_with_text_in_it():
    engine = Engine(SPEC)
    engine.observe("departed", 100.0, {"delay": 3})
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": "three"})
    assert engine.vector(100.0, {"carrier": "AA"}).tolist() == [1, 2, 3, 0, 0]


def test_values_are_clipped_to_their_bounds_and_always_fit_float32():
    spec = Spec.from_toml("""
version = 1
[[features]]
name = "bounded"
field = "x"
bounds = [0, 10]
[[features]]
name = "free"
field = "x"
[[features]]
name = "total"
window = { over = "k", value = "x", statistic = "sum", span_s = 9 }
""")
    engine = Engine(spec)
    assert np.isfinite(engine.vector(0.0, {"x": 1e308})).all()
    assert engine.vector(0.0, {"x": -5})[0] == 0
    assert engine.vector(0.0, {"x": 10**18})[0] == 10
    for x in (1e308, 1e308, -1e308, 2**63 - 1):
        engine.observe("k", 0.0, {"x": x})
    assert np.isfinite(engine.vector(0.0, {"x": 0})).all()


def test_an_engine_of_a_new_spec_takes_over_the_windows_that_it_shares():
    old = Engine(SPEC)
    for time_s in (10.0, 20.0):
        old.observe("departed", time_s, {"carrier": "AA", "delay": 4.0})
    new = Engine(SPEC.subset(["sum_by_carrier", "mean_by_carrier"]))
    new.inherit([old])
    asked = new.vector(20.0, {"carrier": "AA"})
    assert asked.tobytes() == old.vector(20.0, {"carrier": "AA"})[3:].tobytes()
    new.observe("departed", 21.0, {"carrier": "AA", "delay": 1.0})
    assert old.vector(21.0, {"carrier": "AA"})[3] == 8


def test_every_damaged_snapshot_is_refused_and_changes_nothing():
    engine = Engine(SPEC)
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": 3})
    whole = engine.snapshot()
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for damaged in [*flipped, *(whole[:i] for i in range(len(whole))), whole + b"x"]:
        with pytest.raises(RequestError) as caught:
            engine.restore(damaged)
        assert caught.value.code == "bad_snapshot"
    assert engine.snapshot() == whole


def test_a_snapshot_of_another_spec_is_refused():
    with pytest.raises(RequestError) as caught:
        Engine(SPEC).restore(Engine(SPEC.subset(["count"])).snapshot())
    assert caught.value.code == "other_spec"


def test_memory_is_bounded_however_many_keys_come():
    engine = Engine(SPEC)
    for i in range(10_000):
        engine.observe("departed", 100.0, {"carrier": f"X{i}", "delay": 1})
    statistics = engine.statistics()
    assert statistics["keys"] == 4096 + 2
    assert statistics["keys_evicted"] == 10_000 - 4096

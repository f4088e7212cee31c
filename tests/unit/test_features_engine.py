"""The engine against a reference that recomputes everything, and against its own past."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import RequestError
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec

LATENESS_S = 600.0
EXTENTS = {"long": "span_s = 1000.0", "short": "span_s = 50.0", "last": "span_events = 4"}
STATISTICS = ("count", "sum", "mean", "std", "min", "max", "last", "time_since_last", "distinct")
SOURCES = {
    "all": 'over = "departed", value = "delay"',
    "own": 'over = "departed", key = "carrier", value = "delay"',
    "label": 'over = "label"',
    "own_label": 'over = "label", key = "carrier"',
}
ALL_WINDOWS = [
    (source, statistic, extent)
    for source in SOURCES
    for extent in EXTENTS
    for statistic in STATISTICS
] + [
    *((source, "rate", extent) for source in SOURCES for extent in ("long", "short")),
    *((source, "decayed_mean", "half_life_s = 80.0") for source in SOURCES),
]
FILL = -7.0


def declared(windows) -> Spec:
    """A spec with one feature for each window, every one with the same fill."""
    lines = ["version = 1"]
    for source, statistic, extent in windows:
        name = f"{source} {statistic} {extent}"
        window = f'{SOURCES[source]}, statistic = "{statistic}", {EXTENTS.get(extent, extent)}'
        lines += ["[[features]]", f'name = "{name}"', f"fill = {FILL}", f"window = {{ {window} }}"]
    return Spec.from_toml("\n".join(lines))


SPEC = declared(ALL_WINDOWS)

SPEC_OF_ALL_KINDS = """
version = 1
[[features]]
name = "carrier"
field = "carrier"
vocabulary = ["UA", "AA"]
one_hot = true
[[features]]
name = "delay"
field = "delay"
log1p = true
[[features]]
name = "day"
cycle = { of = "day" }
[[features]]
name = "height"
lookup = { table = "heights", key = "carrier", column = "height" }
[[features]]
name = "all"
window = { over = "departed", statistic = "sum", value = "delay", span_s = 50.0 }
bounds = [-100.0, 100.0]
[[features]]
name = "own"
window = { over = "departed", key = "carrier", statistic = "mean", value = "delay", span_s = 1e3 }
fill = -7.0
standardise = { mean = 3.0, std = 2.0 }
[[features]]
name = "own_count"
window = { over = "departed", key = "carrier", statistic = "count", span_s = 50.0 }
bucket = [1.0, 2.0]
one_hot = true
[[features]]
name = "labels"
window = { over = "label", key = "carrier", statistic = "distinct", span_s = 1e3 }
[tables.heights]
version = "1"
columns = ["height"]
rows = { AA = [5.0] }
"""

# Steps of event time: back at most by the lateness, forward at most beyond every span.
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "departed", "departed", "departed", "label", "landed"]),
        st.integers(-int(LATENESS_S), 1200) | st.floats(-LATENESS_S, 200.0) | st.integers(0, 5),
        st.sampled_from(["AA", "UA", "ZZ"]),
        st.floats(-1e4, 1e4) | st.integers(-3, 3),
    ),
    max_size=60,
)


def timed(steps):
    """Events as (kind, time, fields), none further behind the newest one than the lateness."""
    newest_s = 1.4e9
    for kind, step_s, carrier, delay in steps:
        time_s = newest_s + step_s
        newest_s = max(newest_s, time_s)
        yield kind, time_s, {"carrier": carrier, "delay": delay}


def observe(engine, kind, time_s, fields) -> None:
    if kind == "label":
        engine.observe_label(time_s, fields["delay"], {"carrier": fields["carrier"]})
    else:
        engine.observe(kind, time_s, fields)


def reference(past, now_s, carrier, window) -> float:
    """What a feature means, computed from all events in the plainest way."""
    source, statistic, extent = window
    kind = "label" if "label" in source else "departed"
    seen = [
        (time_s, fields["delay"])
        for each, time_s, fields in past
        if each == kind and (not source.startswith("own") or fields["carrier"] == carrier)
    ]
    if statistic == "decayed_mean":
        weights = [0.5 ** ((now_s - time_s) / 80.0) for time_s, _ in seen]
        total = math.fsum(w * value for w, (_, value) in zip(weights, seen, strict=True))
        return total / math.fsum(weights) if seen and math.fsum(weights) else math.nan
    if statistic == "distinct" and extent == "last":
        return len({value for _, value in seen[-4:]})  # as they came
    inside = sorted((each for each in seen if each[0] <= now_s), key=lambda each: each[0])
    span_s = {"long": 1000.0, "short": 50.0}.get(extent, 0.0)
    inside = [e for e in inside if now_s - span_s < e[0]] if span_s else inside[-4:]
    values = [value for _, value in inside]
    if statistic in ("count", "sum", "rate", "distinct"):
        return {
            "count": len(values),
            "sum": math.fsum(values),
            "rate": len(values) / (span_s or 1.0),
            "distinct": len(set(values)),
        }[statistic]
    if not values:
        return FILL
    return {
        "mean": lambda: math.fsum(values) / len(values),
        "std": lambda: statistics.pstdev(values),
        "min": lambda: min(values),
        "max": lambda: max(values),
        "last": lambda: values[-1],
        "time_since_last": lambda: now_s - inside[-1][0],
    }[statistic]()


@given(steps)
def test_every_statistic_equals_the_reference(steps):
    engine, past, newest_s = Engine(SPEC, lateness_s=LATENESS_S), [], -math.inf
    for kind, time_s, fields in timed(steps):
        if kind != "ask":
            observe(engine, kind, time_s, fields)
            past.append((kind, time_s, fields))
            newest_s = max(newest_s, time_s)
            continue
        vector = engine.vector(time_s, fields)
        assert vector.dtype == np.float32
        for value, window in zip(vector.tolist(), ALL_WINDOWS, strict=True):
            if window[1] in ("distinct", "decayed_mean") and time_s < newest_s:
                continue  # they answer as of the newest entry
            expected = reference(past, time_s, fields["carrier"], window)
            if not math.isnan(expected):  # all weights have faded to nothing
                assert value == pytest.approx(expected, rel=1e-6, abs=2e-5), window


@given(steps)
def test_many_at_one_time_have_the_bits_that_each_has_alone(steps):
    spec = Spec.from_toml(SPEC_OF_ALL_KINDS)
    engine, newest_s = Engine(spec, lateness_s=LATENESS_S), 1.4e9
    for kind, time_s, fields in timed(steps):
        observe(engine, kind, time_s, fields)
        newest_s = max(newest_s, time_s)
    many = [
        {"carrier": carrier, "delay": delay}
        for carrier in ("AA", "UA", "AA", "ZZ")
        for delay in (-3.0, 1e9)
    ]

    together = engine.packed_many(newest_s, many)

    assert together == [engine.packed(newest_s, fields) for fields in many]
    assert engine.packed_many(newest_s, []) == []


def test_every_statistic_equals_the_reference_after_thousands_were_forgotten():
    chance = random.Random(5)
    engine, past, time_s = Engine(SPEC, lateness_s=LATENESS_S), [], 1.4e9
    for number in range(4000):
        time_s += chance.expovariate(1.0)
        fields = {"carrier": chance.choice(["AA", "UA"]), "delay": chance.gauss(0, 9)}
        kind = chance.choice(["departed", "label"])
        event = (kind, time_s - chance.choice([0.0, 0.0, 0.0, 0.0, 300.0]), fields)
        observe(engine, *event)
        past.append(event)
        if number % 800 == 799:
            for value, window in zip(engine.vector(time_s, fields), ALL_WINDOWS, strict=True):
                expected = reference(past, time_s, fields["carrier"], window)
                assert value == pytest.approx(expected, rel=1e-5, abs=2e-5), window
    assert engine.statistics()["entries"] < 20_000


@given(steps, st.data())
def test_snapshot_and_replay_give_the_same_bits_as_never_stopping(steps, data):
    events = list(timed(steps))
    cut = data.draw(st.integers(0, len(events)))
    engine, restored = Engine(SPEC, lateness_s=LATENESS_S), Engine(SPEC, lateness_s=LATENESS_S)
    for at, (kind, time_s, fields) in enumerate(events):
        if at == cut:
            restored.restore(engine.snapshot())
        for each in (engine, restored) if at >= cut else (engine,):
            observe(each, kind, time_s, fields)
        if at >= cut:
            for asked_s in (time_s, time_s + 30.0, time_s - 3 * LATENESS_S):
                assert restored.packed(asked_s, fields) == engine.packed(asked_s, fields)
    if cut < len(events):
        assert restored.snapshot() == engine.snapshot()


@given(steps)
def test_replaying_the_same_events_gives_the_same_bits_whatever_was_asked_between(steps):
    asked, unasked = Engine(SPEC, lateness_s=LATENESS_S), Engine(SPEC, lateness_s=LATENESS_S)
    for kind, time_s, fields in timed(steps):
        asked.packed(time_s, fields)
        for each in (asked, unasked):
            observe(each, kind, time_s, fields)
    assert asked.snapshot() == unasked.snapshot()


EXACT = declared(
    window
    for window in ALL_WINDOWS
    if window[1] != "decayed_mean" and window[1:] != ("distinct", "last")
)


@given(st.permutations(range(12)))
def test_the_order_of_arrival_does_not_show_in_the_bits_of_exact_statistics(order):
    def state(sequence):
        engine = Engine(EXACT, lateness_s=LATENESS_S)
        for i in sequence:
            fields = {"carrier": "AU"[i % 2] * 2, "delay": 0.1 * i + 1e6 * (i % 3)}
            observe(engine, ("departed", "label")[i % 4 == 3], 20.0 * i, fields)
        asked = [(now_s, {"carrier": name}) for now_s in (150.0, 250.0) for name in ("AA", "UU")]
        late, now = asked[:2], asked[2:]
        plain = [engine.vector(*each)[WITHOUT_DISTINCT].tobytes() for each in late]
        return plain + [engine.packed(*each) for each in now]

    assert state(order) == state(range(12))


WITHOUT_DISTINCT = [i for i, name in enumerate(EXACT.names) if " distinct " not in name]


@given(steps, st.integers(0, 60))
def test_an_engine_of_a_new_spec_goes_on_with_the_windows_that_it_shares(steps, cut):
    some = declared(ALL_WINDOWS[::3])
    columns = [SPEC.names.index(name) for name in some.names]
    old, new = Engine(SPEC, lateness_s=LATENESS_S), Engine(some, lateness_s=LATENESS_S)
    for at, (kind, time_s, fields) in enumerate(timed(steps)):
        if at == cut:
            new.inherit([Engine(SPEC), old])
        for each in (old, new) if at >= cut else (old,):
            observe(each, kind, time_s, fields)
        if at >= cut:
            kept = old.vector(time_s, fields)[columns]
            assert new.packed(time_s, fields) == kept.tobytes()


def test_a_snapshot_needs_no_more_of_a_spec_than_its_windows():
    spec = Spec.from_toml("""
version = 1
[tables.facts]
version = "1"
columns = ["size"]
rows = { AA = [3.0] }
[[features]]
name = "size"
lookup = { table = "facts", key = "carrier", column = "size" }
[[features]]
name = "count"
bounds = [0.0, 1.0]
window = { over = "departed", statistic = "count", span_s = 100.0 }
""")
    engine = Engine(spec)
    engine.observe("departed", 1.0, {})
    engine.observe("departed", 2.0, {})
    held = Engine(Spec.from_json(spec.windows_json()))
    held.restore(engine.snapshot())
    assert held.vector(3.0, {}).tolist() == [2.0]
    assert "facts" not in spec.windows_json()
    served = Engine(spec)
    served.inherit([held])
    assert served.vector(3.0, {"carrier": "AA"}).tolist() == [3.0, 1.0]
    assert served.snapshot() == engine.snapshot()


def test_a_spec_without_windows_has_nothing_to_keep():
    spec = Spec.from_toml('version = 1\n[[features]]\nname = "a"\nfield = "a"')
    assert spec.windows_json() == ""
    assert Engine(spec).statistics()["tables"] == 0


def test_what_a_label_has_to_be_observed_with_is_said():
    assert Engine(SPEC).label_fields == {"carrier"}
    assert Engine(SPEC).sees_labels
    plain = Engine(declared([("label", "mean", "long")]))
    assert (plain.label_fields, plain.sees_labels) == (frozenset(), True)
    without = Engine(declared([("own", "mean", "long")]))
    assert (without.label_fields, without.sees_labels) == (frozenset(), False)
    without.observe_label(1.0, 1.0, {})
    assert without.statistics()["entries"] == 0


def test_asking_changes_nothing():
    engine = Engine(SPEC)
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": 3})
    before = engine.snapshot()
    engine.vector(1e9, {"carrier": "UA"})
    assert engine.snapshot() == before


def test_a_window_excludes_its_far_end_and_includes_its_near_one():
    engine = Engine(declared([("all", "count", "long")]))
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": 3})
    counts = [engine.vector(now_s, {})[0] for now_s in (99.9, 100, 1099.9, 1100)]
    assert counts == [0, 1, 1, 0]


def test_a_window_skips_an_event_without_its_field_or_with_text_in_it():
    spec = Spec.from_toml("""
version = 1
[[features]]
name = "count"
window = { over = "departed", statistic = "count", span_s = 9.0 }
[[features]]
name = "sum"
window = { over = "departed", statistic = "sum", value = "delay", span_s = 9.0 }
[[features]]
name = "own"
window = { over = "departed", statistic = "sum", key = "carrier", value = "delay", span_s = 9.0 }
[[features]]
name = "distinct"
window = { over = "departed", statistic = "distinct", value = "delay", span_s = 9.0 }
""")
    engine = Engine(spec)
    engine.observe("departed", 100.0, {"delay": 3})
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": "three"})
    engine.observe("departed", 100.0, {"carrier": "AA"})
    assert engine.vector(100.0, {"carrier": "AA"}).tolist() == [3, 3, 0, 2]


def test_no_value_however_wild_makes_a_window_answer_what_is_not_finite():
    engine = Engine(SPEC)
    for time_s, x in enumerate((1e308, 1e308, -1e308, 2**63 - 1, -0.0)):
        observe(engine, "departed", float(time_s), {"carrier": "AA", "delay": x})
        observe(engine, "label", float(time_s), {"carrier": "AA", "delay": x})
    for now_s in (5.0, 1e308, -1e308):
        assert np.isfinite(engine.vector(now_s, {"carrier": "AA"})).all()


def test_every_damaged_snapshot_is_refused_and_changes_nothing():
    engine = Engine(declared([("own", "mean", "long"), ("all", "distinct", "long")]))
    engine.observe("departed", 100.0, {"carrier": "AA", "delay": 3})
    whole = engine.snapshot()
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for damaged in [*flipped, *(whole[:i] for i in range(len(whole))), whole + b"x"]:
        with pytest.raises(RequestError) as caught:
            engine.restore(damaged)
        assert caught.value.code == "bad_snapshot"
    assert engine.snapshot() == whole


def test_a_snapshot_of_other_windows_is_refused():
    with pytest.raises(RequestError) as caught:
        Engine(SPEC).restore(Engine(declared(ALL_WINDOWS[:1])).snapshot())
    assert caught.value.code == "other_spec"


def test_memory_is_bounded_however_many_keys_come():
    engine = Engine(declared([("own", "mean", "long"), ("own", "decayed_mean", "half_life_s = 9")]))
    for i in range(10_000):
        engine.observe("departed", 100.0, {"carrier": f"X{i}", "delay": 1})
    counted = engine.statistics()
    assert counted["keys"] == 2 * 4096
    assert counted["keys_evicted"] == 2 * (10_000 - 4096)


def test_a_kept_function_sees_what_is_restored_and_inherited():
    engine, other = Engine(SPEC), Engine(SPEC)
    packed, nothing = engine.packed, engine.packed(101.0, {"carrier": "AA"})
    other.observe("departed", 100.0, {"carrier": "AA", "delay": 3})
    engine.restore(other.snapshot())
    assert packed(101.0, {"carrier": "AA"}) == other.packed(101.0, {"carrier": "AA"}) != nothing

"""History: what is carried, restored or rebuilt, and what waits for its label."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import RequestError
from edge_runtime.features.engine import Engine
from edge_runtime.features.spec import Spec
from edge_runtime.inference import history
from edge_runtime.inference.package import Interface, Kind, PackageInfo

NOW_S = 1_360_000_000.0
SUM = 'over = "departed", value = "delay", statistic = "sum", span_s = {}'
LATEST = 'over = "departed", value = "delay", statistic = "mean", span_events = {}'
RATE = 'over = "label", key = "carrier", statistic = "mean", span_s = 600.0'
KINDS = {
    "scheduled": Kind(predicts=True, fields={"carrier": "str"}),
    "departed": Kind(predicts=False, fields={"carrier": "str", "delay": "float"}),
}


def info(*windows, lateness_s=100.0):
    parts = [
        f'[[features]]\nname = "w{n}"\nwindow = {{ {rest} }}\n' for n, rest in enumerate(windows)
    ]
    interface = Interface("toy", KINDS, "event", 1e5, lateness_s, "late")
    spec = Spec.from_toml("version = 1\n" + "".join(parts))
    return PackageInfo("toy", interface, spec, None, None, 0.0, {})


def engine(of, records=()):
    made = Engine(of.spec, lateness_s=of.interface.lateness_s_max)
    for kind, time_s, fields in records:
        history.see(made, kind, time_s, fields)
    return made


def departed(time_s, delay=1.0):
    return "departed", NOW_S + time_s, {"carrier": "UA", "delay": delay}


def label(time_s, seq, value=1.0):
    fields = {"carrier": "UA", "label.value": value, "label.epoch": 1, "label.seq": seq}
    return "label", NOW_S + time_s, fields


def by_hash(*infos):
    return {each.spec.hash: each for each in infos}


@pytest.mark.parametrize(
    ("wanted", "is_new"),
    [
        (SUM.format(600.0), False),
        (SUM.format(60.0), False),
        (SUM.format(6000.0), True),
        (SUM.format(600.0).replace("delay", "extra"), True),
        (SUM.format(600.0).replace("departed", "scheduled"), True),
        (SUM.format(600.0) + ', key = "carrier"', True),
        (LATEST.format(20), True),
        (SUM.format(600.0).replace("sum", "std"), False),
        (SUM.format(600.0).replace("sum", "distinct"), True),
    ],
)
def test_a_window_is_new_where_what_is_known_does_not_reach_as_far(wanted, is_new):
    known, release = engine(info(SUM.format(600.0))), info(wanted)
    assert bool(history.with_new_windows([release], [known])) is is_new


def test_a_window_is_known_if_any_engine_keeps_it():
    release = info(SUM.format(600.0), RATE)
    parts = [engine(info(SUM.format(700.0))), engine(info(RATE))]
    assert history.with_new_windows([release], parts) == {}
    assert history.with_new_windows([release], parts[:1]) == by_hash(release)
    assert history.with_new_windows([release, info(RATE)], []) == by_hash(release, info(RATE))


@given(
    steps=st.lists(st.tuples(st.integers(-300, 200), st.integers(-9, 9)), max_size=60),
    lateness_s=st.sampled_from([0.0, 50.0, 250.0]),
)
def test_what_is_rebuilt_is_what_streaming_would_have_given(steps, lateness_s):
    release = info(SUM.format(900.0), LATEST.format(5), lateness_s=lateness_s)
    live, newest_s, records = engine(release), -float("inf"), []
    for step_s, delay in steps:
        time_s = (NOW_S if newest_s < 0 else newest_s) + step_s
        records.append(("departed", time_s, {"carrier": "UA", "delay": float(delay)}))
        if time_s >= newest_s - lateness_s:
            live.observe(*records[-1])
        newest_s = max(newest_s, time_s)
    rebuilt = history.rebuild(by_hash(release), iter(records))
    assert rebuilt[release.spec.hash].snapshot() == live.snapshot()


def test_labels_in_the_log_are_seen_as_labels():
    release = info(RATE)
    rebuilt = history.rebuild(by_hash(release), iter([departed(0), label(1, 1), label(2, 2, 0.0)]))
    values = rebuilt[release.spec.hash].vector(NOW_S + 3, {"carrier": "UA"})
    assert values.tolist() == [0.5]


def test_an_engine_of_the_same_spec_goes_on_as_it_is():
    release = info(SUM.format(600.0))
    known = {release.spec.hash: engine(release, [departed(0)])}
    assert history.engines_for([release], known, {}) == known


def test_another_lateness_makes_a_new_engine_that_takes_over_what_is_known():
    release = info(SUM.format(600.0))
    known = {release.spec.hash: engine(release, [departed(0, 3.0)])}
    patient = replaced(release, lateness_s_max=500.0)
    made = history.engines_for([patient], known, {})[release.spec.hash]
    assert (made.lateness_s, made.vector(NOW_S, {}).tolist()) == (500.0, [3.0])


def test_engines_share_their_tables_where_windows_and_lateness_are_the_same():
    one, two = info(SUM.format(600.0), LATEST.format(5)), info(SUM.format(600.0))
    other = msgspec.structs.replace(one, spec=with_a_field(one.spec))
    known = {one.spec.hash: engine(one, [departed(0, 3.0)])}
    made = history.engines_for([one, other, two], known, {})
    assert [made[each.spec.hash].spec for each in (one, other, two)] == [
        *(one.spec, other.spec, two.spec),
    ]
    first, second, third = made.values()
    assert first is known[one.spec.hash]
    assert second.tables is first.tables
    assert not {*map(id, third.tables.values())} & {*map(id, first.tables.values())}
    assert history.with_tables_of_their_own(made.values()) == [first, third]
    patient = replaced(other, lateness_s_max=500.0)
    [apart] = history.engines_for([patient], made, {}).values()
    assert apart.tables is not first.tables
    assert apart.vector(NOW_S, {"carrier": "UA"}).tolist() == [3.0, 3.0, 0.0]


def with_a_field(spec):
    field = {"name": "carrier", "field": "carrier", "vocabulary": ["AA"]}
    text = msgspec.json.decode(spec.to_json())
    return Spec.from_json(msgspec.json.encode(text | {"features": [*text["features"], field]}))


def replaced(release, **changes):
    interface = msgspec.structs.replace(release.interface, **changes)
    return msgspec.structs.replace(release, interface=interface)


def test_what_is_new_comes_from_the_rebuilt_and_the_rest_is_carried():
    per_carrier = 'over = "departed", key = "carrier", statistic = "count", span_s = 600.0'
    old, release = info(SUM.format(600.0)), info(SUM.format(600.0), per_carrier)
    records = [departed(n, float(n)) for n in range(8)]
    known = {old.spec.hash: engine(old, records)}
    rebuilt = history.rebuild(by_hash(release), iter(records[4:]))  # the log has lost the first
    made = history.engines_for([release], known, rebuilt)[release.spec.hash]
    assert made.vector(NOW_S + 8, {"carrier": "UA"}).tolist() == [sum(range(8)), 4]


def test_an_engine_comes_back_of_its_windows_and_garbage_is_named():
    release = info(SUM.format(600.0))
    before = engine(release, [departed(0), departed(1)])
    text = release.spec.windows_json()
    [after] = history.restored([(text, before.snapshot())], 100.0).values()
    assert after.snapshot() == before.snapshot()
    for damaged in (("{}", before.snapshot()), (text, b""), (text, before.snapshot()[:-1])):
        with pytest.raises(RequestError, match="bad_snapshot"):
            history.restored([damaged], 100.0)


@pytest.fixture
def answered():
    answered = history.Answered()
    answered.serve([engine(info(RATE))])
    return answered


def test_a_prediction_waits_for_its_label_with_the_fields_that_windows_need(answered):
    answered.remember((1, 7), {"carrier": "UA", "distance": 3.0})
    fields = answered.record((1, 7), 1.0)
    assert fields == {"carrier": "UA", "label.value": 1.0, "label.epoch": 1, "label.seq": 7}
    assert answered.record((1, 7), 0.0) is not None
    answered.forget(fields)
    assert answered.record((1, 7), 1.0) is None


def test_a_prediction_that_nobody_made_has_nothing_to_log(answered):
    assert answered.record((1, 1), 1.0) is None
    answered.forget({"label.epoch": 1, "label.seq": 1})


def test_nothing_waits_where_no_window_is_over_labels():
    answered = history.Answered()
    for engines in ([], [engine(info(SUM.format(1.0)))]):
        answered.serve(engines)
        answered.remember((1, 1), {"carrier": "UA"})
        assert answered.record((1, 1), 1.0) is None


def test_a_window_over_all_labels_needs_no_field():
    answered = history.Answered()
    answered.serve([engine(info('over = "label", statistic = "count", span_s = 9.0'))])
    answered.remember((1, 1), {"carrier": "UA"})
    assert answered.record((1, 1), 1.0).keys() == {"label.value", "label.epoch", "label.seq"}


def test_the_oldest_is_forgotten_beyond_the_bound_and_counted(answered):
    for seq in range(history.ANSWERED_MAX + 2):
        answered.remember((1, seq), {"carrier": "UA"})
    assert answered.forgotten == 2
    assert answered.record((1, 1), 1.0) is None
    assert answered.record((1, 2), 1.0) is not None

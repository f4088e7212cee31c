"""Asking many at once, and from many threads: as if one event came after the other."""

from __future__ import annotations

import asyncio
import threading

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, LogConfig
from edge_runtime.errors import HeadwaterError, PackageError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.plan import choose
from edge_runtime.runtime import Event, Prediction, Runtime
from edge_runtime.wire import codec
from edge_runtime.wire.messages import ObservationRecord, PredictionRecord

NOW_S = 1_360_000_000.0
OWN_FEATURES = """
version = 1
[[features]]
name = "distance"
field = "distance"
[[features]]
name = "asked"
window = { over = "scheduled", statistic = "count", span_s = 600.0, key = "carrier" }
[[features]]
name = "far"
window = { over = "scheduled", value = "distance", statistic = "sum", span_s = 600.0 }
[[features]]
name = "delay"
window = { over = "departed", value = "delay", statistic = "mean", span_s = 600.0 }
"""


def scheduled(time_s, carrier="UA", distance=998.0):
    return Event("scheduled", time_s, {"carrier": carrier, "distance": distance})


def departed(time_s, delay=1.0):
    return Event("departed", time_s, {"carrier": "UA", "delay": delay})


def stream(count, seed=1):
    """Predicting events that feed their own windows, some of them late, too late, or wrong."""
    random = np.random.default_rng(seed)
    events = []
    for step in range(count):
        time_s = NOW_S + step * 5 - float(random.choice([0, 0, 300, 8000]))
        event = scheduled(time_s, str(random.choice(["UA", "AA"])), float(random.integers(3000)))
        events.append(event)
        if step % 7 == 3:
            events.append(Event("scheduled", time_s, {"carrier": "UA"}))
        if step % 11 == 5:
            events.append(departed(time_s))
    return events


@pytest.fixture
def config(tmp_path):
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
    )


@pytest.fixture
def open_runtime(config, tmp_path, plan_of):
    """`open_runtime(*arms)` opens one more device that serves them."""
    opened = []

    def open_runtime(*arms, **changes):
        folder = tmp_path / f"state-{len(opened)}"
        own = msgspec.structs.replace(config, state_dir=folder, **changes)
        runtime = Runtime.open(own, clock=ManualClock(NOW_S), step=lambda: 1)
        opened.append(runtime)
        runtime.swap("toy", arms, plan_of(*arms))
        return runtime

    yield open_runtime
    for runtime in opened:
        runtime.close()


@pytest.fixture
def load(write_package):
    """An arm over windows of its own kind; it may fail where the distance is 2500 or more."""

    def load(bias=0.0, name="stable", weight=1.0, *, fails=False):
        path, _ = write_package(bias=bias, spec=Spec.from_toml(OWN_FEATURES))
        if fails:
            let_fail(path)
        return load_arm(path, None, name, f"r{bias:g}", weight)

    return load


def let_fail(path):
    """Add a look-up that changes no answer and fails where the first feature is 2500 or more."""
    model = onnx.load(path)
    nodes, last = model.graph.node, model.graph.node[-1]
    cells = {"first": np.array([0]), "cells": np.zeros(2500, np.float32)}
    for name, value in cells.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    logit, _ = last.input[0], nodes.pop()
    nodes.append(helper.make_node("Gather", ["features", "first"], ["f"], axis=1))
    nodes.append(helper.make_node("Cast", ["f"], ["at"], to=onnx.TensorProto.INT64))
    nodes.append(helper.make_node("Gather", ["cells", "at"], ["nothing"]))
    nodes.append(helper.make_node("Add", [logit, "nothing"], ["same"]))
    nodes.append(helper.make_node("Sigmoid", ["same"], ["probability"]))
    path.write_bytes(model.SerializeToString())


def logged(runtime):
    asyncio.run(runtime.log.wait_durable("event", runtime.log.handed_out("event")))
    return [codec.decode_record(data) for _, _, data in runtime.log.tail("event", 0, 0)]


def windows(runtime):
    return runtime._members["toy"].pipeline.snapshot()


def each_alone(runtime, events):
    found = []
    for event in events:
        try:
            found.append(runtime.predict("toy", event))
        except HeadwaterError as error:
            found.append(error)
    return found


def assert_alike(expected, actual):
    assert len(expected) == len(actual)
    for alone, together in zip(expected, actual, strict=True):
        if isinstance(alone, HeadwaterError):
            assert (alone.code, alone.message) == (together.code, together.message)
        else:
            assert (alone.id, alone.release, alone.arm) == (
                *(together.id, together.release, together.arm),
            )
            np.testing.assert_allclose(alone.outputs, together.outputs, atol=1e-6)


def test_many_at_once_are_what_one_after_the_other_is(open_runtime, load):
    arms = load(0.0, weight=0.7), load(1.0, "canary", 0.3)
    one, many = open_runtime(*arms), open_runtime(*arms)
    events = stream(150)
    alone, together = each_alone(one, events), []
    for start in range(0, len(events), 40):
        together += many.predict_many("toy", events[start : start + 40])
    assert_alike(alone, together)
    assert {each.arm for each in together if isinstance(each, Prediction)} == {"stable", "canary"}
    assert windows(one) == windows(many)
    for first, second in zip(logged(one), logged(many), strict=True):
        assert (first.fields, first.features) == (second.fields, second.features)
        assert (first.time_s, first.propensity) == (second.time_s, second.propensity)
    assert one.counters() == many.counters()
    assert many.latencies()["predict"].total == many.counters()["predictions"]


def test_none_at_once_is_no_error(open_runtime, load):
    runtime = open_runtime(load())
    assert runtime.predict_many("toy", []) == []
    with pytest.raises(HeadwaterError, match="unknown_family"):
        runtime.predict_many("other", [])


def labelled(runtime, family):
    runtime.label("EWR.1.1", 1.0, family=family)


def predicted_async(runtime, family):
    asyncio.run(runtime.predict_async(family, scheduled(NOW_S)))


def inferred_async(runtime, family):
    asyncio.run(runtime.infer_async(family, {}))


@pytest.mark.parametrize(
    "ask",
    [
        lambda runtime, family: runtime.predict(family, scheduled(NOW_S)),
        lambda runtime, family: runtime.predict_many(family, [scheduled(NOW_S)] * 3),
        predicted_async,
        lambda runtime, family: runtime.observe(family, departed(NOW_S)),
        labelled,
        lambda runtime, family: runtime.infer(family, {}),
        lambda runtime, family: runtime.infer_many(family, [{}]),
        inferred_async,
    ],
)
def test_a_family_that_is_not_served_counts_once_whatever_is_asked(open_runtime, load, ask):
    runtime = open_runtime(load())
    with pytest.raises(HeadwaterError, match="unknown_family"):
        ask(runtime, "other")
    counters = runtime.counters()
    assert (counters["request_errors"], counters["requests_dropped"]) == (1, 0)


@pytest.mark.parametrize(
    "strange",
    [None, {"carrier": b"x"}, {"carrier": "\ud800", "distance": 1.0}, {"distance": 1 << 70}],
)
def test_fields_that_no_record_can_carry_are_refused_in_their_place(open_runtime, load, strange):
    runtime = open_runtime(load())
    if strange is None:
        strange = {"carrier": "UA", "distance": np.float32(1)}
    first, bad, last = runtime.predict_many(
        "toy", [scheduled(NOW_S), Event("scheduled", NOW_S, strange), scheduled(NOW_S)]
    )
    assert (first.id, last.id) == ("EWR.1.1", "EWR.1.2")
    assert bad.code in {"wrong_type", "out_of_range"}


def test_where_a_row_fails_the_others_are_answered_and_the_log_says_what_moved(open_runtime, load):
    runtime = open_runtime(load(fails=True))
    events = [scheduled(NOW_S + n, distance=4000.0 * (n % 3 == 1)) for n in range(9)]
    found = runtime.predict_many("toy", events)
    kinds = [type(each) for each in found]
    assert kinds == [Prediction, PackageError, Prediction] * 3
    assert [type(each) for each in logged(runtime)] == [
        ObservationRecord if n % 3 == 1 else PredictionRecord for n in range(9)
    ]
    assert [each.id for each in found if type(each) is Prediction][-1] == "EWR.1.9"
    assert runtime.counters()["requests_dropped"] == 3
    before = windows(runtime)
    with pytest.raises(PackageError, match="run_failed"):
        runtime.predict("toy", scheduled(NOW_S + 10, distance=4000.0))
    assert windows(runtime) == before
    assert runtime.log.handed_out("event") == 9


def test_a_full_log_answers_all(open_runtime, load):
    runtime = open_runtime(load(), log=LogConfig(bytes_max_mb=1))
    events = [scheduled(NOW_S + n, carrier="x" * 900) for n in range(2000)]
    found = runtime.predict_many("toy", events)
    assert [type(each) for each in found] == [Prediction] * 2000
    twin = open_runtime(load())
    each_alone(twin, events)
    assert windows(twin) == windows(runtime)


def test_many_threads_get_ids_of_their_own_and_a_log_that_is_whole(open_runtime, load):
    runtime = open_runtime(load(0.0, weight=0.5), load(1.0, "canary", 0.5))
    found, together = [[] for _ in range(8)], threading.Barrier(8)

    def ask(mine):
        together.wait(30)
        for n in range(0, 60, 3):
            mine.append(runtime.predict("toy", scheduled(NOW_S + n)))
            mine += runtime.predict_many("toy", [scheduled(NOW_S + n), scheduled(NOW_S + n)])
            runtime.observe("toy", departed(NOW_S + n))
            runtime.label(mine[-1].id, 1.0)

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    answers = {answer.id: answer for mine in found for answer in mine}
    assert len(answers) == 8 * 60
    records = logged(runtime)
    assert len(records) == 8 * 80
    for seq, record in enumerate(records, start=1):
        if isinstance(record, PredictionRecord):
            answer = answers.pop(f"EWR.1.{seq}")
            assert (answer.outputs, answer.arm) == (record.scored[0].outputs, record.scored[0].arm)
            assert answer.arm == ["stable", "canary"][choose([0.5, 0.5], "s|EWR", 1, seq)]
    assert answers == {}
    assert windows(runtime) == replayed(open_runtime, runtime)
    assert runtime.counters()["labels"] == 8 * 20


def replayed(open_runtime, runtime):
    """The windows of a device that reads the log of `runtime` and nothing else."""
    twin = open_runtime(*runtime._members["toy"].pipeline.slot.arms)
    pipeline = twin._members["toy"].pipeline
    for record in logged(runtime):
        pipeline.replay(record.kind, record.time_s, record.fields)
    return pipeline.snapshot()


def test_a_light_model_is_answered_on_the_loop(open_runtime, load):
    runtime = open_runtime(load())
    answer = asyncio.run(runtime.predict_async("toy", scheduled(NOW_S)))
    assert answer.id == "EWR.1.1"
    assert runtime.statistics()["worker"]["jobs"] == 0

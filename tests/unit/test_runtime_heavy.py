"""Models too heavy for the event loop: answered on the worker, logged and counted as all others."""

from __future__ import annotations

import asyncio
import threading

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, InferenceConfig
from edge_runtime.errors import CapacityError, PackageError, RequestError
from edge_runtime.features.spec import Spec
from edge_runtime.inference.slot import load_arm
from edge_runtime.rollout.plan import choose
from edge_runtime.runtime import Event, Runtime
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec
from edge_runtime.wire.messages import PredictionRecord

NOW_S = 1_360_000_000.0
OWN_FEATURES = """
version = 1
[[features]]
name = "distance"
field = "distance"
[[features]]
name = "asked"
window = { over = "scheduled", statistic = "count", span_s = 600.0, key = "carrier" }
"""


def scheduled(step, carrier="UA"):
    return Event("scheduled", NOW_S + step, {"carrier": carrier, "distance": 10.0 * step})


@pytest.fixture
def config(tmp_path):
    return EdgeConfig(
        device="EWR",
        families=["toy"],
        state_dir=tmp_path / "state",
        socket=tmp_path / "edge.sock",
        inference=InferenceConfig(batch_rows_max=8, batch_delay_us=1000),
    )


@pytest.fixture
def runtime(config):
    with Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1) as runtime:
        yield runtime


@pytest.fixture
def load(write_package):
    def load(bias=0.0, name="stable", weight=1.0, *, features=OWN_FEATURES, **options):
        path, _ = write_package(bias=bias, spec=Spec.from_toml(features))
        make_heavy(path, **options)
        return load_arm(path, None, name, f"r{bias:g}", weight)

    return load


def make_heavy(path, *, mixes=False, fails=False):
    """Give the model milliseconds of work that change no answer; one that mixes its rows answers
    otherwise where there are three of them, one that fails does so where a first feature is large.
    """
    model = onnx.load(path)
    nodes, last = model.graph.node, model.graph.node[-1]
    shifts = np.zeros(65, np.float32)
    shifts[3] = mixes
    cells = {"zero": np.zeros((1, 1)), "wide": np.ones((1, 10_000)), "shifts": shifts}
    for name, value in cells.items():
        tensor = onnx.numpy_helper.from_array(value.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    logit, _ = last.input[0], nodes.pop()
    nodes.append(helper.make_node("MatMul", [logit, "wide"], ["a0"]))
    nodes.extend(helper.make_node("Asinh", [f"a{i}"], [f"a{i + 1}"]) for i in range(4))
    nodes.append(helper.make_node("ReduceMax", ["a4"], ["most"], axes=[1], keepdims=1))
    nodes.append(helper.make_node("Mul", ["most", "zero"], ["nothing"]))
    nodes.append(helper.make_node("Add", [logit, "nothing"], ["same"]))
    nodes.append(helper.make_node("Shape", ["features"], ["rows"], start=0, end=1))
    nodes.append(helper.make_node("Gather", ["shifts", "rows"], ["shift"]))
    nodes.append(helper.make_node("Add", ["same", "shift"], ["shifted"]))
    indices = np.zeros(1, np.int64), np.zeros(2500 if fails else 1 << 16, np.float32)
    for name, value in zip(("first", "cells"), indices, strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    nodes.append(helper.make_node("Gather", ["features", "first"], ["feature"], axis=1))
    nodes.append(helper.make_node("Cast", ["feature"], ["at"], to=onnx.TensorProto.INT64))
    nodes.append(helper.make_node("Gather", ["cells", "at"], ["none"]))
    nodes.append(helper.make_node("Add", ["shifted", "none"], ["sum_of_all"]))
    nodes.append(helper.make_node("Sigmoid", ["sum_of_all"], ["probability"]))
    path.write_bytes(model.SerializeToString())


def logged(runtime):
    asyncio.run(runtime.log.wait_durable("event", runtime.log.handed_out("event")))
    return [codec.decode_record(data) for _, _, data in runtime.log.tail("event", 0, 0)]


def windows(runtime):
    return runtime._members["toy"].pipeline.snapshot()


async def all_of(runtime, events, **options):
    asks = [runtime.predict_async("toy", each, **options) for each in events]
    return await asyncio.gather(*asks, return_exceptions=True)


def test_answers_come_of_shared_runs_and_each_is_logged_once(runtime, load, plan_of):
    arms = load(0.0, weight=0.6), load(1.0, "canary", 0.4)
    runtime.swap("toy", arms, plan_of(*arms))
    assert not runtime.model("toy").inline
    answers = {each.id: each for each in asyncio.run(all_of(runtime, map(scheduled, range(40))))}
    worker = runtime.statistics()["worker"]
    assert (worker["jobs"], worker["runs"] <= 20) == (40, True)
    records = logged(runtime)
    assert len(answers) == len(records) == 40
    for seq, record in enumerate(records, start=1):
        answer = answers[f"EWR.1.{seq}"]
        assert answer.arm == ["stable", "canary"][choose([0.6, 0.4], "s|EWR", 1, seq)]
        assert answer.outputs == record.scored[0].outputs
        for scored in record.scored:
            bias = float(scored.release == "r1")
            assert scored.outputs == [pytest.approx(expected(record.features, bias), abs=1e-6)]
    assert runtime.counters()["predictions"] == runtime.latencies()["predict"].total == 40


def expected(features, bias=0.0):
    return 1 / (1 + np.exp(-(np.frombuffer(features, "<f4").sum() / 1000 + bias)))


def test_the_windows_are_what_the_log_says_in_its_order(runtime, load, config, tmp_path, plan_of):
    arm = load()
    runtime.swap("toy", [arm], plan_of(arm))

    async def mixed():
        asks = asyncio.create_task(all_of(runtime, map(scheduled, range(20))))
        await asyncio.sleep(0)
        for step in range(5):
            runtime.predict("toy", scheduled(step, "AA"))
        await asks

    asyncio.run(mixed())
    again = msgspec.structs.replace(config, state_dir=tmp_path / "again")
    with Runtime.open(again, clock=ManualClock(NOW_S), step=lambda: 1) as twin:
        twin.swap("toy", [arm], plan_of(arm))
        for record in logged(runtime):
            twin._members["toy"].pipeline.replay(record.kind, record.time_s, record.fields)
        assert windows(twin) == windows(runtime)
    assert runtime.log.handed_out("event") == 25


def test_what_is_refused_or_given_up_leaves_no_trace(runtime, load, plan_of):
    arm = load()
    runtime.swap("toy", [arm], plan_of(arm))
    runtime.predict("toy", scheduled(0))
    before = windows(runtime)

    async def ask():
        late = await all_of(runtime, [scheduled(1), scheduled(2)], timeout_s=0)
        assert [each.code for each in late] == ["deadline_exceeded"] * 2
        [wrong] = await all_of(runtime, [Event("scheduled", NOW_S, {"carrier": "UA"})])
        assert wrong.code == "missing_field"
        gone = asyncio.create_task(runtime.predict_async("toy", scheduled(3)))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(ask())
    assert windows(runtime) == before
    assert runtime.log.handed_out("event") == 1
    counters = runtime.counters()
    assert (counters["requests_dropped"], counters["request_errors"]) == (2, 1)
    assert runtime.statistics()["families"]["toy"]["leases"] == 0


def test_a_full_queue_refuses_by_name_and_logs_nothing(config, load, plan_of):
    tight = msgspec.structs.replace(config, inference=InferenceConfig(queue_max=1))
    arm = load()
    with Runtime.open(tight, clock=ManualClock(NOW_S), step=lambda: 1) as runtime:
        runtime.swap("toy", [arm], plan_of(arm))
        found = asyncio.run(all_of(runtime, map(scheduled, range(20))))
        refused = [each for each in found if isinstance(each, CapacityError)]
        assert {each.code for each in refused} == {"overloaded"}
        assert runtime.log.handed_out("event") == 20 - len(refused) > 0


def test_a_swap_lets_what_was_asked_be_answered_by_what_it_was_asked_of(runtime, load, plan_of):
    first, second = load(0.0), load(2.0)
    runtime.swap("toy", [first], plan_of(first))

    async def ask():
        asks = asyncio.create_task(all_of(runtime, map(scheduled, range(5))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await runtime.adopt("toy", [second], plan_of(second))
        after = await runtime.predict_async("toy", scheduled(9))
        return await asks, after

    answers, after = asyncio.run(ask())
    assert [each.release for each in answers] == ["r0"] * 5
    assert after.release == "r2"
    runtime._members["toy"].pipeline.slot.settle()
    assert runtime.statistics()["families"]["toy"]["draining"] == 0


def test_across_a_swap_the_arm_is_drawn_as_the_plan_says_that_it_was_asked_under(
    runtime, load, plan_of
):
    arms = {
        salt: (load(bias, weight=0.5), load(bias + 0.5, "canary", 0.5))
        for salt, bias in (("old", 0.0), ("new", 1.0))
    }
    plans = {
        salt: msgspec.structs.replace(plan_of(*pair), salt=salt) for salt, pair in arms.items()
    }
    runtime.swap("toy", arms["old"], plans["old"])

    async def ask():
        asks = asyncio.create_task(all_of(runtime, map(scheduled, range(40))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        runtime.swap("toy", arms["new"], plans["new"])
        after = all_of(runtime, map(scheduled, range(40, 60)))
        return await asyncio.gather(asks, after)

    answers = asyncio.run(ask())
    assert runtime.log.handed_out("event") == 60
    records = logged(runtime)
    for salt, found in zip(("old", "new"), answers, strict=True):
        for answer in found:
            seq = int(answer.id.rpartition(".")[2])
            drawn = arms[salt][choose([0.5, 0.5], f"{salt}|EWR", 1, seq)]
            assert (answer.release, answer.arm) == (drawn.release, drawn.name)
            assert records[seq - 1].scored[0].release == drawn.release
        assert {each.arm for each in found} == {"stable", "canary"}


@pytest.mark.parametrize("where", ["worker", "loop", "caller"])
def test_an_answer_that_failed_is_counted_wherever_it_ran(runtime, load, where, plan_of):
    arm = load(fails=True)
    runtime.swap("toy", [arm], plan_of(arm))
    far = scheduled(300)
    if where == "worker":
        [error] = asyncio.run(all_of(runtime, [far]))
    elif where == "loop":
        [error] = runtime.predict_many("toy", [far])
    else:
        with pytest.raises(PackageError) as caught:
            runtime.predict("toy", far)
        error = caught.value
    assert error.code == "run_failed"
    assert runtime.statistics()["families"]["toy"]["run_failures"] >= 1
    assert runtime.counters()["requests_dropped"] == 1
    assert asyncio.run(all_of(runtime, [scheduled(1)]))[0].release == "r0"


def test_beside_swaps_a_model_only_ever_gets_its_own_features(runtime, load, plan_of):
    narrow = OWN_FEATURES[: OWN_FEATURES.rindex("[[features]]")]
    arms = [load(0.0), load(1.0, features=narrow)]
    sizes = {arm.info.spec.hash: arm.info.spec.size for arm in arms}
    runtime.swap("toy", arms[:1], plan_of(arms[0]))
    done = threading.Event()

    def swap():
        turn = 0
        while not done.is_set():
            turn += 1
            runtime.swap("toy", [arms[turn % 2]], plan_of(arms[turn % 2]))

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        answers = asyncio.run(all_of(runtime, map(scheduled, range(200))))
    finally:
        done.set()
        thread.join(30)
    assert [each for each in answers if isinstance(each, Exception)] == []
    records = logged(runtime)
    assert len(records) == 200
    for record in records:
        assert len(record.features) == 4 * sizes[record.spec]
        bias = float(record.scored[0].release == "r1")
        assert record.scored[0].outputs == [
            pytest.approx(expected(record.features, bias), abs=1e-6)
        ]


def test_a_model_that_mixes_its_rows_is_run_row_by_row_wherever_it_runs(runtime, load, plan_of):
    arm = load(mixes=True)
    assert not arm.runner.batchable
    runtime.swap("toy", [arm], plan_of(arm))

    def predict():
        for step in range(40):
            runtime.predict("toy", scheduled(1000 + step))

    thread = threading.Thread(target=predict)
    thread.start()
    try:
        asyncio.run(all_of(runtime, map(scheduled, range(40))))
        together = runtime.predict_many("toy", [scheduled(step) for step in range(3)])
        assert not [each for each in together if isinstance(each, RequestError)]
    finally:
        thread.join(30)
    records = logged(runtime)
    assert len(records) == 83
    for record in records:
        assert isinstance(record, PredictionRecord)
        assert record.scored[0].outputs == [pytest.approx(expected(record.features), abs=1e-6)]


def test_a_device_that_closes_says_so_to_those_who_wait(config, load, plan_of):
    arm = load()
    runtime = Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1)
    runtime.swap("toy", [arm], plan_of(arm))

    async def ask():
        asks = asyncio.create_task(all_of(runtime, map(scheduled, range(30))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.to_thread(runtime.close)
        return await asks

    found = asyncio.run(ask())
    codes = {each.code for each in found if isinstance(each, Exception)}
    assert codes <= {"closed", "log_closed"}
    assert codes


def test_closing_beside_a_run_that_hangs_ends_and_keeps_all_that_was_answered(
    config, load, plan_of
):
    arm, gate, begun = load(), threading.Event(), threading.Event()
    runtime = Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1)
    runtime.swap("toy", [arm], plan_of(arm))
    Shelf(config.state_dir / "shelf").save_current(plan_of(arm))

    def hang(payloads):
        begun.set()
        gate.wait(60)
        return payloads

    async def ask():
        answers = await all_of(runtime, map(scheduled, range(5)))
        hung = asyncio.create_task(runtime._serving.worker.submit(hang, None))
        await asyncio.to_thread(begun.wait, 30)
        waits = asyncio.create_task(runtime.predict_async("toy", scheduled(9)))
        await asyncio.sleep(0)
        closing = threading.Thread(target=runtime.close)
        closing.start()
        await asyncio.to_thread(closing.join, 20)
        ended = not closing.is_alive()
        gate.set()
        await asyncio.to_thread(closing.join)
        return answers, ended, await asyncio.gather(hung, waits, return_exceptions=True)

    answers, ended, (_, waited) = asyncio.run(ask())
    assert ended
    assert waited.code == "closed"
    with Runtime.open(config, clock=ManualClock(NOW_S), step=lambda: 1) as again:
        assert again.survived()[0] == (1, "event", 5)
        records = [codec.decode_record(data) for _, _, data in again.log.tail("event", 0, 0)]
        assert [each.scored[0].outputs for each in records] == [each.outputs for each in answers]
        assert again.statistics()["snapshots"]["replayed"] == 0

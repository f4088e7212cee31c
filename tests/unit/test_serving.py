"""Tensors through a runtime: by release, many at once, on the worker, beside swaps."""

from __future__ import annotations

import asyncio
import threading
import weakref

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime.clock import ManualClock
from edge_runtime.config import EdgeConfig, InferenceConfig
from edge_runtime.errors import CapacityError, HeadwaterError, RequestError
from edge_runtime.inference.slot import load_arm
from edge_runtime.runtime import Runtime

X = np.arange(10, dtype=np.float32).reshape(2, 5)


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
    with Runtime.open(config, clock=ManualClock(1.36e9)) as runtime:
        yield runtime


@pytest.fixture
def load(write_package):
    """`load(bias, name)` is an arm whose answers follow `bias`; heavy: too slow to run inline."""

    def load(bias=0.0, name="stable", *, heavy=False):
        path, _ = write_package(bias=bias)
        if heavy:
            make_heavy(path)
        return load_arm(path, None, name, f"r{bias:g}", 0.5)

    return load


def make_heavy(path):
    """Give the model some milliseconds of work that change no answer."""
    model = onnx.load(path)
    nodes, last = model.graph.node, model.graph.node[-1]
    zero, wide = np.zeros((1, 1), np.float32), np.ones((1, 10_000), np.float32)
    for name, value in (("zero", zero), ("wide", wide)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    del nodes[-1]
    nodes.append(helper.make_node("MatMul", [last.input[0], "wide"], ["a0"]))
    nodes.extend(helper.make_node("Asinh", [f"a{i}"], [f"a{i + 1}"]) for i in range(8))
    nodes.append(helper.make_node("ReduceMax", ["a8"], ["most"], axes=[1], keepdims=1))
    nodes.append(helper.make_node("Mul", ["most", "zero"], ["nothing"]))
    nodes.append(helper.make_node("Add", [last.input[0], "nothing"], ["same"]))
    nodes.append(helper.make_node("Sigmoid", ["same"], ["probability"]))
    path.write_bytes(model.SerializeToString())


def expected(bias, x=X):
    return 1 / (1 + np.exp(-(x.sum(1, keepdims=True) / 1000 + bias)))


def code(call, *arguments, **options):
    with pytest.raises(HeadwaterError) as caught:
        call(*arguments, **options)
    return caught.value.code


def ask(runtime, x=X, **options):
    return runtime.infer("toy", {"features": x}, **options)["probability"]


def test_nothing_is_answered_before_the_first_release(runtime):
    assert code(ask, runtime) == "no_release"
    assert code(runtime.model, "toy") == "no_release"
    assert code(runtime.infer_many, "toy", [{"features": X}]) == "no_release"
    assert (runtime.ready(), runtime.ready("toy"), runtime.ready("other")) == (False, False, False)


def test_a_family_that_is_not_served_is_named(runtime):
    assert code(runtime.infer, "other", {"features": X}) == "unknown_family"
    assert code(runtime.model, "other") == "unknown_family"


def test_the_stable_release_answers_unless_another_is_asked_for(runtime, load):
    runtime.swap("toy", [load(0.0), load(1.0, "canary")], None)
    assert runtime.ready("toy")
    np.testing.assert_allclose(ask(runtime), expected(0.0), atol=1e-6)
    np.testing.assert_allclose(ask(runtime, release="r0"), expected(0.0), atol=1e-6)
    np.testing.assert_allclose(ask(runtime, release="r1"), expected(1.0), atol=1e-6)
    with pytest.raises(RequestError) as caught:
        ask(runtime, release="r2")
    assert (caught.value.code, caught.value.hint) == ("unknown_release", "in memory: r0, r1")
    [answer] = runtime.infer_many("toy", [{"features": X}], release="r1")
    np.testing.assert_allclose(answer["probability"], expected(1.0), atol=1e-6)
    assert code(runtime.infer_many, "toy", [{"features": X}], release="r2") == "unknown_release"


def test_a_model_says_what_it_takes_and_gives(runtime, load):
    runtime.swap("toy", [load(0.0), load(1.0, "canary")], None)
    info = runtime.model("toy")
    assert (info.family, info.release, info.releases) == ("toy", "r0", ("r0", "r1"))
    assert [(t.name, t.datatype, t.shape) for t in info.inputs] == [("features", "FP32", (-1, 5))]
    assert [(t.name, t.shape) for t in info.outputs] == [("probability", (-1, 1))]
    assert (info.inline, info.predicts) == (True, True)
    runtime.swap("toy", [load(0.0), load(2.0, "canary", heavy=True)], None)
    assert not runtime.model("toy").inline


def test_many_are_answered_in_order_with_errors_in_their_places(runtime, load):
    runtime.swap("toy", [load()], None)
    requests = [
        {"features": X},
        {"features": X[:1]},
        {"features": X.astype(np.float64)},
        {},
        {"features": X[:, :2]},
        {"features": "no array"},
        {"features": X[:0]},
        {"features": X, "more": X},
        {"features": X * 2},
    ]
    found = runtime.infer_many("toy", requests)
    codes = [each.code if isinstance(each, HeadwaterError) else "" for each in found]
    assert codes == [
        *("", "", "wrong_type", "missing_input", "wrong_shape", "wrong_type"),
        *("empty_batch", "unknown_input", ""),
    ]
    for index, request in enumerate(requests):
        if not codes[index]:
            answer = ask(runtime, request["features"])
            np.testing.assert_allclose(found[index]["probability"], answer, atol=1e-6)
    counters = runtime.counters()
    assert (counters["infers"], counters["request_errors"]) == (6, 6)
    assert runtime.infer_many("toy", []) == []


def adder(tmp_path):
    """A bare model that adds its inputs and lets a single row stand for as many as needed."""
    tensors = {name: ["abc".index(name), 1] for name in "abc"}
    sides = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"n{row}", one])
        for name, (row, one) in tensors.items()
    }
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])], "add", [sides["a"], sides["b"]], [sides["c"]]
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(
        helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "adder.onnx"
    )
    return tmp_path / "adder.onnx"


def test_requests_that_share_a_run_never_get_each_others_rows(tmp_path):
    def rows(count, value):
        return np.full((count, 1), value, np.float32)

    requests = [{"a": rows(1, 1), "b": rows(2, 10)}, {"a": rows(2, 2), "b": rows(1, 20)}]
    with Runtime.open(package=adder(tmp_path)) as runtime:
        found = [each["c"].ravel().tolist() for each in runtime.infer_many("adder", requests)]
        assert found == [[11, 11], [22, 22]]


def test_the_loop_runs_a_light_model_itself(runtime, load):
    runtime.swap("toy", [load()], None)
    answer = asyncio.run(runtime.infer_async("toy", {"features": X}))
    np.testing.assert_allclose(answer["probability"], expected(0.0), atol=1e-6)
    assert runtime.statistics()["worker"]["jobs"] == 0


def test_a_heavy_model_is_run_on_the_worker_and_requests_share_its_runs(runtime, load):
    runtime.swap("toy", [load(heavy=True)], None)
    assert not runtime.model("toy").inline

    async def ask_all():
        asks = [runtime.infer_async("toy", {"features": X[:1] * n}) for n in range(20)]
        return await asyncio.gather(*asks)

    for n, answer in enumerate(asyncio.run(ask_all())):
        np.testing.assert_allclose(answer["probability"], expected(0.0, X[:1] * n), atol=1e-6)
    worker = runtime.statistics()["worker"]
    assert worker["jobs"] == 20
    assert worker["runs"] <= 10
    assert runtime.counters()["infers"] == 20


@pytest.mark.parametrize(
    ("arrays", "wrong"),
    [
        ({}, "missing_input"),
        ({"features": [[1, 2, 3, 4, 5]]}, "wrong_type"),
        ({"features": X.astype(np.float64)}, "wrong_type"),
        ({"features": X[0]}, "wrong_shape"),
        ({"features": np.float32(1)}, "wrong_type"),
        ({"features": X[:0]}, "empty_batch"),
        ({"features": X, "x": X}, "unknown_input"),
    ],
)
def test_what_does_not_fit_fails_alone_on_the_worker_too(runtime, load, arrays, wrong):
    runtime.swap("toy", [load(heavy=True)], None)

    async def ask_three():
        asks = [runtime.infer_async("toy", each) for each in ({"features": X}, arrays)]
        asks.append(runtime.infer_async("toy", {"features": X}, ["p"]))
        return await asyncio.gather(*asks, return_exceptions=True)

    good, bad, other = asyncio.run(ask_three())
    np.testing.assert_allclose(good["probability"], expected(0.0), atol=1e-6)
    assert (bad.code, other.code) == (wrong, "unknown_output")


def test_a_deadline_that_is_over_is_named_and_counted(runtime, load):
    runtime.swap("toy", [load(heavy=True)], None)
    with pytest.raises(CapacityError, match="deadline_exceeded"):
        asyncio.run(runtime.infer_async("toy", {"features": X}, timeout_s=0))
    assert runtime.counters()["requests_dropped"] == 1


def test_the_configured_bound_and_deadline_hold(config, load):
    tight = InferenceConfig(queue_max=1, deadline_ms=1)
    with Runtime.open(msgspec.structs.replace(config, inference=tight)) as runtime:
        runtime.swap("toy", [load(heavy=True)], None)

        async def ask_all():
            asks = [runtime.infer_async("toy", {"features": X}) for _ in range(30)]
            return await asyncio.gather(*asks, return_exceptions=True)

        found = asyncio.run(ask_all())
        codes = {each.code for each in found if isinstance(each, CapacityError)}
        assert codes == {"overloaded", "deadline_exceeded"}
        assert runtime.counters()["requests_dropped"] >= 20


def test_beside_swaps_every_answer_is_wholly_of_one_release(runtime, load):
    arms = [load(float(bias)) for bias in range(4)]
    runtime.swap("toy", arms[:1], None)
    wrong, done = [], threading.Event()

    def client():
        while not done.is_set():
            answer = ask(runtime)
            if not any(np.allclose(answer, expected(bias), atol=1e-5) for bias in range(4)):
                wrong.append(answer)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    for swap in range(200):
        runtime.swap("toy", [arms[swap % 4]], None)
    done.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    counters = runtime.counters()
    assert (counters["infers"] > 0, counters["request_errors"]) == (True, 0)


def nothing(_runtime):
    return None


def described(runtime):
    return runtime.model("toy")


def asked_once(runtime):
    return ask(runtime)


def asked_many(runtime):
    return runtime.infer_many("toy", [{"features": X}] * 2)


def asked_on_the_worker(runtime):
    return asyncio.run(runtime.infer_async("toy", {"features": X}))


@pytest.mark.parametrize("use", [nothing, described, asked_once, asked_many, asked_on_the_worker])
def test_a_model_that_was_replaced_is_freed_whatever_it_was_asked(runtime, load, use):
    arm = load(heavy=True)
    runtime.swap("toy", [arm], None)
    use(runtime)
    model = weakref.ref(arm.runner)
    del arm
    runtime.swap("toy", [load(1.0)], None)
    runtime._members["toy"].pipeline.slot.settle()
    assert model() is None

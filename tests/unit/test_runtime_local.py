"""A file served by itself: any ONNX file, no broker, no keys, and nothing left when it ends."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime import Runtime
from edge_runtime.clock import ManualClock
from edge_runtime.errors import ConfigError, HeadwaterError, RequestError
from edge_runtime.runtime import Event

NOW_S = 1_360_000_000.0
X = np.float32([[1, 2]])


@pytest.fixture
def bare(tmp_path):
    """A model of no family: y = -x."""
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "m", sides[:1], sides[1:])
    opset = helper.make_opsetid("", 17)
    path = tmp_path / "My model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def scheduled():
    return Event("scheduled", NOW_S, {"carrier": "UA", "distance": 998.0})


def code(call, *arguments):
    with pytest.raises(HeadwaterError) as caught:
        call(*arguments)
    return caught.value.code


def threads():
    return {each.name for each in threading.enumerate()} - {"MainThread", "slot-free"}


def test_a_bare_file_is_served_under_its_name(bare):
    with Runtime.open(package=bare) as runtime:
        assert runtime.families == ["My-model"]
        assert runtime.ready()
        assert runtime.infer("My-model", {"x": X})["y"].tolist() == [[-1, -2]]
        info = runtime.model("My-model")
        assert (info.release, info.releases, info.predicts) == ("local", ("local",), False)
        assert runtime.current("My-model") is None


def test_a_bare_file_answers_no_events_and_says_why(bare):
    with Runtime.open(package=bare) as runtime:
        for call in (runtime.predict, runtime.observe):
            assert code(call, "My-model", scheduled()) == "no_features"
        [error] = runtime.predict_many("My-model", [scheduled()])
        assert (error.code, error.hint) == ("no_features", "ask it with infer")
        with pytest.raises(RequestError, match="no_features"):
            asyncio.run(runtime.predict_async("My-model", scheduled()))
        assert runtime.log.handed_out("event") == 0


def test_a_package_answers_events_labels_and_tensors(write_package):
    path, _ = write_package()
    with Runtime.open(package=str(path), clock=ManualClock(NOW_S), step=lambda: 1) as runtime:
        answer = runtime.predict("toy", scheduled())
        assert answer.id == "local.1.1"
        assert answer.outputs == [pytest.approx(1 / (1 + math.exp(-0.999)), abs=1e-6)]
        assert runtime.label(answer.id, 1.0) == 1
        assert runtime.infer("toy", {"features": np.zeros((1, 5), np.float32)})
        assert runtime.report({}).arms[0].release == "local"
        assert runtime.model("toy").predicts


def test_it_is_a_context_manager_in_async_code_too(bare):
    async def ask():
        async with Runtime.open(package=bare) as runtime:
            state_dir = runtime.config.state_dir
            assert state_dir.is_dir()
            return state_dir, await runtime.infer_async("My-model", {"x": X})

    state_dir, answer = asyncio.run(ask())
    assert answer["y"].tolist() == [[-1, -2]]
    assert not state_dir.exists()


def test_its_state_ends_with_it_and_closing_twice_is_no_error(bare):
    runtime = Runtime.open(package=bare)
    assert runtime.config.state_dir.is_dir()
    runtime.infer("My-model", {"x": X})
    runtime.close()
    runtime.close()
    assert not runtime.config.state_dir.exists()
    assert threads() == set()


def test_two_may_serve_the_same_file(bare):
    with Runtime.open(package=bare) as one, Runtime.open(package=bare) as other:
        assert one.config.state_dir != other.config.state_dir


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\xff" * 200)


def gone(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [truncated, empty, garbage, gone, folder])
def test_a_file_that_cannot_be_served_is_named_and_leaves_nothing(bare, spoil):
    spoil(bare)
    with warnings.catch_warnings(record=True, action="always") as warned:
        with pytest.raises(ConfigError) as caught:
            Runtime.open(package=bare)
        assert (caught.value.code, "My model.onnx" in caught.value.message) == ("bad_package", True)
        del caught
        gc.collect()
    assert [str(each.message) for each in warned] == []  # nor a folder for the collector
    assert threads() == set()


@pytest.mark.parametrize(
    "options",
    [{"model_bias": 1.0}, {"drop": "headwater.golden"}, {"columns": 4}],
    ids=["golden samples disagree", "metadata missing", "wrong width"],
)
def test_a_package_that_is_not_sound_is_not_served(write_package, options):
    path, _ = write_package(**options)
    with pytest.raises(ConfigError, match="bad_package") as caught:
        Runtime.open(package=path)
    assert "nothing is served" in caught.value.message


def test_a_family_that_cannot_be_a_name_is_refused(bare):
    model = onnx.load(bare)
    helper.set_model_props(model, {"headwater.family": "../../etc"})
    onnx.save(model, bare)
    with pytest.raises(ConfigError, match="bad_name"):
        Runtime.open(package=bare)


def test_a_path_is_a_package_only_if_it_is_said_to_be(bare):
    with pytest.raises(ConfigError):
        Runtime.open(bare)
    with pytest.raises(AssertionError, match="a configuration or a package"):
        Runtime.open()
    with pytest.raises(AssertionError, match="not both"):
        Runtime.open(bare, package=bare)


@pytest.mark.parametrize("kind", ["bare", "package"])
def test_what_is_asked_after_the_end_is_refused_by_name(bare, write_package, kind):
    path = bare if kind == "bare" else write_package()[0]
    runtime = Runtime.open(package=path, clock=ManualClock(NOW_S))
    [family] = runtime.families
    runtime.close()
    event = Event("departed", NOW_S, {"carrier": "UA", "delay": 1.0})
    x = {"x" if kind == "bare" else "features": X}
    assert code(runtime.predict, family, scheduled())
    assert code(runtime.observe, family, event)
    assert code(runtime.infer, family, x)
    assert code(lambda: asyncio.run(runtime.infer_async(family, x)))
    assert code(lambda: asyncio.run(runtime.predict_async(family, scheduled())))
    assert [
        isinstance(each, HeadwaterError) for each in runtime.predict_many(family, [scheduled()])
    ]
    assert not runtime.ready()


def test_its_folder_is_private(bare):
    with Runtime.open(package=bare) as runtime:
        assert Path(runtime.config.state_dir).stat().st_mode & 0o077 == 0

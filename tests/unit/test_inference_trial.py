"""The trial: which models may answer several requests in one run is found out, not believed."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import PackageError
from edge_runtime.inference import trial
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.tensors import Tensor

X, Y = Tensor("x", "FP32", (-1, 2)), Tensor("y", "FP32", (-1, 2))
W = np.random.default_rng(5).normal(size=(2, 4)).astype(np.float32)
DYNAMIC = [
    ("DynamicQuantizeLinear", ["h"], ["q", "scale", "zero"]),
    ("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
]
STATIC = [
    ("QuantizeLinear", ["h", "s", "z"], ["q"]),
    ("DequantizeLinear", ["q", "s", "z"], ["y"]),
]


@pytest.fixture
def runner_of(tmp_path):
    """`runner_of(nodes, kind, columns)` loads a model from x (n, columns) to y (n, 4)."""

    def runner_of(nodes, kind=TensorProto.FLOAT, columns=2):
        constants = {"w": W, "s": np.float32(0.05), "z": np.uint8(128), "e": np.abs(W[:, :1]) * W}
        shape = ["n", columns] if columns else ["n"]
        graph = helper.make_graph(
            [helper.make_node(*node) for node in nodes],
            "made",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opset = helper.make_opsetid("", 17)
        path = tmp_path / "made.onnx"
        path.write_bytes(
            helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
        )
        return Runner(path)

    return runner_of


def test_plain_and_statically_quantized_rows_do_not_depend_on_each_other(runner_of):
    product = ("MatMul", ["x", "w"], ["h"])
    assert runner_of([("MatMul", ["x", "w"], ["y"])]).batchable
    assert runner_of([product, *STATIC]).batchable


def test_dynamic_quantization_makes_an_answer_depend_on_its_batch_and_is_noticed(runner_of):
    runner = runner_of([("MatMul", ["x", "w"], ["h"]), *DYNAMIC])
    x = np.float32([[0.1, -0.2], [30, 40]])
    together, alone = (runner.infer({"x": rows})["y"][0] for rows in (x, x[:1]))
    assert np.abs(together - alone).max() > 0.01
    assert not runner.batchable


def test_it_is_noticed_where_the_inputs_are_numbers_of_words_too(runner_of):
    runner = runner_of([("Gather", ["e", "x"], ["h"]), *DYNAMIC], TensorProto.INT64, 0)
    together, alone = (runner.infer({"x": np.array(ids)})["y"][0] for ids in ([0, 1], [0]))
    assert np.abs(together - alone).max() > 1e-4
    assert not runner.batchable


def test_a_model_that_mixes_its_rows_is_not_batchable():
    def mixed(feed):
        return [feed["x"] / feed["x"].sum(axis=0)]

    assert not trial.is_batchable(mixed, [X], [Y])
    assert trial.is_batchable(lambda feed: [feed["x"] * 2], [X], [Y])


def test_nan_in_an_answer_is_an_answer_like_any_other():
    assert trial.is_batchable(lambda feed: [feed["x"] * np.nan], [X], [Y])


@pytest.mark.parametrize("odd", [Tensor("k", "INT64", ()), Tensor("k", "FP32", (1, 2))])
def test_inputs_or_outputs_without_rows_allow_no_batch(odd):
    def never(_feed):
        raise AssertionError

    assert not trial.is_batchable(never, [X, odd], [Y])
    assert not trial.is_batchable(never, [X], [Y, odd])


def test_answers_that_are_fewer_than_the_rows_allow_no_batch():
    assert not trial.is_batchable(lambda feed: [feed["x"][:1]], [X], [Y])


def test_what_fails_on_a_sample_is_taken_to_be_slow_and_never_batchable():
    def fails(_feed):
        raise PackageError("run_failed", "no")

    assert trial.usual_us(fails, [X]) is None
    assert not trial.is_batchable(fails, [X], [Y])


def test_a_measurement_is_of_runs_after_the_first_and_ends_in_time():
    runs = []

    def run(feed):
        runs.append(feed["x"].shape)
        return [feed["x"]]

    assert trial.usual_us(run, [X]) >= 0
    assert 2 <= len(runs) <= 10
    assert set(runs) == {(1, 2)}

"""The runner: any ONNX file, whatever its inputs and outputs; one row or many, the same answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import PackageError, RequestError
from edge_runtime.inference.runner import BATCH_ROWS_MAX, INLINE_US_MAX, Runner
from edge_runtime.inference.tensors import DTYPES, Tensor

FLOAT, INT64, TEXT = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
NUMBER_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


@pytest.fixture
def build(tmp_path):
    """`build([(op, inputs, outputs, {attribute: value})], inputs, outputs, **constants)` writes a
    model; `inputs` and `outputs` are (name, type, shape), a type that is no number a whole value.
    """
    numbers = itertools.count()

    def declared(name, kind, shape):
        if isinstance(kind, int):
            return helper.make_tensor_value_info(name, kind, shape)
        return helper.make_value_info(name, kind)

    def build(nodes, inputs, outputs, **constants):
        graph = helper.make_graph(
            [helper.make_node(op, *names, **attributes) for op, *names, attributes in nodes],
            "made",
            [declared(*each) for each in inputs],
            [declared(*each) for each in outputs],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
        path = tmp_path / f"made-{next(numbers)}.onnx"
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        path.write_bytes(model.SerializeToString())
        return path

    return build


@pytest.fixture
def linear(build):
    """y = x @ w for x of three columns."""
    w = np.arange(6, dtype=np.float32).reshape(3, 2)
    sides = [("x", FLOAT, ["n", 3])], [("y", FLOAT, ["n", 2])]
    return Runner(build([("MatMul", ["x", "w"], ["y"], {})], *sides, w=w))


@pytest.fixture
def negate(build):
    return Runner(
        build([("Neg", ["x"], ["y"], {})], [("x", FLOAT, ["n", 2])], [("y", FLOAT, ["n", 2])])
    )


def rows(count, columns, seed=1):
    return np.random.default_rng(seed).normal(size=(count, columns)).astype(np.float32)


def code(call, *arguments):
    with pytest.raises((RequestError, PackageError)) as caught:
        call(*arguments)
    return caught.value.code


def test_every_type_that_can_be_declared_goes_in_and_comes_out(build):
    names = list(NUMBER_TYPES)
    runner = Runner(
        build(
            [("Identity", [f"in_{name}"], [f"out_{name}"], {}) for name in names],
            [(f"in_{name}", NUMBER_TYPES[name], ["n", 2]) for name in names],
            [(f"out_{name}", NUMBER_TYPES[name], ["n", 2]) for name in names],
        )
    )
    assert runner.inputs == tuple(Tensor(f"in_{name}", name, (-1, 2)) for name in names)
    feed = {f"in_{name}": np.array([[0, 1]]).astype(DTYPES[name]) for name in names}
    feed["in_BYTES"] = np.array([["", "zwölf"]], dtype=object)
    answers = runner.infer(feed)
    for name in names:
        expected, actual = feed[f"in_{name}"], answers[f"out_{name}"]
        assert (expected.dtype, expected.tolist()) == (actual.dtype, actual.tolist())
    assert runner.batchable


def test_dimensions_are_read_as_they_are_declared(build):
    runner = Runner(
        build(
            [("Identity", ["a"], ["c"], {}), ("Identity", ["b"], ["d"], {})],
            [("a", FLOAT, ["n", "m", 4]), ("b", INT64, [])],
            [("c", FLOAT, ["n", "m", 4]), ("d", INT64, [])],
        )
    )
    assert [tensor.shape for tensor in runner.inputs] == [(-1, -1, 4), ()]
    answers = runner.infer({"a": np.ones((2, 5, 4), np.float32), "b": np.array(7)})
    assert (answers["c"].shape, answers["d"].tolist()) == ((2, 5, 4), 7)
    assert not runner.batchable


def test_an_input_without_a_declared_rank_takes_one_value_and_refuses_rows_by_name(build):
    runner = Runner(build([("Neg", ["x"], ["y"], {})], [("x", FLOAT, None)], [("y", FLOAT, None)]))
    assert runner.infer({"x": np.float32([2]).reshape(())})["y"] == -2
    assert code(runner.infer, {"x": np.zeros((2, 3), np.float32)}) == "wrong_shape"


def test_a_model_of_fixed_shape_takes_that_shape_alone(build):
    runner = Runner(
        build([("Neg", ["x"], ["y"], {})], [("x", FLOAT, [1, 2])], [("y", FLOAT, [1, 2])])
    )
    assert runner.infer({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[-1, -1]]
    assert code(runner.infer, {"x": np.ones((2, 2), np.float32)}) == "wrong_shape"
    assert not runner.batchable


def test_outputs_that_are_no_tensors_are_left_out(build):
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))
    )
    runner = Runner(
        build(
            [
                ("ZipMap", ["x"], ["maps"], {"classlabels_int64s": [0, 1], "domain": "ai.onnx.ml"}),
                ("Neg", ["x"], ["y"], {}),
            ],
            [("x", FLOAT, ["n", 2])],
            [("maps", kind, None), ("y", FLOAT, ["n", 2])],
        )
    )
    assert [tensor.name for tensor in runner.outputs] == ["y"]
    assert list(runner.infer({"x": rows(3, 2)})) == ["y"]
    assert code(runner.infer, {"x": rows(3, 2)}, ["maps"]) == "unknown_output"


def test_a_model_without_an_output_that_is_a_tensor_is_refused(build):
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, ["n", 2]))
    path = build(
        [("SequenceConstruct", ["x"], ["all"], {})], [("x", FLOAT, ["n", 2])], [("all", kind, None)]
    )
    assert code(Runner, path) == "wrong_signature"


def test_an_input_of_a_type_that_nobody_can_send_is_refused(build):
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, [2]))
    path = build(
        [("SequenceLength", ["all"], ["y"], {})], [("all", kind, None)], [("y", INT64, [])]
    )
    assert code(Runner, path) == "wrong_signature"


def test_nan_and_infinity_go_through(negate):
    strange = np.float32([[np.nan, np.inf], [-np.inf, 0]])
    np.testing.assert_array_equal(negate.infer({"x": strange})["y"], -strange)


def test_only_the_outputs_that_are_named_come_back(build):
    runner = Runner(
        build(
            [("Neg", ["x"], ["minus"], {}), ("Abs", ["x"], ["size"], {})],
            [("x", FLOAT, ["n"])],
            [("minus", FLOAT, ["n"]), ("size", FLOAT, ["n"])],
        )
    )
    x = np.float32([-1, 2])
    assert list(runner.infer({"x": x})) == ["minus", "size"]
    assert list(runner.infer({"x": x}, ["size"])) == ["size"]
    assert [list(each) for each in runner.infer_many([{"x": x}] * 2, ["size"])] == [["size"]] * 2
    assert code(runner.infer, {"x": x}, ["siez"]) == "unknown_output"


def test_what_does_not_fit_never_reaches_the_model(linear):
    assert code(linear.infer, {}) == "missing_input"
    assert code(linear.infer, {"x": rows(1, 3), "z": rows(1, 3)}) == "unknown_input"
    assert code(linear.infer, {"x": rows(1, 3).astype(np.float64)}) == "wrong_type"
    assert code(linear.infer, {"x": rows(1, 2)}) == "wrong_shape"
    assert code(linear.infer, {"x": rows(0, 3)}) == "empty_batch"
    assert code(linear.infer_many, [{"x": rows(1, 3)}, {"x": rows(1, 2)}]) == "wrong_shape"


def test_a_run_that_fails_is_our_error_and_the_runner_goes_on(build):
    runner = Runner(
        build(
            [("Gather", ["table", "i"], ["y"], {})],
            [("i", INT64, ["n"])],
            [("y", FLOAT, ["n"])],
            table=np.float32([1, 2, 3]),
        )
    )
    assert code(runner.infer, {"i": np.array([99])}) == "run_failed"
    assert runner.infer({"i": np.array([2])})["y"].tolist() == [3]


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [2, 1, 5], [BATCH_ROWS_MAX - 1, 1], [70, 3]])
def test_many_at_once_are_answered_as_each_alone_is(linear, sizes):
    assert linear.batchable
    requests = [{"x": rows(size, 3, seed)} for seed, size in enumerate(sizes)]
    for request, together in zip(requests, linear.infer_many(requests), strict=True):
        assert together["y"].shape == (len(request["x"]), 2)
        np.testing.assert_allclose(together["y"], linear.infer(request)["y"], rtol=1e-5, atol=1e-6)


def test_many_texts_at_once_keep_their_lengths(build):
    runner = Runner(
        build([("Identity", ["x"], ["y"], {})], [("x", TEXT, ["n"])], [("y", TEXT, ["n"])])
    )
    requests = [{"x": np.array(["a"])}, {"x": np.array(["bcd", "ü"], dtype=object)}] * 2
    answers = [each["y"].tolist() for each in runner.infer_many(requests)]
    assert answers == [["a"], ["bcd", "ü"]] * 2


def test_a_model_whose_rows_of_output_depend_on_the_values_is_never_cut_wrongly(build):
    runner = Runner(
        build(
            [("Unique", ["x"], ["y"], {"sorted": 0})], [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])]
        )
    )
    requests = [{"x": np.float32([1])}, {"x": np.float32([1])}, {"x": np.float32([5])}]
    assert not runner.batchable or code(runner.infer_many, requests) == "run_failed"
    assert runner.infer(requests[2])["y"].tolist() == [5]


def test_a_package_answers_its_rows_alike_one_by_one_and_together(write_package, toy_spec):
    runner = Runner(write_package()[0])
    assert (runner.features, runner.scores) == (toy_spec.size, 1)
    packed = [row.tobytes() for row in rows(BATCH_ROWS_MAX + 6, toy_spec.size) * 100]
    alone = [runner.answer(row) for row in packed]
    for count in (1, 2, 3, 37, BATCH_ROWS_MAX, len(packed)):
        np.testing.assert_allclose(runner.answer_many(packed[:count]), alone[:count], atol=1e-6)


def test_a_model_that_is_no_package_has_no_widths(linear):
    assert (linear.features, linear.scores) == (0, 0)


def test_what_a_row_costs_is_measured_and_decides_where_it_runs(linear, build):
    assert 0 < linear.run_us <= INLINE_US_MAX
    assert linear.inline
    heavy = Runner(
        build(
            [("Expand", ["x", "shape"], ["x0"], {})]
            + [("Asinh", [f"x{i}"], [f"x{i + 1}"], {}) for i in range(10)]
            + [("ReduceSum", ["x10", "axes"], ["y"], {"keepdims": 1})],
            [("x", FLOAT, ["n", 1])],
            [("y", FLOAT, ["n", 1])],
            shape=np.array([1, 10_000]),
            axes=np.array([1]),
        ),
        rows_max=1,
    )
    assert (heavy.run_us > INLINE_US_MAX, heavy.inline, heavy.batchable) == (True, False, True)
    requests = [{"x": rows(count, 1, count)} for count in (1, 2)]
    for request, together in zip(requests, heavy.infer_many(requests), strict=True):
        np.testing.assert_allclose(together["y"], heavy.infer(request)["y"], rtol=1e-5)


def test_a_model_that_no_sample_fits_still_answers_what_does(build):
    runner = Runner(
        build(
            [("Reshape", ["x", "shape"], ["y"], {})],
            [("x", FLOAT, ["n"])],
            [("y", FLOAT, ["m", 2])],
            shape=np.array([-1, 2]),
        )
    )
    assert (runner.run_us, runner.inline, runner.batchable) == (None, False, False)
    assert runner.infer({"x": np.float32([1, 2])})["y"].tolist() == [[1, 2]]


def test_a_file_that_is_no_model_is_named(tmp_path):
    path = tmp_path / "no.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(PackageError, match=r"no\.onnx") as caught:
        Runner(path)
    assert caught.value.code == "unreadable_package"

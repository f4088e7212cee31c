"""Any ONNX file gets the input and output of a package, or is refused with what to do next."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cloud_learner.package.adopted import prepared
from cloud_learner.package.foreign import fitted, read_foreign
from edge_runtime.errors import PackageError
from edge_runtime.inference.package import read_package
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import load_arm

CONVERTED = Path(__file__).parents[1] / "fixtures" / "foreign-1"
ROWS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
NAMES = ["a", "b", "c"]
WEIGHTS = np.array([[1.0], [2.0], [3.0]])


def saved(path, nodes, inputs, outputs, weights=(), *, opset=17, domains=()):
    graph = helper.make_graph(nodes, "model", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(each, 1) for each in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def linear(path, kind=TensorProto.FLOAT, names=("x", "y"), *, width=1, opset=17):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = np.repeat(WEIGHTS, width, axis=1)
    weights[:, 0] *= -1 if width == 2 else 1
    return saved(
        path,
        [helper.make_node("MatMul", [names[0], "w"], [names[1]])],
        [value(names[0], [None, 3], kind)],
        [value(names[1], [None, width], kind)],
        [numpy_helper.from_array(weights.astype(dtype), "w")],
        opset=opset,
    )


def answers(tmp_path, model):
    path = tmp_path / "fitted.onnx"
    path.write_bytes(model.SerializeToString())
    return Runner(path).run(ROWS)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.DOUBLE])
@pytest.mark.parametrize("names", [("x", "y"), ("features", "probability"), ("probability", "z")])
def test_names_and_floats_of_any_kind_are_made_to_fit(tmp_path, kind, names):
    model = read_foreign(linear(tmp_path / "m.onnx", kind, names))

    found = answers(tmp_path, fitted(model, NAMES, 1, {}))

    assert np.allclose(found, ROWS @ WEIGHTS, atol=1e-6)


def test_of_two_columns_for_one_answer_the_second_is_the_positive_class(tmp_path):
    model = read_foreign(linear(tmp_path / "m.onnx", width=2))

    assert np.allclose(answers(tmp_path, fitted(model, NAMES, 1, {})), ROWS @ WEIGHTS, atol=1e-6)


def test_an_embedding_beside_the_answer_is_no_second_answer(tmp_path, toy_spec, toy_interface):
    """Without a policy no session stands on it, so a package does not compute it."""
    weights = {"w": np.ones((5, 4)), "v": np.full((4, 1), 0.01)}
    path = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("MatMul", ["features", "w"], ["embedding"]),
            helper.make_node("MatMul", ["embedding", "v"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["probability"]),
        ],
        [value("features", [None, 5])],
        [value("embedding", [None, 4]), value("probability", [None, 1])],
        [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()],
    )
    about = {"outputs": 1, "names": {}, "rows": None, "facts": {}, "quantize": False}
    (tmp_path / "p.onnx").write_bytes(
        prepared(read_foreign(path), toy_interface, toy_spec, **about)[0]
    )
    arm = load_arm(tmp_path / "p.onnx", None, "stable", "r1", 1.0)

    assert [each.name for each in arm.runner.outputs] == ["probability"]
    assert arm.info.policy is None


def test_an_input_for_each_feature_is_one_column_each_in_the_spec_s_order(tmp_path):
    """As skl2onnx writes a pipeline over a data frame, with one name that differs."""
    path = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("Concat", ["c", "a", "bee"], ["x"], axis=1),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [value(name, [None, 1]) for name in ("c", "bee", "a")],
        [value("y", [None, 1])],
        [numpy_helper.from_array(WEIGHTS[[2, 0, 1]].astype(np.float32), "w")],
    )

    model = fitted(read_foreign(path), NAMES, 1, {"b": "bee"})

    assert np.allclose(answers(tmp_path, model), ROWS @ WEIGHTS, atol=1e-6)


def converted(name):
    """What a real converter wrote, the rows that it was asked, and what the framework answered."""
    told = json.loads((CONVERTED / "answers.json").read_text())
    rows = np.array(told["rows"], np.float32)
    return CONVERTED / f"{name}.onnx", rows, np.array(told["answers"][name])[:, None]


def test_every_converted_file_has_its_answers():
    told = json.loads((CONVERTED / "answers.json").read_text())

    assert {path.stem for path in CONVERTED.glob("*.onnx")} == set(told["answers"])


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("logistic", {}),
        ("double", {}),
        ("columns", {"probability": "i1"}),
        ("scaled", {}),
        ("flipped", {}),
        ("boosting", {}),
        ("named", {}),
        ("keras", {}),
    ],
)
def test_what_converters_write_answers_as_the_framework_did(tmp_path, name, names):
    """ZipMap, a column for each class, an input for each feature, trees, doubles, softmax."""
    path, rows, expected = converted(name)
    model = fitted(read_foreign(path), ["side", "x", "seen"], 1, names)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    runner = Runner(tmp_path / "m.onnx")

    assert np.abs(runner.run(rows) - expected).max() < 1e-6
    for row, answer in zip(rows, expected, strict=True):
        assert np.abs(runner.run(row[None]) - answer).max() < 1e-6


def test_an_output_for_each_class_asks_which_is_meant(tmp_path):
    path, _, _ = converted("columns")

    error = refused(fitted, read_foreign(path), ["side", "x", "seen"], 1, {})

    assert error.code == "wrong_interface"
    assert "i0 (rank 1, width 0), i1" in error.message
    assert error.hint == "--map probability=OUTPUT"


def test_what_torch_exports_is_sealed_and_quantized(tmp_path, toy_spec, toy_interface):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(toy_spec.size, 8), torch.nn.ReLU())
    network.append(torch.nn.Linear(8, 1)).append(torch.nn.Sigmoid())
    rows = np.random.default_rng(0).normal(size=(200, toy_spec.size)).astype(np.float32)
    with warnings.catch_warnings():  # torch's own
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            (torch.from_numpy(rows[:2]),),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            opset_version=18,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    program.save(str(tmp_path / "m.onnx"))
    model = read_foreign(tmp_path / "m.onnx", quantize=True)

    package, float_package = prepared(
        model,
        toy_interface,
        toy_spec,
        outputs=1,
        names={},
        rows=rows,
        facts={"operator": "anna"},
        quantize=True,
    )

    for data, form in ((package, "int8"), (float_package, "float32")):
        path = tmp_path / f"{form}.onnx"
        path.write_bytes(data)
        runner = Runner(path)
        info = read_package(runner.metadata)
        assert info.provenance["form"] == form
        assert info.provenance["operator"] == "anna"
        assert info.provenance["features"] == toy_spec.hash
        with torch.no_grad():
            expected = network(torch.from_numpy(rows)).numpy()
        assert np.abs(runner.run(rows) - expected).max() < 0.03


def refused(call, *arguments, **options):
    with pytest.raises(PackageError) as caught:
        call(*arguments, **options)
    assert caught.value.hint
    return caught.value


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_text("no model at all")

    assert refused(read_foreign, tmp_path / "m.onnx").code == "unreadable_package"
    assert refused(read_foreign, tmp_path / "nowhere.onnx").code == "unreadable_package"


def test_weights_in_other_files_are_refused(tmp_path):
    model = onnx.load_model(str(linear(tmp_path / "m.onnx")))
    onnx.save_model(
        *(model, str(tmp_path / "e.onnx")), save_as_external_data=True, size_threshold=0
    )

    assert refused(read_foreign, tmp_path / "e.onnx").code == "external_data"


def test_operators_that_no_device_knows_are_named(tmp_path):
    path = saved(
        tmp_path / "m.onnx",
        [helper.make_node("Secret", ["x"], ["y"], domain="my.lab")],
        [value("x", [None, 3])],
        [value("y", [None, 1])],
        domains=["my.lab"],
    )

    error = refused(read_foreign, path)

    assert error.code == "custom_operator"
    assert "my.lab.Secret" in error.message


@pytest.mark.parametrize(("opset", "quantize"), [(8, False), (24, False), (12, True)])
def test_an_opset_that_cannot_be_taken_is_refused(tmp_path, opset, quantize):
    path = linear(tmp_path / "m.onnx", opset=opset)

    assert refused(read_foreign, path, quantize=quantize).code == "unsupported_opset"


@pytest.mark.parametrize(
    ("features", "outputs", "names"),
    [
        (["a", "b"], 1, {}),
        (NAMES, 3, {}),
        (NAMES, 1, {"probability": "other"}),
        (NAMES, 1, {"features": "other"}),
        (NAMES, 1, {"d": "x"}),
    ],
)
def test_another_interface_is_refused_with_what_the_model_has(tmp_path, features, outputs, names):
    model = read_foreign(linear(tmp_path / "m.onnx"))

    error = refused(fitted, model, features, outputs, names)

    assert error.code == "wrong_interface"
    assert "x (rank 2, width 3)" in error.message
    assert "--map" in error.hint or "known" in error.hint


def test_a_model_that_answers_with_no_number_is_refused(tmp_path, toy_spec, toy_interface):
    path = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("ReduceSum", ["x", "axes"], ["s"]),
            helper.make_node("Sub", ["s", "s"], ["z"]),
            helper.make_node("Div", ["z", "z"], ["y"]),
        ],
        [value("x", [None, toy_spec.size])],
        [value("y", [None, 1])],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )

    error = refused(
        prepared,
        read_foreign(path),
        toy_interface,
        toy_spec,
        outputs=1,
        names={},
        rows=None,
        facts={},
        quantize=False,
    )

    assert error.code == "not_finite"

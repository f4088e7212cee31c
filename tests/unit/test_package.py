"""From a student to a package: weights swapped in, int8, sealed; what a device gets is what torch
would have answered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import nn

from cloud_learner.package.build import Graph
from cloud_learner.package.quantize import quantized
from cloud_learner.package.seal import sealed
from cloud_learner.train.family import Family
from edge_runtime.errors import PackageError
from edge_runtime.inference.package import read_package
from edge_runtime.inference.pipeline import score_batch
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import load_arm

FLIGHTS = Path(__file__).parents[2] / "models" / "flight_delay"


@pytest.fixture(scope="module")
def family():
    return Family.load(FLIGHTS)


@pytest.fixture(scope="module")
def rows(family):
    """Rows as flights give them: words by their index, numbers in their range."""
    random = np.random.default_rng(0)
    columns = [
        random.integers(0, len(f.vocabulary) + 1, 600)
        if f.vocabulary
        else random.exponential(30, 600)
        for f in family.spec.features
    ]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def graph(family, rows):
    return Graph(student(family, rows, 0), rows[:64])


def student(family, rows, seed):
    """A student with weights of its own, far from where it was built."""
    torch.manual_seed(seed)
    network = family.build_student(rows)
    with torch.no_grad():
        for parameter in network.parameters():
            # Scaled by the width of the layer, so that a wider student is no wilder one.
            parameter.add_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return network.eval()


def answers(network, rows):
    with torch.no_grad():
        return torch.sigmoid(network(torch.from_numpy(rows))).numpy()


@pytest.fixture
def runner(tmp_path):
    """`runner(model)` runs it with the device's code."""

    def run(model) -> Runner:
        data = model if isinstance(model, bytes) else model.SerializeToString()
        (tmp_path / "model.onnx").write_bytes(data)
        return Runner(tmp_path / "model.onnx")

    return run


@pytest.mark.parametrize("seed", [1, 2])
def test_swapped_weights_answer_as_torch_does(graph, family, rows, runner, seed):
    network = student(family, rows, seed)

    found = score_batch(runner(graph.package(network, {})), rows)

    assert np.allclose(answers(network, rows), found, atol=1e-5)
    assert not np.allclose(answers(student(family, rows, 0), rows), found, atol=1e-2)


def test_a_swap_leaves_the_graph_as_it_was(graph, family, rows):
    first = graph.package(student(family, rows, 1), {}).SerializeToString(deterministic=True)
    graph.package(student(family, rows, 2), {"a": "b"})

    again = graph.package(student(family, rows, 1), {}).SerializeToString(deterministic=True)

    assert first == again


def test_a_kept_graph_makes_the_same_packages(graph, family, rows, tmp_path):
    graph.save(tmp_path / "graph.onnx")
    network = student(family, rows, 3)

    assert graph.package(network, {}) == Graph.load(tmp_path / "graph.onnx").package(network, {})


def test_garbage_is_no_graph(tmp_path):
    (tmp_path / "graph.onnx").write_bytes(b"garbage")

    with pytest.raises(PackageError, match=r"graph\.onnx"):
        Graph.load(tmp_path / "graph.onnx")


def test_a_network_whose_weights_the_export_folds_away_is_refused():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.scale = nn.Linear(3, 1), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.out(x) * float(self.scale)  # a constant to the export

    with pytest.raises(PackageError, match="differ") as caught:
        Graph(Folded(), np.ones((4, 3), np.float32))
    assert caught.value.code == "parity"


class _Branching(nn.Linear):
    def forward(self, features):
        logits = super().forward(features)
        return logits if float(logits.sum()) > 0 else -logits


def test_a_network_that_branches_on_a_value_is_refused_with_a_hint():
    with pytest.raises(PackageError, match="cannot be exported") as caught:
        Graph(_Branching(3, 1), np.ones((4, 3), np.float32))
    assert caught.value.code == "no_export"
    assert "torch.where" in caught.value.hint


def test_int8_stays_near_the_float_form_and_is_smaller_arithmetic(graph, family, rows, runner):
    model = graph.package(student(family, rows, 4), {})
    int8 = quantized(model, rows[:500])

    gap = np.abs(score_batch(runner(model), rows) - score_batch(runner(int8), rows))

    assert gap.max() < 0.05
    assert 0 < gap.mean() < 0.01
    weights = [t for t in int8.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len(weights) >= 3


def test_an_int8_answer_does_not_depend_on_its_batch(graph, family, rows, runner):
    int8 = runner(quantized(graph.package(student(family, rows, 4), {}), rows[:500]))

    together = int8.run(rows)

    assert np.array_equal(together, np.concatenate([int8.run(row[None]) for row in rows]))
    assert np.array_equal(together, np.concatenate([int8.run(rows[:7]), int8.run(rows[7:])]))


def test_quantizing_is_repeatable_and_keeps_metadata(graph, family, rows):
    model = graph.package(student(family, rows, 4), {"headwater.family": "flight_delay"})

    first, again = (quantized(model, rows[:200]) for _ in range(2))

    assert first.SerializeToString() == again.SerializeToString()
    assert ("headwater.family", "flight_delay") in [(p.key, p.value) for p in first.metadata_props]


def test_a_sealed_package_carries_all_that_a_device_needs(graph, family, rows, tmp_path):
    int8 = quantized(graph.package(student(family, rows, 5), {}), rows[:200])

    data = sealed(int8, family.interface, family.spec, rows[:8], {"batch": 3})
    (tmp_path / "p.onnx").write_bytes(data)
    arm = load_arm(tmp_path / "p.onnx", None, "stable", "r1", 1.0)

    assert (arm.info.family, arm.info.interface) == ("flight_delay", family.interface)
    assert (arm.info.spec, arm.info.provenance) == (family.spec, {"batch": 3})
    assert np.array_equal(rows[:8], arm.info.golden_inputs)
    assert np.allclose(arm.runner.run(rows[:8]), arm.info.golden_outputs)


@pytest.mark.parametrize("tiny", [1e-39, -1e-44, 1.1754942e-38])
def test_a_sealed_package_holds_no_denormal_weight(graph, family, rows, tiny):
    network = student(family, rows, 5)
    with torch.no_grad():
        next(network.parameters()).flatten()[0] = tiny
    model = graph.package(network, {})
    assert denormals(model)

    data = sealed(model, family.interface, family.spec, rows[:8], {})

    assert denormals(onnx.load_model_from_string(data)) == 0


def test_sealing_changes_no_normal_weight(graph, family, rows):
    model = graph.package(student(family, rows, 5), {})
    before = [tensor.SerializeToString() for tensor in model.graph.initializer]

    data = sealed(model, family.interface, family.spec, rows[:8], {})

    sealed_model = onnx.load_model_from_string(data)
    assert [each.SerializeToString() for each in sealed_model.graph.initializer] == before


def denormals(model):
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    floats = [array for array in arrays if array.dtype == np.float32]
    small = np.finfo(np.float32).smallest_normal
    return sum(int(((array != 0) & (np.abs(array) < small)).sum()) for array in floats)


def test_a_model_whose_answers_depend_on_their_batch_cannot_be_sealed(
    graph, family, rows, tmp_path
):
    onnx.save_model(graph.package(student(family, rows, 5), {}), str(tmp_path / "float.onnx"))
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx")
    dynamic = onnx.load_model(str(tmp_path / "dynamic.onnx"))
    assert any(node.op_type == "DynamicQuantizeLinear" for node in dynamic.graph.node)

    with pytest.raises(PackageError) as caught:
        sealed(dynamic, family.interface, family.spec, rows[:8], {})
    assert caught.value.code == "batch_dependent"


@pytest.mark.parametrize("form", ["int8", "float32"])
def test_what_ships_answers_a_row_alike_in_every_batch(graph, family, rows, runner, form):
    model = graph.package(student(family, rows, 4), {})
    shipped = quantized(model, rows[:500]) if form == "int8" else model
    data = runner(sealed(shipped, family.interface, family.spec, rows[:8], {}))

    alone = np.concatenate([data.run(row[None]) for row in rows])

    for size in (2, 7, 64, len(rows)):
        batches = [data.run(rows[start : start + size]) for start in range(0, len(rows), size)]
        assert np.allclose(alone, np.concatenate(batches), rtol=0, atol=1e-6)


def test_sealing_is_repeatable_and_overwrites_what_was_sealed_before(graph, family, rows, runner):
    def seal(model, batch):
        return sealed(model, family.interface, family.spec, rows[:8], {"batch": batch})

    model = graph.package(student(family, rows, 5), {"headwater.provenance": "old"})
    first, second = seal(model, 1), seal(model, 2)

    assert first == seal(graph.package(student(family, rows, 5), {}), 1)
    assert read_package(runner(second).metadata).provenance == {"batch": 2}


def test_a_model_that_answers_no_number_cannot_be_sealed(graph, family, rows):
    network = student(family, rows, 6)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))

    with pytest.raises(PackageError):
        sealed(graph.package(network, {}), family.interface, family.spec, rows[:8], {})

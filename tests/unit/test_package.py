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
from cloud_learner.package.seal import runner_of, sealed
from cloud_learner.train.family import Family
from cloud_learner.train.hidden import embeddings_of, looked_into
from edge_runtime.errors import PackageError
from edge_runtime.inference.package import read_package
from edge_runtime.inference.pipeline import score_batch
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import load_arm
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior

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


@pytest.fixture(scope="module")
def telling(family, rows):
    """A graph that gives the embedding, too."""
    return Graph(student(family, rows, 0), rows[:64], look=looked_into)


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


def test_a_package_without_sessions_is_one_with_them_but_for_what_is_added(
    graph, telling, family, rows
):
    network = student(family, rows, 3)
    without, added = graph.package(network, {}), telling.package(network, {})

    assert [each.name for each in without.graph.output] == ["probability"]
    assert [each.name for each in added.graph.output] == ["probability", "embedding"]
    assert (graph.embeds, telling.embeds) == (False, True)
    del added.graph.output[1]
    assert [n.op_type for n in without.graph.node] == [n.op_type for n in added.graph.node]
    assert list(without.graph.initializer) == list(added.graph.initializer)


@pytest.mark.parametrize("seed", [1, 2])
def test_an_embedding_is_what_torch_gives_after_a_swap(telling, family, rows, runner, seed):
    network = student(family, rows, seed)
    found, answered = runner(telling.package(network, {})).embed(rows)

    assert np.allclose(embeddings_of(network, rows), found, atol=1e-4)
    assert np.allclose(answers(network, rows), answered, atol=1e-5)


def test_a_kept_graph_knows_whether_it_gives_an_embedding(graph, telling, tmp_path):
    for each in (graph, telling):
        each.save(tmp_path / "graph.onnx")
        assert Graph.load(tmp_path / "graph.onnx").embeds == each.embeds


class _Telling(nn.Module):
    """Its embedding is what its method says: half of what goes into the last layer, and scaled by
    a number that no export knows as a weight where `folds`.
    """

    def __init__(self, *, folds: bool) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(3, 8), nn.Linear(8, 1)
        self.scale, self.folds = nn.Parameter(torch.ones(1)), folds

    def forward(self, x):
        return self.out(torch.relu(self.body(x))) * self.scale

    def embed(self, x):
        return torch.relu(self.body(x))[:, :4] * (float(self.scale) if self.folds else self.scale)


def test_a_network_may_say_itself_what_its_embedding_is(runner):
    network, some = _Telling(folds=False), np.random.default_rng(1).normal(size=(9, 3))
    some = some.astype(np.float32)
    found, _ = runner(Graph(network, some, look=looked_into).package(network, {})).embed(some)

    assert np.allclose(embeddings_of(network, some), found, atol=1e-6)
    assert found.shape == (9, 4)


def test_an_embedding_whose_weights_the_export_folds_away_is_refused():
    with pytest.raises(PackageError, match="differ") as caught:
        Graph(_Telling(folds=True), np.ones((4, 3), np.float32), look=looked_into)
    assert caught.value.code == "parity"


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


def test_an_int8_embedding_stays_near_the_float_one_and_does_not_depend_on_its_batch(
    telling, family, rows, runner
):
    model = telling.package(student(family, rows, 4), {})
    int8 = quantized(model, rows[:500])
    assert [each.name for each in int8.graph.output] == ["probability", "embedding"]
    plain, quant = runner(model).embed(rows)[0], runner(int8).embed(rows)[0]

    assert quant.dtype == np.float32
    gap = np.sqrt(np.square(plain - quant).mean() / np.square(plain).mean())
    assert gap < 0.04  # measured: 0.028
    alone = np.concatenate([runner(int8).embed(row[None])[0] for row in rows[:40]])
    assert np.array_equal(alone, quant[:40])


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


def test_a_sealed_package_carries_the_policy_of_its_sessions(telling, family, rows, tmp_path):
    int8 = quantized(telling.package(student(family, rows, 5), {}), rows[:200])
    width = runner_of(int8).width
    eye = np.eye(width + 1, dtype=np.float32)
    policy = Policy(Prior("binary", eye[0] * 0, eye, 3.0, 50.0), 0.1, 0.5)

    data = sealed(int8, family.interface, family.spec, rows[:8], {}, policy=policy)
    (tmp_path / "p.onnx").write_bytes(data)
    arm = load_arm(tmp_path / "p.onnx", None, "stable", "r1", 1.0)

    assert arm.info.policy.to_json() == policy.to_json()
    assert arm.runner.width == width == 32


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


def test_a_model_whose_embedding_depends_on_its_batch_cannot_be_sealed(telling, family, rows):
    model = telling.package(student(family, rows, 5), {})
    model.graph.output[1].name = "own"
    for node in model.graph.node:
        node.input[:] = ["own" if name == "embedding" else name for name in node.input]
        node.output[:] = ["own" if name == "embedding" else name for name in node.output]
    mean = onnx.helper.make_node("ReduceMean", ["own"], ["mean"], axes=[0], keepdims=1)
    model.graph.node.extend([mean, onnx.helper.make_node("Sub", ["own", "mean"], ["embedding"])])
    model.graph.output[1].name = "embedding"
    model.opset_import[0].version = 17

    with pytest.raises(PackageError) as caught:
        sealed(model, family.interface, family.spec, rows[:8], {})
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

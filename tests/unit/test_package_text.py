"""Packages of transformers: exported by torch and by Optimum, at any length, with weights swapped
in, in int8 whose answers depend neither on padding nor on the texts beside."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cloud_learner.package.build import Graph
from cloud_learner.package.delta import patch_between
from cloud_learner.package.dynamic import quantized_by_row
from cloud_learner.package.forms import Forms
from cloud_learner.package.seal import runner_of
from cloud_learner.stats.tasks import Task
from edge_runtime.errors import PackageError
from edge_runtime.inference.pipeline import score_batch
from edge_runtime.inference.signature import INPUT, OUTPUT
from edge_runtime.inference.slot import load_arm
from edge_runtime.personal.policy import Policy
from edge_runtime.personal.prior import Prior

CLASSES, WORDS, LENGTH = 5, 200, 32
TASK = Task(kind="multiclass", classes=CLASSES)
SHAPES = [(1, 8), (3, 16), (5, 31)]

needs_extra = pytest.mark.skipif(
    find_spec("optimum") is None, reason="needs pip install 'headwater[transformers]'"
)


class Attentive(nn.Module):
    """A transformer of one layer, of torch alone; all biases are born equal."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, 32), nn.LayerNorm(32)
        self.asks, self.keys, self.tells = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, outputs)
        for layer in (self.asks, self.keys, self.tells, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, features):
        return self.out(self.embed(features))

    def embed(self, features):
        ids = features.long()
        shown = (ids != 0).unsqueeze(1)
        x = self.words(ids)
        scores = self.asks(x) @ self.keys(x).transpose(1, 2) / 32**0.5
        mixed = torch.softmax(scores.masked_fill(~shown, -1e9), 2) @ self.tells(x)
        weights = shown.transpose(1, 2).to(x.dtype)
        return (self.norm(x + mixed) * weights).sum(1) / weights.sum(1).clamp(min=1)


def bert():
    """A tiny BERT from a configuration, as `models/` makes one from a checkpoint's folder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
    )

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = BertModel(config, add_pooling_layer=False), nn.Linear(32, 5)

        def forward(self, features):
            ids = features.long()
            mask = (ids != 0).long()
            hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            shown = mask.unsqueeze(2).to(hidden.dtype)
            return self.head((hidden * shown).sum(1) / shown.sum(1).clamp(min=1))

    return Classifier()


def texts(count, length, seed=0):
    """Rows of ids, of texts that are each shorter than the one before; 0 is padding."""
    rows = np.random.default_rng(seed).integers(1, WORDS, (count, length)).astype(np.float32)
    for row in range(count):
        rows[row, max(1, length - 2 * row) :] = 0
    return rows


def learned(network, seed):
    """The network with weights far from where it was born."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
    return network.eval()


def answers(network, rows):
    with torch.no_grad():
        return torch.softmax(network(torch.from_numpy(rows)), 1).numpy()


def given(model, rows):
    return runner_of(model).infer({INPUT: rows}, [OUTPUT])[OUTPUT]


def text_graph(network, exporter="torch"):
    return Graph(network, texts(8, LENGTH), TASK, exporter=exporter, is_text=True)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return text_graph(Attentive())


@pytest.fixture(
    scope="module",
    params=[
        "own by torch",
        pytest.param("by torch", marks=needs_extra),
        pytest.param("by optimum", marks=needs_extra),
    ],
)
def case(request):
    """How a network is built, and the graph of it."""
    torch.manual_seed(0)
    if request.param == "own by torch":
        return Attentive, request.getfixturevalue("graph")
    return bert, text_graph(bert(), request.param.removeprefix("by "))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_is_answered_at_any_length_as_torch_does(case, shape):
    build, graph = case
    network, rows = learned(build(), 1), texts(*shape)

    assert np.allclose(answers(network, rows), given(graph.package(network, {}), rows), atol=1e-5)


def test_a_package_of_either_exporter_has_the_one_input_and_the_one_output(case):
    build, graph = case
    model = graph.package(learned(build(), 1), {"a": "b"})
    sizes = [
        [each.dim_value for each in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]

    assert [each.name for each in (*model.graph.input, *model.graph.output)] == [INPUT, OUTPUT]
    assert sizes == [[0, 0], [0, CLASSES]]
    assert {each.key: each.value for each in model.metadata_props} == {"a": "b"}
    onnx.checker.check_model(model)


def test_a_kept_graph_of_either_exporter_makes_the_same_packages(case, tmp_path):
    build, graph = case
    graph.save(tmp_path / "graph.onnx")
    network = learned(build(), 2)

    assert graph.package(network, {}) == Graph.load(tmp_path / "graph.onnx").package(network, {})


@needs_extra
def test_a_network_without_a_transformers_model_is_none_for_optimum():
    with pytest.raises(PackageError, match="no transformers model") as caught:
        text_graph(Attentive(), "optimum")

    assert caught.value.code == "no_export"
    assert "torch" in caught.value.hint


def test_weights_that_are_born_equal_are_swapped_each_by_itself():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.LayerNorm(3), nn.LayerNorm(3)

        def forward(self, x):
            return self.other(torch.tanh(self.one(x)))

    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    task = Task(kind="multiclass", classes=3)
    network = learned(Twins(), 1)

    found = given(Graph(Twins(), rows, task).package(network, {}), rows)

    assert np.allclose(answers(network, rows), found, atol=1e-5)


def test_a_weight_that_is_used_as_it_is_and_turned_is_swapped_in_both_places():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.randn(3, 3))
            self.register_buffer("one", torch.ones(1))  # as is many a constant of an export

        def forward(self, x):
            return torch.tanh(x.unsqueeze(1) @ self.words).squeeze(1) @ self.words.T * self.one

    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    task = Task(kind="multiclass", classes=3)
    network = learned(Tied(), 1)
    plain = Graph(Tied(), rows, task).package(network, {})

    assert np.allclose(answers(network, rows), given(plain, rows), atol=1e-5)
    assert np.allclose(answers(network, rows), given(quantized_by_row(plain), rows), atol=0.1)


@pytest.fixture(scope="module")
def float_and_int8(case):
    """A package in both forms."""
    build, graph = case
    plain = graph.package(learned(build(), 3), {"kept": "yes"})
    return plain, quantized_by_row(plain)


def test_int8_by_row_answers_nearly_as_the_float_form_does(float_and_int8):
    plain, int8 = float_and_int8
    rows = texts(40, LENGTH, seed=4)
    expected, found = given(plain, rows), given(int8, rows)

    assert np.abs(expected - found).max() < 0.1
    assert np.abs(expected - found).mean() < 0.01
    assert [(each.key, each.value) for each in int8.metadata_props] == [("kept", "yes")]
    onnx.checker.check_model(int8)


def test_int8_by_row_multiplies_all_weights_as_bytes(float_and_int8):
    plain, int8 = float_and_int8
    tables = [each for each in int8.graph.initializer if len(each.dims) == 2]
    floats = [each for each in tables if each.data_type == onnx.TensorProto.FLOAT]
    products = [node.op_type for node in int8.graph.node if "MatMul" in node.op_type]

    assert len(floats) < len(tables)
    assert all(1 in each.dims for each in floats)  # a scale for each row of a table
    assert "Gemm" not in {node.op_type for node in int8.graph.node}
    assert len(products) == products.count("MatMulInteger") + 2 * layers(plain)


def test_an_answer_in_int8_depends_neither_on_padding_nor_on_the_texts_beside(float_and_int8):
    _, int8 = float_and_int8
    rows = texts(6, 16, seed=5)
    run = runner_of(int8).infer
    together = run({INPUT: rows}, [OUTPUT])[OUTPUT]
    alone = [run({INPUT: row[None]}, [OUTPUT])[OUTPUT] for row in rows]
    wider = np.pad(rows, ((0, 0), (0, LENGTH - 16)))

    assert np.allclose(together, np.concatenate(alone), rtol=0, atol=1e-6)
    assert np.allclose(together, run({INPUT: wider}, [OUTPUT])[OUTPUT], rtol=0, atol=1e-6)


def test_a_row_of_zeros_is_answered_in_int8(graph):
    network = learned(Attentive(), 3)
    with torch.no_grad():
        network.words.weight.zero_()
    plain = graph.package(network, {})

    expected, found = (given(form, texts(2, 8)) for form in (plain, quantized_by_row(plain)))

    assert np.isfinite(found).all()
    assert np.allclose(expected, found, atol=0.05)


def test_same_weights_give_the_same_int8_bytes_and_near_ones_a_small_patch(graph):
    network = learned(Attentive(), 6)
    first, again, moved = (
        quantized_by_row(graph.package(each, {})).SerializeToString(deterministic=True)
        for each in (network, network, nudged(network))
    )
    patch = patch_between(first, moved)

    assert first == again
    assert first != moved
    assert patch is not None
    assert len(patch) < len(moved) / 4


def test_what_only_a_branch_or_an_output_names_stays_in_int8():
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n,4] features) => (float[n,2] probability, float[4,2] w)
        <float[4,2] w = {1,2,3,4,5,6,7,8}, float zero = {0}, float two = {2}> {
          product = MatMul(features, w)
          largest = ReduceMax<keepdims=0>(product)
          positive = Greater(largest, zero)
          probability = If(positive) <
            then_branch = yes () => (float[n,2] doubled) { doubled = Mul(product, two) },
            else_branch = no () => (float[n,2] same) { same = Identity(product) }>
        }""")
    rows = np.abs(texts(3, 4))
    expected, found = (
        runner_of(form).infer({INPUT: rows}) for form in (model, quantized_by_row(model))
    )

    assert np.allclose(expected[OUTPUT], found[OUTPUT], rtol=0.02)
    assert np.array_equal(expected["w"], found["w"])


def layers(model):
    """Each multiplies activations with one another twice."""
    return sum(node.op_type == "Softmax" for node in model.graph.node) - 1


def nudged(network):
    """The network after a step of learning."""
    torch.manual_seed(7)
    other = Attentive()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape) * 1e-3 * weight.abs().max())
    return other


@pytest.mark.parametrize(
    "made",
    [
        (Attentive, "torch", "static"),
        (Attentive, "torch", "dynamic"),
        pytest.param((bert, "optimum", "dynamic"), marks=needs_extra),
    ],
)
def test_a_device_takes_both_forms_of_a_student_of_texts(made, text_spec, text_interface, tmp_path):
    build, exporter, ranges = made
    spec, network = text_spec(LENGTH), learned(build(), 8)
    said = ["", "my card is lost", "when will it come ?", "where", "cards " * 40]
    rows = np.stack([np.float32(spec.encoders["text"](text)) for text in said])
    forms = Forms(text_interface, spec, TASK, rows, None, exporter=exporter, ranges=ranges)

    packages = forms.of(network, rows, {}, lambda _runner: None)

    for data, atol in zip(packages, (0.2 if ranges == "static" else 0.1, 1e-5), strict=True):
        (tmp_path / "p.onnx").write_bytes(data)
        arm = load_arm(tmp_path / "p.onnx", None, "stable", "r1", 1.0)
        assert np.allclose(answers(network, rows), score_batch(arm.runner, rows), atol=atol)
        assert arm.runner.buckets is not None


def test_sessions_of_texts_stand_on_embeddings_that_a_device_sees_too(
    text_spec, text_interface, tmp_path
):
    """The policy is learned from a runner that reads rows as a device does."""
    spec, network, seen = text_spec(LENGTH), learned(Attentive(1), 8), []
    rows = np.stack([np.float32(spec.encoders["text"](text)) for text in ["", "my card", "where"]])

    def policy(runner):
        eye = np.eye(runner.width + 1, dtype=np.float32)
        seen.append(runner.embed(rows)[0])
        return Policy(Prior("binary", eye[0] * 0, eye, 3.0, 50.0))

    def look(student, features):
        return student(features), student.embed(features)

    int8, _ = Forms(text_interface, spec, Task(), rows, look, ranges="dynamic").of(
        network, rows, {}, policy
    )
    (tmp_path / "p.onnx").write_bytes(int8)
    arm = load_arm(tmp_path / "p.onnx", None, "stable", "r1", 1.0)

    assert seen[0].shape == (len(rows), 32)
    assert arm.runner.buckets is not None
    assert np.allclose(seen[0], arm.runner.embed(rows)[0], rtol=0, atol=1e-6)


def test_a_missing_extra_is_told_with_file_key_and_command(coin, tmp_path):
    declared = '[package]\nexporter = "optimum"\n\n[events.asked]'
    folder = coin.write_family(tmp_path / "f", {"family.toml": ("[events.asked]", declared)})
    code = f"""
import sys
sys.modules["optimum"] = None
from pathlib import Path
from cloud_learner.train.family import Family
from edge_runtime.errors import ConfigError
try:
    Family.load(Path({str(folder)!r}))
except ConfigError as error:
    print(error.message, error.hint, sep="\\n")
"""

    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert "family.toml: package.exporter: 'optimum' is not installed" in told
    assert "pip install 'headwater[transformers]'" in told

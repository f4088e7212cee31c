"""Packages from a student: the graph is exported once, later versions swap their weights in.

Why: `torch.onnx.export` costs seconds, a swap of initializers under a millisecond, and a candidate
is built every half second.

Invariants: same weights give the same bytes; a graph is used only after its answers with swapped
weights were compared with torch's; the package is one file and carries all a device needs.

Knows nothing about training. Implements proto/package.md.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from cloud_learner.stats.tasks import Task
from edge_runtime.errors import PackageError
from edge_runtime.files import write_atomic

INPUT, OUTPUT, EMBEDDING = "features", "probability", "embedding"
OPSET = 18

Matrix = npt.NDArray[np.float32]
_BINARY = Task()


class _Answering(nn.Module):
    """The student as a device runs it: answers, not logits."""

    def __init__(self, student: nn.Module, task: Task) -> None:
        super().__init__()
        self.student, self.kind = student, task.kind

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.student(features)
        if self.kind == "binary":
            return torch.sigmoid(logits)
        return torch.softmax(logits, dim=1) if self.kind == "multiclass" else logits


class Graph:
    """The exported graph of one student architecture."""

    def __init__(self, student: nn.Module, rows: Matrix, task: Task = _BINARY) -> None:
        """Export with `rows` (at least two) as example input. Raises: PackageError."""
        self._model = _export(_Answering(copy.deepcopy(student), task).eval(), rows[:2])
        self._check(student, rows, task)

    @classmethod
    def load(cls, path: Path) -> Graph:
        """The graph that `save` wrote. Raises: OSError, PackageError."""
        graph = cls.__new__(cls)
        try:
            graph._model = onnx.load_model_from_string(path.read_bytes())  # noqa: SLF001
        except DecodeError as error:
            raise PackageError("bad_graph", f"{path} is no exported graph: {error}") from error
        return graph

    def save(self, path: Path) -> None:
        """Keep the graph, so that a restart need not export again. Raises: OSError."""
        write_atomic(path, self._model.SerializeToString(deterministic=True))

    def package(self, student: nn.Module, metadata: Mapping[str, str]) -> ModelProto:
        """The float32 package of this student."""
        model = ModelProto()
        model.CopyFrom(self._model)
        _swap(model, student)
        onnx.helper.set_model_props(model, dict(metadata))
        return model

    def _check(self, student: nn.Module, rows: Matrix, task: Task) -> None:
        """Swapping must reach every weight: other weights must give what torch gives for them."""
        other = copy.deepcopy(student).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.9).add_(0.01)
            expected = _Answering(other, task).eval()(torch.from_numpy(rows)).numpy()
        found = _reference(self.package(other, {}), rows)
        if not np.allclose(expected, found, atol=1e-4):
            gap = float(np.abs(expected - found).max())
            raise PackageError(
                "parity", f"the exported graph and torch differ by {gap:.2g} after a weight swap"
            )


def _export(answering: nn.Module, rows: Matrix) -> ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _program(answering, rows)
    model: ModelProto = program.model_proto
    del model.metadata_props[:]
    model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    return model


def _program(answering: nn.Module, rows: Matrix) -> Any:
    try:
        return torch.onnx.export(
            answering,
            (torch.from_numpy(rows),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
            optimize=True,
        )
    except Exception as error:  # torch's own have no root in common
        reason = f"{error.__cause__ or error}".strip().partition("\n")[0]
        raise PackageError(
            "no_export",
            f"the student cannot be exported to ONNX: {reason}",
            "does network.py branch on a value? torch.where chooses without branching",
        ) from error


def _swap(model: ModelProto, student: nn.Module) -> None:
    values = {f"student.{name}": value for name, value in student.state_dict().items()}
    for tensor in model.graph.initializer:
        value = values.get(tensor.name)
        if value is not None:
            name = tensor.name
            array = value.detach().numpy()
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def _reference(model: ModelProto, rows: Matrix) -> Matrix:
    from onnx.reference import ReferenceEvaluator

    answers: Matrix = ReferenceEvaluator(model).run([OUTPUT], {INPUT: rows})[0]
    return answers

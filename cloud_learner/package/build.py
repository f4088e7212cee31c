"""Packages from a student: the graph is exported once, later versions swap their weights in.

Why: `torch.onnx.export` costs seconds, a swap of initializers under a millisecond, and a candidate
is built every half second.

Where sessions adapt the answers, the graph gives the student's embedding beside them; elsewhere it
does not hold one.

Invariants: same weights give the same bytes; a graph is used only after what it gives with swapped
weights was compared with torch's; the package is one file and carries all a device needs.

Knows nothing about training, nor what a student's embedding is. Implements proto/package.md.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
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
from edge_runtime.inference.signature import EMBEDDING, INPUT, OUTPUT

OPSET = 18

Matrix = npt.NDArray[np.float32]
Look = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]]
"""A network and features to its logits and its embedding."""

_BINARY = Task()
_EXPORTED = "headwater/embedding"  # until what the network calls `embedding` is out of the way


class _Answering(nn.Module):
    """The student as a device runs it: answers, not logits; with `look`, its embedding as well."""

    def __init__(self, student: nn.Module, task: Task, look: Look | None) -> None:
        super().__init__()
        self.student, self.kind, self.look = student, task.kind, look

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        if self.look is None:
            return (self._answers(self.student(features)),)
        logits, embedding = self.look(self.student, features)
        assert embedding is not None, "a family is refused whose student has no embedding"
        return self._answers(logits), embedding

    def _answers(self, logits: Tensor) -> Tensor:
        if self.kind == "binary":
            return torch.sigmoid(logits)
        return torch.softmax(logits, dim=1) if self.kind == "multiclass" else logits


class Graph:
    """The exported graph of one student architecture."""

    def __init__(
        self, student: nn.Module, rows: Matrix, task: Task = _BINARY, look: Look | None = None
    ) -> None:
        """Export with `rows` (at least two) as example input; with the embedding that `look` sees.

        Raises: PackageError.
        """
        self._model = _export(_Answering(copy.deepcopy(student), task, look).eval(), rows[:2])
        self._check(student, rows, task, look)

    @classmethod
    def load(cls, path: Path) -> Graph:
        """The graph that `save` wrote. Raises: OSError, PackageError."""
        graph = cls.__new__(cls)
        try:
            graph._model = onnx.load_model_from_string(path.read_bytes())  # noqa: SLF001
        except DecodeError as error:
            raise PackageError("bad_graph", f"{path} is no exported graph: {error}") from error
        return graph

    @property
    def embeds(self) -> bool:
        """Whether it gives an embedding."""
        return EMBEDDING in self._outputs

    @property
    def _outputs(self) -> list[str]:
        return [output.name for output in self._model.graph.output]

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

    def _check(self, student: nn.Module, rows: Matrix, task: Task, look: Look | None) -> None:
        """Swapping must reach every weight: other weights must give what torch gives for them."""
        other = copy.deepcopy(student).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.9).add_(0.01)
            expected = _Answering(other, task, look).eval()(torch.from_numpy(rows))
        found = _reference(self.package(other, {}), rows, self._outputs)
        for ours, torchs in zip(found, expected, strict=True):
            if not np.allclose(torchs.numpy(), ours, atol=1e-4):
                gap = float(np.abs(torchs.numpy() - ours).max())
                raise PackageError(
                    "parity",
                    f"the exported graph and torch differ by {gap:.2g} after a weight swap",
                )


def _export(answering: _Answering, rows: Matrix) -> ModelProto:
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
    if len(model.graph.output) > 1:
        _rename(model, {EMBEDDING: f"{EMBEDDING}/own", _EXPORTED: EMBEDDING})
    return model


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Give tensors other names; torch calls what it looks up in a table `embedding`, too."""
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.output, *model.graph.value_info):
        value.name = names.get(value.name, value.name)


def _program(answering: _Answering, rows: Matrix) -> Any:
    try:
        return torch.onnx.export(
            answering,
            (torch.from_numpy(rows),),
            input_names=[INPUT],
            output_names=[OUTPUT] if answering.look is None else [OUTPUT, _EXPORTED],
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


def _reference(model: ModelProto, rows: Matrix, outputs: list[str]) -> list[Matrix]:
    from onnx.reference import ReferenceEvaluator

    answers: list[Matrix] = ReferenceEvaluator(model).run(outputs, {INPUT: rows})
    return answers

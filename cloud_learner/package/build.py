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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto
from torch import Tensor, nn

from cloud_learner.package.seal import runner_of
from cloud_learner.package.weights import named, renamed, swap
from cloud_learner.stats.tasks import Task
from edge_runtime.errors import HeadwaterError, PackageError
from edge_runtime.files import write_atomic
from edge_runtime.inference.signature import EMBEDDING, INPUT, OUTPUT

OPSET = 20

Exporter = Literal["torch", "optimum"]
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
        self,
        student: nn.Module,
        rows: Matrix,
        task: Task = _BINARY,
        look: Look | None = None,
        *,
        exporter: Exporter = "torch",
        is_text: bool = False,
    ) -> None:
        """Export with `rows` (at least two) as example input; with the embedding that `look` sees.

        Rows that are a text (`is_text`) may be cut behind it: then the number of columns is free.
        Raises: PackageError.
        """
        made = _Answering(_otherwise(student, 1), task, look).eval()
        self._model = _exported(made, rows[:2], exporter, is_text=is_text)
        self._check(_Answering(_otherwise(student, 2), task, look).eval(), _shapes(rows, is_text))

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
        swap(model, _arrays(student.state_dict()))
        onnx.helper.set_model_props(model, dict(metadata))
        return model

    def _check(self, other: _Answering, tables: Sequence[Matrix]) -> None:
        """Swapping must reach every weight: other weights must give what torch gives for them."""
        runner, names = runner_of(self.package(other.student, {})), self._outputs
        for rows in tables:
            with torch.no_grad():
                expected = other(torch.from_numpy(rows))
            found = runner.infer({INPUT: rows}, names)
            for ours, torchs in zip((found[name] for name in names), expected, strict=True):
                if not np.allclose(torchs.numpy(), ours, atol=1e-4):
                    gap = float(np.abs(torchs.numpy() - ours).max())
                    raise PackageError(
                        "parity",
                        f"the exported graph and torch differ by {gap:.2g} after a weight swap",
                    )


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """By the names that the graph has for them."""
    return {f"student.{name}": tensor.detach().numpy() for name, tensor in tensors.items()}


def _otherwise(student: nn.Module, seed: int) -> nn.Module:
    """The network with weights of which no two are equal, as those that are new may be."""
    other, random = copy.deepcopy(student), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 - seed / 10)
            weight.add_(torch.rand(weight.shape, generator=random), alpha=0.02)
    return other


def _shapes(rows: Matrix, is_text: bool) -> list[Matrix]:
    """What an export is tried on: one row, three rows and more, and texts of three lengths."""
    if not is_text:
        return [rows[:1], rows[:3], rows]
    lengths = (rows.shape[1] // 4, rows.shape[1] // 2, rows.shape[1])
    cut = (rows[:count, : max(length, 1)] for count, length in zip((1, 3, 2), lengths, strict=True))
    return [np.ascontiguousarray(each) for each in cut]


def _exported(
    answering: _Answering, rows: Matrix, exporter: Exporter, *, is_text: bool
) -> ModelProto:
    example, embeds = torch.from_numpy(rows), answering.look is not None
    outputs = [OUTPUT, _EXPORTED] if embeds else [OUTPUT]
    free = {0: "batch", 1: "length"} if is_text else {0: "batch"}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = _EXPORTERS[exporter](answering, example, outputs, free)
        except HeadwaterError:
            raise
        except Exception as error:  # the exporters' own have no root in common
            reason = f"{error.__cause__ or error}".strip().partition("\n")[0]
            raise PackageError(
                "no_export",
                f"the student cannot be exported to ONNX: {reason}",
                "does network.py branch on a value? torch.where chooses without branching",
            ) from error
    _strip(model)
    if embeds:
        renamed(model, {EMBEDDING: f"{EMBEDDING}/own", _EXPORTED: EMBEDDING})
    named(model, _arrays(dict(answering.student.named_parameters())))
    return model


def _by_torch(
    answering: _Answering, example: Tensor, outputs: list[str], free: Mapping[int, str]
) -> ModelProto:
    program: Any = torch.onnx.export(
        answering,
        (example,),
        input_names=[INPUT],
        output_names=outputs,
        dynamic_shapes=(dict.fromkeys(free, torch.export.Dim.DYNAMIC),),
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
        optimize=True,
    )
    model: ModelProto = program.model_proto
    return model


def _by_optimum(
    answering: _Answering, example: Tensor, outputs: list[str], free: Mapping[int, str]
) -> ModelProto:
    from cloud_learner.package.optimum_path import export

    return export(answering, example, outputs, free, OPSET)


_EXPORTERS = {"torch": _by_torch, "optimum": _by_optimum}


def _strip(model: ModelProto) -> None:
    """Take out what exporters tell of themselves and of the machine."""
    del model.metadata_props[:]
    model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]

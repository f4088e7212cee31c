"""Weights in an exported graph: each found by its value, named, and written anew.

Why: exporters name weights as they like, write some of them turned (transposed), and merge those
that are equal into one; where weights are swapped, each of them must have a name of its own.

Invariants: what `named` gives computes what it was given. A number that is no weight, and a weight
that the exporter computed with, keep their own names and are swapped by nobody.

Knows nothing about torch: a weight is a name and an array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, numpy_helper

Array = npt.NDArray[Any]

_TURNED = "^T"


def named(model: ModelProto, weights: Mapping[str, Array]) -> None:
    """Give each initializer that is a weight, or a weight turned, the name of that weight.

    No two `weights` may be equal.
    """
    known = {_print(array): name for name, array in _forms(weights).items()}
    names = {}
    for tensor in model.graph.initializer:
        if tensor.name not in weights:
            names[tensor.name] = known.get(_print(numpy_helper.to_array(tensor)), tensor.name)
    renamed(model, names)
    once = {tensor.name: tensor for tensor in model.graph.initializer}
    if len(once) < len(model.graph.initializer):
        kept = list(once.values())
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)


def swap(model: ModelProto, weights: Mapping[str, Array]) -> None:
    """Write `weights` over those of the same names."""
    forms = _forms(weights)
    for tensor in model.graph.initializer:
        array = forms.get(tensor.name)
        if array is not None:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def renamed(model: ModelProto, names: Mapping[str, str]) -> None:
    """Give tensors other names, inputs of the graph apart."""
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    graph = model.graph
    for value in (*graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)


def _forms(weights: Mapping[str, Array]) -> dict[str, Array]:
    turned = {f"{name}{_TURNED}": array.T for name, array in weights.items() if array.ndim == 2}
    return {**turned, **weights}


def _print(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, hashlib.blake2b(array.tobytes()).digest()

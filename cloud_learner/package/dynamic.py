"""int8 without calibration: each row of activations, a token of a text, takes a range of its own.

Why: inside a transformer single numbers are a hundred times larger than the usual, at places that
change with the text. Ranges that are calibrated lose them; those that ONNX Runtime's dynamic
quantization takes, of a whole tensor, move an answer with its padding and with the texts beside it
(docs/adr/0021-a-range-for-each-token.md).

What a product with a weight W (columns c) becomes, for a row x:

    s = max |x| / 127,  u = x / s, rounded, + 128                 as uint8
    y = (u - 128) @ int8(W / w) * w[c] * s,  w[c] = max |W[:, c]| / 63

Weights have seven bits, so that sums of two products fit 16 bits on processors without VNNI. The
order of the last two factors matters: ONNX Runtime 1.32 takes s * w for the factor of a whole
tensor, and fuses it wrongly. Tables that are gathered from have a scale for each row.

Invariants: an answer depends neither on its batch nor on what a mask hides; same package, same
bytes; metadata survives; nodes that are not products with a weight stay as they are.

Knows nothing about transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_PRE = "int8/"
_ZERO, _STEPS, _WEIGHT_STEPS = 128, 127, 63
_SMALLEST = 1e-20  # a row of zeros divides by something

Array = npt.NDArray[Any]


def quantized_by_row(model: ModelProto) -> ModelProto:
    """The int8 form of a float package."""
    int8 = ModelProto()
    int8.CopyFrom(model)
    graph = _Rewriting(int8)
    nodes = [made for node in model.graph.node for made in graph.instead_of(node)]
    del int8.graph.node[:], int8.graph.value_info[:]
    int8.graph.node.extend(nodes)
    used = {*_named_by(nodes), *(output.name for output in int8.graph.output)}
    kept = [each for each in int8.graph.initializer if each.name in used]
    del int8.graph.initializer[:]
    int8.graph.initializer.extend(kept)
    return int8


class _Rewriting:
    """Nodes and constants that take the place of the float ones, each made once."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._weights = {
            each.name: each
            for each in model.graph.initializer
            if each.data_type == TensorProto.FLOAT and len(each.dims) == 2
        }
        self._made: set[str] = set()
        self._add("zero", np.array(_ZERO, np.uint8))
        self._add("shift", np.array(_ZERO + 0.5, np.float32))  # a cast cuts what is behind the dot
        self._add("step", np.array(1 / _STEPS, np.float32))
        self._add("smallest", np.array(_SMALLEST, np.float32))
        self._add("last", np.array([-1], np.int64))

    def instead_of(self, node: NodeProto) -> Iterator[NodeProto]:
        if node.op_type == "Gather" and self._is_lookup(node):
            table, index = node.input
            yield from self._gathered(table, index, node.output[0])
        elif node.op_type == "MatMul" and node.input[1] in self._weights:
            x, weight = node.input
            yield from self._product(x, weight, node.output[0], turned=False)
        elif node.op_type == "Gemm" and self._is_linear(node):
            turned = bool(_options(node).get("transB", 0))
            out, (x, weight, *bias) = node.output[0], node.input
            product = f"{_PRE}{out}/product" if bias else out
            yield from self._product(x, weight, product, turned=turned)
            if bias:
                yield helper.make_node("Add", [product, bias[0]], [out])
        else:
            yield node

    def _is_lookup(self, node: NodeProto) -> bool:
        return node.input[0] in self._weights and _options(node).get("axis", 0) == 0

    def _is_linear(self, node: NodeProto) -> bool:
        asked = {key: value for key, value in _options(node).items() if key != "transB"}
        usual = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        return node.input[1] in self._weights and asked.items() <= usual.items()

    def _product(self, x: str, weight: str, out: str, *, turned: bool) -> Iterator[NodeProto]:
        own = f"{weight}/turned" if turned else weight
        if self._is_new(own):
            array = numpy_helper.to_array(self._weights[weight])
            numbers, scale = _in_steps(array.T if turned else array, axis=0)
            self._add(f"{own}/int8", numbers)
            self._add(f"{own}/scale", scale.ravel())
        yield from self._row_by_row(x)
        at = f"{_PRE}{out}"
        operands = [f"{_PRE}{x}/uint8", f"{_PRE}{own}/int8", f"{_PRE}zero"]
        yield helper.make_node("MatMulInteger", operands, [f"{at}/sum"])
        yield helper.make_node("Cast", [f"{at}/sum"], [f"{at}/float"], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{at}/float", f"{_PRE}{own}/scale"], [f"{at}/scaled"])
        yield helper.make_node("Mul", [f"{at}/scaled", f"{_PRE}{x}/scale"], [out])

    def _row_by_row(self, x: str) -> Iterator[NodeProto]:
        own = f"{_PRE}{x}"
        if not self._is_new(own):
            return
        yield helper.make_node("Abs", [x], [f"{own}/abs"])
        yield helper.make_node("ReduceMax", [f"{own}/abs", f"{_PRE}last"], [f"{own}/most"])
        yield helper.make_node("Max", [f"{own}/most", f"{_PRE}smallest"], [f"{own}/range"])
        yield helper.make_node("Mul", [f"{own}/range", f"{_PRE}step"], [f"{own}/scale"])
        yield helper.make_node("Div", [x, f"{own}/scale"], [f"{own}/steps"])
        yield helper.make_node("Add", [f"{own}/steps", f"{_PRE}shift"], [f"{own}/shifted"])
        yield helper.make_node("Cast", [f"{own}/shifted"], [f"{own}/uint8"], to=TensorProto.UINT8)

    def _gathered(self, table: str, index: str, out: str) -> Iterator[NodeProto]:
        own, at = f"{table}/rows", f"{_PRE}{out}/found"
        if self._is_new(own):
            numbers, scale = _in_steps(numpy_helper.to_array(self._weights[table]), axis=1)
            self._add(f"{own}/int8", numbers)
            self._add(f"{own}/scale", scale)
        yield helper.make_node("Gather", [f"{_PRE}{own}/int8", index], [f"{at}/int8"])
        yield helper.make_node("Gather", [f"{_PRE}{own}/scale", index], [f"{at}/scale"])
        yield helper.make_node("Cast", [f"{at}/int8"], [f"{at}/float"], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{at}/float", f"{at}/scale"], [out])

    def _is_new(self, name: str) -> bool:
        known = name in self._made
        self._made.add(name)
        return not known

    def _add(self, name: str, array: Array) -> None:
        tensor = numpy_helper.from_array(array.copy(order="C"), f"{_PRE}{name}")
        self._graph.initializer.append(tensor)


def _named_by(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """What nodes take in, and those of the graphs within them."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _named_by(attribute.g.node)


def _options(node: NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _in_steps(weight: Array, axis: int) -> tuple[Array, Array]:
    """Whole numbers, and the scale of each line along `axis` that makes the weight of them."""
    most = np.abs(weight).max(axis=axis, keepdims=True)
    scale = (np.maximum(most, _SMALLEST) / _WEIGHT_STEPS).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale

"""Any ONNX file as a package: its inputs and outputs become those that a device asks.

Why: models come from torch, scikit-learn and converters of other frameworks, each with names, types
and outputs of its own; a device knows one input of features and one output of answers.

Invariants: the model's own nodes stay as they are; what is added only renames, joins columns, casts
and chooses a column. A file that cannot be made to fit is refused whole, with what to do next.

Knows nothing about families and gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edge_runtime.errors import PackageError
from edge_runtime.inference.signature import INPUT, OUTPUT

OPSETS = range(9, 24)
QUANTIZED_FROM = 13
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)
_PRE = "headwater/"

Matrix = npt.NDArray[np.float32]


def read_foreign(path: Path, *, quantize: bool = False) -> ModelProto:
    """The model in an ONNX file. Raises: PackageError (unreadable_package, external_data,
    custom_operator, unsupported_opset).
    """
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        hint = "give an ONNX file, such as torch.onnx.export writes"
        raise PackageError(
            "unreadable_package", f"{path} is no ONNX file: {error}", hint
        ) from error
    if not model.graph.node:
        raise PackageError("unreadable_package", f"{path} holds no model", "give an ONNX file")
    if any(each.data_location == TensorProto.EXTERNAL for each in model.graph.initializer):
        raise PackageError(
            "external_data",
            f"{path} keeps weights in other files; a package is one file",
            "onnx.save_model(onnx.load(path), path, save_as_external_data=False)",
        )
    strange = sorted({f"{n.domain}.{n.op_type}" for n in model.graph.node} & _custom(model))
    if strange:
        raise PackageError(
            "custom_operator",
            f"{path} uses {', '.join(strange)}, which a device's ONNX Runtime does not know",
            "export with operators of the domains ai.onnx and ai.onnx.ml alone",
        )
    _check_opset(path, model, quantize=quantize)
    return model


def fitted(
    model: ModelProto, features: Sequence[str], outputs: int, names: Mapping[str, str]
) -> ModelProto:
    """The model with the one input and the one output of a package.

    `names` says which of the model's own stands for `features`, a feature, or `probability`.
    Raises: PackageError `wrong_interface`, naming what the model has.
    """
    fit = ModelProto()
    fit.CopyFrom(model)
    wanted = {INPUT, OUTPUT, *features}
    if unknown := sorted(set(names) - wanted):
        raise _wrong(model, f"--map names {', '.join(unknown)}", f"known: {', '.join(wanted)}")
    _step_aside(fit)
    names = {ours: _aside(yours) for ours, yours in names.items()}
    before = _inputs(fit, features, names)
    after = _output(fit, outputs, names)
    nodes = [*before, *fit.graph.node, *after]
    del fit.graph.node[:]
    fit.graph.node.extend(nodes)
    batch = [onnx.helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", len(features)])]
    given = {each.name for each in fit.graph.initializer}
    _replace(fit.graph.input, batch + [each for each in fit.graph.input if each.name in given])
    answer = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", outputs])
    _replace(fit.graph.output, [answer])
    del fit.graph.value_info[:]
    return fit


def _step_aside(fit: ModelProto) -> None:
    """Free the names of a package's input and output, whatever the model uses them for."""
    for node in fit.graph.node:
        node.input[:] = [_aside(each) for each in node.input]
        node.output[:] = [_aside(each) for each in node.output]
    for each in (*fit.graph.input, *fit.graph.output, *fit.graph.initializer):
        each.name = _aside(each.name)


def _aside(name: str) -> str:
    return f"{_PRE}own/{name}" if name in {INPUT, OUTPUT} else name


def _inputs(fit: ModelProto, features: Sequence[str], names: Mapping[str, str]) -> list[NodeProto]:
    given = {each.name for each in fit.graph.initializer}
    inputs = {each.name: each for each in fit.graph.input if each.name not in given}
    named = names.get(INPUT, "")
    if named or len(inputs) == 1:
        name = named or next(iter(inputs))
        if name not in inputs or len(inputs) != 1 or _width(inputs[name]) not in {0, len(features)}:
            raise _wrong(fit, f"{len(features)} features go in", f"--map {INPUT}=INPUT")
        return _renamed_input(fit, inputs[name])
    columns = [_aside(names.get(feature, feature)) for feature in features]
    if sorted(columns) != sorted(inputs):
        raise _wrong(
            fit, f"the features are {', '.join(features)}", "--map FEATURE=INPUT, one for each"
        )
    nodes = []
    for at, name in enumerate(columns):
        kind, rank = inputs[name].type.tensor_type.elem_type, _rank(inputs[name])
        index = np.array(at if rank == 1 else [at], np.int64)
        column = f"{_PRE}column/{at}"
        fit.graph.initializer.append(numpy_helper.from_array(index, f"{_PRE}at/{at}"))
        nodes.append(helper.make_node("Gather", [INPUT, f"{_PRE}at/{at}"], [column], axis=1))
        nodes.append(helper.make_node("Cast", [column], [name], to=kind))
    return nodes


def _renamed_input(fit: ModelProto, own: ValueInfoProto) -> list[NodeProto]:
    kind = own.type.tensor_type.elem_type
    if kind not in _FLOATS:
        raise _wrong(fit, "features are floats", "export with a float input")
    return [helper.make_node("Cast", [INPUT], [own.name], to=kind)]


def _output(fit: ModelProto, outputs: int, names: Mapping[str, str]) -> list[NodeProto]:
    found = {each.name: each for each in fit.graph.output}
    named = names.get(OUTPUT, "")
    name = named or _likeliest(fit, outputs)
    if name not in found:
        raise _wrong(fit, f"{outputs} numbers come out", f"--map {OUTPUT}=OUTPUT")
    source = _without_zipmap(fit, name)
    width = _width(found[name]) if source == name else 0
    nodes = [helper.make_node("Cast", [source], [f"{_PRE}float"], to=TensorProto.FLOAT)]
    if outputs == 1 and (source != name or width == 2):
        one = numpy_helper.from_array(np.array([1], np.int64), f"{_PRE}one")
        fit.graph.initializer.append(one)
        pick = [f"{_PRE}float", f"{_PRE}one"]
        nodes.append(helper.make_node("Gather", pick, [OUTPUT], axis=1))
        return nodes
    if width not in {0, outputs} and _rank(found[name]) != 1:
        raise _wrong(fit, f"{outputs} numbers come out", f"--map {OUTPUT}=OUTPUT")
    shape = numpy_helper.from_array(np.array([-1, outputs], np.int64), f"{_PRE}shape")
    fit.graph.initializer.append(shape)
    nodes.append(helper.make_node("Reshape", [f"{_PRE}float", f"{_PRE}shape"], [OUTPUT]))
    return nodes


def _likeliest(fit: ModelProto, outputs: int) -> str:
    """The only output that can be meant; a classifier's labels are whole numbers or text."""
    zipped = [n.output[0] for n in fit.graph.node if n.op_type == "ZipMap"]
    floats = [
        each.name
        for each in fit.graph.output
        if each.type.tensor_type.elem_type in _FLOATS
        and (_width(each) in {0, outputs} or (outputs == 1 and _width(each) in {1, 2}))
    ]
    meant = [each.name for each in fit.graph.output if each.name in zipped] or floats
    if _aside(OUTPUT) in meant:
        return _aside(OUTPUT)
    return meant[0] if len(meant) == 1 else ""


def _without_zipmap(fit: ModelProto, name: str) -> str:
    """What a ZipMap made a list of maps of, which no device could read."""
    for node in fit.graph.node:
        if node.op_type == "ZipMap" and name in node.output:
            source: str = node.input[0]
            fit.graph.node.remove(node)
            return source
    return name


def _custom(model: ModelProto) -> set[str]:
    own = {(each.domain, each.name) for each in model.functions}
    return {
        f"{node.domain}.{node.op_type}"
        for node in model.graph.node
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own
    }


def _check_opset(path: Path, model: ModelProto, *, quantize: bool) -> None:
    opset = max((e.version for e in model.opset_import if e.domain in {"", "ai.onnx"}), default=0)
    lowest = QUANTIZED_FROM if quantize else OPSETS.start
    if not lowest <= opset < OPSETS.stop:
        raise PackageError(
            "unsupported_opset",
            f"{path} is of opset {opset}; {lowest} to {OPSETS.stop - 1} can be taken",
            "export again with another opset_version (torch) or target_opset (skl2onnx)",
        )


def _wrong(model: ModelProto, wanted: str, hint: str) -> PackageError:
    def told(values: Sequence[ValueInfoProto]) -> str:
        return ", ".join(
            f"{each.name} (rank {_rank(each)}, width {_width(each)})" for each in values
        )

    has = f"inputs {told(model.graph.input)}; outputs {told(model.graph.output)}"
    return PackageError("wrong_interface", f"{wanted}, but the model has {has}", hint)


def _width(value: ValueInfoProto) -> int:
    """The size of the last axis; 0 where it is open or none."""
    shape = value.type.tensor_type.shape.dim
    return shape[-1].dim_value if len(shape) > 1 else 0


def _rank(value: ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _replace(values: object, new: Sequence[ValueInfoProto]) -> None:
    kept = list(new)
    del values[:]  # type: ignore[attr-defined] # of protobuf
    values.extend(kept)  # type: ignore[attr-defined]

"""What unit tests share: a family so small that its answers can be worked out by hand, its packages
as real files, and one profile for generated tests: the same examples in each run, no deadlines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface, Kind, metadata_of

settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("house")

TOY_FEATURES = """
version = 1
[[features]]
name = "carrier"
field = "carrier"
vocabulary = ["AA", "UA"]
[[features]]
name = "distance"
field = "distance"
bounds = [0.0, 6000.0]
[[features]]
name = "seen_1h"
window = { over = "departed", statistic = "count", span_s = 3600.0 }
[[features]]
name = "delay_1h"
fill = -1.0
window = { over = "departed", value = "delay", statistic = "mean", span_s = 3600.0 }
[[features]]
name = "carrier_delay_1e4s"
window = { over = "departed", key = "carrier", value = "delay", statistic = "sum", span_s = 1e4 }
"""


@pytest.fixture
def toy_spec() -> Spec:
    return Spec.from_toml(TOY_FEATURES)


@pytest.fixture
def toy_interface() -> Interface:
    return Interface(
        family="toy",
        kinds={
            "scheduled": Kind(predicts=True, fields={"carrier": "str", "distance": "float"}),
            "departed": Kind(predicts=False, fields={"carrier": "str", "delay": "float"}),
        },
        clock="event",
        skew_s_max=86400.0,
        lateness_s_max=7200.0,
        output="late",
    )


@pytest.fixture
def write_package(
    tmp_path: Path, toy_spec: Spec, toy_interface: Interface
) -> Callable[..., tuple[Path, str]]:
    """`write_package(bias=...)` writes a package that answers sigmoid(bias + sum(x) / 1000).

    Returns its path and SHA-256. `model_bias` makes the model differ from its golden answers, which
    follow `bias`; `drop` leaves a metadata key out, `columns` changes the model's width alone,
    `ballast` adds 4 * ballast**2 bytes of weights that change no answer.
    """

    def write(
        bias: float = 0.0,
        *,
        spec: Spec = toy_spec,
        interface: Interface = toy_interface,
        model_bias: float | None = None,
        drop: str = "",
        columns: int | None = None,
        ballast: int = 0,
    ) -> tuple[Path, str]:
        inputs = np.linspace(-3, 100, 4 * spec.size, dtype=np.float32).reshape(4, -1)
        logits = inputs.sum(1, keepdims=True) / 1000 + bias
        outputs = (1 / (1 + np.exp(-logits))).astype(np.float32)
        metadata = metadata_of(
            interface,
            spec,
            golden_inputs=inputs,
            golden_outputs=outputs,
            tolerance=1e-5,
            provenance={"bias": bias},
        )
        metadata.pop(drop, None)
        actual_bias = bias if model_bias is None else model_bias
        model = _model(columns or spec.size, actual_bias, metadata, ballast)
        sha256 = hashlib.sha256(model).hexdigest()
        path = tmp_path / f"{sha256}.onnx"
        path.write_bytes(model)
        return path, sha256

    return write


def _model(columns: int, bias: float, metadata: dict[str, str], ballast: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    weights = {"w": np.full((columns, 1), 1 / 1000), "b": np.array([bias])}
    nodes = [helper.make_node("Gemm", ["features", "w", "b"], ["logit"])]
    if ballast:
        shapes = ((columns, ballast), (ballast, ballast), (ballast, 1))
        weights |= {f"z{i}": np.zeros(shape) for i, shape in enumerate(shapes)}
        nodes += [
            helper.make_node("MatMul", ["features", "z0"], ["y0"]),
            helper.make_node("MatMul", ["y0", "z1"], ["y1"]),
            helper.make_node("MatMul", ["y1", "z2"], ["y2"]),
            helper.make_node("Add", ["logit", "y2"], ["sum"]),
        ]
    nodes.append(helper.make_node("Sigmoid", [nodes[-1].output[0]], ["probability"]))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()

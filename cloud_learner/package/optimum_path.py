"""Export through Hugging Face Optimum: for networks that hold a transformers model.

Why: Optimum knows how to trace each architecture of transformers: it patches what an exporter
stumbles over. What comes out is swapped, quantized and sealed as any graph.

Invariants: the graph has the inputs and outputs that it was asked for. Nothing of Optimum or
transformers is imported before a family asks for it.

Knows nothing about weights: whoever exports finds them in the graph by their values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.inference.signature import INPUT

HINT = "pip install 'headwater[transformers]'"


def export(
    network: Any, example: Any, outputs: Sequence[str], free: Mapping[int, str], opset: int
) -> ModelProto:
    """The graph of `network`, a torch module from `example`, a tensor, to as many tensors as there
    are `outputs`; the dimensions of its input that are `free` have names, and the first is theirs.

    Raises: ConfigError `missing_extra`, PackageError `no_export`, and what the exporter raises.
    """
    try:
        from optimum.exporters.onnx import export as export_by_optimum
    except ImportError as error:
        raise ConfigError(
            "missing_extra", f"package.exporter = 'optimum', but it cannot be used: {error}", HINT
        ) from error
    network.config = _configuration(network)
    declared = _declaration(example, outputs, free)(network.config, task="feature-extraction")
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        path = Path(folder) / "exported.onnx"
        export_by_optimum(network, declared, path, opset=opset)
        return onnx.load_model(str(path))


def _configuration(network: Any) -> Any:
    """That of the transformers model within, which Optimum adjusts while it traces."""
    from transformers import PreTrainedModel

    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            return module.config
    raise PackageError(
        "no_export",
        "package.exporter = 'optimum', but the student holds no transformers model",
        "exporter = 'torch' exports any network",
    )


def _declaration(example: Any, outputs: Sequence[str], free: Mapping[int, str]) -> Any:
    """What Optimum must know of a network that it has not met: inputs, outputs, an example."""
    from optimum.exporters.onnx.base import OnnxConfig
    from optimum.utils import DummyInputGenerator, NormalizedConfig

    class Example(DummyInputGenerator):  # type: ignore[misc] # untyped
        SUPPORTED_INPUT_NAMES = (INPUT,)

        def __init__(self, *_arguments: Any, **_options: Any) -> None: ...

        def generate(self, *_arguments: Any, **_options: Any) -> Any:
            return example

    class Declaration(OnnxConfig):  # type: ignore[misc] # untyped
        NORMALIZED_CONFIG_CLASS = NormalizedConfig
        DUMMY_INPUT_GENERATOR_CLASSES = (Example,)

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {INPUT: dict(free)}

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return {name: {0: free[0]} for name in outputs}

    return Declaration

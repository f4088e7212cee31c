"""Rule 4: what speaks to a device must be light; wire and client load no heavy library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("onnxruntime", "tuf", "securesystemslib", "nats", "torch", "onnx", "duckdb")


def loaded_by(module: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has loaded after importing `module`."""
    program = f"import sys, {module}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    "module",
    [
        "edge_runtime",
        "edge_runtime.wire.codec",
        "edge_runtime.wire.subjects",
        "edge_runtime.api.client",
        "edge_runtime.bus.memory",
    ],
)
def test_it_loads_no_heavy_library(module):
    assert loaded_by(module) == []


def test_a_heavy_library_would_be_seen():
    assert loaded_by("onnxruntime") == ["onnxruntime"]

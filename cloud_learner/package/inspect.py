"""What a package that lies on disk says of itself, read without loading its model.

Why: whoever goes on from an earlier release must know which features it was given.

Knows nothing about who made the package.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.features.spec import Spec
from edge_runtime.inference.onnxfile import metadata_in
from edge_runtime.inference.package import read_package


def spec_of(path: Path) -> Spec:
    """The feature spec of a package. Raises: PackageError."""
    return read_package(metadata_in(path)).spec


def outputs_of(path: Path) -> int:
    """How many numbers an answer of a package has. Raises: PackageError."""
    outputs: int = read_package(metadata_in(path)).golden_outputs.shape[1]
    return outputs

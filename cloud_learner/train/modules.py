"""A family's Python files, loaded by their paths.

Why: families are no packages, so that no name of theirs collides with other software. Who needs
only what a family simulates or reads loads it without torch.

Knows nothing about what the files define.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from cloud_learner.train.problems import bad


def load_module(path: Path) -> ModuleType:
    """A Python file of a family folder, imported by its path. Raises: ConfigError with its line."""
    name = f"family_{path.parent.name}_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise bad(path, "does not exist")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise bad(path, f"cannot be imported{line_of(path, error)}: {error!r}") from error
    return module


def line_of(path: Path, error: Exception) -> str:
    """Where in the file the error arose, as `, line 7`; empty where it did not arise there."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""

"""The runner: one ONNX Runtime session, and the only place that makes one.

Why: its settings decide latency and memory on a small machine, and its exceptions end here.

Settings: one thread and no spinning, so nothing burns a core between events; the CPU provider alone
and no fallback, which would print and rebuild; loaded from a path, never from bytes, because
only then the interpreter goes on meanwhile. Loads take turns: making two at once is called unsafe.

Invariants: `run` may be called from any thread; the same row gives the same answer, from `run` and
from `answer`.

Knows nothing about features, arms or metadata keys.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_runtime.errors import PackageError

INPUT = "features"
OUTPUT = "probability"

Matrix = npt.NDArray[np.float32]
Row = npt.NDArray[np.float32]

_load_turn = threading.Lock()


class Runner:
    """A model in memory. `features` and `outputs` are the widths of what goes in and comes out.

    Loading takes milliseconds to seconds: call it in a thread of its own.
    Raises: PackageError (unreadable_package, wrong_signature), naming the file.
    """

    def __init__(self, path: Path | str) -> None:
        started_s = time.perf_counter()
        self._session = _load(str(path))
        self.features, self.outputs = _widths(self._session, str(path))
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self._row = np.zeros((1, self.features), dtype=np.float32)
        self._answer = np.zeros((1, self.outputs), dtype=np.float32)
        self._bound = _bind(self._session, self._row, self._answer)
        self.load_ms = (time.perf_counter() - started_s) * 1000

    def run(self, x: Matrix) -> Matrix:
        """Answers, float32 (batch, outputs), for `x`, float32 (batch, features).

        Raises: PackageError `run_failed`.
        """
        try:
            outputs: list[Matrix] = self._session.run([OUTPUT], {INPUT: x})
        except Exception as error:
            raise PackageError("run_failed", f"the model could not be run: {error}") from error
        return outputs[0]

    def answer(self, row: Row) -> list[float]:
        """Answers to one row, float32 (features,), in memory of its own; for one thread.

        Raises: PackageError `run_failed`.
        """
        self._row[0] = row
        try:
            self._session.run_with_iobinding(self._bound)
        except Exception as error:
            raise PackageError("run_failed", f"the model could not be run: {error}") from error
        answers: list[float] = self._answer[0].tolist()
        return answers


def _bind(session: Any, row: Matrix, answer: Matrix) -> Any:
    """`session` bound to both arrays: a run reads the one and writes the other in place."""
    bound = session.io_binding()
    bound.bind_ortvalue_input(INPUT, ort.OrtValue.ortvalue_from_numpy(row))
    bound.bind_ortvalue_output(OUTPUT, ort.OrtValue.ortvalue_from_numpy(answer))
    return bound


def _load(path: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        with _load_turn:
            return ort.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
    except Exception as error:
        raise PackageError(
            "unreadable_package", f"{path} cannot be loaded as a model: {error}"
        ) from error


def _widths(session: Any, path: str) -> tuple[int, int]:
    inputs = {each.name: each for each in session.get_inputs()}
    outputs = {each.name: each for each in session.get_outputs()}
    if list(inputs) != [INPUT] or OUTPUT not in outputs:
        raise _wrong(path, f"takes {list(inputs)} and gives {list(outputs)}")
    return _width(inputs[INPUT], path), _width(outputs[OUTPUT], path)


def _width(tensor: Any, path: str) -> int:
    shape = tensor.shape
    fits = len(shape) == 2 and not isinstance(shape[0], int) and isinstance(shape[1], int)
    if tensor.type != "tensor(float)" or not fits:
        raise _wrong(path, f"{tensor.name} is {tensor.type} of shape {shape}")
    return int(shape[1])


def _wrong(path: str, what: str) -> PackageError:
    return PackageError(
        "wrong_signature",
        f"{path}: {what}",
        f"a package maps {INPUT!r} float (batch, F) to {OUTPUT!r} float (batch, K)",
    )

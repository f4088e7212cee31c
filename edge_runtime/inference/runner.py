"""The runner: one ONNX Runtime session, and the only place that makes one.

Why: its settings decide latency and memory on a small machine, and its exceptions end here.

Settings: no spinning, so nothing burns a core between events; one thread, unless a model that takes
long proved to be faster with all CPUs that this process may use; the CPU provider alone and no
fallback, which would print and rebuild; loaded from a path, never from bytes, because only then
the interpreter goes on meanwhile. Loads take turns: making two at once is called unsafe.

What a model costs, and whether a row's answer depends on the rows beside it, is measured when it is
loaded: `run_us`, `inline`, `batchable`. That warms it, too, for each size of batch that is used.

Invariants: `infer`, `infer_many` and `run` may be called from any thread, `answer` from one at a
time; the same row gives the same answer, to rounding, whichever is called. An answer has the shape
that the model declares, or is none. After `give_up` nothing is answered any more.

Knows nothing about features, arms or metadata keys.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_runtime import cpus
from edge_runtime.errors import PackageError
from edge_runtime.inference import trial
from edge_runtime.inference.bound import BoundRow, can_be_bound, row_of, runs
from edge_runtime.inference.buckets import Buckets, in_buckets
from edge_runtime.inference.signature import EMBEDDING, INPUT, OUTPUT, width_of, widths_of
from edge_runtime.inference.tensors import (
    BATCH_ROWS_MAX,
    ONNX_TYPES,
    Array,
    fitting,
    padded,
    selected,
    tensors_of,
)

INLINE_US_MAX = 250.0
"""A model that answers within this runs on the caller's thread: a hop to another one and back takes
50 to 150 µs of its own, and a loop that stalls so briefly is not noticed."""

_THREADED_US_MIN = 2000.0
_WORTH_IT = 0.8  # all CPUs for less than a fifth of the time saved would be a waste

Matrix = npt.NDArray[np.float32]

_load_turn = threading.Lock()


class Runner:
    """A model in memory, warm. `inputs` and `outputs` are what it declares; outputs that are no
    tensors, such as lists of maps, are left out.

    `run_us` is the usual time of one row; None where no sample row would run. Where rows end in
    padding, each is run in one of `buckets`, and `bucket_us` are their times. `features` and
    `scores` are the widths of a model that maps a row of features to probabilities, else 0, `width`
    that of its embedding, 0 without. `embedding`, (width,), is that of the row that `answer` had
    last: who keeps it, copies it. `running` says since when the rows of a release on trial run, and
    how many, by thread.

    Loading takes milliseconds to seconds: call it in a thread of its own.
    Raises: PackageError (unreadable_package, wrong_signature), naming the file.
    """

    def __init__(self, path: Path | str, *, rows_max: int = BATCH_ROWS_MAX) -> None:
        started_s = time.perf_counter()
        self._run_options, self.given_up = _options_of_runs(), False
        self.embedding: Matrix | None = None
        self.running: dict[int, tuple[int, int]] = {}
        self._session = _load(str(path), threads=1)
        try:
            self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
            takes = tensors_of(self._session.get_inputs())
            self.outputs = tensors_of(self._session.get_outputs())
            self.inputs, self.buckets = in_buckets(takes, self.outputs, self.metadata)
        except UnicodeDecodeError as error:
            what = f"{path} has a name that is no text: {error}"
            raise PackageError("unreadable_package", what) from error
        self._check(str(path))
        self._try_out(str(path))
        self._warm(rows_max)
        self.features, self.scores = widths_of(self.inputs, self.outputs)
        self.width = width_of(self.outputs) if self.scores else 0
        self._one_row: BoundRow | None = None
        self._bind()
        self.load_ms = (time.perf_counter() - started_s) * 1000

    @property
    def inline(self) -> bool:
        """Whether a run is short enough for the caller's own thread."""
        return self.run_us is not None and self.run_us <= INLINE_US_MAX

    def give_up(self) -> None:
        """End the run that goes on, between two of its operators, and refuse all others."""
        self.given_up = self._run_options.terminate = True

    def infer(self, arrays: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """The named outputs, or all of them, for one array for each input.

        Values are the caller's business: a NaN goes in, and what the model makes of it comes out.
        Raises: RequestError (see `fitting` and `selected`), PackageError `run_failed`.
        """
        names = self._names if not outputs else selected(self.outputs, outputs)
        fitting(self.inputs, arrays)
        row = self._one_row
        if row is None or not row.holds(arrays) or not row.lock.acquire(blocking=False):
            return dict(zip(names, self._run(names, arrays), strict=True))
        try:
            return row.answers(arrays, names)
        except Exception as error:
            raise _failed(error) from error
        finally:
            row.lock.release()

    def infer_many(
        self, requests: Sequence[Mapping[str, Array]], outputs: Sequence[str] = ()
    ) -> list[dict[str, Array]]:
        """As `infer` of each of `requests`, in one run; only where `batchable`, and where the
        arrays of all requests differ in their numbers of rows alone, which are one number in each.

        Raises: as `infer`; no request was then answered.
        """
        assert self.batchable
        names = self._names if not outputs else selected(self.outputs, outputs)
        first = self.inputs[0].name
        ends = np.cumsum([len(fitting(self.inputs, each)[first]) for each in requests]).tolist()
        feed = {
            tensor.name: self._padded(np.concatenate([each[tensor.name] for each in requests]))
            for tensor in self.inputs
        }
        answers = self._run(names, feed)
        if any(len(answer) != len(feed[first]) for answer in answers):
            raise PackageError("run_failed", "the model gave other rows than it was asked for")
        starts = [0, *ends[:-1]]
        return [
            dict(zip(names, [answer[start:end] for answer in answers], strict=True))
            for start, end in zip(starts, ends, strict=True)
        ]

    def run(self, x: Matrix) -> Matrix:
        """Answers, float32 (batch, scores), for `x`, float32 (batch, features).

        Raises: PackageError `run_failed`.
        """
        answer = self._run([OUTPUT], {INPUT: x})[0]
        if answer.shape != (len(x), self.scores):
            raise PackageError("run_failed", f"the model's answer has shape {answer.shape}")
        return answer

    def answer(self, packed: bytes) -> list[float]:
        """Answers to one row, float32 little-endian, in memory of its own; for one thread.

        Raises: PackageError `run_failed`.
        """
        self._row[:] = packed
        try:
            self._scored.run()
        except Exception as error:
            raise _failed(error) from error
        answers: list[float] = self._answer.tolist()[0]
        return answers

    def answer_many(self, packed: Sequence[bytes]) -> list[list[float]]:
        """As `answer` of each row, in one run where `batchable`; on any thread."""
        rows = np.frombuffer(b"".join(packed), dtype="<f4").reshape(len(packed), self.features)
        if not self.batchable:
            return [self.run(rows[at : at + 1]).tolist()[0] for at in range(len(rows))]
        answers: list[list[float]] = self.run(self._padded(rows))[: len(packed)].tolist()
        return answers

    def embed(self, x: Matrix) -> tuple[Matrix, Matrix]:
        """Embeddings (batch, width) and answers (batch, scores) for `x`, float32 (batch, features).

        Only where there is a `width`. Raises: PackageError `run_failed`.
        """
        tables = [self._padded(x)] if self.batchable else [row[None] for row in x]
        found = [self._run([EMBEDDING, OUTPUT], {INPUT: each}) for each in tables]
        embeddings, answers = (np.concatenate(each)[: len(x)] for each in zip(*found, strict=True))
        if embeddings.shape + answers.shape != (len(x), self.width, len(x), self.scores):
            raise PackageError("run_failed", f"the model's embedding has shape {embeddings.shape}")
        return embeddings, answers

    def whole(self, feed: Mapping[str, Array], names: Sequence[str] = ()) -> list[Array]:
        """All outputs, or those named, for arrays that fit, padding included. Raises: as `run`."""
        try:
            answers: list[Array] = self._session.run(names or self._names, feed, self._run_options)
        except Exception as error:
            raise _failed(error) from error
        return answers

    def _run(self, names: list[str], feed: Mapping[str, Array]) -> list[Array]:
        """The named outputs; rows are run in their buckets where there are some."""
        if self.buckets is None:
            return self.whole(feed, names)
        return self.buckets.run(lambda part: self.whole({INPUT: part}, names), feed[INPUT])

    def _padded(self, rows: Array) -> Array:
        """`rows` in a size of batch that was warmed; buckets make sizes of their own."""
        return rows if self.buckets else padded(rows)

    def _check(self, path: str) -> None:
        if not self.inputs or not self.outputs:
            raise PackageError(
                "wrong_signature",
                f"{path} has {len(self.inputs)} inputs and {len(self.outputs)} outputs that are "
                "tensors; a model that can be asked has at least one of each",
            )
        strange = [each.name for each in self._session.get_inputs() if each.type not in ONNX_TYPES]
        if strange:
            raise PackageError(
                "wrong_signature",
                f"{path}: inputs {strange} are of types that no caller can send",
                f"types that can be sent: {', '.join(ONNX_TYPES.values())}",
            )
        self._names = [tensor.name for tensor in self.outputs]

    def _try_out(self, path: str) -> None:
        self.run_us = trial.usual_us(self.whole, self.inputs)
        self.batchable = self.run_us is not None and trial.is_batchable(
            self.whole, self.inputs, self.outputs
        )
        threads = cpus.usable()
        if threads == 1 or self.run_us is None or self.run_us < _THREADED_US_MIN:
            return
        alone, self._session = self._session, _load(path, threads)
        together_us = trial.usual_us(self.whole, self.inputs)
        if together_us is not None and together_us < _WORTH_IT * self.run_us:
            self.run_us = together_us
        else:
            self._session = alone

    def _warm(self, rows_max: int) -> None:
        """Run each size of batch, and each bucket, that is used."""
        sizes = self.buckets.sizes if self.buckets is not None else []
        self.bucket_us = {s: trial.usual_us(self.whole, [Buckets.input_of(s)]) for s in sizes[:-1]}
        self.bucket_us |= dict.fromkeys(sizes[-1:], self.run_us)
        if self.batchable:
            trial.warm(self.whole, self.inputs, self.buckets.least if self.buckets else rows_max)

    def _bind(self) -> None:
        """Bind one row, twice: for `infer` whoever calls it, and for `answer`."""
        wiring, how = (self._session, self.inputs), (self._run_options, self.buckets)
        sized = self.batchable or not any(each.has_rows for each in (*self.inputs, *self.outputs))
        if sized and can_be_bound((*self.inputs, *self.outputs)):
            row = row_of(*wiring, self.outputs, *how)
            self._one_row = row if runs(row) else None
        if self.scores:
            wanted = (OUTPUT, EMBEDDING) if self.width else (OUTPUT,)
            given = [tensor for tensor in self.outputs if tensor.name in wanted]
            self._scored = row_of(*wiring, given, *how)
            self._row = self._scored.inputs[INPUT].data.cast("B")
            self._answer = self._scored.outputs[OUTPUT]
            self.embedding = self._scored.outputs[EMBEDDING][0] if self.width else None


def _load(path: str, threads: int) -> Any:
    options = _options(threads)
    try:
        with _load_turn:
            return ort.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
    except Exception as error:
        raise PackageError(
            "unreadable_package", f"{path} cannot be loaded as a model: {error}"
        ) from error


def _options(threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what fails is raised; a line for each would fill a log
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _options_of_runs() -> Any:
    options = ort.RunOptions()
    options.log_severity_level = 4
    # Never used on a CPU; without it each run looks for it in vain, which takes 28 µs.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def _failed(error: Exception) -> PackageError:
    return PackageError("run_failed", f"the model could not be run: {error}")

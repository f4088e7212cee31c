"""Serving tensors: what a family's models are, and what they answer to arrays.

Why: Open Inference clients, and applications with features of their own, want the model alone: no
windows, no log.

Invariants: an answer belongs wholly to one release, whatever swaps meanwhile. May be called from
any thread.

Knows nothing about events and the log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns

import msgspec

from edge_runtime.config import InferenceConfig
from edge_runtime.cpus import flush_denormals
from edge_runtime.errors import HeadwaterError, RequestError
from edge_runtime.inference.pipeline import no_release
from edge_runtime.inference.runner import Runner
from edge_runtime.inference.slot import Arm, Slot
from edge_runtime.inference.tensors import Array, Tensor, fitting
from edge_runtime.inference.worker import Worker
from edge_runtime.metrics import Histogram

QUICK_US = 1000.0
"""So long an event loop may be kept by one run."""

TEXT_BYTES = 64

Arrays = Mapping[str, Array]
Answers = dict[str, Array]


class ModelInfo(msgspec.Struct, frozen=True):
    """What a family serves: `release` answers by default, `releases` are all in memory.

    `inline` says that a run of one row is short enough for the caller's thread, and so are, then,
    `quick_rows` rows in one run, or inputs of `quick_bytes` in all. `predicts` says that the model
    answers events and not only tensors.
    """

    family: str
    release: str
    releases: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    inline: bool
    predicts: bool
    quick_rows: int = 0
    quick_bytes: int = 0


class Serving:
    """The slots of a device's families, and the worker for what is too heavy to run inline.

    `latency` and `infers` are of what was answered; `refused` is told of what was not.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        config: InferenceConfig,
        refused: Callable[[HeadwaterError], None],
    ) -> None:
        self._slots, self._rows_max, self._refused = slots, config.batch_rows_max, refused
        self.latency, self.infers, self._counting = Histogram(), 0, threading.Lock()
        self._models: dict[str, tuple[int, ModelInfo]] = {}
        self.deadline_s = config.deadline_ms / 1000
        self.worker = Worker(
            queue_max=config.queue_max,
            rows_max=config.batch_rows_max,
            delay_us=config.batch_delay_us,
            deadline_s=self.deadline_s,
            on_start=flush_denormals,
        )

    def slot(self, family: str) -> Slot:
        """The slot of a family. Raises: RequestError `unknown_family`."""
        slot = self._slots.get(family)
        if slot is None:
            raise RequestError(
                "unknown_family",
                f"this device does not serve {family!r:.64}",
                f"it serves: {', '.join(self._slots)}",
            )
        return slot

    def model(self, family: str) -> ModelInfo:
        """What `family` serves now. Raises: RequestError (unknown_family, no_release)."""
        slot = self.slot(family)
        known = self._models.get(family)
        if known is None or known[0] != slot.generation:
            known = self._models[family] = slot.generation, _described(family, slot.arms)
        return known[1]

    def infer(
        self, family: str, arrays: Arrays, outputs: Sequence[str], release: str | None
    ) -> Answers:
        """See `Runtime.infer`."""
        started_ns = perf_counter_ns()
        try:
            with self.slot(family).lease() as arms:
                answers = _named(family, arms, release).runner.infer(arrays, outputs)
        except HeadwaterError as error:
            self._refused(error)
            raise
        self._answered(started_ns, 1)
        return answers

    async def infer_async(
        self,
        family: str,
        arrays: Arrays,
        outputs: Sequence[str],
        release: str | None,
        timeout_s: float | None,
    ) -> Answers:
        """See `Runtime.infer_async`."""
        started_ns = perf_counter_ns()
        try:
            with self.slot(family).lease() as arms:
                runner = _named(family, arms, release).runner
                fitting(runner.inputs, arrays)
                if size_of(arrays) <= self.model(family).quick_bytes:
                    answers = runner.infer(arrays, outputs)
                else:
                    answers = await self._heavy(runner, arrays, outputs, timeout_s)
        except HeadwaterError as error:
            self._refused(error)
            raise
        self._answered(started_ns, 1)
        return answers

    def infer_many(
        self, family: str, requests: Sequence[Arrays], outputs: Sequence[str], release: str | None
    ) -> list[Answers | HeadwaterError]:
        """See `Runtime.infer_many`."""
        started_ns = perf_counter_ns()
        try:
            with self.slot(family).lease() as arms:
                answers = _each(_named(family, arms, release).runner, requests, outputs)
        except HeadwaterError as error:
            self._refused(error)
            raise
        refused = [each for each in answers if isinstance(each, HeadwaterError)]
        for each in refused:
            self._refused(each)
        self._answered(started_ns, len(answers) - len(refused))
        return answers

    def close(self) -> None:
        """End the worker."""
        self.worker.close()

    async def _heavy(
        self, runner: Runner, arrays: Arrays, outputs: Sequence[str], timeout_s: float | None
    ) -> Answers:
        return await self.worker.submit(
            lambda requests: _together(runner, requests, outputs),
            arrays,
            group=self._group(runner, arrays, outputs),
            rows=_rows(arrays),
            timeout_s=self.deadline_s if timeout_s is None else timeout_s,
        )

    def _answered(self, started_ns: int, count: int) -> None:
        each_us = (perf_counter_ns() - started_ns) / 1000 / max(count, 1)
        with self._counting:
            self.infers += count
            self.latency.record(each_us, count)

    def _group(self, runner: Runner, arrays: Arrays, outputs: Sequence[str]) -> object:
        """What requests must have in common to share a run; None where none may."""
        if self._rows_max == 1 or not runner.batchable or not _has_one_length(arrays):
            return None
        shapes = tuple((name, array.shape[1:]) for name, array in sorted(arrays.items()))
        return id(runner), tuple(outputs), shapes


def _described(family: str, arms: tuple[Arm, ...]) -> ModelInfo:
    if not arms:
        raise no_release(family)
    runner, rows = arms[0].runner, min(_quick_rows(arm.runner) for arm in arms)
    return ModelInfo(
        family,
        arms[0].release,
        tuple(arm.release for arm in arms),
        runner.inputs,
        runner.outputs,
        rows > 0,
        arms[0].info is not None,
        rows,
        rows * size_of({tensor.name: tensor.sample(1) for tensor in runner.inputs}),
    )


def size_of(arrays: Arrays) -> int:
    """The bytes of `arrays`; a text counts as TEXT_BYTES at least."""
    sizes = (
        sum(max(TEXT_BYTES, len(str(cell))) for cell in array.flat)
        if array.dtype.kind in "OU"
        else array.nbytes
        for array in arrays.values()
    )
    return sum(sizes)


def _quick_rows(runner: Runner) -> int:
    """How many rows of an inline model run in the time that a loop may be kept; else 0."""
    return max(1, int(QUICK_US / max(runner.run_us or 0.0, 1.0))) if runner.inline else 0


def _named(family: str, arms: tuple[Arm, ...], release: str | None) -> Arm:
    if not arms:
        raise no_release(family)
    if release is None:
        return arms[0]
    for arm in arms:
        if arm.release == release:
            return arm
    raise RequestError(
        "unknown_release",
        f"release {release!r:.64} of {family} is not in memory here",
        f"in memory: {', '.join(arm.release for arm in arms)}",
    )


def _each(
    runner: Runner, requests: Sequence[Arrays], outputs: Sequence[str]
) -> list[Answers | HeadwaterError]:
    try:
        return [*_together(runner, requests, outputs)]
    except HeadwaterError:
        return [_tried(runner, each, outputs) for each in requests]


def _together(
    runner: Runner, requests: Sequence[Arrays], outputs: Sequence[str]
) -> Sequence[Answers]:
    if len(requests) > 1 and runner.batchable and _is_uniform(requests):
        return runner.infer_many(requests, outputs)
    return [runner.infer(each, outputs) for each in requests]


def _is_uniform(requests: Sequence[Arrays]) -> bool:
    """Whether the arrays of all requests differ in their numbers of rows alone, one in each."""
    try:
        first = {name: array.shape[1:] for name, array in requests[0].items()}
        return all(
            array.shape[1:] == first.get(name) for each in requests for name, array in each.items()
        ) and (len(first) == 1 or all(_has_one_length(each) for each in requests))
    except (AttributeError, TypeError):  # no arrays at all: each gets an error of its own
        return False


def _has_one_length(arrays: Arrays) -> bool:
    return len({len(array) for array in arrays.values()}) == 1


def _rows(arrays: Arrays) -> int:
    return max((len(array) for array in arrays.values() if getattr(array, "ndim", 0)), default=1)


def _tried(runner: Runner, arrays: Arrays, outputs: Sequence[str]) -> Answers | HeadwaterError:
    try:
        return runner.infer(arrays, outputs)
    except HeadwaterError as error:
        return error

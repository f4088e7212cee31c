"""The runtime: what an application calls, in its own process or through the daemon's socket.

Why: one object answers, remembers and takes labels, with all that may block kept elsewhere.

Invariants: all calls belong to one thread. A prediction id, `device.epoch.seq`, is handed out once,
ever. What was refused left no trace in windows or log. After a restart the windows are, bit for
bit, what the log's durable records say they are.

Knows nothing about sockets, brokers or signatures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from edge_runtime import config as configuration
from edge_runtime import restart
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.config import EdgeConfig
from edge_runtime.errors import HeadwaterError, RequestError
from edge_runtime.events.log import EventLog
from edge_runtime.family import Family
from edge_runtime.inference.slot import Arm
from edge_runtime.labels import label_record
from edge_runtime.metrics import Histogram
from edge_runtime.rollout.plan import Plan
from edge_runtime.snapshots import SNAPSHOT_VERSION, Snapshot, SnapshotFile
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec
from edge_runtime.wire.messages import (
    WIRE_VERSION,
    Fields,
    ObservationRecord,
    PredictionRecord,
    Report,
)

SNAPSHOT_EVERY = 4096
_PIPELINE_COUNTS = ("swaps", "swap_failures", "late_events")


class Event(msgspec.Struct, frozen=True):
    """What an application reports: typed fields at a time (seconds since the epoch, UTC)."""

    kind: str
    time_s: float
    fields: Fields


class Prediction(msgspec.Struct, frozen=True):
    """The answer to an event; `outputs` are the values of the arm that answered."""

    id: str
    outputs: list[float]
    release: str
    arm: str


class Runtime:
    """A device's families, answering; made by `open`, ended by `close` or as a context manager.

    `on_commit`, once set, is called from the log's thread whenever more became durable.
    """

    def __init__(self, config: EdgeConfig, clock: Clock) -> None:
        self.config, self.device, self.families = config, config.device, config.families
        self.on_commit: Callable[[], None] | None = None
        self._clock = clock
        self.log = EventLog(
            config.state_dir / "log",
            device=config.device,
            linger_ms=config.log.linger_ms,
            bytes_max=config.log.bytes_max_mb << 20,
        )
        self.shelf = Shelf(config.state_dir / "shelf")  # after the log, whose lock guards it too
        self.epoch = self.log.epoch
        self._prefix = f"{self.device}.{self.epoch}."
        self._members = {name: Family(name, self.device, clock) for name in self.families}
        self._snapshots = SnapshotFile(config.state_dir / "windows.snapshot")
        self._since_snapshot = self._replayed = 0
        self._latency, self._closed = Histogram(), False
        self._counts = dict.fromkeys(
            ("predictions", "observations", "labels", "request_errors", "requests_dropped"), 0
        )

    @classmethod
    def open(cls, source: str | Path | EdgeConfig, *, clock: Clock | None = None) -> Self:
        """The runtime that a configuration describes, serving what its shelf says ran last.

        Raises: ConfigError for the configuration, or a state directory that another process owns.
        """
        config = source if isinstance(source, EdgeConfig) else configuration.load(Path(source))
        runtime = cls(config, clock or SystemClock())
        try:
            for family in runtime._members.values():
                restart.restore_arms(family, runtime.shelf, config.attributes)
            windows = runtime._members, runtime._snapshots, runtime.log
            runtime._replayed = restart.restore_windows(*windows)
        except BaseException:
            runtime.log.close()
            raise
        runtime.log.on_commit = runtime._committed
        return runtime

    def predict(self, family: str, event: Event) -> Prediction:
        """Answer an event, and log the answer with the feature values behind it.

        Raises: RequestError (unknown_family, no_release, unknown_kind, unknown_field,
        missing_field, wrong_type, not_finite, event_from_future), CapacityError (log_full).
        """
        started_ns = time.perf_counter_ns()
        try:
            prediction = self._predict(self._family(family), event)
        except HeadwaterError as error:
            self._refused(error)
            raise
        self._counts["predictions"] += 1
        self._latency.record((time.perf_counter_ns() - started_ns) / 1000)
        return prediction

    def observe(self, family: str, event: Event) -> int:
        """Let the windows see an event; returns its sequence number in the log, class event.

        Raises: as `predict`.
        """
        try:
            seq = self._observe(self._family(family), event)
        except HeadwaterError as error:
            self._refused(error)
            raise
        self._counts["observations"] += 1
        return seq

    def label(
        self,
        prediction_id: str,
        value: float,
        *,
        time_s: float | None = None,
        final: bool = True,
        family: str | None = None,
    ) -> int:
        """Say what turned out to be true of a prediction, at `time_s` (None: now).

        `family` may be left out where the device has only one. Returns the label's own sequence
        number in the log, class label.

        Raises: RequestError (unknown_prediction, prediction_lost, wrong_type, not_finite,
        unknown_family), CapacityError (log_full).
        """
        try:
            name = self._family(family).name
            time_s = self._clock.now_s() if time_s is None else time_s
            record = label_record(self.log, name, prediction_id, value, time_s, final=final)
            label_seq = self.log.append("label", codec.encode(record))
        except HeadwaterError as error:
            self._refused(error)
            raise
        self._counts["labels"] += 1
        return label_seq

    def swap(self, family: str, arms: Sequence[Arm], plan: Plan) -> None:
        """Serve `arms`, loaded and proven, as `plan` says; no request is dropped.

        Raises: PackageError from the slot, with what serves unchanged.
        """
        self._family(family).follow(arms, plan)
        self._since_snapshot = SNAPSHOT_EVERY

    def current(self, family: str) -> Plan | None:
        """The plan that `family` follows; None before its first release."""
        return self._family(family).plan

    def survived(self) -> list[tuple[int, str, int]]:
        """(epoch, class, last sequence number) of what restarts left of earlier epochs."""
        return [
            (epoch, event_class, last)
            for event_class in ("event", "label")
            for epoch, last in self.log.ends(event_class)
        ]

    def trim_floor(self) -> tuple[int, int]:
        """(epoch, seq) of the newest snapshot: events after it must stay in the log."""
        return self._snapshots.floor

    def report(self, refused: dict[str, int]) -> Report:
        """What this device says about itself; `refused` counts refused updates by error code."""
        numbers = self.log.statistics()
        return Report(
            WIRE_VERSION,
            self.device,
            self.epoch,
            self._clock.now_s(),
            self.config.attributes,
            [arm for family in self._members.values() for arm in family.reports()],
            max(family.plan_seq for family in self._members.values()),
            self.counters(),
            refused,
            self._latency.counts(),
            numbers["bytes"],
            numbers["pending"],
        )

    def counters(self) -> dict[str, int]:
        """Counts since the process started, over all families."""
        counts = self._counts | dict.fromkeys(_PIPELINE_COUNTS, 0)
        for family in self._members.values():
            numbers = family.pipeline.statistics()
            for name in _PIPELINE_COUNTS:
                counts[name] += numbers[name]
        return counts

    def statistics(self) -> dict[str, Any]:
        """Everything that is counted here, as texts, numbers, lists and maps."""
        quantile = self._latency.quantile
        return {
            "device": self.device,
            "epoch": self.epoch,
            "families": {name: family.statistics() for name, family in self._members.items()},
            "counters": self.counters(),
            "predict_us": {"p50": quantile(0.5), "p99": quantile(0.99), "p999": quantile(0.999)},
            "log": self.log.statistics(),
            "snapshots": self._snapshots.statistics() | {"replayed": self._replayed},
            "shelf": self.shelf.statistics(),
        }

    def close(self) -> None:
        """Make everything durable and stop; closing twice is no error.

        Raises: CapacityError `log_not_durable`.
        """
        if self._closed:
            return
        self._closed = True
        self._offer_snapshot()
        self.log.close()
        self._snapshots.commit(*self.log.durable("event"))
        for family in self._members.values():
            family.pipeline.slot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _predict(self, family: Family, event: Event) -> Prediction:
        kind, time_s, fields = event.kind, event.time_s, event.fields
        seq = self.log.handed_out("event") + 1
        answer = family.pipeline.answer(kind, time_s, fields, family.chooser(self.epoch, seq))
        record = family.record(answer, kind, time_s, fields)
        logged = self._accept(family, event, record)
        assert logged == seq
        first = record.scored[0]
        return Prediction(f"{self._prefix}{seq}", first.outputs, first.release, first.arm)

    def _observe(self, family: Family, event: Event) -> int:
        kind, time_s, fields = event.kind, event.time_s, event.fields
        family.pipeline.admit(kind, time_s, fields)
        return self._accept(family, event, ObservationRecord(family.name, kind, time_s, fields))

    def _accept(
        self, family: Family, event: Event, record: PredictionRecord | ObservationRecord
    ) -> int:
        """Log an admitted event, then let it move the windows: what the log refuses moves none."""
        seq = self.log.append("event", codec.encode(record))
        family.pipeline.move(event.kind, event.time_s, event.fields)
        self._since_snapshot += 1
        if self._since_snapshot >= SNAPSHOT_EVERY:
            self._offer_snapshot()
        return seq

    def _family(self, name: str | None) -> Family:
        if name is None and len(self.families) == 1:
            name = self.families[0]
        family = self._members.get(name or "")
        if family is None:
            raise RequestError(
                "unknown_family",
                f"this device does not serve {name!r}",
                f"it serves: {', '.join(self._members)}",
            )
        return family

    def _refused(self, error: HeadwaterError) -> None:
        kind = "request_errors" if isinstance(error, RequestError) else "requests_dropped"
        self._counts[kind] += 1

    def _committed(self) -> None:
        self._snapshots.commit(*self.log.durable("event"))
        if self.on_commit is not None:
            self.on_commit()

    def _offer_snapshot(self) -> None:
        states = {name: family.pipeline.snapshot() for name, family in self._members.items()}
        seq = self.log.handed_out("event")
        self._snapshots.offer(Snapshot(SNAPSHOT_VERSION, self.epoch, seq, states))
        self._since_snapshot = 0

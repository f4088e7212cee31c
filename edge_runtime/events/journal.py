"""The journal: what a device logs, and the snapshots that make its windows quick to bring back.

Why: an answer counts once it is in the log, and windows must be what the log says, so that one
object decides when a record has a number and when the windows are worth a snapshot.

Invariants: a prediction id, `device.epoch.seq`, is handed out once, ever. A snapshot is offered
only between events, so it never holds half of one.

Knows nothing about models. One thread at a time appends; `on_commit` comes on the log's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from edge_runtime.clock import Clock
from edge_runtime.config import EdgeConfig
from edge_runtime.events.log import CLASSES, EventLog, random_step
from edge_runtime.events.snapshots import SNAPSHOT_VERSION, Snapshot, SnapshotFile
from edge_runtime.files import OsFiles
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord, ObservationRecord, PredictionRecord

log = logging.getLogger("edge_runtime")

SNAPSHOT_EVERY = 8192


class Journal:
    """The log and the snapshots of `config`'s device; `states` gives each family's snapshot.

    `on_commit`, once set, is called from the log's thread whenever more became durable; `replayed`
    is how many records the windows were brought back with.

    Raises: ConfigError, as the log does.
    """

    def __init__(
        self,
        config: EdgeConfig,
        states: Callable[[], dict[str, bytes]],
        clock: Clock | None = None,
        step: Callable[[], int] = random_step,
    ) -> None:
        files = OsFiles()
        self.log = EventLog(
            config.state_dir / "log",
            device=config.device,
            files=files,
            clock=clock,
            step=step,
            linger_ms=config.log.linger_ms,
            linger_max_ms=config.log.linger_max_ms,
            bytes_max=config.log.bytes_max_mb << 20,
        )
        self.snapshots = SnapshotFile(config.state_dir / "windows.snapshot", files)
        self.on_commit: Callable[[], None] | None = None
        self.replayed = 0
        self._states = states
        self._nobody_reads = config.package is not None
        self._prefix = f"{config.device}.{self.log.epoch}."
        self._since_snapshot = self._bytes_since = 0
        self._bytes_every = (config.log.bytes_max_mb << 20) // 8  # what a snapshot covers can go

    def start(self) -> None:
        """Follow the log's commits from now on; before it, the windows are being brought back."""
        self.log.on_commit = self._committed

    def next_seq(self) -> int:
        """The number that the next event will have."""
        return self.log.handed_out("event") + 1

    def event(self, record: PredictionRecord | ObservationRecord, data: bytes = b"") -> int:
        """Log an event, in bytes where they are known already; its number.
        Raises: RequestError `too_large`, with nothing logged.
        """
        data = data or codec.encode(record)
        seq = self.log.append("event", data)
        self._bytes_since += len(data)
        return seq

    def label(self, record: LabelRecord) -> int:
        """Log a label; its own number. Raises: RequestError `too_large`, with nothing logged."""
        return self.log.append("label", codec.encode(record))

    def id_of(self, seq: int) -> str:
        """The id of the prediction with that number."""
        return f"{self._prefix}{seq}"

    def moved(self, events: int = 1) -> None:
        """So many events are logged and the windows have seen them."""
        self._since_snapshot += events
        if self._since_snapshot >= SNAPSHOT_EVERY or self._bytes_since >= self._bytes_every:
            self.offer_snapshot()

    def hasten_snapshot(self) -> None:
        """Take the next snapshot at the next event: what is kept has changed."""
        self._since_snapshot = SNAPSHOT_EVERY

    def offer_snapshot(self) -> None:
        """Have the windows, as they are now, written once what they know is durable."""
        seq = self.log.handed_out("event")
        self.snapshots.offer(Snapshot(SNAPSHOT_VERSION, self.log.epoch, seq, self._states()))
        self._since_snapshot = self._bytes_since = 0

    def trim_floor(self) -> tuple[int, int]:
        """(epoch, seq) of the newest snapshot: events after it must stay in the log."""
        return self.snapshots.floor

    def close(self) -> None:
        """Make everything durable, windows included. Raises: CapacityError `log_not_durable`."""
        self.offer_snapshot()
        self.log.close()
        self.snapshots.commit(*self.log.durable("event"))

    def statistics(self) -> dict[str, Any]:
        """What log and snapshots count."""
        snapshots = self.snapshots.statistics() | {"replayed": self.replayed}
        return {"log": self.log.statistics(), "snapshots": snapshots}

    def survived(self) -> list[tuple[int, str, int]]:
        """(epoch, class, last sequence number) of what restarts left of earlier epochs."""
        return [
            (epoch, event_class, last)
            for event_class in CLASSES[::-1]
            for epoch, last in self.log.ends(event_class)
        ]

    def _committed(self) -> None:
        before = self.snapshots.floor
        self.snapshots.commit(*self.log.durable("event"))
        if self._nobody_reads and self.snapshots.floor != before:
            self._trim()
        if self.on_commit is not None:
            self.on_commit()

    def _trim(self) -> None:
        """Without a learner, what the windows no longer need is needed by nobody."""
        try:
            self.log.learned("event", *self.snapshots.floor)
            for epoch, _, last_seq in self.log.epochs("label"):
                self.log.learned("label", epoch, last_seq)
        except OSError as error:  # the next snapshot tries again
            log.warning("what the windows no longer need stays in the log: %s", error)

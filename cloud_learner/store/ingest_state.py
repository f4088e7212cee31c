"""What ingest holds in memory between commits, and what one commit changes.

Why: the ingest database stores these shapes and the ingest room moves them; they meet here, so that
neither reaches into the other.

Invariants: plain data, no I/O. A prediction is pending until it settles as exactly one of released,
expired (no label in its window) or covered (joined, but the bootstrap has learned its time).

Knows nothing about SQL, envelopes or how a state is decided.
"""

from __future__ import annotations

import msgspec

from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import EventClass, PredictionRecord

PENDING, RELEASED, EXPIRED, COVERED = 0, 1, 2, 3
DROPPED = 0  # the batch number of a released example that no batch will ever hold

Id = tuple[str, int, int]
Lane = tuple[str, int, EventClass]


class Label(msgspec.Struct, frozen=True, gc=False):
    """What a label record says; `arrived_s` is the wall time at which it reached the learner."""

    value: float
    time_s: float
    final: bool
    arrived_s: float


class Pending(msgspec.Struct, gc=False):
    """A prediction that waits to mature, with the label that stands for it so far."""

    device: str
    epoch: int
    seq: int
    record: PredictionRecord
    label: Label | None = None


class IngestState(msgspec.Struct):
    """What a start reads back: all that `Changes` built up, but for what is settled.

    `marks` hold the highest sequence number and the newest event time of each lane; `unbatched`
    are released examples in release order.
    """

    commit: int = 0
    clock_s: float = float("-inf")
    batch: int = 0
    released: int = 0
    marks: dict[Lane, tuple[int, float]] = {}
    pending: list[Pending] = []
    early_labels: dict[Id, Label] = {}
    unbatched: list[Example] = []
    counters: dict[str, int] = {}


class Changes(msgspec.Struct):
    """What one commit changes; lists hold the rows of their statement, in its order of columns."""

    commit: int
    clock_s: float = float("-inf")
    batch: int = 0
    released: int = 0
    files: list[str] = []
    covered: list[Example] = []
    marks: dict[Lane, tuple[int, float]] = {}
    predictions: list[tuple[str, int, int, bytes]] = []
    labels: list[tuple[float, float, bool, float, str, int, int]] = []
    settled: list[tuple[int, float | None, int | None, str, int, int]] = []
    batched: list[tuple[int, str, int, int]] = []
    early_labels: dict[Id, Label] = {}
    early_joined: list[Id] = []
    quarantine: list[tuple[float, str, str, bytes]] = []
    counters: dict[str, int] = {}


def example(pending: Pending, matured_s: float) -> Example:
    """The example that a labelled prediction becomes when it matures."""
    record, label = pending.record, pending.label
    assert label is not None
    return Example(
        device=pending.device,
        epoch=pending.epoch,
        seq=pending.seq,
        family=record.family,
        time_s=record.time_s,
        label_time_s=label.time_s,
        features=record.features,
        spec=record.spec,
        label=label.value,
        propensity=record.propensity,
        scored=record.scored,
        arrived_s=label.arrived_s,
        matured_s=matured_s,
        kind=record.kind,
        fields=record.fields,
        final=label.final,
    )

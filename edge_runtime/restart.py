"""Restart: a device serves again what it served, knowing what it knew.

Why: after a power cut, and with no network, an application must get the same answers as if nothing
had happened.

Invariants: windows come from the snapshot where it can be used and from the log for what came
after it, so they are, bit for bit, what the durable records say. What cannot be restored is said,
and costs only itself: a family without its package waits for the next update.

Knows nothing about sockets, brokers or signatures.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from edge_runtime.errors import HeadwaterError, PackageError
from edge_runtime.events.log import EventLog
from edge_runtime.family import Family
from edge_runtime.inference.slot import Arm, load_arm
from edge_runtime.rollout.plan import PlanArm, arms_for
from edge_runtime.snapshots import SnapshotFile
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord

log = logging.getLogger("edge_runtime")


def restore_arms(family: Family, shelf: Shelf, attributes: Mapping[str, str]) -> None:
    """Let `family` follow the plan that `shelf` remembers, if any; what fails is logged."""
    try:
        plan = shelf.load_current(family.name)
        if plan is not None:
            family.follow(
                [_load(shelf, name, arm) for name, arm in arms_for(plan, attributes)], plan
            )
    except HeadwaterError as error:
        log.warning("%s serves nothing until its next update: %s", family.name, error)


def _load(shelf: Shelf, name: str, arm: PlanArm) -> Arm:
    path = shelf.path_of(arm.sha256)
    if path is None:
        raise PackageError(
            "not_on_shelf", f"the package of {arm.release} is missing or damaged on the shelf"
        )
    return load_arm(path, arm.sha256, name, arm.release, arm.weight)


def restore_windows(families: Mapping[str, Family], file: SnapshotFile, events: EventLog) -> int:
    """Bring the windows of `families` to the end of `events`; how many records that took."""
    snapshot = file.load()
    states = {} if snapshot is None else snapshot.families
    from_log_alone = {
        name
        for name, family in families.items()
        if name not in states or not family.restore(states[name])
    }
    start, replayed = file.floor, 0
    for epoch, seq, data in events.tail("event", *((0, 0) if from_log_alone else start)):
        record = codec.decode_record(data)
        assert not isinstance(record, LabelRecord), "labels have a class of their own"
        family = families.get(record.family)
        if family is not None and (record.family in from_log_alone or (epoch, seq) > start):
            family.pipeline.replay(record.kind, record.time_s, record.fields)
            replayed += 1
    return replayed

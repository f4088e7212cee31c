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
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.config import EdgeConfig, HttpConfig, local_config
from edge_runtime.device import releases
from edge_runtime.device.family import Family
from edge_runtime.errors import ConfigError, HeadwaterError, PackageError
from edge_runtime.events.journal import Journal
from edge_runtime.events.log import EventLog
from edge_runtime.events.snapshots import Snapshot, SnapshotFile
from edge_runtime.inference import history
from edge_runtime.inference.onnxfile import family_of
from edge_runtime.inference.slot import load_bare_arm
from edge_runtime.rollout.arms import load_plan_arm
from edge_runtime.rollout.plan import Plan, arms_for
from edge_runtime.update.shelf import Shelf
from edge_runtime.wire import codec
from edge_runtime.wire.messages import LabelRecord, PredictionRecord

LOCAL = "local"

log = logging.getLogger("edge_runtime")


@contextmanager
def temporary_config(
    package: Path, *, socket: Path | None = None, http: HttpConfig | None = None
) -> Iterator[EdgeConfig]:
    """What serves the ONNX file `package` alone, with a state that ends with the context.

    Raises: ConfigError `bad_package`.
    """
    try:
        family = family_of(package)
    except PackageError as error:
        raise ConfigError("bad_package", error.message, error.hint) from error
    with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
        yield local_config(package, family, Path(folder), socket=socket, http=http)


def bring_back(
    families: Mapping[str, Family], shelf: Shelf, config: EdgeConfig, journal: Journal
) -> None:
    """Let `families` serve what they served, with the windows that the log says they had."""
    for family in families.values():
        restore_arms(family, shelf, config)
    journal.replayed = restore_windows(families, journal.snapshots, journal.log)
    journal.start()


def restore_arms(family: Family, shelf: Shelf, config: EdgeConfig) -> None:
    """Let `family` serve the configured package, or follow the plan that `shelf` remembers.

    What fails on the shelf is logged: then the plan's stable release is tried alone, and then the
    release before it. Raises: ConfigError `bad_package` for a package that was asked for by name.
    """
    if config.package is not None:
        _serve_package(family, config.package)
        return
    known = 0
    for plan in _remembered(family, shelf):
        known += 1
        try:
            arms = arms_for(plan, config.device, config.attributes)
            family.follow([load_plan_arm(shelf, name, arm) for name, arm in arms], plan)
        except HeadwaterError as error:
            log.warning("%s: plan %d is not followed: %s", family.name, plan.seq, error)
        else:
            return
    if known:
        log.warning("%s serves nothing until its next update", family.name)


def _serve_package(family: Family, package: Path) -> None:
    try:
        family.follow([load_bare_arm(package, LOCAL)], None)
    except HeadwaterError as error:
        raise ConfigError(
            "bad_package", f"nothing is served: {error.message}", error.hint
        ) from error


def _remembered(family: Family, shelf: Shelf) -> Iterator[Plan]:
    """The plans that may be followed, the best first."""
    current, previous = _read(family, shelf.load_current), _read(family, shelf.load_previous)
    if current is not None:
        yield current
    if current is not None and current.canary is not None:
        yield releases.alone(current)
    if previous is not None:
        yield releases.alone(previous)


def _read(family: Family, load: Callable[[str], Plan | None]) -> Plan | None:
    try:
        return load(family.name)
    except HeadwaterError as error:
        log.warning("%s: what served last cannot be read: %s", family.name, error)
        return None


def restore_windows(families: Mapping[str, Family], file: SnapshotFile, events: EventLog) -> int:
    """Bring the windows of `families` to the end of `events`; how many records that took."""
    snapshot = file.load()
    from_log_alone = {
        name
        for name, family in families.items()
        if snapshot is None or not _restore(family, snapshot, events)
    }
    start, replayed = file.floor, 0
    for epoch, seq, data in events.tail("event", *((0, 0) if from_log_alone else start)):
        record = codec.decode_record(data)
        assert not isinstance(record, LabelRecord), "labels have a class of their own"
        family = families.get(record.family)
        if family is not None and (record.family in from_log_alone or (epoch, seq) > start):
            family.pipeline.replay(record.kind, record.time_s, record.fields)
            if isinstance(record, PredictionRecord):
                family.pipeline.answered.remember((epoch, seq), record.fields)
            replayed += 1
    return replayed


def _restore(family: Family, snapshot: Snapshot, events: EventLog) -> bool:
    """Whether `family` has its windows as of `snapshot`, those that it lacks from the log."""
    state = snapshot.families.get(family.name)
    lacking = None if state is None else family.lacking(state)
    if state is None or lacking is None:
        return False
    until = snapshot.epoch, snapshot.seq
    records = releases.seen(events, family.name, until=until) if lacking else iter(())
    try:
        family.pipeline.restore(state, history.rebuild(lacking, records))
    except HeadwaterError as error:
        log.warning("%s: windows are rebuilt from the log alone: %s", family.name, error)
        return False
    return True

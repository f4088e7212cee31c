"""Backfill: a feature that is new gets its history, from the raw envelopes that the home kept.

Why: a model under a new feature spec would otherwise begin with nothing, or with values that some
other code made up; here the device's engine computes what a device would have logged.

Steps: the raw envelopes are sorted by device; each device's log is replayed under the new spec; the
values that the old spec has too must be those that were logged; then each labelled example gets a
twin, and the first release of the new spec is learned from them (see `successor`).

Invariants: nothing is changed before every device was replayed and compared. The home is ours
alone meanwhile. What was done is done
once: after a kill at any moment, the same call comes to the same end. Its folder `backfill` in the
home is only for its own use, and may be removed.

Knows nothing about networks, gates and keys.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from cloud_learner.config import Home
from cloud_learner.experiment.hindsight import Hindsight, Vector
from cloud_learner.experiment.lanes import Lanes
from cloud_learner.experiment.logged import Found, Known
from cloud_learner.experiment.progress import Progress
from cloud_learner.experiment.successor import Released, release
from cloud_learner.experiment.twins import Twins, Vectors
from cloud_learner.package.inspect import spec_of
from cloud_learner.store.ingest_db import IngestDb, accounts_of
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.raw import Position, RawLog
from cloud_learner.store.registry import Registry
from cloud_learner.train.family import Family
from edge_runtime.errors import ConfigError, HeadwaterError, PackageError
from edge_runtime.features.feature import LABEL
from edge_runtime.features.spec import Spec

FOLDER = "backfill"

Tell = Callable[[str], None]


class SkewError(PackageError):
    """A value that was computed again is another than the one that was logged."""


class Filled(msgspec.Struct, kw_only=True):
    """What a backfill came to: by device what the replay found, and how many twins were written.

    `damaged_bytes` of the raw log could not be read, nor could `unreadable` envelopes.
    """

    spec: str
    envelopes: int = 0
    unreadable: int = 0
    damaged_bytes: int = 0
    twins: int = 0
    devices: dict[str, Found] = {}

    @property
    def whole(self) -> int:
        """How many predictions have a vector."""
        return sum(found.whole for found in self.devices.values())


class Backfilled(msgspec.Struct, frozen=True):
    """The replay and the release that came of it; both None where there was nothing to do."""

    family: str
    spec: str
    filled: Filled | None = None
    released: Released | None = None


def facts(done: Backfilled) -> dict[str, Any]:
    """All of it as plain values; an undefined number is None."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(done))
    return found


def backfill(folder: Path, home: Home, tell: Tell) -> Backfilled:
    """Give the family in `folder`, whose features.toml changed, its history and its next release.

    Raises: ConfigError (unknown_family, already_owned, no_raw, field_missing, no_history,
    too_few_rows), SkewError, RefusedError, CapacityError. What serves is unchanged then.
    """
    family, origins = Family.load(folder), home.origins()
    home.check_gate_is_here()
    if family.name not in origins:
        raise ConfigError(
            "unknown_family",
            f"{home.root} has no family {family.name!r}, but {', '.join(origins)}",
            f"cloud-learner bootstrap {folder} DATA --home {home.root}",
        )
    spec = family.spec.hash
    if spec_of(Registry(home.registry).path(origins[family.name].sha256)).hash == spec:
        tell(f"{home.root} learns {family.name} under these features already; nothing to do")
        return Backfilled(family.name, spec)
    with owned(home) as db:
        filled = fill(home, db, family, known_releases(home, family.name), tell)
        tell(f"{filled.whole:,} predictions have a vector, {filled.twins:,} examples were added")
        released = release(home, family, db, tell)
    tell(f"release {released.release} passed the gate and is offered; serve the home again")
    return Backfilled(family.name, spec, filled, released)


@contextlib.contextmanager
def owned(home: Home) -> Iterator[IngestDb]:
    """The ingest database of a home that nobody serves. Raises: ConfigError."""
    with home.owned():
        if not home.ingest_db.exists():
            raise _no_raw(home)
        db = IngestDb(home.ingest_db)
        try:
            yield db
        finally:
            db.close()


def known_releases(home: Home, family: str) -> Known:
    """What the home's own lineage and registry say of the family's releases so far."""
    registry, specs, saw_labels = Registry(home.registry), dict[str, Spec](), set[str]()
    for entry in Lineage(home.lineage).of(family).read("release"):
        try:
            spec = spec_of(registry.path(entry["sha256"]))
        except HeadwaterError:  # gone, or damaged: what was logged under it is only not compared
            continue
        specs[spec.hash] = spec
        if any(f.window is not None and f.window.over == LABEL for f in spec.features):
            saw_labels.add(entry["release"])
    return Known(specs, frozenset(saw_labels))


def fill(home: Home, db: IngestDb, family: Family, known: Known, tell: Tell) -> Filled:
    """Write the twins of all examples of `family` for which the raw log tells enough.

    Raises: ConfigError (no_raw, field_missing, no_history), SkewError, CapacityError; then the
    archive is as it was.
    """
    work = home.root / FOLDER
    shutil.rmtree(work, ignore_errors=True)
    try:
        with contextlib.ExitStack() as stack:
            lanes = Lanes(work / "lanes", accounts_of(db.rocks))
            stack.callback(lanes.close)
            filled, size = _sorted(home, db, lanes, family, tell)
            vectors = Vectors(work / "vectors")
            step = Progress("replay", size, tell).step
            for device, epochs in lanes.epochs():
                hindsight = Hindsight(family.spec, family.interface, known)
                found = replayed(lanes, device, epochs, hindsight, step)
                vectors.write(device, (each for each in found if each.spec != filled.spec))
                filled.devices[device] = hindsight.found
            _judge(family, filled)
            progress = Progress("examples", len(vectors.days()), tell)
            twins = Twins(family.name, family.spec.hash, vectors)
            filled.twins = twins.write(db, home.archive, progress.step)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return filled


def _sorted(
    home: Home, db: IngestDb, lanes: Lanes, family: Family, tell: Tell
) -> tuple[Filled, int]:
    """Sort the raw envelopes; how many bytes they have."""
    position = db.meta().raw
    raw = RawLog(home.raw, keep_s=math.inf)
    try:
        if position is not None:
            raw.adopt(Position(*position))
        statistics = raw.statistics()
        if not statistics["raw_bytes"] or position is None:
            raise _no_raw(home)
        progress = Progress("raw envelopes", statistics["raw_bytes"], tell)
        lanes.sort(raw, progress.step)
        damaged = raw.statistics().get("raw_damaged_bytes", 0)
    finally:
        raw.close()
    counts = lanes.counts
    filled = Filled(
        spec=family.spec.hash,
        envelopes=counts["envelopes"],
        unreadable=counts["unreadable"],
        damaged_bytes=damaged,
    )
    return filled, progress.done


def replayed(
    lanes: Lanes,
    device: str,
    epochs: Iterable[tuple[int, int]],
    hindsight: Hindsight,
    step: Callable[[int], None],
) -> Iterator[Vector]:
    """The vectors of a device, all its epochs in order; `hindsight.found` is whole at the end."""
    for epoch, prior in epochs:
        events = lanes.lane(device, epoch, "event", step)
        labels = lanes.lane(device, epoch, "label", step)
        yield from hindsight.live(epoch, prior, events, labels)


def _judge(family: Family, filled: Filled) -> None:
    """Raises: SkewError, ConfigError; nothing was changed so far."""
    differing, lacking = Counter[str](), Counter[str]()
    for found in filled.devices.values():
        differing.update(found.differing)
        lacking.update(found.lacking)
        missed = {name: n for name, n in found.lost.items() if name.startswith("without ")}
        lacking.update({name.removeprefix("without "): n for name, n in missed.items()})
    if differing:
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(differing.items()))
        raise SkewError(
            "skew_found",
            f"{family.name}: values computed again differ from those that were logged, and no gap "
            f"explains it: {names}; nothing was changed",
            "a device that answers on the worker, or with another engine, logs such values",
        )
    if filled.whole:
        return
    if lacking:
        names = ", ".join(f"{name} ({count:,} events)" for name, count in sorted(lacking.items()))
        raise ConfigError(
            "field_missing",
            f"{family.folder / 'features.toml'}: a feature needs what no old event has: {names}; "
            "nothing was changed",
            "events get the field from the next release on; add the feature when they have it",
        )
    raise ConfigError(
        "no_history",
        f"{family.name}: of {sum(f.predictions for f in filled.devices.values()):,} predictions in "
        "raw envelopes, none was made with full windows; nothing was changed",
        "raise archive.raw_days, or wait until raw envelopes reach back further than the windows",
    )


def _no_raw(home: Home) -> ConfigError:
    return ConfigError(
        "no_raw",
        f"{home.root} keeps no raw envelopes; nothing was changed",
        "archive.raw_days says for how long they are kept, once `serve` has taken some in",
    )

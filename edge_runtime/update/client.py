"""The update client of a device: python-tuf's verified workflow, and the trust rules around it.

Why: python-tuf proves who signed what; it does not know plans, release counters, a floor that
outlives its cache, or a clock that was set back. Here both meet, and every refusal gets a name.

Invariants: a sync object for one thread; a second one on the same directory is refused. Nothing is
installed that is not proven against the newest metadata, and refusing changes nothing that runs.
The floor lies in two sealed copies, written one after the other, each in one commit point.
python-tuf's own cache may be lost at any time without loss of safety.

Knows nothing about models, slots or the event loop. Reads one private attribute of python-tuf
(`_trusted_set`: versions, time of reference), which tests/integration/test_release_path.py pins.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined] # tuf has no __all__
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.updater import Updater

from edge_runtime.clock import Clock
from edge_runtime.errors import (
    CapacityError,
    ConfigError,
    HeadwaterError,
    TransportError,
    TrustError,
)
from edge_runtime.files import write_atomic
from edge_runtime.rollout.plan import Plan, PlanArm, Variant, decode_plan, plan_path
from edge_runtime.update import trust
from edge_runtime.update.fetcher import BASE_URL, BusFetcher
from edge_runtime.update.shelf import Shelf

_CODES: list[tuple[type[Exception], type[HeadwaterError], str]] = [
    (tuf_errors.ExpiredMetadataError, TrustError, "expired"),
    (tuf_errors.BadVersionNumberError, TrustError, "rolled_back"),
    (tuf_errors.UnsignedMetadataError, TrustError, "below_threshold"),
    (tuf_errors.LengthOrHashMismatchError, TrustError, "hash_mismatch"),
    (tuf_errors.RepositoryError, TrustError, "bad_metadata"),
    (tuf_errors.DownloadLengthMismatchError, TrustError, "wrong_length"),
    (tuf_errors.DownloadHTTPError, TransportError, "absent"),
    (tuf_errors.DownloadError, TransportError, "unreachable"),
    (OSError, CapacityError, "state_unwritable"),
]
_LIMITS = UpdaterConfig(max_delegations=8, snapshot_max_length=512_000, targets_max_length=1 << 20)


class UpdateClient:
    """Asks what shall run, proves it and brings it onto the shelf.

    `root_bytes` is the root metadata that the device was given when it was set up.
    """

    def __init__(
        self, state_dir: Path, root_bytes: bytes, fetcher: BusFetcher, clock: Clock
    ) -> None:
        self._state_dir = state_dir
        self._metadata_dir = state_dir / "tuf"
        self._metadata_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(state_dir / "update.lock")
        self._root_bytes = root_bytes
        self._fetcher = fetcher
        self._clock = clock
        self._floor = self._load_floor()
        self._updater: Updater | None = None
        self._root_version = self._floor.versions.get("root", 1)
        self._held: dict[str, int] = {}
        self._plans: dict[str, tuple[str, Plan]] = {}
        self._verdicts: dict[str, dict[str, Any]] = {}

    @property
    def floor(self) -> trust.Floor:
        """What this device has confirmed so far."""
        return self._floor

    def refresh(self) -> None:
        """Bring the signed metadata up to date; nothing that runs changes.

        Raises: TrustError (expired, rolled_back, below_threshold, bad_metadata, wrong_length,
        metadata_rolled_back), TransportError (absent, unreachable), CapacityError.
        """
        self._updater = None
        with _ours("the signed metadata"):
            updater = Updater(
                str(self._metadata_dir),
                BASE_URL,
                fetcher=self._fetcher,
                config=_LIMITS,
                bootstrap=self._root_bytes,
            )
            now_s = trust.trusted_time_s(self._floor, self._clock.now_s())
            _trusted(updater).reference_time = dt.datetime.fromtimestamp(now_s, dt.UTC)
            self._fetcher.prefetch([f"{self._root_version + 1}.root.json", "timestamp.json"])
            updater.refresh()
        self._root_version = _trusted(updater).root.version
        trust.check_versions(self._floor, _versions(updater))
        self._updater = updater

    def plan(self, family: str) -> Plan:
        """The family's plan, each release in it proven to be genuine; `refresh` comes first.

        Raises: as `refresh` and `fetch`, and TrustError (bad_plan, plan_rolled_back,
        plan_of_other_family), TransportError (no_plan: none was published yet).
        """
        self._prefetch_roles(family)
        target = self._target(plan_path(family))
        if target is None:
            raise TransportError("no_plan", f"no plan is published for {family!r} yet")
        plan = self._read_plan(family, target)
        trust.check_plan(self._floor, family, plan)
        found = {}
        for arm in plan.arms:
            for package in arm.packages:
                found[arm.release] = self._proven_target(arm, package).custom["verdict"]
        self._verdicts[family] = found
        return plan

    def fetch(self, arm: PlanArm, package: Variant, shelf: Shelf) -> Path:
        """One of an arm's packages on the shelf, brought there if need be and proven.

        Raises: TrustError (not_released, plan_mismatch, no_verdict, release_below_floor,
        hash_mismatch, release_quarantined, wrong_length), TransportError, CapacityError.
        """
        target = self._proven_target(arm, package)
        if package.sha256 in shelf.quarantined():
            trust.check_release(self._floor, _family(arm), arm.counter, quarantined=True)
        with _ours(f"the package of {arm.release}"):
            return shelf.put(package.sha256, self._fetcher.chunks(package.sha256, target.length))

    def confirm(self, plan: Plan) -> None:
        """Raise the floor to `plan` and the metadata that proved it: it serves now.

        Raises: CapacityError (state_unwritable), with the floor as it was or raised.
        """
        updater = self._refreshed()
        floor = trust.confirmed(
            self._floor,
            plan,
            _versions(updater),
            self._release_floor(plan.family),
            _issued_s(updater),
        )
        if floor == self._floor:
            return
        with _ours("the floor"):
            for path in self._floor_paths():
                write_atomic(path, trust.encode_floor(floor))
        self._floor = floor

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """By family and release, what the gate said of those in the plan that was read last."""
        return dict(self._verdicts)

    def statistics(self) -> dict[str, int]:
        """What the fetcher counted."""
        return self._fetcher.statistics()

    def close(self) -> None:
        """Give the state directory back; closing twice is no error."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _refreshed(self) -> Updater:
        assert self._updater is not None, "refresh comes first, and must have succeeded"
        return self._updater

    def _target(self, path: str) -> TargetFile | None:
        with _ours(f"the metadata of {path}"):
            return self._refreshed().get_targetinfo(path)

    def _proven_target(self, arm: PlanArm, package: Variant) -> TargetFile:
        """The counter binds the packages of a release: a plan cannot mix those of two."""
        target = self._target(package.path)
        if target is None:
            raise TrustError("not_released", f"{package.path} is not among the signed releases")
        counter = (target.custom or {}).get("counter")
        if target.hashes.get("sha256") != package.sha256 or counter != arm.counter:
            raise TrustError(
                "plan_mismatch", f"the plan and the signed release of {package.path} differ"
            )
        if not trust.is_passed(target.custom):
            raise TrustError("no_verdict", f"{package.path} does not carry its gate's verdict")
        family = _family(arm)
        floor = self._release_floor(family)
        trust.check_release(self._floor, family, arm.counter, release_floor=floor)
        return target

    def _read_plan(self, family: str, target: TargetFile) -> Plan:
        sha256 = target.hashes["sha256"]
        known = self._plans.get(family)
        if known is not None and known[0] == sha256:
            return known[1]
        with _ours(f"the plan of {family}"):
            data = b"".join(self._fetcher.chunks(sha256, target.length))
            target.verify_length_and_hashes(data)
        plan = decode_plan(data)
        self._plans[family] = (sha256, plan)
        return plan

    def _prefetch_roles(self, family: str) -> None:
        """Ask at once for the roles that the coming look-ups need and the cache lacks."""
        meta = _trusted(self._refreshed()).snapshot.meta
        wanted = {}
        for role in (trust.PLANS_ROLE, trust.models_role(family)):
            entry = meta.get(f"{role}.json")
            if entry is not None and self._held.get(role) != entry.version:
                wanted[role] = entry.version
        if wanted:
            with _ours("the signed metadata"):
                self._fetcher.prefetch([f"{number}.{role}.json" for role, number in wanted.items()])
        self._held |= wanted

    def _release_floor(self, family: str) -> int:
        role = _trusted(self._refreshed()).get(trust.models_role(family))
        floor = role.unrecognized_fields.get(trust.RELEASE_FLOOR_FIELD, 0) if role else 0
        return floor if isinstance(floor, int) else 0

    def _floor_paths(self) -> list[Path]:
        return [self._state_dir / "floor.a", self._state_dir / "floor.b"]

    def _load_floor(self) -> trust.Floor:
        copies = [path.read_bytes() for path in self._floor_paths() if path.exists()]
        floor, failure = None, None
        for copy in copies:
            try:
                one = trust.decode_floor(copy)
                floor = one if floor is None else trust.merge_floors(floor, one)
            except TrustError as error:
                failure = error
        if floor is None and failure is not None:
            raise failure
        return floor or trust.Floor()


def _trusted(updater: Updater) -> TrustedMetadataSet:
    return updater._trusted_set  # noqa: SLF001 - versions and time have no public access


def _versions(updater: Updater) -> dict[str, int]:
    trusted = _trusted(updater)
    listed = {
        name.removesuffix(".json"): entry.version for name, entry in trusted.snapshot.meta.items()
    }
    return listed | {
        "root": trusted.root.version,
        "timestamp": trusted.timestamp.version,
        "snapshot": trusted.snapshot.version,
    }


def _issued_s(updater: Updater) -> float:
    fields = _trusted(updater).timestamp.unrecognized_fields
    issued = fields.get(trust.ISSUED_FIELD, 0)
    return float(issued) if isinstance(issued, int | float) else 0.0


def _family(arm: PlanArm) -> str:
    return arm.path.split("/")[1]


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            "already_owned", f"{path.parent} is used by another process", "stop the other process"
        ) from error
    return fd


@contextmanager
def _ours(what: str) -> Iterator[None]:
    """Turn python-tuf's and the disk's errors into ours, with the attack's name as code."""
    try:
        yield
    except HeadwaterError:
        raise
    except Exception as error:
        for kind, family, code in _CODES:
            if isinstance(error, kind):
                raise family(code, f"{what}: {error}; what runs is unchanged") from error
        raise

"""The update client of a device: python-tuf's verified workflow, and the trust rules around it.

Why: python-tuf proves who signed what; it does not know plans, release counters, a floor that
outlives its cache, or a clock that was set back. Here both meet, and every refusal gets a name.

Invariants: a sync object for one thread; a second one on the same directory is refused. Nothing is
installed that is not proven against the newest metadata, and refusing changes nothing that runs.
python-tuf's own cache may be lost at any time without loss of safety. Expiry is judged by a time
that is never below what was signed; a clock that looks wrong is settled by a signed answer, and
where none comes, nothing is installed.

Knows nothing about models, slots or the event loop.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined] # tuf has no __all__
from tuf.ngclient.updater import Updater

from edge_runtime.clock import Clock
from edge_runtime.errors import ConfigError, HeadwaterError, TransportError, TrustError
from edge_runtime.files import make_directory, remove_strays
from edge_runtime.rollout.plan import Plan, PlanArm, Variant, decode_plan, plan_path
from edge_runtime.update import approval, trust
from edge_runtime.update.delivery import Delivery
from edge_runtime.update.fetcher import Fetcher
from edge_runtime.update.floorfile import FloorFile
from edge_runtime.update.refreshing import (
    Ask,
    Refreshing,
    issued_at,
    online,
    ours,
    trusted,
    versions,
)
from edge_runtime.update.shelf import Shelf


class UpdateClient:
    """Asks what shall run, proves it and brings it onto the shelf.

    `root_bytes` is the root metadata that the device was given when it was set up. `ask_time` puts
    a question of the time to whoever answers; without it, the device's clock is believed. Steps of
    more than `step_max` percentage points need the gate's approval.
    """

    def __init__(
        self,
        state_dir: Path,
        root_bytes: bytes,
        fetcher: Fetcher,
        clock: Clock,
        *,
        ask_time: Ask | None = None,
        step_max: float = 100.0,
    ) -> None:
        metadata_dir = state_dir / "tuf"
        make_directory(metadata_dir)
        self._lock = _lock(state_dir / "update.lock")
        remove_strays(state_dir)
        for stray in metadata_dir.glob("tmp*"):  # python-tuf's, when it was killed
            stray.unlink(missing_ok=True)
        self._fetcher, self._step_max = fetcher, step_max
        self._delivery = Delivery(fetcher)
        self._refreshing = Refreshing(metadata_dir, root_bytes, fetcher, clock, ask_time)
        try:
            with ours("the floor"):
                self._floors = FloorFile(state_dir)
        except HeadwaterError:
            self.close()
            raise
        self._updater: Updater | None = None
        self._fresh = trust.Freshness(self._confirmed(), self.floor.time_s)
        self._held: dict[str, int] = {}
        self._plans: dict[str, tuple[str, bytes, Plan]] = {}
        self._verdicts: dict[str, dict[str, Any]] = {}

    @property
    def floor(self) -> trust.Floor:
        """What this device has confirmed so far."""
        return self._floors.floor

    @property
    def freshness(self) -> trust.Freshness:
        """Of the last `refresh` that brought anything; any thread may ask."""
        return self._fresh

    def refresh(self) -> None:
        """Bring the signed metadata up to date; nothing that runs changes.

        Raises: TrustError (expired, clock_behind, issued_ahead, rolled_back, below_threshold,
        bad_metadata, wrong_length, metadata_rolled_back), TransportError (absent, unreachable),
        CapacityError.
        """
        self._updater = None
        updater, now_s = self._refreshing.load(self.floor)
        issued_s = issued_at(trusted(updater).timestamp)
        with ours("the floor"):
            self._floors.raise_to(trust.seen(self.floor, issued_s))
        self._fresh = trust.Freshness(self._confirmed(), issued_s, issued_s < now_s - trust.STALE_S)
        self._updater = updater

    def plan(self, family: str) -> Plan:
        """The family's plan, each release in it proven to be genuine; `refresh` comes first.

        A fallback below the signed floor is taken out of it: the ban came after the plan.
        Raises: as `refresh` and `fetch`, and TrustError (bad_plan, plan_rolled_back,
        plan_of_other_family), TransportError (no_plan: none was published yet).
        """
        self._prefetch_roles(family)
        target = self.target(plan_path(family))
        if target is None:
            raise TransportError("no_plan", f"no plan is published for {family!r} yet")
        plan = self._read_plan(family, target)
        trust.check_plan(self._binding(), family, plan)
        self._verdicts[family] = {arm.release: self._proven_verdict(arm) for arm in plan.arms}
        if plan.fallback is not None:
            if plan.fallback.counter < self.lowest_counter(family):
                return msgspec.structs.replace(plan, fallback=None)
            self._proven_verdict(plan.fallback)
        return plan

    def check_course(
        self, plan: Plan, seen: Plan, shall: Sequence[PlanArm], has: Sequence[PlanArm]
    ) -> None:
        """Refuse what `plan`, just read, does to a device that follows `seen`: by it the device
        `shall` run other arms than it `has`, the stable one standing first.

        Raises: TrustError (history_rewritten, unapproved_jump).
        """
        approval.check_history(plan, seen)
        if not approval.is_jump(plan, shall, has, self._step_max):
            return
        _, data, _ = self._plans[plan.family]
        target = self.target(plan_path(plan.family))
        targets = trusted(self._refreshed()).targets
        if target is None or not approval.is_approved(targets, data, target.custom):
            raise approval.unapproved(plan, self._step_max)

    def fetch(self, arm: PlanArm, package: Variant, shelf: Shelf) -> Path:
        """One of an arm's packages on the shelf, brought there if need be and proven.

        Raises: TrustError (not_released, plan_mismatch, no_verdict, release_below_floor,
        hash_mismatch, release_quarantined, wrong_length), TransportError (absent, unreachable,
        too_slow), CapacityError.
        """
        target = self._proven_target(arm, package)
        if package.sha256 in shelf.quarantined():
            trust.check_release(self._binding(), _family(arm), arm.counter, quarantined=True)
        with ours(f"the package of {arm.release}"):
            return self._delivery.bring(target, shelf)

    def target(self, path: str) -> TargetFile | None:
        """What the signed metadata says of the file `path`; `refresh` comes first.

        Raises: as `refresh`.
        """
        with ours(f"the metadata of {path}"):
            return self._refreshed().get_targetinfo(path)

    def confirm(self, plan: Plan | None) -> None:
        """Raise the floor to the metadata, and to the `plan` that it proved and that serves now.

        Raises: CapacityError (state_unwritable), with the floor as it was or raised.
        """
        updater = self._refreshed()
        floor = trust.confirmed(
            self.floor, versions(updater), online(updater), issued_at(trusted(updater).timestamp)
        )
        if plan is not None:
            floor = trust.planned(floor, plan, self._release_floor(plan.family))
        with ours("the floor"):
            self._floors.raise_to(floor)
        self._fresh = trust.Freshness(self._confirmed(), self._fresh.issued_s, self._fresh.stale)

    def lowest_counter(self, family: str) -> int:
        """The release counter below which no release of `family` may run; `refresh` comes first."""
        known = self._binding().release_counter.get(family, 0)
        return max(known, self._release_floor(family))

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """By family and release, what the gate said of those in the plan that was read last."""
        return dict(self._verdicts)

    def statistics(self) -> dict[str, int]:
        """What was fetched, in which way, and how it went."""
        return self._fetcher.statistics() | self._delivery.statistics()

    def close(self) -> None:
        """Give the state directory back; closing twice is no error."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _confirmed(self) -> tuple[int, int]:
        versions = self.floor.versions
        return versions.get("root", 0), versions.get("timestamp", 0)

    def _binding(self) -> trust.Floor:
        updater = self._refreshed()
        return trust.binding(self.floor, versions(updater), online(updater))

    def _refreshed(self) -> Updater:
        assert self._updater is not None, "refresh comes first, and must have succeeded"
        return self._updater

    def _proven_verdict(self, arm: PlanArm) -> dict[str, Any]:
        """What the gate said of a release whose packages are all genuine."""
        *_, target = [self._proven_target(arm, package) for package in arm.packages]
        verdict: dict[str, Any] = target.custom["verdict"]
        return verdict

    def _proven_target(self, arm: PlanArm, package: Variant) -> TargetFile:
        """The counter binds the packages of a release: a plan cannot mix those of two."""
        target = self.target(package.path)
        if target is None:
            raise TrustError("not_released", f"{package.path} is not among the signed releases")
        counter = (target.custom or {}).get("counter")
        if target.hashes.get("sha256") != package.sha256 or counter != arm.counter:
            raise TrustError(
                "plan_mismatch", f"the plan and the signed release of {package.path} differ"
            )
        if not trust.is_passed(target.custom):
            raise TrustError(
                "no_verdict",
                f"{package.path} does not carry its gate's verdict; what runs is unchanged",
                "is the release older than verdicts, start cloud-learner serve anew: it adds them",
            )
        family = _family(arm)
        floor = self._release_floor(family)
        trust.check_release(self._binding(), family, arm.counter, release_floor=floor)
        return target

    def _read_plan(self, family: str, target: TargetFile) -> Plan:
        sha256 = target.hashes.get("sha256", "")
        trust.check_plan_file(sha256, target.length)
        known = self._plans.get(family)
        if known is not None and known[0] == sha256:
            return known[2]
        with ours(f"the plan of {family}"):
            data = b"".join(self._fetcher.chunks(sha256, target.length))
            target.verify_length_and_hashes(data)
        plan = decode_plan(data)
        self._plans[family] = sha256, data, plan
        return plan

    def _prefetch_roles(self, family: str) -> None:
        """Ask at once for the roles that the coming look-ups need and the cache lacks."""
        meta = trusted(self._refreshed()).snapshot.meta
        wanted = {}
        for role in (trust.PLANS_ROLE, trust.models_role(family)):
            entry = meta.get(f"{role}.json")
            if entry is not None and self._held.get(role) != entry.version:
                wanted[role] = entry.version
        if wanted:
            with ours("the signed metadata"):
                self._fetcher.prefetch([f"{number}.{role}.json" for role, number in wanted.items()])
        self._held |= wanted

    def _release_floor(self, family: str) -> int:
        role = trusted(self._refreshed()).get(trust.models_role(family))
        floor = role.unrecognized_fields.get(trust.RELEASE_FLOOR_FIELD, 0) if role else 0
        return floor if isinstance(floor, int) else 0


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

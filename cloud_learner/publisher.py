"""The publisher: the one place that puts releases and plans where devices find them.

Why: learner, gate and rollout each sign their own document; somebody must bring the signatures
together under one snapshot and one timestamp, so that a device never sees a half.

Invariants: `publish` is one transaction: the new state is built and its thresholds are verified in
memory, committed by one rename, then pushed, the timestamp last. A refused signature changes
nothing. What was committed and not pushed, the next transaction pushes, under higher versions.
Versions go above what the broker holds, so a genuine publish mends forged metadata. A family's role
lists what its current plan and the one before it name, and the newest release, with patches to it
from what ran when it was published.

Knows nothing about verdicts and campaigns: it publishes what the trust domains sign.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import msgspec
from tuf.api.metadata import Snapshot, Targets, Timestamp  # type: ignore[attr-defined] # no __all__

from cloud_learner.package.delta import patch_between
from cloud_learner.release.collecting import collected
from cloud_learner.release.keys import Signers
from cloud_learner.release.listing import check_plan, with_release
from cloud_learner.release.metadata import (
    MODELS_DAYS,
    TIMESTAMP_DAYS,
    BrokerView,
    ReleaseFile,
    expiry,
    look,
    opened,
    plan_target,
    push,
    sealed,
    snapshot_of,
    timestamp_of,
)
from cloud_learner.release.patches import files_in, patches_for
from cloud_learner.release.repository import STREAM_BYTES, Repository, SignedFile, State
from edge_runtime.bus.base import Bus
from edge_runtime.clock import Clock
from edge_runtime.errors import ConfigError, TransportError, TrustError
from edge_runtime.rollout.plan import Plan, decode_plan, encode_plan
from edge_runtime.update.approval import APPROVALS_ROLE, FIELD, Approval, is_approved
from edge_runtime.update.trust import PLANS_ROLE, RELEASE_FLOOR_FIELD, TIME_ROLE, models_role
from edge_runtime.wire import subjects

_DAY_S = 86_400.0
_SILENT = (TIME_ROLE, APPROVALS_ROLE)


class Publisher:
    """Publishes under the keys and the state of `home`; the only writer of both.

    Raises on construction: ConfigError (no_trust, bad_state).
    """

    def __init__(self, home: Path, bus: Bus, signers: Signers, clock: Clock) -> None:
        self._repository = Repository(home / "tuf")
        self._bus = bus
        self._signers = signers
        self._clock = clock
        self._root, self._targets = self._repository.trust.root, self._repository.trust.targets
        self._lock = asyncio.Lock()
        self._counts = {"transactions": 0, "repairs": 0, "messages": 0}

    async def publish(
        self,
        release: ReleaseFile | None = None,
        plan: Plan | None = None,
        approval: Approval | None = None,
    ) -> None:
        """Publish a release, a plan or both in one transaction; with neither, sign afresh.

        The gate's `approval` goes with the plan, and stays with it when that is published again.
        Calling again with the same after a TransportError is safe.

        Raises: TrustError (not_passed, below_threshold, release_exists, plan_rolled_back,
        plan_names_unreleased, bad_approval: nothing changed), ConfigError (unknown_family),
        TransportError.
        """
        async with self._lock:
            documents = self._documents()
            changed: set[str] = set()
            if release is not None:
                release = await asyncio.to_thread(self._patched, release)
                changed.add(self._add_release(documents, release, plan))
            if plan is not None:
                changed.add(self._add_plan(documents, plan, approval))
            await self._transact(documents, changed, release, plan)

    async def raise_floor(self, family: str, counter: int) -> None:
        """Make devices refuse releases of `family` below `counter` for ever: use it for harm only.

        Raises: as `publish`.
        """
        async with self._lock:
            documents = self._documents()
            role = self._known(models_role(family))
            fields = documents[role].unrecognized_fields
            fields[RELEASE_FLOOR_FIELD] = max(counter, fields.get(RELEASE_FLOOR_FIELD, 0))
            await self._transact(documents, {role}, None, None)

    async def maintain(self) -> bool:
        """Sign afresh if anything has lived half its life; call it every hour or so."""
        due = any(self._due(role) for role in self._state.roles) or not self._state.roles
        if due:
            await self.publish()
        return due

    def plan(self, family: str) -> Plan | None:
        """The plan of a family that was published last."""
        return decode_plan(text.encode()) if (text := self._state.plans.get(family)) else None

    def signed(self, role: str) -> str:
        """The document of a role as it was published last."""
        return self._state.roles[role].text

    def statistics(self) -> dict[str, int]:
        """Transactions made, how many repaired foreign metadata, and messages pushed."""
        return dict(self._counts)

    @property
    def _state(self) -> State:
        return self._repository.state

    async def _transact(
        self,
        documents: dict[str, Targets],
        changed: set[str],
        release: ReleaseFile | None,
        plan: Plan | None,
    ) -> None:
        try:
            view = await self._look()
            state = await self._draft(documents, changed, plan, view)
            messages = await asyncio.to_thread(
                self._repository.commit, state, release, files_in(documents)
            )
            await push(self._bus, messages)
            await push(self._bus, [state.message("timestamp")])
        except TransportError:
            self._repository.forget_sent()
            raise
        self._repository.mark_sent(messages)
        self._counts["messages"] += len(messages) + 1
        self._counts["transactions"] += 1
        await self._bus.send(subjects.REFRESH, b"")

    async def _look(self) -> BrokerView:
        if not self._repository.anything_sent:
            await self._bus.ensure_stream(
                subjects.TRUST_STREAM,
                subjects.TRUST_ALL,
                max_bytes=STREAM_BYTES,
                per_subject=1,
                discard_new=False,
            )
        view = await look(self._bus, self._root)
        self._compare(view)
        return view

    def _documents(self) -> dict[str, Targets]:
        """A fresh copy of every delegated role, empty and of version 0 where none was signed."""
        assert self._targets.delegations is not None
        roles = self._targets.delegations.roles or {}
        return {role: self._document(role) for role in roles if role not in _SILENT}

    def _document(self, role: str) -> Targets:
        file = self._state.roles.get(role)
        if file is not None:
            return opened(Targets, file.text.encode(), None, role)
        document = Targets(version=1)
        document.version = 0
        return document

    def _known(self, role: str) -> str:
        assert self._targets.delegations is not None
        if role not in (self._targets.delegations.roles or {}):
            raise ConfigError(
                "unknown_family",
                f"the root of trust delegates no role {role!r}; nothing is published",
                "name the family when the keys are created",
            )
        return role

    def _patched(self, release: ReleaseFile) -> ReleaseFile:
        """The release with what makes it of the packages that run now."""
        plan, stored = self.plan(release.family), self._repository.package
        arms = [] if plan is None else plan.arms
        made = patches_for(release.packages(), release.release, arms, stored, patch_between)
        return dataclasses.replace(release, patches=made)

    def _add_release(
        self, documents: dict[str, Targets], release: ReleaseFile, plan: Plan | None
    ) -> str:
        role = self._known(models_role(release.family))
        plans = self.plan(release.family), plan
        documents[role].targets = with_release(documents[role].targets, release, plans)
        return role

    def _add_plan(
        self, documents: dict[str, Targets], plan: Plan, approval: Approval | None
    ) -> str:
        check_plan(documents[self._known(models_role(plan.family))].targets, plan)
        target, data = plan_target(plan)
        current, listed = self.plan(plan.family), documents[PLANS_ROLE].targets
        again = self._state.plans.get(plan.family) == data.decode()
        if current is not None and current.seq >= plan.seq and not again:
            raise TrustError(
                "plan_rolled_back",
                f"plan {plan.seq} of {plan.family!r} does not follow plan {current.seq}",
            )
        if approval is not None:
            custom = {FIELD: msgspec.to_builtins(approval)}
            target.unrecognized_fields["custom"] = custom
            if not is_approved(self._targets, data, custom):
                raise TrustError("bad_approval", "the approval is not the gate's; not published")
        if approval is None and again:
            listed.setdefault(target.path, target)
        else:
            listed[target.path] = target
        return PLANS_ROLE

    def _compare(self, view: BrokerView) -> None:
        """Notice what is not ours on the broker, and what is ours and no longer there."""
        ours = self._state.roles.get("timestamp")
        if ours is None or view.timestamp == ours.text.encode():
            return
        self._repository.forget_sent()
        if view.versions.get("timestamp", 0) > ours.version:
            self._counts["repairs"] += 1
        if view.versions.get("targets", 0) > self._targets.version:
            raise TrustError(
                "targets_fast_forwarded",
                "the broker holds a signed snapshot of newer targets; nothing is published",
                "stop `cloud-learner serve`, then tools/key-ceremony revoke snapshot timestamp",
            )

    async def _draft(
        self, documents: dict[str, Targets], changed: set[str], plan: Plan | None, view: BrokerView
    ) -> State:
        """The next state: what changed, is due or was overtaken, below new online documents."""
        now_s = self._clock.now_s()
        roles = dict(self._state.roles)
        for role, document in documents.items():
            held = view.versions.get(role, 0)
            must = role in changed or held > document.version or role not in roles
            if must or self._due(role):
                document.version = max(held, document.version) + 1
                document.expires = expiry(now_s, MODELS_DAYS)
                try:
                    data = await collected(document, self._signers.of_role(role))
                except TransportError:  # a gate that is away keeps no plan from the devices
                    if must:
                        raise
                    document.version = roles[role].version
                    continue
                opened(Targets, data, self._targets, role)
                roles[role] = _file(document, data)
        roles |= self._online(documents, view, now_s)
        new = {} if plan is None else {plan.family: encode_plan(plan).decode()}
        return State(roles=roles, plans=self._state.plans | new)

    def _online(
        self, documents: dict[str, Targets], view: BrokerView, now_s: float
    ) -> dict[str, SignedFile]:
        """Snapshot and timestamp; a role that any snapshot ever listed stays listed."""
        foreign = {k: v for k, v in view.versions.items() if k not in {"timestamp", "snapshot"}}
        listed = foreign | {role: document.version for role, document in documents.items()}
        listed["targets"] = self._targets.version
        snapshot = snapshot_of(listed, self._above("snapshot", view), now_s)
        below = sealed(snapshot, [self._signers.snapshot])
        timestamp = timestamp_of(snapshot.version, self._above("timestamp", view), now_s)
        top = sealed(timestamp, [self._signers.timestamp])
        return {
            "snapshot": _file(opened(Snapshot, below, self._root, "snapshot"), below),
            "timestamp": _file(opened(Timestamp, top, self._root, "timestamp"), top),
        }

    def _above(self, role: str, view: BrokerView) -> int:
        """Once both online keys are new, versions begin anew: nobody holds us to the old ones."""
        anew = not any(self._repository.stands(each) for each in ("snapshot", "timestamp"))
        ours = 0 if anew else self._state.roles[role].version
        return max(ours, view.versions.get(role, 0)) + 1

    def _due(self, role: str) -> bool:
        if not self._repository.stands(role):
            return True
        days = TIMESTAMP_DAYS if role == "timestamp" else MODELS_DAYS
        return self._state.roles[role].expires_s - self._clock.now_s() < days * _DAY_S / 2


def _file(document: Targets | Snapshot | Timestamp, data: bytes) -> SignedFile:
    return SignedFile(document.version, document.expires.timestamp(), data.decode())

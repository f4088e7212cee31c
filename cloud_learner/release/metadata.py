"""The signed metadata of releases and plans: how a document is built, sealed, read and pushed.

Why: one vocabulary for the publisher, which publishes what is genuine, and for fault injection,
which must be able to publish what is not.

Invariants: a document is signed by exactly the signers that are named, over its canonical JSON.
Versions only rise: whoever publishes reads first what the broker holds, and takes from it only what
snapshot and timestamp keys have really signed. A timestamp is pushed last, after all it leads to.

Knows nothing about verdicts, campaigns or local state. Implements proto/asyncapi.yaml (channels
hw.meta, hw.blob) on the writing side.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
from securesystemslib.signer import Signature  # type: ignore[attr-defined] # as tuf
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined] # tuf has no __all__
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from cloud_learner.release.patches import Patch, listed
from edge_runtime.bus.base import Bus
from edge_runtime.errors import TrustError
from edge_runtime.rollout.plan import Plan, encode_plan, model_path, plan_path
from edge_runtime.update.trust import ISSUED_FIELD, chunk_sizes, models_role
from edge_runtime.wire import subjects

MODELS_DAYS = PLANS_DAYS = SNAPSHOT_DAYS = 7
TIMESTAMP_DAYS = 1

_OUTSTANDING = 32

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)


class Signs(Protocol):
    """What signs for a trust domain; it may look at the payload, and refuse."""

    def sign(self, payload: bytes) -> Signature:
        """A signature over `payload`. Raises: TrustError when it refuses."""


@dataclass(frozen=True)
class ReleaseFile:
    """A release on its way to be published; `verdict` is kept with it in the signed metadata.

    `data` is its default package, `variants` its others by name, `patches` are by package's path.
    """

    family: str
    release: str
    counter: int
    data: bytes
    verdict: dict[str, Any] = field(default_factory=dict)
    variants: Mapping[str, bytes] = field(default_factory=dict)
    patches: Mapping[str, list[Patch]] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The name of the default package in the signed metadata."""
        return model_path(self.family, self.release)

    @property
    def sha256(self) -> str:
        """The hash of the default package in hex."""
        return hashlib.sha256(self.data).hexdigest()

    def packages(self) -> dict[str, bytes]:
        """All packages by their names in the signed metadata, the default one first."""
        others = {
            model_path(self.family, self.release, name): data
            for name, data in self.variants.items()
        }
        return {self.path: self.data} | others

    def targets(self) -> dict[str, TargetFile]:
        """The entries of the packages in their family's role, by name."""
        custom = {"counter": self.counter} | ({"verdict": self.verdict} if self.verdict else {})
        return {
            path: _target(path, data, custom | listed(self.patches.get(path, ())))
            for path, data in self.packages().items()
        }


@dataclass(frozen=True)
class BrokerView:
    """What the broker holds under valid signatures of the timestamp and snapshot keys.

    `versions` has an entry for timestamp, snapshot and each role that the snapshot lists.
    `timestamp` is the raw message, genuine or not; None when there is none.
    """

    timestamp: bytes | None
    versions: dict[str, int]

    def next(self, role: str) -> int:
        """The lowest version of `role` that no device takes for a step back."""
        return self.versions.get(role, 0) + 1


def expiry(now_s: float, days: int) -> dt.datetime:
    """The time `days` after `now_s`, in whole seconds."""
    return dt.datetime.fromtimestamp(int(now_s), dt.UTC) + dt.timedelta(days=days)


def sealed(document: S, signers: Sequence[Signs]) -> bytes:
    """The file of a document, signed by exactly these signers. Raises: what a signer raises."""
    metadata = Metadata(document)
    payload = metadata.signed_bytes
    for signer in signers:
        signature = signer.sign(payload)
        metadata.signatures[signature.keyid] = signature
    return metadata.to_bytes()


def opened(kind: type[S], data: bytes, delegator: Root | Targets | None, role: str) -> S:
    """The document in a file, its threshold verified by `delegator` (None: trusted already).

    Raises: TrustError (bad_metadata, below_threshold).
    """
    try:
        metadata = Metadata[S].from_bytes(data)
    except RepositoryError as error:
        raise TrustError("bad_metadata", f"{role} is no metadata: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise TrustError("bad_metadata", f"{role} holds a {metadata.signed.type}")
    if delegator is not None:
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            raise TrustError("below_threshold", f"{error}; nothing is published") from error
    return metadata.signed


def plan_target(plan: Plan) -> tuple[TargetFile, bytes]:
    """The entry of a plan in the plans role, and the bytes that it stands for."""
    data = encode_plan(plan)
    return _target(plan_path(plan.family), data, None), data


def releases_in(payload: bytes) -> list[tuple[str, str]]:
    """Path and hash of each release in the payload of a family's role, for who must judge it.

    Raises: TrustError (not_releases): the payload is another document, delegates, or names paths
    that are no releases of one family.
    """
    try:
        document = json.loads(payload)
        targets, kind = document["targets"], document["_type"]
        found = [(path, entry["hashes"]["sha256"]) for path, entry in targets.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrustError("not_releases", f"payload lists no releases: {error!r}") from error
    if kind != "targets" or "delegations" in document:
        raise TrustError("not_releases", f"payload is a {kind!r}, or delegates; nothing is signed")
    families = {tuple(path.split("/")[:-1]) for path, _ in found}
    if len(families) > 1 or any(len(parts) != 2 or parts[0] != "m" for parts in families):
        raise TrustError("not_releases", f"payload names paths of {sorted(families)}")
    return found


def snapshot_of(versions: Mapping[str, int], version: int, now_s: float) -> Snapshot:
    """A snapshot of the roles in `versions`."""
    meta = {f"{role}.json": MetaFile(number) for role, number in sorted(versions.items())}
    return Snapshot(version=version, expires=expiry(now_s, SNAPSHOT_DAYS), meta=meta)


def timestamp_of(snapshot: int, version: int, now_s: float) -> Timestamp:
    """A timestamp that leads to the snapshot of version `snapshot` and says when it was issued."""
    return Timestamp(
        version=version,
        expires=expiry(now_s, TIMESTAMP_DAYS),
        snapshot_meta=MetaFile(snapshot),
        unrecognized_fields={ISSUED_FIELD: int(now_s)},
    )


def metadata_message(role: str, version: int, data: bytes) -> tuple[str, bytes]:
    """Subject and bytes of a metadata file; only the timestamp's name carries no version."""
    name = f"{role}.json" if role == "timestamp" else f"{version}.{role}.json"
    return subjects.metadata(name), data


def blob_messages(data: bytes) -> list[tuple[str, bytes]]:
    """Subjects and bytes of the chunks of a package or plan."""
    sha256, messages, start = hashlib.sha256(data).hexdigest(), [], 0
    for index, size in enumerate(chunk_sizes(len(data))):
        messages.append((subjects.chunk(sha256, index), data[start : start + size]))
        start += size
    return messages


async def push(bus: Bus, messages: Sequence[tuple[str, bytes]]) -> None:
    """Publish messages, many outstanding; returns when all are stored. Raises: as Bus.publish."""
    for start in range(0, len(messages), _OUTSTANDING):
        window = messages[start : start + _OUTSTANDING]
        await asyncio.gather(*(bus.publish(subject, data) for subject, data in window))


async def look(bus: Bus, root: Root) -> BrokerView:
    """What the broker holds; what does not carry valid signatures counts as absent.

    Raises: TransportError.
    """
    message = await bus.last(subjects.TRUST_STREAM, subjects.metadata("timestamp.json"))
    if message is None:
        return BrokerView(None, {})
    versions: dict[str, int] = {}
    with contextlib.suppress(TrustError):  # devices refuse it, too, so it bounds no next version
        timestamp = opened(Timestamp, message.data, root, "timestamp")
        number = timestamp.snapshot_meta.version
        versions = {"timestamp": timestamp.version, "snapshot": number}
        name = subjects.metadata(f"{number}.snapshot.json")
        found = await bus.last(subjects.TRUST_STREAM, name)
        if found is not None:
            snapshot = opened(Snapshot, found.data, root, "snapshot")
            roles = {key.removesuffix(".json"): e.version for key, e in snapshot.meta.items()}
            versions = roles | versions
    return BrokerView(message.data, versions)


async def forge_release(
    bus: Bus, root: Root, release: ReleaseFile, signers: Sequence[Signs], now_s: float
) -> tuple[str, bytes]:
    """A family's role that holds only `release`, signed by `signers` alone, above the broker's.

    Publishes the package and gives role and file for `publish_below`. For fault injection.
    """
    role = models_role(release.family)
    view = await look(bus, root)
    document = Targets(
        version=view.next(role),
        expires=expiry(now_s, MODELS_DAYS),
        targets=release.targets(),
    )
    for data in release.packages().values():
        await push(bus, blob_messages(data))
    return role, sealed(document, signers)


async def forge_plan(
    bus: Bus, root: Root, plan: Plan, signers: Sequence[Signs], now_s: float
) -> tuple[str, bytes]:
    """A plans role that holds only `plan`, signed by `signers` alone; as `forge_release`."""
    view = await look(bus, root)
    target, data = plan_target(plan)
    document = Targets(
        version=view.next("plans"),
        expires=expiry(now_s, PLANS_DAYS),
        targets={target.path: target},
    )
    await push(bus, blob_messages(data))
    return "plans", sealed(document, signers)


async def publish_below(
    bus: Bus,
    root: Root,
    forged: Mapping[str, bytes],
    *,
    snapshot_signer: Signs,
    timestamp_signer: Signs,
    now_s: float,
) -> None:
    """Publish forged roles below a snapshot and a timestamp that are really signed.

    What a thief of both online keys can do; whether devices believe it is for them to say.
    """
    view = await look(bus, root)
    new = {role: msgspec.json.decode(data)["signed"]["version"] for role, data in forged.items()}
    roles = {key: n for key, n in view.versions.items() if key not in {"timestamp", "snapshot"}}
    number = view.next("snapshot")
    snapshot = sealed(snapshot_of(roles | new, number, now_s), [snapshot_signer])
    stamp = view.next("timestamp")
    timestamp = sealed(timestamp_of(number, stamp, now_s), [timestamp_signer])
    messages = [metadata_message(role, new[role], data) for role, data in forged.items()]
    await push(bus, [*messages, metadata_message("snapshot", number, snapshot)])
    await push(bus, [metadata_message("timestamp", stamp, timestamp)])


def _target(path: str, data: bytes, custom: dict[str, Any] | None) -> TargetFile:
    hashes = {"sha256": hashlib.sha256(data).hexdigest()}
    return TargetFile(len(data), hashes, path, {"custom": custom} if custom else None)

"""The trust rules of a device beyond TUF's: the floor, plans, release counters, trusted time.

Why: TUF's client keeps its rollback state in a cache that may be lost or emptied, and then takes
older signed metadata for new. The floor stands apart from that cache and never goes down.

Invariants: pure; bytes and time in, verdict out. A floor only rises. What a check refuses leaves
everything as it was. The release counter that a floor demands is itself signed (by learner and
gate, in the family's role) and rises on purpose only, so a fleet can go back to an older release
that is still allowed.

Knows nothing about the broker, the disk or python-tuf.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from edge_runtime.errors import TrustError
from edge_runtime.rollout.plan import Plan, model_path

CHUNK_BYTES = 128 * 1024
"""Packages and plans travel in chunks of this size, the last one shorter."""

PLANS_ROLE = "plans"
RELEASE_FLOOR_FIELD = "x-release-floor"
ISSUED_FIELD = "x-issued-at"
FLOOR_VERSION = 1

_ONLINE = ("timestamp", "snapshot")


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """What a device has confirmed, below which it never goes again.

    `versions` holds metadata versions by role, `plan_seq` and `release_counter` are by family,
    `time_s` is the newest signed time of issue.
    """

    version: int = FLOOR_VERSION
    versions: dict[str, int] = {}
    plan_seq: dict[str, int] = {}
    release_counter: dict[str, int] = {}
    time_s: float = 0.0


class _Sealed(msgspec.Struct):
    sha256: str
    floor: msgspec.Raw


def models_role(family: str) -> str:
    """The role that signs the releases of a family, with the learner's and the gate's key."""
    return f"m-{family}"


def chunk_sizes(length: int) -> list[int]:
    """The sizes of the chunks of a file of `length` bytes; an empty file has one empty chunk."""
    full, rest = divmod(length, CHUNK_BYTES)
    return [CHUNK_BYTES] * full + ([rest] if rest or not full else [])


def encode_floor(floor: Floor) -> bytes:
    """The bytes of a floor, sealed with their checksum."""
    body = msgspec.json.encode(floor)
    seal = hashlib.sha256(body).hexdigest()
    return msgspec.json.encode(_Sealed(seal, msgspec.Raw(body)))


def decode_floor(data: bytes) -> Floor:
    """The floor in `data`. Raises: TrustError (floor_unreadable)."""
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        floor = msgspec.json.decode(sealed.floor, type=Floor)
    except (msgspec.DecodeError, ValueError) as error:
        raise _unreadable(f"{len(data)} bytes that are no floor") from error
    if hashlib.sha256(bytes(sealed.floor)).hexdigest() != sealed.sha256:
        raise _unreadable("its checksum differs")
    if floor.version != FLOOR_VERSION:
        raise _unreadable(f"version {floor.version}; this reads {FLOOR_VERSION}")
    return floor


def merge_floors(one: Floor, other: Floor) -> Floor:
    """The higher of two floors in every part."""
    return Floor(
        versions=_higher(one.versions, other.versions),
        plan_seq=_higher(one.plan_seq, other.plan_seq),
        release_counter=_higher(one.release_counter, other.release_counter),
        time_s=max(one.time_s, other.time_s),
    )


def confirmed(
    floor: Floor, plan: Plan, versions: dict[str, int], release_floor: int, issued_s: float
) -> Floor:
    """The floor after `plan` serves, under metadata of these versions.

    A newer root may have changed the online keys, so it resets the versions of timestamp and
    snapshot (TUF 5.3.11).
    """
    kept = dict(floor.versions)
    if versions["root"] > kept.get("root", 0):
        kept = {role: version for role, version in kept.items() if role not in _ONLINE}
    return Floor(
        versions=_higher(kept, versions),
        plan_seq=_higher(floor.plan_seq, {plan.family: plan.seq}),
        release_counter=_higher(floor.release_counter, {plan.family: release_floor}),
        time_s=max(floor.time_s, issued_s),
    )


def trusted_time_s(floor: Floor, now_s: float) -> float:
    """The time to judge expiry by: a clock that was set back counts as the newest signed time."""
    return max(now_s, floor.time_s)


def check_versions(floor: Floor, versions: dict[str, int]) -> None:
    """Refuse metadata below the floor, whatever a cache says.

    Raises: TrustError (metadata_rolled_back).
    """
    rotated = versions["root"] > floor.versions.get("root", 0)
    for role, lowest in floor.versions.items():
        if rotated and role in _ONLINE:
            continue
        if versions.get(role, 0) < lowest:
            raise TrustError(
                "metadata_rolled_back",
                f"{role} version {versions.get(role, 0)} is below the confirmed {lowest}",
                "an older copy of the metadata is being served; check the broker's store",
            )


def check_plan(floor: Floor, family: str, plan: Plan) -> None:
    """Refuse a plan that is old, or not about `family` and its releases alone.

    Raises: TrustError (plan_of_other_family, plan_rolled_back).
    """
    if plan.family != family:
        raise TrustError(
            "plan_of_other_family", f"the plan of {family!r} is about {plan.family!r}; kept the old"
        )
    for arm in plan.arms:
        if arm.path != model_path(family, arm.release):
            raise TrustError(
                "plan_of_other_family", f"plan {plan.seq} of {family!r} names {arm.path!r}"
            )
    lowest = floor.plan_seq.get(family, 0)
    if plan.seq < lowest:
        raise TrustError(
            "plan_rolled_back", f"plan {plan.seq} of {family!r} is below the confirmed {lowest}"
        )


def is_passed(custom: Mapping[str, Any] | None) -> bool:
    """Whether the signed facts of a release hold its gate's verdict: outcome, rules and hash."""
    verdict = (custom or {}).get("verdict")
    if not isinstance(verdict, dict) or verdict.get("outcome") != "pass":
        return False
    return isinstance(verdict.get("rules"), list) and isinstance(verdict.get("sha256"), str)


def check_release(
    floor: Floor, family: str, counter: int, *, release_floor: int = 0, quarantined: bool = False
) -> None:
    """Refuse a release that is below the signed or the confirmed floor, or that failed here.

    Raises: TrustError (release_below_floor, release_quarantined).
    """
    lowest = max(floor.release_counter.get(family, 0), release_floor)
    if counter < lowest:
        raise TrustError(
            "release_below_floor", f"release counter {counter} of {family!r} is below {lowest}"
        )
    if quarantined:
        raise TrustError(
            "release_quarantined",
            f"a release of {family!r} (counter {counter}) failed on this device before",
            "publish a mended release; this one is not tried again here",
        )


def _higher(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in one | other}


def _unreadable(what: str) -> TrustError:
    return TrustError(
        "floor_unreadable", f"floor: {what}; nothing is installed", "enrol the device anew"
    )

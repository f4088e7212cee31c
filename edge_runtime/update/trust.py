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
from edge_runtime.rollout.plan import NUMBER_MAX, SHA256, Plan, model_path

CHUNK_BYTES = 128 * 1024
"""Packages and plans travel in chunks of this size, the last one shorter."""

PLANS_ROLE = "plans"
TIME_ROLE = "time"
RELEASE_FLOOR_FIELD = "x-release-floor"
ISSUED_FIELD = "x-issued-at"
FLOOR_VERSION = 1
NONCE_BYTES = 16
SKEW_S = 300.0
"""How far a clock may be behind a signed time before it counts as wrong."""
STALE_S = 18 * 3600.0
"""Metadata is signed afresh every half day: what was issued longer ago is being held back."""
PLAN_BYTES_MAX = 1 << 20
"""No plan is longer: who holds the key of plans alone must not fill a device's memory."""
TIME_KEPT_S = 3600.0
"""By how much the signed time must rise before it is stored again: flash wears out."""

ONLINE = ("timestamp", "snapshot")
"""The roles whose keys are online; whoever steals them can raise every version that they name.
New keys for them undo whatever number a thief ran out of reach, also one of a plan or a release."""


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """What a device has confirmed, below which it never goes again.

    `versions` holds metadata versions by role, `plan_seq` and `release_counter` are by family,
    `time_s` is the newest signed time of issue, `online` the ids of the keys that vouched for the
    versions. The time alone rises without a confirmation; and it is never the device's own clock,
    which might be years ahead and would shut the device out for as long.
    """

    version: int = FLOOR_VERSION
    versions: dict[str, int] = {}
    plan_seq: dict[str, int] = {}
    release_counter: dict[str, int] = {}
    time_s: float = 0.0
    online: str = ""


class Freshness(msgspec.Struct, frozen=True):
    """How far the metadata of a device is: for its report, its status and the alarm.

    `floor` holds the confirmed versions of root and timestamp, `issued_s` is when the newest
    metadata that was believed was signed; `stale`: that was too long ago when it arrived.
    """

    floor: tuple[int, int] = (0, 0)
    issued_s: float = 0.0
    stale: bool = False


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
    """The higher of two floors in every part, as far as the older one binds."""
    older, newer = sorted((one, other), key=lambda each: each.versions.get("root", 0))
    older = binding(older, newer.versions, newer.online)
    return Floor(
        versions=_higher(older.versions, newer.versions),
        plan_seq=_higher(older.plan_seq, newer.plan_seq),
        release_counter=_higher(older.release_counter, newer.release_counter),
        time_s=max(one.time_s, other.time_s),
        online=newer.online,
    )


def confirmed(floor: Floor, versions: dict[str, int], online: str, issued_s: float) -> Floor:
    """The floor after metadata of these versions was proven, under the `online` keys."""
    floor = binding(floor, versions, online)
    return msgspec.structs.replace(
        floor,
        versions=_higher(floor.versions, versions),
        time_s=max(floor.time_s, issued_s),
        online=online,
    )


def planned(floor: Floor, plan: Plan, release_floor: int) -> Floor:
    """The floor after `plan` serves, where the family's signed floor is `release_floor`."""
    return msgspec.structs.replace(
        floor,
        plan_seq=_higher(floor.plan_seq, {plan.family: plan.seq}),
        release_counter=_higher(floor.release_counter, {plan.family: release_floor}),
    )


def seen(floor: Floor, signed_s: float) -> Floor:
    """The floor after a signed time was seen; the same one where it would rise only a little."""
    if signed_s < floor.time_s + TIME_KEPT_S:
        return floor
    return msgspec.structs.replace(floor, time_s=signed_s)


def lowest_time_s(floor: Floor, root_issued_s: float) -> float:
    """It cannot be earlier: the newest signed time, or the issue of the root the device got."""
    return max(floor.time_s, root_issued_s)


def is_behind(now_s: float, signed_s: float) -> bool:
    """Whether a clock that says `now_s` is wrong, for this much was signed already."""
    return now_s < signed_s - SKEW_S


def check_issued(issued_s: float, now_s: float) -> None:
    """Refuse metadata from the future, `now_s` being a signed time.

    Raises: TrustError (issued_ahead).
    """
    if is_behind(now_s, issued_s):
        raise TrustError(
            "issued_ahead",
            f"the metadata was issued {issued_s - now_s:.0f} s from now; nothing is installed",
            "the clock where it is signed is wrong, or the timestamp key is stolen",
        )


def time_payload(nonce: bytes, time_s: float) -> bytes:
    """What the time key signs."""
    return b"headwater-time-1|" + nonce + b"|" + str(round(time_s * 1000)).encode()


def binding(floor: Floor, versions: dict[str, int], online: str) -> Floor:
    """What still binds: of what other online keys vouched for, the root's version and the time.

    So a thief who ran a number out of reach is undone by new keys (TUF 5.3.11): a version, a plan's
    or the release counter's, which the newest metadata demand again where they are genuine. A floor
    of before keys were noted counts as of other keys once the root is newer.
    """
    root = floor.versions.get("root", 0)
    if versions.get("root", 0) > root and online != floor.online:
        return Floor(versions={"root": root}, time_s=floor.time_s, online=floor.online)
    return floor


def check_versions(floor: Floor, versions: dict[str, int], online: str) -> None:
    """Refuse metadata below the floor, whatever a cache says.

    Raises: TrustError (metadata_rolled_back, bad_metadata: a version that no report can carry).
    """
    highest = max(versions.values(), default=0)
    if highest > NUMBER_MAX:
        raise TrustError(
            "bad_metadata",
            f"a version is {highest:.17g}, above {NUMBER_MAX}; what runs is unchanged",
            "the snapshot or timestamp key is stolen: tools/key-ceremony revoke snapshot timestamp",
        )
    for role, lowest in binding(floor, versions, online).versions.items():
        if versions.get(role, 0) < lowest:
            raise TrustError(
                "metadata_rolled_back",
                f"{role} version {versions.get(role, 0)} is below the confirmed {lowest}",
                "an older copy of the metadata is being served; check the broker's store",
            )


def check_plan_file(sha256: str, length: int) -> None:
    """Refuse a plan by its signed entry, before it is fetched. Raises: TrustError (bad_plan)."""
    if not SHA256.fullmatch(sha256) or length > PLAN_BYTES_MAX:
        raise TrustError(
            "bad_plan",
            f"the entry of a plan has no sha256, or more than {PLAN_BYTES_MAX} bytes; kept the old",
            "the rollout key signed what no publisher makes: tools/key-ceremony revoke rollout",
        )


def check_plan(floor: Floor, family: str, plan: Plan) -> None:
    """Refuse a plan that is old, or not about `family` and its releases alone.

    `floor` is what still binds. Raises: TrustError (plan_of_other_family, plan_rolled_back).
    """
    if plan.family != family:
        raise TrustError(
            "plan_of_other_family", f"the plan of {family!r} is about {plan.family!r}; kept the old"
        )
    for arm in plan.named:
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
    return TrustError("floor_unreadable", f"floor: {what}")

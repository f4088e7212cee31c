"""The plan of a family: which releases run, on which devices, and with what share of the answers.

Why: one signed document for the whole fleet, which every device reads in the same way; who gets
what is decided by the plan and the device's attributes alone, with no state and no network.

Invariants: the same plan, attributes, epoch and sequence number give the same arm everywhere and
always; the stable arm is always first and its weight is positive. A canary of weight zero is
resident and scored, but never answers.

Knows nothing about signatures, disks or models.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence

import msgspec

from edge_runtime.errors import TrustError

PLAN_VERSION = 1
SEQ_MAX = (1 << 53) - 1
"""The largest number of a plan: what every language's numbers hold exactly."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Variant(msgspec.Struct, frozen=True):
    """One of the packages of a release: `path` is its name in the signed metadata."""

    name: str
    path: str
    sha256: str


class PlanArm(msgspec.Struct, frozen=True):
    """One release of a plan.

    `path` is the name of the package in the signed metadata, `sha256` its content in hex, `counter`
    its release counter, `weight` its share of the answers relative to the other arm's. `variants`
    is empty where the release has one package; else it lists all of them, that one first.
    """

    release: str
    path: str
    sha256: str
    counter: int
    weight: float
    variants: tuple[Variant, ...] = ()

    @property
    def packages(self) -> tuple[Variant, ...]:
        """What a device may load for this arm, the default first; a single package has no name."""
        return self.variants or (Variant("", self.path, self.sha256),)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a family's devices shall run; `seq` rises by one with every plan of the family.

    `selector` holds the attributes that a device must have to get the canary (empty: every
    device). `reason` is the code of the decision behind the plan, `note` is for people.
    """

    version: int = PLAN_VERSION
    family: str
    seq: int
    stable: PlanArm
    canary: PlanArm | None = None
    selector: dict[str, str] = {}
    salt: str = ""
    reason: str = ""
    note: str = ""

    @property
    def arms(self) -> list[PlanArm]:
        """The arms of the plan, the stable one first."""
        return [self.stable] if self.canary is None else [self.stable, self.canary]


_decoder = msgspec.json.Decoder(Plan)


def model_path(family: str, release: str, variant: str = "") -> str:
    """The name that a package has in the signed metadata; the default variant's names none."""
    return f"m/{family}/{release}.{variant}.onnx" if variant else f"m/{family}/{release}.onnx"


def plan_path(family: str) -> str:
    """The name that a family's plan has in the signed metadata."""
    return f"p/{family}.json"


def encode_plan(plan: Plan) -> bytes:
    """The bytes of a plan: JSON, keys in order of declaration. Raises: TrustError (bad_plan)."""
    _check(plan)
    return msgspec.json.encode(plan)


def decode_plan(data: bytes) -> Plan:
    """The plan in `data`. Raises: TrustError (bad_plan, unknown_plan_version)."""
    try:
        plan = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise TrustError("bad_plan", f"plan of {len(data)} bytes is not valid: {error}") from error
    _check(plan)
    return plan


def arms_for(plan: Plan, attributes: Mapping[str, str]) -> list[tuple[str, PlanArm]]:
    """The arms that a device with these attributes runs, by name, the stable one first."""
    arms = [("stable", plan.stable)]
    if plan.canary is not None and _selected(plan.selector, attributes):
        arms.append(("canary", plan.canary))
    return arms


def choose(weights: Sequence[float], salt: str, epoch: int, seq: int) -> int:
    """The index of the arm that answers prediction (`epoch`, `seq`), drawn in proportion.

    A device mixes its own name into `salt`, so that devices draw independently of each other.
    """
    if len(weights) == 1:
        return 0
    point = draw(salt, epoch, seq) * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(range(len(weights)), key=weights.__getitem__)


def draw(salt: str, epoch: int, seq: int) -> float:
    """A number in [0, 1) that looks random and is a function of its arguments."""
    digest = hashlib.sha256(f"{salt}|{epoch}|{seq}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def propensity(weights: Sequence[float], index: int) -> float:
    """The probability with which `choose` picks `index`."""
    return weights[index] / sum(weights)


def _selected(selector: Mapping[str, str], attributes: Mapping[str, str]) -> bool:
    return all(attributes.get(key) == value for key, value in selector.items())


def _check(plan: Plan) -> None:
    if plan.version != PLAN_VERSION:
        raise TrustError(
            "unknown_plan_version", f"plan has version {plan.version}; this reads {PLAN_VERSION}"
        )
    if not _NAME.fullmatch(plan.family) or not 1 <= plan.seq <= SEQ_MAX:
        raise _bad(plan, "family or seq is out of range")
    for arm in plan.arms:
        _check_arm(plan, arm)
    if plan.stable.weight <= 0:
        raise _bad(plan, "the stable arm must have a positive weight")


def _check_arm(plan: Plan, arm: PlanArm) -> None:
    if not _NAME.fullmatch(arm.release):
        raise _bad(plan, f"release {arm.release!r} is not a name")
    if not _SHA256.fullmatch(arm.sha256):
        raise _bad(plan, f"sha256 of {arm.release} is not 64 hex digits")
    if not (math.isfinite(arm.weight) and arm.weight >= 0):
        raise _bad(plan, f"weight of {arm.release} is {arm.weight}")
    if arm.counter < 0:
        raise _bad(plan, f"counter of {arm.release} is {arm.counter}")
    if arm.variants:
        _check_variants(plan, arm)


def _check_variants(plan: Plan, arm: PlanArm) -> None:
    default, *others = arm.variants
    if (default.path, default.sha256) != (arm.path, arm.sha256):
        raise _bad(plan, f"the first variant of {arm.release} is not its own package")
    for each in others:
        if each.path != model_path(plan.family, arm.release, each.name):
            raise _bad(plan, f"{each.path!r} is no variant of {arm.release}")
        if not _SHA256.fullmatch(each.sha256):
            raise _bad(plan, f"sha256 of {each.path} is not 64 hex digits")
    if not all(_NAME.fullmatch(each.name) for each in arm.variants):
        raise _bad(plan, f"a variant of {arm.release} has no proper name")
    if len({each.name for each in arm.variants}) < len(arm.variants):
        raise _bad(plan, f"two variants of {arm.release} have the same name")


def _bad(plan: Plan, what: str) -> TrustError:
    return TrustError("bad_plan", f"plan {plan.seq} of {plan.family!r}: {what}")

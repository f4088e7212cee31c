"""The plan of a family: which releases run, on which devices, and with what share of the answers.

Why: one signed document for the whole fleet, which every device reads in the same way; who gets
what is decided by the plan, the device's name and its attributes alone, with no state and no
network.

Invariants: the same plan, device, attributes, epoch and sequence number give the same arm on every
machine and always; the stable arm is always first and its weight is positive. While a trial lasts
its salt stays, so a higher percentage only adds devices and a lower one only removes them. A canary
of weight zero is resident and scored, but never answers; nor does a shadow.

Knows nothing about signatures, disks or models.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import msgspec

from edge_runtime.errors import TrustError

PLAN_VERSION = 2
"""Version 1, without stages, is read too; what reads version 1 alone refuses this one."""

NUMBER_MAX = (1 << 53) - 1
"""The highest version, seq and counter: what the numbers of every language hold exactly."""

SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Variant(msgspec.Struct, frozen=True):
    """One of the packages of a release: `path` is its name in the signed metadata."""

    name: str
    path: str
    sha256: str


class PlanArm(msgspec.Struct, frozen=True):
    """One release of a plan.

    `path` is the name of the package in the signed metadata, `sha256` its content in hex, `counter`
    its release counter, `weight` its share of the answers relative to the other arms'. `variants`
    is empty where the release has one package; else it lists all of them, that one first. A
    `shadow` is scored beside what answers, in idle time, and never answers.
    """

    release: str
    path: str
    sha256: str
    counter: int
    weight: float
    variants: tuple[Variant, ...] = ()
    mode: Literal["live", "shadow"] = "live"

    @property
    def packages(self) -> tuple[Variant, ...]:
        """What a device may load for this arm, the default first; a single package has no name."""
        return self.variants or (Variant("", self.path, self.sha256),)


class Stage(msgspec.Struct, frozen=True):
    """From plan `seq` on, published at `began_s` (wall time), so many percent of devices tried."""

    seq: int
    percent: float
    began_s: float


class Window(msgspec.Struct, frozen=True):
    """When a device may change what runs: minutes of the day, UTC; may go past midnight."""

    from_min: int
    to_min: int


class LocalGates(msgspec.Struct, frozen=True):
    """When a device leaves a release on trial by itself, at once and without a network.

    After `failures` requests in a row that it could not answer, when its runs take `slowdown` times
    what the stable release's take, or when loading it adds more than `memory_mb` to the process;
    0 turns a gate off.
    """

    failures: int = 3
    slowdown: float = 20.0
    memory_mb: float = 0.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a family's devices shall run; `seq` rises by one with every plan of the family.

    On trial are the `canary` and, where several releases compete, `others`: on devices that have
    the attributes of `selector` (empty: every device) and whose bucket under `salt` lies below the
    percentage of the last of `stages`. These are the history of the trial; after a promotion they
    tell how the stable release came there. `pins` names the one release that a device runs, of
    those in the plan; what stands in `hold` changes nothing. Changes wait for the `window`, and for
    a share of `jitter_s` that differs from device to device. After `not_after_s` (wall time, 0:
    never) no device tries anything any more. `fallback` is what a device goes to when its stable
    release fails there; None: what ran before. `reason` is the code of the decision behind the
    plan, `note` is for people.
    """

    version: int = PLAN_VERSION
    family: str
    seq: int
    stable: PlanArm
    canary: PlanArm | None = None
    others: tuple[PlanArm, ...] = ()
    selector: dict[str, str] = {}
    salt: str = ""
    stages: tuple[Stage, ...] = ()
    window: Window | None = None
    jitter_s: float = 0.0
    not_after_s: float = 0.0
    gates: LocalGates = LocalGates()
    fallback: PlanArm | None = None
    hold: tuple[str, ...] = ()
    pins: dict[str, str] = {}
    reason: str = ""
    note: str = ""

    @property
    def arms(self) -> list[PlanArm]:
        """The arms of the plan, the stable one first."""
        return [self.stable, *self.trials]

    @property
    def trials(self) -> list[PlanArm]:
        """The arms on trial, the canary first."""
        return [] if self.canary is None else [self.canary, *self.others]

    @property
    def named(self) -> list[PlanArm]:
        """All releases that the plan speaks of: its arms, and what they fall back to."""
        return [*self.arms, self.fallback] if self.fallback else self.arms

    @property
    def raised(self) -> list[PlanArm]:
        """The releases that the plan is about: those on trial or, with none, the stable one."""
        return self.trials or [self.stable]

    @property
    def reach(self) -> float:
        """How many percent of the devices these come to."""
        return self.percent if self.trials else 100.0

    @property
    def percent(self) -> float:
        """How many percent of the selected devices try what is on trial."""
        return self.stages[-1].percent if self.stages else 100.0


_decoder = msgspec.json.Decoder(Plan)


def model_path(family: str, release: str, variant: str = "") -> str:
    """The name that a package has in the signed metadata; the default variant's names none."""
    return f"m/{family}/{release}.{variant}.onnx" if variant else f"m/{family}/{release}.onnx"


def plan_path(family: str) -> str:
    """The name that a family's plan has in the signed metadata."""
    return f"p/{family}.json"


def encode_plan(plan: Plan) -> bytes:
    """The bytes of a plan: JSON, keys in order of declaration; equal plans have the same.

    Raises: TrustError (bad_plan).
    """
    _check(plan)
    return msgspec.json.encode(_decoder.decode(msgspec.json.encode(plan)))  # 1 is written as 1.0


def decode_plan(data: bytes) -> Plan:
    """The plan in `data`. Raises: TrustError (bad_plan, unknown_plan_version)."""
    try:
        plan = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise TrustError("bad_plan", f"plan of {len(data)} bytes is not valid: {error}") from error
    _check(plan)
    return plan


def arms_for(plan: Plan, device: str, attributes: Mapping[str, str]) -> list[tuple[str, PlanArm]]:
    """The arms that `device` with these attributes runs, by name, the stable one first."""
    arms = [("stable", plan.stable)]
    if (pinned := plan.pins.get(device)) is not None:
        return [("stable", arm) for arm in plan.arms if arm.release == pinned] or arms
    if _selected(plan.selector, attributes) and bucket(plan.salt, device) < plan.percent / 100:
        names = ["canary", *(f"trial{number}" for number in range(2, len(plan.others) + 2))]
        arms += zip(names, plan.trials, strict=False)
    return arms


def bucket(salt: str, device: str) -> float:
    """Where a device stands under `salt`, in [0, 1): a trial is on those below its percentage."""
    return _uniform(f"{salt}|{device}")


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
    return _uniform(f"{salt}|{epoch}|{seq}")


def propensity(weights: Sequence[float], index: int) -> float:
    """The probability with which `choose` picks `index`."""
    return weights[index] / sum(weights)


def _uniform(text: str) -> float:
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def _selected(selector: Mapping[str, str], attributes: Mapping[str, str]) -> bool:
    return all(attributes.get(key) == value for key, value in selector.items())


def _check(plan: Plan) -> None:
    if not 1 <= plan.version <= PLAN_VERSION:
        raise TrustError(
            "unknown_plan_version", f"plan has version {plan.version}; this reads {PLAN_VERSION}"
        )
    if not _NAME.fullmatch(plan.family) or not 1 <= plan.seq <= NUMBER_MAX:
        raise _bad(plan, "family or seq is out of range")
    for arm in plan.named:
        _check_arm(plan, arm)
    if plan.stable.weight <= 0 or plan.stable.mode != "live":
        raise _bad(plan, "the stable arm must be live and have a positive weight")
    if plan.others and plan.canary is None:
        raise _bad(plan, "others are on trial, but no canary")
    _check_course(plan)


def _check_arm(plan: Plan, arm: PlanArm) -> None:
    if not _NAME.fullmatch(arm.release):
        raise _bad(plan, f"release {arm.release!r} is not a name")
    if not SHA256.fullmatch(arm.sha256):
        raise _bad(plan, f"sha256 of {arm.release} is not 64 hex digits")
    if not (math.isfinite(arm.weight) and arm.weight >= 0):
        raise _bad(plan, f"weight of {arm.release} is {arm.weight}")
    if not 0 <= arm.counter <= NUMBER_MAX:
        raise _bad(plan, f"counter of {arm.release} is {arm.counter}")
    if arm.variants:
        _check_variants(plan, arm)


def _check_course(plan: Plan) -> None:
    if not all(0 <= each.percent <= 100 and 1 <= each.seq <= plan.seq for each in plan.stages):
        raise _bad(plan, "a stage is not within 0 and 100 percent, or is of a later plan")
    if not all(one.seq < other.seq for one, other in pairwise(plan.stages)):
        raise _bad(plan, "its stages do not follow each other")
    times = (plan.jitter_s, plan.not_after_s, plan.gates.slowdown, plan.gates.memory_mb)
    if not all(math.isfinite(each) and each >= 0 for each in times) or plan.gates.failures < 0:
        raise _bad(plan, "a time or a local gate is negative or no number")
    window = plan.window
    if window is not None and not (0 <= window.from_min < 1440 and 0 <= window.to_min < 1440):
        raise _bad(plan, "its window is not within the minutes of a day")


def _check_variants(plan: Plan, arm: PlanArm) -> None:
    default, *others = arm.variants
    if (default.path, default.sha256) != (arm.path, arm.sha256):
        raise _bad(plan, f"the first variant of {arm.release} is not its own package")
    for each in others:
        if each.path != model_path(plan.family, arm.release, each.name):
            raise _bad(plan, f"{each.path!r} is no variant of {arm.release}")
        if not SHA256.fullmatch(each.sha256):
            raise _bad(plan, f"sha256 of {each.path} is not 64 hex digits")
    if not all(_NAME.fullmatch(each.name) for each in arm.variants):
        raise _bad(plan, f"a variant of {arm.release} has no proper name")
    if len({each.name for each in arm.variants}) < len(arm.variants):
        raise _bad(plan, f"two variants of {arm.release} have the same name")


def _bad(plan: Plan, what: str) -> TrustError:
    return TrustError("bad_plan", f"plan {plan.seq} of {plan.family!r}: {what}")

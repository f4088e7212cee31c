"""Approvals: when a plan needs the gate's signature too, and whether it carries one.

Why: one key signs plans, by itself and all day. A bug of its holder, such as 1 % and then 100, must
not reach every device at once; so each device says how large a step it takes without a second yes.

Rules: a plan's history begins at 0 %; where the release that is new here is the stable one, it ends
at 100. A plan without stages goes from 0 to 100. Each rise in it is held against the device's own
limit, whoever was on the way there before. What goes back to lower counters needs nobody's yes, and
a device that runs nothing yet has nothing to lose.

Invariants: pure; bytes in, verdict out. A history that is approved is still held against what this
device has seen.

Knows nothing about who approves, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec
from securesystemslib.signer import Signature  # type: ignore[attr-defined] # no __all__
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Targets  # type: ignore[attr-defined] # no __all__

from edge_runtime.errors import TrustError
from edge_runtime.rollout.plan import Plan, PlanArm

APPROVALS_ROLE = "approvals"
FIELD = "approval"
"""The field of a plan's target, in the signed metadata, that holds its approval."""

_CONTEXT = b"headwater-approval-1|"


class Approval(msgspec.Struct, frozen=True):
    """The signature, in hex, of the key `keyid` of the role `approvals` over a plan's payload."""

    keyid: str
    sig: str


def payload(plan: bytes) -> bytes:
    """What is signed to approve a plan with these bytes."""
    return _CONTEXT + plan


def is_approved(targets: Targets, plan: bytes, custom: Mapping[str, Any] | None) -> bool:
    """Whether the signed facts of a plan with these bytes hold an approval by who may give one."""
    try:
        found = msgspec.convert((custom or {}).get(FIELD), Approval)
        signatures = {found.keyid: Signature(found.keyid, found.sig)}
        targets.verify_delegate(APPROVALS_ROLE, payload(plan), signatures)
    except (msgspec.ValidationError, UnsignedMetadataError, ValueError):  # or there is no such role
        return False
    return True


def check_history(plan: Plan, seen: Plan) -> None:
    """Refuse a plan for more than now whose stages contradict those of `seen`, followed before.

    A trial goes on from the stages that were seen; another one has all its stages after them.

    Raises: TrustError (history_rewritten).
    """
    if not plan.trials and plan.stable.counter <= seen.stable.counter:
        return  # nothing comes of it but what is there already
    if plan.seq < seen.seq:
        return  # numbers begin anew under new online keys: `seen` was a thief's
    seq = seen.seq if seen.stable.counter else 0  # a factory package's plan was never published
    known = plan.stages[: len(seen.stages)] == seen.stages
    if known or plan.salt != seen.salt:
        new = plan.stages[len(seen.stages) :] if known else plan.stages
        if all(stage.seq > seq for stage in new):
            return
    raise TrustError(
        "history_rewritten",
        f"the stages of plan {plan.seq} of {plan.family!r} are not those that this device saw up to"
        f" plan {seq}; it is not followed",
        "a trial keeps its salt and its stages; what else they say was not written by the campaign",
    )


def is_jump(plan: Plan, shall: Sequence[PlanArm], has: Sequence[PlanArm], step_max: float) -> bool:
    """Whether `plan`, by which a device shall run `shall`, brings it more than it `has` in a step
    of more than `step_max` percentage points. The stable release stands first in both.
    """
    newest = max(shall, key=lambda arm: arm.counter)
    if not has or newest.counter <= max(arm.counter for arm in has):
        return False
    percents = [0.0, *(stage.percent for stage in plan.stages)]
    if newest is shall[0] or not plan.stages:
        percents.append(100.0)
    return any(after - before > step_max for before, after in pairwise(percents))


def unapproved(plan: Plan, step_max: float) -> TrustError:
    """The refusal of a plan that jumps and is not approved."""
    steps = " ".join(f"{stage.percent:g}" for stage in plan.stages) or "none"
    return TrustError(
        "unapproved_jump",
        f"plan {plan.seq} of {plan.family!r} (stages: {steps}) rises by more than this device's"
        f" step_max of {step_max:g} points, and the gate has not approved it; what runs goes on",
        "cloud-learner signs an approval for an operator's order; or raise [rollout] step_max",
    )

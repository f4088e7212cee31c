"""Approvals of plans that take too large a step for some devices: by the gate, for an operator.

Why: the campaign's key alone must not bring a release from one device in a hundred to all of them.
Whoever wants that says so by an order of their own, and the gate, in another trust domain, signs
the very plan.

Invariants: the gate approves a plan only for an order that a known operator signed, that names the
family, each release that the plan tries (or, where it tries none, its stable one) and at least the
plan's percentage; and only releases that this gate passed. An order is no plan: without a plan by
the campaign's key nothing comes of it.

Knows nothing about campaigns and devices. Implements proto/asyncapi.yaml (gateApprove).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cloud_learner import orders
from cloud_learner.orders import Consent, Order
from edge_runtime.errors import RequestError, TrustError
from edge_runtime.rollout.plan import Plan, decode_plan
from edge_runtime.update.approval import Approval, payload

__all__ = ["Approval", "Signs", "approve", "payload"]


class Signs(Protocol):
    """What signs with the gate's key."""

    def sign(self, payload: bytes) -> Any:
        """A signature with its `keyid` and `signature`, in hex."""


def approve(
    plan: bytes, order: Order, operators: Path, passed: Callable[[str], bool], signer: Signs
) -> Approval:
    """The approval of the plan with these bytes; `passed` says of a package that the gate did it.

    Raises: RequestError (bad_plan, not_approved, and as `orders.checked`).
    """
    consent = orders.checked(order, operators, Consent)
    found = read(plan)
    _check(found, consent)
    for arm in found.raised:
        if not all(passed(package.sha256) for package in arm.packages):
            raise _refused(found, f"this gate has not passed {arm.release}")
    signature = signer.sign(payload(plan))
    return Approval(signature.keyid, signature.signature)


def read(plan: bytes) -> Plan:
    """The plan in what is to be approved. Raises: RequestError (bad_plan)."""
    try:
        return decode_plan(plan)
    except TrustError as error:
        raise RequestError("bad_plan", f"{error.message}; nothing was approved") from error


def _check(plan: Plan, consent: Consent) -> None:
    if plan.family != consent.family:
        raise _refused(plan, f"the order is about {consent.family!r}")
    for arm in plan.raised:
        if arm.sha256 not in consent.packages:
            raise _refused(plan, f"the order does not name {arm.release} ({arm.sha256[:12]})")
    if not plan.reach <= consent.percent:
        raise _refused(
            plan, f"the order is for {consent.percent:g} %, the plan for {plan.reach:g} %"
        )


def _refused(plan: Plan, why: str) -> RequestError:
    return RequestError(
        "not_approved",
        f"plan {plan.seq} of {plan.family!r} is not approved: {why}",
        "sign an order that names the family, the release's hash and the percentage",
    )

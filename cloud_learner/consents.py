"""Consents: the plan of now, shown to an operator, and approved by the gate if they say yes to it.

Why: a plan that takes too large a step for careful devices is published like any other, and refused
there; whoever stands behind it reads it, signs, and it is published again with the gate's approval.

Invariants: the gate checks the order, not this process. What is approved is the plan that is
published now, byte by byte. Nothing else is changed by it.

Knows nothing about campaigns. Implements proto/asyncapi.yaml (approve).
"""

from __future__ import annotations

from collections.abc import Mapping

from cloud_learner.asking import Asker
from cloud_learner.judging import GateDoor
from cloud_learner.orders import Order
from cloud_learner.packed import decoded, encoded
from cloud_learner.publisher import Publisher
from edge_runtime.bus.base import Bus, Message
from edge_runtime.errors import RequestError
from edge_runtime.rollout.plan import Plan, decode_plan, encode_plan
from edge_runtime.wire import subjects

ANSWER_S = 60.0


class Consents:
    """Answers operators about the plans of `publisher`; `doors` lead to each family's gate."""

    def __init__(self, publisher: Publisher, doors: Mapping[str, GateDoor]) -> None:
        self._publisher, self._doors = publisher, doors

    async def work(self, message: Message, body: bytes) -> bytes:
        """What an Answerer does: the plan, approved where `body` is an order.

        Raises: RequestError (no_plan, and as the door), TransportError.
        """
        family = message.subject.split(".")[-1]
        plan, door = self._publisher.plan(family), self._doors.get(family)
        if plan is None or door is None:
            raise RequestError("no_plan", f"no plan is published for {family!r:.70}")
        data = encode_plan(plan)
        if body:
            approval = await door.approve(data, decoded(body, Order))
            await self._publisher.publish(plan=plan, approval=approval)
        return data


async def shown(bus: Bus, family: str) -> Plan:
    """The family's plan of now. Raises: RequestError, TransportError."""
    return await _asked(bus, family, b"")


async def consented(bus: Bus, family: str, order: Order) -> Plan:
    """The plan that was approved for `order`. Raises: RequestError (refused), TransportError."""
    return await _asked(bus, family, encoded(order))


async def _asked(bus: Bus, family: str, body: bytes) -> Plan:
    asker = Asker(bus)
    try:
        return decode_plan(await asker.ask(subjects.approve(family), body, wait_s=ANSWER_S))
    finally:
        await asker.close()

"""Core subscriptions survive a reconnect, whoever leaves meanwhile."""

from __future__ import annotations

import asyncio

from edge_runtime.bus.nats import NatsBus


class Link:
    """A connection on which somebody unsubscribes while the first is being subscribed."""

    def __init__(self):
        self.leaves = []
        self.subjects = []

    async def listen(self, subject, _callback, _unheard_max):
        self.subjects.append(subject)
        while self.leaves:
            await self.leaves.pop().close()
        return subject

    async def silence(self, subject):
        self.subjects.remove(subject)


async def reconnected(leaver):
    bus = NatsBus("nats://127.0.0.1:1", "test")
    listeners = [await bus.subscribe(subject, print) for subject in "abc"]
    link = Link()
    link.leaves.append(listeners[leaver])
    await bus._attach(link)
    return link.subjects


def test_one_that_leaves_while_all_are_attached_again_costs_no_other_its_place():
    assert asyncio.run(reconnected(0)) == ["b", "c"]


def test_one_that_left_before_its_turn_is_not_attached():
    assert asyncio.run(reconnected(1)) == ["a", "c"]

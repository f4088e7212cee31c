"""What a controller computes for a whole fleet: a report of each device, labels, the decision.

Why: one process decides for all devices; what a device costs it bounds the fleet.

Invariants: the rooms that serve, in their order: signature and freshness of each report, the
campaign with its journal, the state on disk, the plan as bytes. Time is that of the processor, of
all threads, and only of what happens once devices have spoken.

Knows nothing about brokers.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cloud_learner.controller import Controller
from cloud_learner.floors import Floors
from cloud_learner.reports import Reports
from cloud_learner.rollout.state import Offer, Rules
from cloud_learner.simulate.crowd import FAMILY
from cloud_learner.simulate.crowd_trial import offer
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from edge_runtime.bus.base import Message
from edge_runtime.bus.nkey import Key
from edge_runtime.clock import ManualClock
from edge_runtime.rollout.plan import Plan, encode_plan
from edge_runtime.wire import codec, subjects
from edge_runtime.wire.messages import WIRE_VERSION, ArmReport, Report, Scored

REQUESTS, FAILS = 20, 10  # since a device's last report; one of so many devices failed once


class Cost(msgspec.Struct, frozen=True):
    """Seconds of the processor: for reports and labels up to the plan; of it, for signatures; and
    for one look at all that is going on. The campaign came to `ending` after `pairs` labels.
    """

    cycle_s: float
    signatures_s: float
    status_s: float
    ending: str
    pairs: int


def cycle_cost(home: Path, devices: int) -> Cost:
    """A campaign on so many devices: they have the release, then each of them reports again."""
    signing = {f"d{number:05d}": _key(number) for number in range(devices)}
    return asyncio.run(_cycle(home, signing))


async def _cycle(home: Path, signing: dict[str, Key]) -> Cost:
    floors, keys = Floors(home / "floors.json"), {name: k.public for name, k in signing.items()}
    reports, clock, plans = Reports(lambda: keys, floors.is_news), ManualClock(1.0), list[bytes]()

    async def publish(_release: Offer | None, plan: Plan | None, _consent: object) -> str:
        plans.append(encode_plan(plan) if plan else b"")
        return ""

    async def take(messages: Sequence[Message]) -> float:
        started_s = time.process_time()
        for message in messages:
            report = reports.believed(message)
            assert report is not None, reports.statistics()
            await controller.report(report)
        return time.process_time() - started_s

    rules = Rules(family=FAMILY, selector={}, canary_share=0.2)
    path, lineage = home / "campaign.json", Lineage(home / "lineage")
    controller = Controller(rules, path, publish, lineage, clock)
    await controller.start()
    await controller.offer(offer("r1"))
    await controller.offer(offer("r2"))
    first = [_said(name, key, 1, 1) for name, key in signing.items()]
    second = [_said(name, key, 2, at) for at, (name, key) in enumerate(signing.items())]
    examples = [_label(name) for name in signing]
    await take(first)
    started_s = time.process_time()
    controller.status()
    status_s = time.process_time() - started_s
    clock.advance(60.0)
    cycle_s = await take(second)
    started_s = time.process_time()
    await controller.examples(examples)
    cycle_s += time.process_time() - started_s
    [decision] = controller.status()["decisions"]
    await controller.close()
    assert len(plans) == 3, "the decision's own is the third"
    checks_s = _signatures_s(second, keys)
    return Cost(cycle_s, checks_s, status_s, decision["reason"], decision["pairs"])


def _signatures_s(messages: Sequence[Message], keys: dict[str, str]) -> float:
    """What reading and checking these alone costs."""
    fresh = Reports(lambda: keys, lambda _report: True)
    started_s = time.process_time()
    for message in messages:
        fresh.believed(message)
    return time.process_time() - started_s


def _key(number: int) -> Key:
    return Key(hashlib.sha256(b"device %d" % number).digest())


def _said(name: str, key: Key, number: int, at: int) -> Message:
    """A signed report, as it lies on the bus; both arms fail at the same rate."""
    answered, fails, on_trial = number * REQUESTS, at % FAILS == 0, at % (5 * FAILS) == 0
    arms = [
        ArmReport(FAMILY, "stable", "r1", 0.0, "", 40.0, answered * 4, int(fails and not on_trial)),
        ArmReport(FAMILY, "canary", "r2", 0.0, "", 40.0, answered, int(on_trial)),
    ]
    counters = dict.fromkeys(("predictions", "observations", "labels", "infers", "swaps"), 100)
    latencies = [0] * 100 + [5] * 20
    report = Report(
        WIRE_VERSION, name, 1, float(number), {"site": "a"}, arms, 2, counters, {}, latencies,
        10_000, 5, number=number,
    )  # fmt: skip
    subject, data = subjects.report(name), codec.encode(report)
    headers = codec.signature_headers(key.sign(codec.signed_report(subject, data)))
    return Message(subject, data, headers)


def _label(name: str) -> Example:
    """A label that speaks against the release on trial, as nine of ten do."""
    return Example(
        device=name,
        epoch=1,
        seq=1,
        family=FAMILY,
        time_s=1.0,
        label_time_s=1.0,
        features=b"",
        spec="",
        label=float(name[-1] == "0"),
        propensity=0.8,
        scored=[Scored("r1", "stable", [0.1]), Scored("r2", "canary", [0.5])],
        arrived_s=1.0,
        matured_s=1.0,
    )

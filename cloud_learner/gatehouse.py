"""The gate as a process of its own: it reads the stream itself, judges what it is asked, signs, and
approves what an operator wants.

Why: thresholds separate trust domains only where processes do. Here is the gate's key and no other;
the learner, its home and its word are not needed for a verdict.

Invariants: rows come from the stream through an ingest of this home alone. What serves must be a
package that this gate passed itself. Packages are judged as they were fetched, by hash. The stream
keeps what this process has not read; devices hear nothing from here.

Knows nothing about plans and devices. Implements proto/asyncapi.yaml (gate).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cloud_learner import approvals
from cloud_learner.asking import Answerer
from cloud_learner.config import Home
from cloud_learner.gate_signing import JudgedSigner
from cloud_learner.ingest.consumer import Ingest
from cloud_learner.ingest.intake import Commit
from cloud_learner.judging import (
    Case,
    JudgeRequest,
    OwnGate,
    answer_of,
)
from cloud_learner.learner import open_intake
from cloud_learner.orders import Order
from cloud_learner.packed import Parcel, decoded, encoded, fetch_package
from cloud_learner.release.keys import load_signer
from cloud_learner.store.lineage import Lineage
from cloud_learner.store.registry import Registry
from cloud_learner.streams import GATE_DURABLE
from cloud_learner.train.family import Family
from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock
from edge_runtime.errors import RequestError
from edge_runtime.wire import subjects


class Gatehouse:
    """The gates of some families over one bus, each with a hold-out of its own.

    Raises: ConfigError (no_key, bad_key, ...), CapacityError.
    """

    def __init__(self, home: Home, families: Sequence[Family], bus: Bus, clock: Clock) -> None:
        lineage = Lineage(home.lineage)
        self._bus, self._registry = bus, Registry(home.registry)
        self._signer = JudgedSigner(load_signer(home.root, "gate"), self._verdict)
        self._specs = {family.name: family.spec.hash for family in families}
        self.gates = {each.name: OwnGate(home, each, lineage.of(each.name)) for each in families}
        make = partial(open_intake, home, families, clock)
        self.ingest = Ingest(
            bus, make, clock, on_commit=self._take, durable=GATE_DURABLE, tells=False
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gate")

    async def run(self) -> None:
        """Answer until cancelled."""
        judging, signing = Answerer(self._bus, self._judge), Answerer(self._bus, self._sign)
        approving = Answerer(self._bus, self._approve)
        heard = [
            await self._bus.subscribe(subjects.gate_judge("*"), judging.hear),
            await self._bus.subscribe(subjects.GATE_SIGN, signing.hear),
            await self._bus.subscribe(subjects.GATE_APPROVE, approving.hear),
        ]
        try:
            await self.ingest.run()
        finally:
            for subscription in heard:
                await subscription.close()
            self._thread.shutdown()
            for gate in self.gates.values():
                gate.close()

    async def _judge(self, message: Message, body: bytes) -> bytes:
        request, family = decoded(body, JudgeRequest), message.subject.split(".")[-1]
        gate = self._gate(family)
        serving = self._serving(gate, request.serving)
        forms = [
            await fetch_package(self._bus, parcel)
            for parcel in (request.package, request.float_package)
        ]
        case = Case(forms[0], forms[1], serving, request.alarmed, request.order)
        judgement = await gate.judge(case, self._thread)
        if judgement.outcome == "pass":
            for data in forms:
                if Parcel.of(data).sha256 in judgement.variants.values():
                    self._registry.put(data)
        return encoded(answer_of(judgement))

    async def _sign(self, _message: Message, payload: bytes) -> bytes:
        signature = await asyncio.to_thread(self._signer.sign, payload)
        return encoded((signature.keyid, signature.signature))

    async def _approve(self, _message: Message, body: bytes) -> bytes:
        plan, order = decoded(body, tuple[bytes, Order])
        gate = self._gate(approvals.read(plan).family)
        found = await gate.approve(plan, order)
        return encoded((found.keyid, found.sig))

    def _gate(self, family: str) -> OwnGate:
        gate = self.gates.get(family)
        if gate is None:
            raise RequestError("unknown_family", f"this gate judges no family {family!r:.70}")
        return gate

    async def _take(self, commit: Commit) -> None:
        for name, released in commit.families.items():
            spec = self._specs[name]
            self.gates[name].take([each for each in released.examples if each.spec == spec])
            if released.batches:  # nobody learns from them here
                self.ingest.learned[name] = released.batches[-1].number

    def _serving(self, gate: OwnGate, sha256: str) -> Path:
        """What serves, as this gate has it."""
        if gate.verdict(sha256) is None:
            raise RequestError(
                "unknown_serving",
                f"what serves is said to be {sha256[:12]!r}, which this gate has not passed",
                "the gate's home and the learner's do not belong together: gate init makes one",
            )
        return self._registry.path(sha256)

    def _verdict(self, family: str, sha256: str) -> Mapping[str, Any] | None:
        return self.gates[family].verdict(sha256) if family in self.gates else None

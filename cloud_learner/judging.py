"""The door to a family's gate: in this process, or in another one that is asked over the bus.

Why: on a laptop one process hosts all domains; on a fleet the gate stands apart, under another user
or on another machine. Who has a candidate judged must not care which.

Invariants: what a gate apart says is its word alone: nothing of the asker's home is read by it, nor
the other way round. A gate that is away or slow raises TransportError, one that refuses a question
RequestError: ask again.

Knows nothing about candidates' origins, campaigns and plans.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cloud_learner import approvals, orders
from cloud_learner.approvals import Approval
from cloud_learner.asking import Asker
from cloud_learner.config import Home
from cloud_learner.evaluate.gates import Outcome, Verdict
from cloud_learner.evaluate.holdout import HoldOut
from cloud_learner.evaluate.offline import load_set
from cloud_learner.evaluate.slices import Keys
from cloud_learner.gate import Gate, Judgement
from cloud_learner.packed import Parcel, decoded, encoded, send_package
from cloud_learner.release.keys import load_signer
from cloud_learner.rules import gate_limits, recent_hold_out
from cloud_learner.store.examples import Example
from cloud_learner.store.lineage import Lineage
from cloud_learner.train.family import Family
from edge_runtime.bus.base import Bus
from edge_runtime.errors import RequestError, TransportError
from edge_runtime.inference.prover import Prover
from edge_runtime.wire import subjects

HOLD_OUT_JUDGEMENTS = 10  # after so many it is kept; what a kill loses comes again from the stream
JUDGE_S = 30.0


class Case(msgspec.Struct, frozen=True):
    """What is to be judged: a candidate's forms beside what serves (a file, or None).

    `alarmed` asks for strictness; `order` is what an operator signed, of a package handed in.
    """

    package: bytes
    float_package: bytes
    serving: Path | None
    alarmed: bool = False
    order: orders.Order | None = None


class JudgeRequest(msgspec.Struct, array_like=True, frozen=True):
    """A case on its way to a gate apart; `serving` is the hash of what serves, or empty."""

    package: Parcel
    float_package: Parcel
    serving: str
    alarmed: bool
    order: orders.Order | None = None


class JudgeAnswer(msgspec.Struct, array_like=True, frozen=True):
    """A judgement without its evidence, which stays in the gate's lineage."""

    sha256: str
    outcome: Outcome
    verdicts: list[Verdict]
    variants: dict[str, str]
    proof: str


class GateDoor(Protocol):
    """What a family's releasing asks of its gate."""

    counts: dict[str, int]

    @property
    def is_apart(self) -> bool:
        """Whether judging may take any time, so that the learner must not wait for it."""

    def take(self, examples: list[Example]) -> None:
        """Joined examples of the family's spec, for the hold-out."""

    async def judge(self, case: Case, thread: Executor) -> Judgement:
        """Judge, in `thread` if here. Raises: TransportError, RequestError (a refused question)."""

    async def approve(self, plan: bytes, order: orders.Order) -> Approval:
        """Approve a plan for an operator. Raises: TransportError, RequestError, as `approve`."""

    def verdict(self, sha256: str) -> Mapping[str, Any] | None:
        """The verdict on a package that this gate passed; None for any other."""

    def status(self) -> dict[str, Any]:
        """Where the gate is, and since when it does not answer."""

    def close(self) -> None:
        """Keep what is to be kept."""


class OwnGate:
    """The gate of a family in this process, over a home of its own or the learner's."""

    is_apart = False

    def __init__(
        self, home: Home, family: Family, lineage: Lineage, hold_out: HoldOut | None = None
    ) -> None:
        """`lineage` is the family's own part; what was passed in earlier lives is trusted."""
        own = home.of(family.name)
        self._kept, self._family = own.hold_out, family.name
        self._home, self._lineage = home, lineage
        self.hold_out = recent_hold_out(family) if hold_out is None else hold_out
        if self._kept.exists():
            self.hold_out.load(self._kept)
        static, known = load_set(own.static), Keys.load(own.known)
        self.gate = Gate(gate_limits(family), static, self.hold_out, lineage, known)
        for sha256, verdict in passed_before(lineage).items():
            self.gate.trust(sha256, verdict)
        self.counts = self.gate.counts
        self._prover = Prover()

    def take(self, examples: list[Example]) -> None:
        self.hold_out.add(examples)

    async def judge(self, case: Case, thread: Executor) -> Judgement:
        judgement = await asyncio.get_running_loop().run_in_executor(thread, self.judged, case)
        thread.submit(self._keep)  # no release waits for it
        return judgement

    def judged(self, case: Case) -> Judgement:
        """Judge here and now; what an operator brings only if the order is genuine, and only once
        it was tried in a child process, which it may end.
        """
        if case.order is not None:
            wish = orders.checked(case.order, self._home.operators, orders.Wish)
            brought = [Parcel.of(each).sha256 for each in (case.package, case.float_package)]
            if wish.packages != brought or wish.family != self._family:
                raise RequestError("bad_order", "it names other packages; nothing was judged")
        return self.gate.judge(
            case.package,
            case.float_package,
            case.serving,
            alarmed=case.alarmed,
            prove=self._prover.prove if case.order is not None else None,
        )

    async def approve(self, plan: bytes, order: orders.Order) -> Approval:
        return await asyncio.to_thread(self.approved, plan, order)

    def approved(self, plan: bytes, order: orders.Order) -> Approval:
        """Approve here and now."""
        found = approvals.approve(
            plan,
            order,
            self._home.operators,
            lambda sha256: self.verdict(sha256) is not None,
            load_signer(self._home.root, "gate"),
        )
        said = {"operator": order.operator, "order": order.text.decode()}
        self._lineage.append("approval", plan_seq=approvals.read(plan).seq, **said)
        return found

    def verdict(self, sha256: str) -> Mapping[str, Any] | None:
        return self.gate.verdict(sha256)

    def status(self) -> dict[str, Any]:
        return {"apart": False, "waits": ""}

    def close(self) -> None:
        self._prover.close()
        self.hold_out.save(self._kept)

    def _keep(self) -> None:
        """The hold-out on disk, every so many judgements; a full disk is tried again then."""
        if self.gate.counts["judged"] % HOLD_OUT_JUDGEMENTS == 0:
            with contextlib.suppress(OSError):
                self.hold_out.save(self._kept)


class ApartGate:
    """The gate of a family in another process."""

    is_apart = True

    def __init__(self, family: str, bus: Bus, asker: Asker, lineage: Lineage) -> None:
        self._family, self._bus, self._asker, self._lineage = family, bus, asker, lineage
        self.counts = {"judged": 0, "pass": 0, "fail": 0, "hold": 0}
        self._waits = ""

    def take(self, examples: list[Example]) -> None:
        """It reads the stream itself."""

    async def judge(self, case: Case, thread: Executor) -> Judgement:
        del thread
        self._waits = self._waits or "a candidate is at the gate, which has not answered yet"
        try:
            judgement = await self._judge(case)
        except (TransportError, RequestError) as error:
            self._waits = str(error)
            raise
        self._waits = ""
        self.counts["judged"] += 1
        self.counts[judgement.outcome] += 1
        self._lineage.append("verdict", by="gate apart", **_told(judgement))
        return judgement

    async def approve(self, plan: bytes, order: orders.Order) -> Approval:
        body = encoded((plan, order))
        data = await self._asker.ask(subjects.GATE_APPROVE, body, wait_s=JUDGE_S)
        return Approval(*decoded(data, tuple[str, str]))

    def verdict(self, sha256: str) -> Mapping[str, Any] | None:
        """Nobody here may know."""
        del sha256
        return None

    def status(self) -> dict[str, Any]:
        return {"apart": True, "waits": self._waits}

    def close(self) -> None:
        """Nothing is kept here."""

    async def _judge(self, case: Case) -> Judgement:
        serving = case.serving.read_bytes() if case.serving is not None else b""
        request = JudgeRequest(
            await send_package(self._bus, case.package),
            await send_package(self._bus, case.float_package),
            Parcel.of(serving).sha256 if serving else "",
            case.alarmed,
            case.order,
        )
        subject = subjects.gate_judge(self._family)
        data = await self._asker.ask(subject, encoded(request), wait_s=JUDGE_S)
        answer = decoded(data, JudgeAnswer)
        _check_forms(answer, request)
        return Judgement(
            answer.sha256, answer.outcome, answer.verdicts, None, answer.variants, answer.proof
        )


def passed_before(lineage: Lineage) -> dict[str, dict[str, Any]]:
    """The verdicts on all packages that a family's gate has passed, as its lineage says."""
    found = {}
    for entry in lineage.read("verdict"):
        if entry["outcome"] == "pass" and "by" not in entry:
            rules = [verdict["rule"] for verdict in entry["verdicts"]]
            verdict = {"outcome": "pass", "rules": rules, "sha256": entry.get("proof", "")}
            shipped = entry.get("variants", {}).values()
            found.update(dict.fromkeys((entry["sha256"], *shipped), verdict))
    return found


def answer_of(judgement: Judgement) -> JudgeAnswer:
    """What goes back to who asked."""
    return JudgeAnswer(
        judgement.sha256,
        judgement.outcome,
        judgement.verdicts,
        judgement.variants,
        judgement.proof,
    )


def _check_forms(answer: JudgeAnswer, request: JudgeRequest) -> None:
    sent = {request.package.sha256, request.float_package.sha256}
    if not {answer.sha256, *answer.variants.values()} <= sent:
        raise RequestError("bad_answer", "the gate speaks of packages that it was not asked about")


def _told(judgement: Judgement) -> dict[str, Any]:
    return {
        "sha256": judgement.sha256,
        "outcome": judgement.outcome,
        "reason": judgement.why_not,
        "variants": judgement.variants,
        "proof": judgement.proof,
    }

"""Submissions: what operators hand in, brought to the gate and, if it passes, to the campaign.

Why: a model that a person brings goes the way of every other one; only its order differs, and what
the learner's own candidates do meanwhile.

Invariants: the gate checks the order, not this process. While a submitted release is undecided, no
candidate of the learner takes its place; with `hold`, none follows it until another is handed in.

Durable state: `submitted.json` of a family; the commit point is its rename.
Knows nothing about how packages come about.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import msgspec

from cloud_learner.cycle import Candidate
from cloud_learner.judging import Case, answer_of
from cloud_learner.orders import Wish, selector_of
from cloud_learner.packed import decoded, encoded, fetch_package
from cloud_learner.pushing import Pushed, Submission
from cloud_learner.releasing import Releasing
from edge_runtime.bus.base import Bus, Message
from edge_runtime.clock import Clock
from edge_runtime.errors import RequestError


@dataclass(frozen=True)
class Submissions:
    """Answers operators for the families of a host."""

    bus: Bus
    releasing: Mapping[str, Releasing]
    thread: Executor
    clock: Clock

    async def work(self, message: Message, body: bytes) -> bytes:
        """What an Answerer does. Raises: RequestError, TransportError."""
        submission, family = decoded(body, Submission), message.subject.split(".")[-1]
        wish = _wish(submission.order.text)
        releasing = self.releasing.get(family)
        if releasing is None or wish.family != family:
            raise RequestError(
                "unknown_family",
                f"there is no family {family!r} here; nothing was judged",
                f"known: {', '.join(sorted(self.releasing))}",
            )
        selector_of(wish)  # before anything is judged
        candidate = await self._candidate(submission)
        case = Case(
            candidate.package,
            candidate.float_package,
            releasing.served.package,
            order=submission.order,
        )
        judgement = await releasing.door.judge(case, self.thread)
        release = ""
        if judgement.outcome == "pass" and not wish.dry_run:
            operator = submission.order.operator
            release = await releasing.submitted(candidate, judgement, wish, operator)
        return encoded(Pushed(answer_of(judgement), release))

    async def _candidate(self, submission: Submission) -> Candidate:
        package = await fetch_package(self.bus, submission.package)
        float_package = await fetch_package(self.bus, submission.float_package)
        now_s = self.clock.now_s()
        return Candidate(0, package, float_package, now_s, now_s, {})


def _wish(text: bytes) -> Wish:
    try:
        return msgspec.json.decode(text, type=Wish)
    except msgspec.DecodeError as error:
        raise RequestError("bad_order", f"the order cannot be read: {error}") from error

"""A trial once more, from its journal: the plans that it comes to.

Why: a decision counts as right if whoever is told the same comes to the same.

Invariants: the campaign's own code decides, and nothing else. A line that moves nothing was never
written by a campaign.

Knows nothing about files and signatures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cloud_learner.rollout.journal import Fed, fed_of, header_of
from cloud_learner.rollout.matches import Matches
from cloud_learner.rollout.state import Told, Trial
from edge_runtime.errors import RequestError
from edge_runtime.rollout.plan import Plan


class _Again(Matches):
    """A campaign whose journal is written already."""

    lines: list[bytes]
    members = 0

    def tell(self, fed: Fed) -> None:
        """What came to the campaign then."""
        trial, self.members = self.state.trial, fed.members
        if fed.offer is not None:
            self.offer(fed.offer, fed.now_s)
        elif fed.control is not None:
            self.control(fed.control, fed.now_s)
        elif fed.example is not None:
            self.examples([fed.example], fed.now_s)
        elif fed.answered is not None:
            self.draw(fed.answered, fed.now_s)
        elif trial is not None and (report := fed.told()) is not None:
            self._turnout.know(report)
            trial.members.setdefault(report.device, False)
            self._hear(trial, report, fed.now_s, fed.signed)
        else:
            self.tick(fed.now_s)

    def _members(self, _trial: Trial) -> int:
        return self.members

    def _write(self, trial: Told, line: bytes) -> None:
        super()._write(trial, self.lines.pop(0) if self.lines else line)


def replayed(lines: Iterable[bytes]) -> Iterator[Plan]:
    """The plans of the trial with this journal, in order.

    Raises: RequestError `bad_journal` at what no campaign was told.
    """
    rest = iter(lines)
    first = next(rest, b"")
    header = header_of(first)
    campaign = _Again(header.rules, header.state)
    campaign.lines = [first]
    for number, line in enumerate(rest, start=2):
        campaign.lines.append(line)
        campaign.tell(fed_of(line))
        if campaign.lines:
            raise RequestError("bad_journal", f"line {number} moves nothing")
        for step in campaign.state.outbox:
            if step.plan is not None:
                yield step.plan
        campaign.state.outbox.clear()

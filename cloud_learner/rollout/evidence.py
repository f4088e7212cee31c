"""All the evidence of a release on trial: labels that compare it, and what devices report of it.

Why: both arms of a canary answer the same requests, so each label compares them on equal terms,
whatever the airport, the hour or the weather; unpaired arms would need ten times the labels.
Reports (`health`) tell of failures, at once.

Two questions have two answers. *Harm* stops, for either reason, and is watched to the end of the
trial; its alpha is spent over the two tests, nine tenths on failures, which are few, and one on
labels. *Not worse* lets the release advance, and rests on labels alone.

Invariants: only an example scored by exactly the stable and the canary release counts, so only
predictions made while both were resident; each counts once, and those of one device only in the
order in which the joiner releases them, so what is handed over twice is dropped; what cannot be
compared is counted under its reason and moves nothing. No data holds: nor does anything follow from
labels that are all the same, from answers that are all the same, or from two releases that never
differ. All state is plain numbers: evidence that was stored goes on where it stopped.

Knows nothing about plans, devices' attributes or where examples come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from cloud_learner.rollout.health import Health
from cloud_learner.stats.confidence import ConfidenceSequence
from cloud_learner.stats.counting import CountingTest
from cloud_learner.stats.sequential import PairedTest
from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import Report

Position = tuple[float, int, int]
Span = tuple[float, float]

FAILURES_SHARE = 0.9
"""Of alpha: what harm by failures may cost; the rest is for harm by labels."""


class ArmTally(msgspec.Struct):
    """What the counted pairs say about one arm; `loss_sum` sums `Task.bounded_losses`.

    `answers` is between what the first of its outputs lay.
    """

    release: str
    answered: int = 0
    loss_sum: float = 0.0
    answers: Span = (0.0, 0.0)


class PairEvidence(msgspec.Struct, kw_only=True):
    """Stable against canary on labels: the test, tallies by arm, positions of devices.

    `effect` is between what the mean difference lies, for people. `differing` counts the pairs in
    which the two did not answer the same.
    """

    family: str
    stable: ArmTally
    canary: ArmTally
    test: PairedTest
    task: Task = Task()
    effect: ConfidenceSequence = msgspec.field(default_factory=lambda: ConfidenceSequence(low=-1.0))
    labels: Span = (0.0, 0.0)
    differing: int = 0
    positions: dict[str, Position] = {}
    other_pair: int = 0
    unusable: int = 0
    repeated: int = 0

    def count(self, example: Example) -> None:
        """Count an example, or the reason why it is no evidence."""
        outputs = self._outputs(example)
        if outputs is None:
            self.other_pair += 1
        elif not self._advance(example):
            self.repeated += 1
        elif not self._is_usable(example.label, outputs):
            self.unusable += 1
        else:
            self._compare(example, *outputs)

    def _outputs(self, example: Example) -> tuple[list[float], list[float]] | None:
        """What stable and canary answered, in this order; None when others or one alone did."""
        if example.family != self.family or len(example.scored) != 2:
            return None
        by_release = {scored.release: scored.outputs for scored in example.scored}
        old, new = by_release.get(self.stable.release), by_release.get(self.canary.release)
        return (old, new) if old and new else None

    def _is_usable(self, label: float, outputs: Sequence[list[float]]) -> bool:
        """Whether this is a label of the task, and these are answers to it."""
        if self.task.why_unfit(label):
            return False
        if any(len(answer) != self.task.outputs for answer in outputs):
            return False
        numbers = [value for answer in outputs for value in answer]
        if self.task.kind in ("binary", "multiclass"):
            return all(0 <= value <= 1 for value in numbers)
        return all(map(math.isfinite, numbers))

    def _advance(self, example: Example) -> bool:
        """Move the device's position forward; False when it stands there already or beyond."""
        position = (example.time_s, example.epoch, example.seq)
        seen = self.positions.get(example.device)
        if seen is not None and position <= seen:
            return False
        self.positions[example.device] = position
        return True

    def _compare(self, example: Example, old: list[float], new: list[float]) -> None:
        labels = np.array([example.label, example.label], np.float32)
        losses = self.task.bounded_losses(labels, np.array([old, new], np.float32))
        old_loss, new_loss = losses.tolist()
        self.stable.loss_sum += old_loss
        self.canary.loss_sum += new_loss
        answering = example.scored[0].release
        tally = self.canary if answering == self.canary.release else self.stable
        tally.answered += 1
        is_first = not self.test.pairs
        self.labels = _widened(self.labels, example.label, is_first)
        self.stable.answers = _widened(self.stable.answers, old[0], is_first)
        self.canary.answers = _widened(self.canary.answers, new[0], is_first)
        self.differing += old != new
        self.effect.add(new_loss - old_loss)
        self.test.add(new_loss - old_loss, example.device)

    @property
    def pairs(self) -> int:
        """Pairs counted so far."""
        return self.test.pairs

    @property
    def not_worse(self) -> bool:
        """Whether the canary is not worse by the margin, for certain."""
        return (
            self.test.not_worse
            and self.differing > 0
            and _varies(self.labels)
            and _varies(self.canary.answers)
        )

    @property
    def harmful(self) -> bool:
        """Whether the canary is worse by more than half of the margin, for certain."""
        return self.test.harmful and _varies(self.labels)

    def statistics(self) -> dict[str, float | int | str]:
        """The numbers behind the verdict, flat, as they stand in lineage and in the live view."""
        test, pairs = self.test, max(self.pairs, 1)
        return {
            "stable": self.stable.release,
            "canary": self.canary.release,
            "pairs": self.pairs,
            "mean_difference": test.difference_sum / pairs,
            "difference_low": self.effect.interval[0],
            "difference_high": self.effect.interval[1],
            "stable_loss": self.stable.loss_sum / pairs,
            "canary_loss": self.canary.loss_sum / pairs,
            "stable_answered": self.stable.answered,
            "canary_answered": self.canary.answered,
            "margin": test.margin,
            "e_noninferior": test.noninferior.standing(test.may_lie),
            "e_noninferior_reach": 1 / test.alpha_promote,
            "e_harm": test.harm.standing(test.may_lie),
            "e_harm_reach": 1 / test.alpha_stop,
            "verdict": test.verdict,
            "label_devices": len(test.devices),
            "differing": self.differing,
            "other_pair": self.other_pair,
            "unusable": self.unusable,
            "repeated": self.repeated,
            "unheard": test.unheard,
        }


def _widened(span: Span, value: float, is_first: bool) -> Span:
    return (value, value) if is_first else (min(span[0], value), max(span[1], value))


def _varies(span: Span) -> bool:
    return span[0] < span[1]


class TrialEvidence(msgspec.Struct, kw_only=True):
    """What is known of one release on trial, from labels (`quality`) and reports (`health`)."""

    quality: PairEvidence
    health: Health

    @classmethod
    def start(
        cls,
        family: str,
        stable: str,
        canary: str,
        task: Task,
        *,
        margin: float,
        alpha_promote: float,
        alpha_stop: float,
    ) -> TrialEvidence:
        """A trial of the release `canary` against `stable`, without data."""
        on_failures, on_labels = alpha_stop * FAILURES_SHARE, alpha_stop * (1 - FAILURES_SHARE)
        return cls(
            quality=PairEvidence(
                family=family,
                stable=ArmTally(stable),
                canary=ArmTally(canary),
                test=PairedTest.start(margin, alpha_promote, on_labels),
                task=task,
            ),
            health=Health(
                family=family,
                stable=stable,
                canary=canary,
                failures=CountingTest(alpha=on_failures),
            ),
        )

    def examples(self, examples: Iterable[Example]) -> bool:
        """Take joined examples, in the order of their release. Returns whether any counted."""
        before = self.quality.pairs
        for example in examples:
            self.quality.count(example)
        return self.quality.pairs > before

    def report(self, report: Report) -> bool:
        """Take what a device says about itself. Returns whether it says anything of the trial."""
        counted = self.health.add(report)
        self.expect(self.health.members)
        return counted

    def expect(self, members: int) -> None:
        """The trial is on so many devices: of these some may lie, not of the first to speak."""
        self.health.members = members
        self.quality.test.on_trial = self.health.size

    @property
    def not_worse(self) -> bool:
        """Whether labels say for certain that it is not worse by the margin."""
        return self.quality.not_worse

    @property
    def harm(self) -> str:
        """Where it does harm for certain: `failures`, `quality`, or nowhere, ""."""
        if self.health.harmful:
            return "failures"
        return "quality" if self.quality.harmful else ""

    @property
    def pairs(self) -> int:
        """Labels that compared it."""
        return self.quality.pairs

    @property
    def devices(self) -> int:
        """Devices that reported it in memory."""
        return len(self.health.devices)

    @property
    def answered(self) -> int:
        """Requests whose answer was drawn for it, as reported."""
        return self.health.total.answered

    def statistics(self) -> dict[str, float | int | str]:
        """All numbers behind a decision, flat, as they stand in lineage and in the live view."""
        verdict = "stop" if self.harm else "promote" if self.not_worse else "hold"
        facts = {**self.quality.statistics(), **self.health.statistics()}
        return {**facts, "verdict": verdict, "harm": self.harm}

    def gates(self) -> list[dict[str, float | str]]:
        """The rules over the evidence, each with its value and what it must reach to act."""
        test, failures = self.quality.test, self.health.failures
        safe, bad = test.noninferior.standing(test.may_lie), test.harm.standing(test.may_lie)
        failing = failures.evidence(self.health.size)
        return [
            gate_row("not_worse", safe, 1 / test.alpha_promote, "advance"),
            gate_row("harm", bad, 1 / test.alpha_stop, "roll back"),
            gate_row("failures", failing, 1 / failures.alpha, "roll back"),
        ]


def gate_row(gate: str, value: float, reach: float, then: str) -> dict[str, float | str]:
    """A gate as the live view shows it."""
    text = f"{gate} {value:,.4g}/{reach:,.4g}"
    return {"gate": gate, "value": value, "reach": reach, "then": then, "text": text}

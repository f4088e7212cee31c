"""Bounded trust: whose rows of a micro-batch are learned, and why the others are not.

Why: a cap bounds how much of a batch a hostile device can be; within the cap its rows still pull. A
device is quarantined when two things come together: its rows fit worse than the others'
(suspicion), and without its pull the candidate would be better for the others (harm). Either alone
accuses honest devices: a hard place fits worse and harms nobody, and the pull of a few honest rows
harms by chance. What a quarantined device says is looked at again with every batch, and learned
again once it fits or no longer harms. Only its own pull is taken away, not its place in the mean,
or who is merely different would seem to harm, since the others' pull would grow in its absence.
Leaving out rows with a large loss costs quality on clean data, so it is done on alarm alone (Shen &
Sanghavi 2019).

Invariants: besides suspects at most `contributors` devices of a batch are tried, the largest first,
and a device is never judged by rows of its own. The judges are others' rows of the same batch:
older ones tell the age of the device's rows, not their truth. At least half of a batch is always
learned. Same rows, same answer.

Knows nothing about caps, which hold before a batch is cut, and nothing about alarms' causes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from cloud_learner.stats.tasks import Task
from cloud_learner.train.dataset import Rows, concatenate
from cloud_learner.train.replica import Replica

JUDGES_MIN = 30  # rows of others in a batch, below which nobody is judged
MEMORY = 0.9
"""Of suspicion and harm, from batch to batch: about the last ten count."""
EVIDENCE_MAX = 4.0  # standard errors that a single batch can add
SUSPICION_MAX, SUSPICION_CALM = 8.0, 2.0
HARM_MAX, HARM_CALM = 4.0, -4.0
"""Summed standard errors, fading: both over MAX quarantine, either below CALM ends it."""

Mask = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]


class Standing(msgspec.Struct, frozen=True):
    """What is known of a device: summed standard errors, fading with each batch."""

    suspicion: float = 0.0
    harm: float = 0.0


class Quarantined(msgspec.Struct, frozen=True):
    """A device of which nothing is learned for now.

    Its `rows` of the last batch fit worse than the others', and without them the candidate's loss
    falls by `gain` for each row of others; `standing` is that in standard errors over batches.
    """

    device: str
    rows: int
    gain: float
    standing: Standing

    @property
    def reason(self) -> str:
        """In words."""
        return (
            f"the rows of {self.device} fit worse than others' (suspicion"
            f" {self.standing.suspicion:.1f}, at most {SUSPICION_MAX:g}), and without its last"
            f" {self.rows} the loss on others' changes by {-self.gain:.2g} a row (harm"
            f" {self.standing.harm:.1f}, at most {HARM_MAX:g})"
        )


class HeldOut:
    """The newest held-out rows with their devices, at most `bound`; half of them of one device."""

    def __init__(self, bound: int, width: int) -> None:
        self._bound = bound
        self._rows = Rows.none(width)
        self._devices: list[str] = []

    def add(self, rows: Rows, devices: Sequence[str]) -> None:
        """Take in rows, oldest first, and let go of the oldest beyond the bounds."""
        all_rows, names = concatenate([self._rows, rows]), [*self._devices, *devices]
        counts: Counter[str] = Counter()
        kept: list[int] = []
        for place in range(len(names) - 1, -1, -1):
            if len(kept) < self._bound and counts[names[place]] < self._bound // 2:
                counts[names[place]] += 1
                kept.append(place)
        kept.reverse()
        self._rows = all_rows.take(np.array(kept, np.intp))
        self._devices = [names[place] for place in kept]

    @property
    def rows(self) -> Rows:
        """All of them."""
        return self._rows

    def state(self) -> tuple[Any, ...]:
        """All that is needed to go on from here."""
        rows = self._rows
        return rows.features, rows.labels, rows.groups, list(self._devices)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go on from `state`."""
        features, labels, groups, devices = state
        self._rows, self._devices = Rows(features, labels, groups=groups), list(devices)


class Trust:
    """Judges the devices of one family's micro-batches."""

    def __init__(self, task: Task, contributors: int) -> None:
        self._task, self._contributors = task, contributors
        self.standings: dict[str, Standing] = {}
        self.quarantined: dict[str, Quarantined] = {}
        self.counters: Counter[str] = Counter()

    def admitted(self, replica: Replica, rows: Rows, devices: Sequence[str]) -> Mask:
        """Which rows may be learned, shape (rows,)."""
        names, counts = np.array(devices), Counter(devices)
        if self._contributors and len(counts) > 1:
            self._suspect(names, counts, self._losses(replica, rows))
            with_all: Values | None = None
            for device in self._tried(counts):
                others = names != device
                if others.sum() < JUDGES_MIN:
                    continue
                if with_all is None:
                    with_all = self._losses_after(replica, rows)
                without = self._losses_after(replica, _unweighted(rows, ~others))
                self._judge(device, counts[device], (with_all - without)[others])
        admitted = self.heard(devices)
        if admitted.sum() * 2 < len(rows):  # a majority is no outlier
            return np.ones(len(rows), bool)
        self.counters["quarantined_rows"] += int(len(rows) - admitted.sum())
        return admitted

    def heard(self, devices: Sequence[str]) -> Mask:
        """Which rows are of devices that are not quarantined, shape (rows,)."""
        return np.array([name not in self.quarantined for name in devices], bool)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "standings": dict(self.standings),
            "quarantined": dict(self.quarantined),
            "counters": dict(self.counters),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.standings = dict(state["standings"])
        self.quarantined = dict(state["quarantined"])
        self.counters = Counter(state["counters"])

    def _suspect(self, names: npt.NDArray[np.str_], counts: Counter[str], losses: Values) -> None:
        """Compare how well each device's rows fit with how well the others' do."""
        known = np.isfinite(losses)
        spread = float(losses[known].std()) if known.any() else 0.0
        for device in counts:
            own, others = known & (names == device), known & (names != device)
            if spread and own.any() and others.sum() >= JUDGES_MIN:
                excess = float(losses[own].mean() - losses[others].mean())
                self._add(device, suspicion=excess / (spread / math.sqrt(own.sum())))

    def _tried(self, counts: Counter[str]) -> list[str]:
        largest = [device for device, _ in counts.most_common(self._contributors)]
        suspects = [device for device in counts if self._of(device).suspicion > SUSPICION_MAX]
        return list(dict.fromkeys([*largest, *suspects, *(self.quarantined.keys() & counts)]))

    def _judge(self, device: str, rows: int, gains: Values) -> None:
        """`gains` are how much lower the losses of others' rows are without the device."""
        gains = gains[np.isfinite(gains)]
        if len(gains) < JUDGES_MIN:  # the batch leaves no numbers, with the device or without it
            return
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        self._add(device, harm=gain / error if error else 0.0)
        now, known = self._of(device), device in self.quarantined
        limits = (SUSPICION_CALM, HARM_CALM) if known else (SUSPICION_MAX, HARM_MAX)
        if now.suspicion > limits[0] and now.harm > limits[1]:
            self.counters["quarantines"] += int(not known)
            self.quarantined[device] = Quarantined(device, rows, gain, now)
        else:
            self.quarantined.pop(device, None)

    def _of(self, device: str) -> Standing:
        return self.standings.get(device, Standing())

    def _add(self, device: str, **evidence: float) -> None:
        """Standard errors of one batch, bounded, so that no single batch condemns anybody."""
        now = self._of(device)
        for name, errors in evidence.items():
            bounded = min(max(errors, -EVIDENCE_MAX), EVIDENCE_MAX)
            total = MEMORY * getattr(now, name) + bounded
            now = msgspec.structs.replace(now, **{name: total})
        self.standings[device] = now

    def _losses(self, replica: Replica, rows: Rows) -> Values:
        return self._task.losses(rows.labels, replica.answers(rows.features), rows.groups)

    def _losses_after(self, replica: Replica, rows: Rows) -> Values:
        trial = replica.fork()
        with torch.random.fork_rng(devices=[]):  # the same dropout for all: it is no one's doing
            trial.step(rows)
        return self._losses(trial, rows)


def _unweighted(rows: Rows, left_out: Mask) -> Rows:
    """The same rows, of which some pull nowhere; the others pull no more than before."""
    weights = np.where(left_out, np.float32(0), rows.weights)
    return Rows(rows.features, rows.labels, weights, rows.groups)


def trimmed(losses: npt.NDArray[np.float64], share: float) -> Mask:
    """Which rows are kept when the `share` of them with the largest loss is left out, (rows,)."""
    kept = np.ones(len(losses), bool)
    order = np.argsort(-np.where(np.isfinite(losses), losses, np.inf), kind="stable")
    kept[order[: int(share * len(losses))]] = False
    return kept

"""Bounded trust: whose rows of a micro-batch are learned, and why the others are not.

Why: a cap bounds how much of a batch a hostile device can be; within the cap its rows still pull.
A device without whose pull the candidate would be better, measured on held-out rows of others, is
quarantined: what it says is looked at again with every batch, and learned again once it no longer
harms. Only its own pull is taken away, not its place in the mean, or who is merely different would
seem to harm, since the others' pull would grow in its absence. Leaving out rows with a large loss
costs quality on clean data, so it is done on alarm alone (Shen & Sanghavi 2019).

Invariants: at most `contributors` devices of a batch are tried, the largest first, and a device is
never judged by rows of its own. At least half of a batch is always learned. Same rows, same answer.

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

JUDGES_MIN = 100  # held-out rows of others, below which nobody is judged
HARM_MEMORY = 0.8
HARM_MAX = 8.0
"""Summed standard errors, fading, at which a device is quarantined: about 1.6 in every batch."""
HARM_CALM = 2.0

Mask = npt.NDArray[np.bool_]


class Quarantined(msgspec.Struct, frozen=True):
    """A device of which nothing is learned for now.

    Without its `rows` the loss of the candidate falls by `gain` for each held-out row; `harm` is
    that in standard errors, summed over batches and fading.
    """

    device: str
    rows: int
    gain: float
    harm: float

    @property
    def reason(self) -> str:
        """In words."""
        return (
            f"without the {self.rows} rows of {self.device} the loss on others' held-out rows"
            f" is lower by {self.gain:.2g} (harm {self.harm:.1f}, at most {HARM_MAX:g})"
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

    def is_of_another(self, device: str) -> Mask:
        """Which rows are of other devices, (rows,)."""
        return np.array([name != device for name in self._devices], bool)

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
        self._harm: dict[str, float] = {}
        self.quarantined: dict[str, Quarantined] = {}
        self.counters: Counter[str] = Counter()

    def admitted(
        self, replica: Replica, rows: Rows, devices: Sequence[str], held_out: HeldOut
    ) -> Mask:
        """Which rows may be learned, shape (rows,)."""
        names, counts = np.array(devices), Counter(devices)
        tried = [name for name, _ in counts.most_common(self._contributors)]
        tried += [name for name in counts if name in self.quarantined and name not in tried]
        if len(counts) > 1 and tried and len(held_out.rows) >= JUDGES_MIN:
            with_all = self._losses_after(replica, rows, held_out.rows)
            for device in tried:
                without = _unweighted(rows, names == device)
                gains = with_all - self._losses_after(replica, without, held_out.rows)
                others = held_out.is_of_another(device)
                if others.sum() >= JUDGES_MIN:
                    self._judge(device, counts[device], gains[others])
        admitted = np.array([name not in self.quarantined for name in devices], bool)
        if admitted.sum() * 2 < len(rows):  # a majority is no outlier
            return np.ones(len(rows), bool)
        self.counters["quarantined_rows"] += int(len(rows) - admitted.sum())
        return admitted

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "harm": dict(self._harm),
            "quarantined": dict(self.quarantined),
            "counters": dict(self.counters),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._harm = dict(state["harm"])
        self.quarantined = dict(state["quarantined"])
        self.counters = Counter(state["counters"])

    def _judge(self, device: str, rows: int, gains: npt.NDArray[np.float64]) -> None:
        """`gains` are how much lower the losses of others' held-out rows are without the device."""
        gains = gains[np.isfinite(gains)]
        if len(gains) < JUDGES_MIN:  # the batch leaves no numbers, with the device or without it
            return
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        harm = HARM_MEMORY * self._harm.get(device, 0.0) + (gain / error if error else 0.0)
        self._harm[device] = harm
        known = device in self.quarantined
        if harm > HARM_MAX or (known and harm > HARM_CALM):
            self.counters["quarantines"] += int(not known)
            self.quarantined[device] = Quarantined(device, rows, gain, harm)
        else:
            self.quarantined.pop(device, None)

    def _losses_after(self, replica: Replica, rows: Rows, judges: Rows) -> npt.NDArray[np.float64]:
        trial = replica.fork()
        with torch.random.fork_rng(devices=[]):  # the same dropout for all: it is no one's doing
            trial.step(rows)
        return self._task.losses(judges.labels, trial.answers(judges.features))


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

"""A trajectory: one arm learns a stream from end to end, and is scored at every cadence meanwhile.

Why: what is compared must differ by staleness alone, so the cadences share one course of learning:
each prediction is answered by the version that its cadence would have had in service.

A cadence is tried with several phases (offsets): whether the sync came just before a storm or just
after it is luck, and is averaged out.

Invariants: same setting and job, same numbers, but for the seconds. A row is scored only by
versions that were ready before it was asked.

Knows nothing about how arms learn, or what their numbers mean for anyone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.experiment.arms import Arm, Incremental, Policy, Spent, arm_of, seeded
from cloud_learner.experiment.asked import Floats, Index
from cloud_learner.experiment.cadence import Cadence, Versions
from cloud_learner.experiment.scoring import Measures, Truth
from cloud_learner.experiment.stream import Cut, Stream
from cloud_learner.stats.tasks import Matrix
from cloud_learner.train.family import Family

Tick = Callable[[], None]
STUDENT, TEACHER, STATIC, LATER = "student", "teacher", "without windows", "student, later rows"


class Setting(msgspec.Struct, frozen=True):
    """What all trajectories of a stream share; `warm` are positions known by `start_s`.

    `later` are rows of later times, as if they had been asked earlier.
    """

    folder: Path
    stream: Stream
    cuts: list[Cut]
    warm: Index
    start_s: float
    truth: Truth
    later: Truth
    cadences: list[Cadence]
    offsets: int

    def versions(self, cadence: Cadence, times_s: Floats) -> list[Versions]:
        """The version that answers at each of the times, for each phase."""
        ready_s = np.array([cut.released_s for cut in self.cuts])
        return [
            cadence.versions(times_s, ready_s, self.start_s, phase)
            for phase in cadence.phases(self.offsets)
        ]


class Job(msgspec.Struct, frozen=True):
    """One trajectory: which arm, which seed, of which features; `control` of shuffled time."""

    policy: Policy
    seed: int
    static: bool = False
    control: bool = False
    compares_teacher: bool = False


class AtCadence(msgspec.Struct, frozen=True):
    """What one cadence came to: `measures` of each phase, losses of each day meaned over phases.

    `updates` and `spent` are means over phases; `day_losses` are sums over rows.
    """

    measures: list[Measures]
    day_losses: Floats
    updates: float
    sample_passes: float
    cpu_s: float


class Played(msgspec.Struct, frozen=True):
    """A finished trajectory: by model, what each cadence came to.

    `package_bytes` are those of the int8 package, whose size no training changes: of the control.
    """

    job: Job
    models: dict[str, list[AtCadence]]
    package_bytes: int
    failed: int


def play(setting: Setting, job: Job, tick: Tick) -> Played:
    """Learn the stream and score it; `tick` is called once for each micro-batch."""
    family = seeded(Family.load(setting.folder), job.seed)
    arm = _arm(setting, job, family)
    sheets = {STATIC if job.static else STUDENT: _Sheet(setting, setting.truth, arm.answers)}
    if job.policy.kind == "incremental" and not job.static:
        sheets[LATER] = _Sheet(setting, setting.later, arm.answers)
    if job.compares_teacher and isinstance(arm, Incremental):
        sheets[TEACHER] = _Sheet(setting, setting.truth, arm.teacher)
    learning, readying = [arm.spent], [Spent(0, 0.0)]
    for version in range(len(setting.cuts) + 1):
        if version:
            arm.learn(version, setting.cuts[version - 1])
            learning.append(arm.spent)
        if any(sheet.wants(version) for sheet in sheets.values()):
            arm.ready()
        for sheet in sheets.values():
            sheet.fill(version)
        readying.append(arm.spent)
        tick()
    costs = _Costs(learning, readying[1:])
    return Played(
        job,
        {name: [*sheet.results(costs)] for name, sheet in sheets.items()},
        len(arm.cycle.candidate().package) if job.control and isinstance(arm, Incremental) else 0,
        arm.failed if isinstance(arm, Incremental) else 0,
    )


def static_names(family: Family) -> list[str]:
    """The features that look at no window."""
    return [feature.name for feature in family.spec.features if feature.window is None]


def _arm(setting: Setting, job: Job, family: Family) -> Arm:
    if job.static:
        restricted = family.restricted(static_names(family))
        return Incremental(restricted, setting.stream, setting.warm, family)
    return arm_of(job.policy, family, setting.stream, setting.warm)


class _Costs:
    """What each version has cost: to learn up to it, and to make it ready."""

    def __init__(self, learned: list[Spent], ready: list[Spent]) -> None:
        self._made = [
            (after.sample_passes - before.sample_passes, after.cpu_s - before.cpu_s)
            for before, after in zip(learned, ready, strict=True)
        ]
        steps = [(0, 0.0)] + [
            (after.sample_passes - before.sample_passes, after.cpu_s - before.cpu_s)
            for before, after in zip(ready, learned[1:], strict=False)
        ]
        self._learned = np.cumsum(np.array(steps, np.float64), axis=0)

    def of(self, used: npt.NDArray[np.int32]) -> tuple[float, float]:
        """Passes and seconds for the versions `used`, after the warm-up."""
        made = [self._made[version] for version in used.tolist() if version]
        passes, seconds = np.array([*made, (0, 0.0)]).sum(0) + self._learned[used.max(initial=0)]
        return float(passes), float(seconds)


class _Sheet:
    """The answers to all rows of a truth, for each cadence and phase.

    Versions only rise with time, so those that one answers for a cadence are rows in a row.
    """

    def __init__(self, setting: Setting, truth: Truth, answers: Callable[[Matrix], Matrix]) -> None:
        self._truth, self._ask = truth, answers
        self._phases = [len(cadence.phases(setting.offsets)) for cadence in setting.cadences]
        self._versions = [
            versions
            for cadence in setting.cadences
            for versions in setting.versions(cadence, truth.times_s)
        ]
        shape = (len(truth), truth.task.outputs)
        self._answers = [np.zeros(shape, np.float32) for _ in self._versions]
        self._features = setting.stream.asked.features

    def wants(self, version: int) -> bool:
        """Whether the version answers anything."""
        return any(rows.start < rows.stop for rows in self._rows(version))

    def fill(self, version: int) -> None:
        """Ask for the answers of a version, once for a row, and enter them where it served."""
        rows = self._rows(version)
        some = [each for each in rows if each.start < each.stop]
        if not some:
            return
        first, end = min(each.start for each in some), max(each.stop for each in some)
        found = self._ask(self._features[self._truth.rows[first:end]])
        for each, sheet in zip(rows, self._answers, strict=True):
            sheet[each] = found[each.start - first : each.stop - first]

    def results(self, costs: _Costs) -> Iterator[AtCadence]:
        """What each cadence came to."""
        first, truth = 0, self._truth
        for count in self._phases:
            phases = range(first, first + count)
            used = [np.unique(self._versions[at]) for at in phases]
            losses = np.mean([truth.losses(self._answers[at]) for at in phases], axis=0)
            spent = np.mean([costs.of(versions) for versions in used], axis=0)
            yield AtCadence(
                [truth.measures(self._answers[at]) for at in phases],
                truth.day_losses(losses),
                float(np.mean([np.count_nonzero(versions) for versions in used])),
                float(spent[0]),
                float(spent[1]),
            )
            first += count

    def _rows(self, version: int) -> list[slice]:
        """The rows that the version answers, for each cadence and phase."""
        ends = [np.searchsorted(each, [version, version + 1]) for each in self._versions]
        return [slice(int(start), int(stop)) for start, stop in ends]

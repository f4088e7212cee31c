"""The report of a freshness experiment: what was found, from what, by which code, on which machine.

Why: a number is worth as much as what is known of where it comes from.

Invariants: the CSV holds only what follows from file, family, code and options; seconds, which
differ from run to run, stand in the JSON alone.

Knows nothing about how trajectories were played.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from cloud_learner.experiment.arms import Policy, policies_of
from cloud_learner.experiment.cadence import Cadence, cadences_of
from cloud_learner.experiment.scoring import Measures, majority, persistence
from cloud_learner.experiment.trajectory import (
    LATER,
    STATIC,
    STUDENT,
    TEACHER,
    Played,
    Setting,
)
from cloud_learner.experiment.verdict import (
    DAY_S,
    Line,
    Step,
    difference,
    lines_of,
    recency_of,
    sentence,
    steps_of,
)
from cloud_learner.stats.blocks import Interval
from cloud_learner.train.family import Family

_ROOT = Path(__file__).parents[2]
_NAMES = ("policy", "model", "cadence", "every_s", "loss", "loss_min", "loss_max", "quality")
_MORE = ("accuracy", "kappa", "calibration", "updates", "sample_passes", "bytes_shipped")


class Options(msgspec.Struct, frozen=True):
    """What is compared: cadences from slow to fast, policies, phases of a sync, seeds."""

    cadences: list[Cadence]
    policies: list[Policy]
    offsets: int
    seeds: int

    @classmethod
    def of(cls, cadence: str, policy: str, offsets: int, seeds: int) -> Options:
        """From what a person wrote. Raises: ConfigError `bad_cadence`, `bad_policy`."""
        return cls(cadences_of(cadence), policies_of(policy), offsets, seeds)


class Recency(msgspec.Struct, frozen=True):
    """The slowest cadence against the fastest, for the first seed of the production cycle.

    `worse` is what is lost in all, `recency` the part of it that newer data alone account for.
    """

    worse: Interval
    recency: Interval


class Report(msgspec.Struct, frozen=True):
    """All that was found, and from what; `days` is how long the scored stream is."""

    family: str
    data: str
    data_sha256: str
    family_sha256: str
    code: dict[str, str]
    machine: dict[str, Any]
    measure: str
    predictions: int
    warm_up_examples: int
    micro_batches: int
    scored: int
    days: float
    block_s: float
    offsets: int
    seeds: list[int]
    package_bytes: int
    lines: list[Line]
    grid: list[Line]
    baselines: dict[str, Measures]
    steps: list[Step]
    sentences: list[str]
    newer_data: Recency | None
    control: Recency
    control_is_clean: bool
    failed_batches: int
    experiments_per_hour: float
    wall_s: float


def report_of(
    family: Family,
    data: Path,
    settings: dict[bool, Setting],
    options: Options,
    *,
    played: Sequence[Played],
    wall_s: float,
) -> Report:
    """The report of the trajectories that were `played` in `wall_s`; `settings[True]` is the
    control's.
    """
    setting, real = settings[False], [each for each in played if not each.job.control]
    control = _recency(settings[True], [each for each in played if each.job.control])
    assert control is not None, "the control runs always"
    truth, asked = setting.truth, setting.stream.asked
    known = setting.stream.released.labels[setting.warm]
    baselines = {
        "majority": majority(truth, known),
        "persistence": persistence(truth, asked, known),
    }
    package_bytes = max(each.package_bytes for each in played)
    make = _Lines(setting, package_bytes, baselines["persistence"])
    lines = [make.pooled(real, policy) for policy in options.policies]
    days = (float(truth.times_s[-1]) - setting.start_s) / DAY_S
    steps = [step for some in lines for step in steps_of(some, days)]
    tried = sum(len(at.measures) for each in played for some in each.models.values() for at in some)
    return Report(
        family=family.name,
        data=data.name,
        data_sha256=_sha256([data]),
        family_sha256=_sha256(path for path in family.folder.iterdir() if path.is_file()),
        code=_code(),
        machine=_machine(),
        measure=truth.task.measure,
        predictions=len(asked),
        warm_up_examples=len(setting.warm),
        micro_batches=len(setting.cuts),
        scored=len(truth),
        days=days,
        block_s=truth.day_s,
        offsets=options.offsets,
        seeds=[family.config.learning.seed + seed for seed in range(options.seeds)],
        package_bytes=package_bytes,
        lines=[line for some in lines for line in some],
        grid=make.grid(real),
        baselines=baselines,
        steps=steps,
        sentences=[sentence(step) for step in steps],
        newer_data=_recency(setting, real),
        control=control,
        control_is_clean=control.recency.covers_zero,
        failed_batches=sum(each.failed for each in played),
        experiments_per_hour=3600 * tried / wall_s,
        wall_s=wall_s,
    )


class _Lines:
    """Makes the lines of trajectories that share a setting."""

    def __init__(self, setting: Setting, package_bytes: int, persisting: Measures) -> None:
        self._setting, self._bytes, self._persisting = setting, package_bytes, persisting

    def pooled(self, played: Sequence[Played], policy: Policy) -> list[Line]:
        """Of one policy, all its seeds together."""
        some = [each for each in played if each.job.policy == policy and not each.job.static]
        return self._of(some, STUDENT)

    def grid(self, played: Sequence[Played]) -> list[Line]:
        """Models against data: the first seed of the production cycle, other models beside it."""
        return [
            line
            for model in (STATIC, STUDENT, TEACHER)
            for each in played
            if each.job.policy.kind == "incremental" and each.job.seed == 0 and model in each.models
            for line in self._of([each], model)
        ]

    def _of(self, played: Sequence[Played], model: str) -> list[Line]:
        return lines_of(
            played,
            model,
            self._setting.cadences,
            self._setting.truth,
            package_bytes=self._bytes,
            persisting=self._persisting,
        )


def _recency(setting: Setting, played: Sequence[Played]) -> Recency | None:
    for each in played:
        if LATER in each.models and each.job.seed == 0:
            own, later = each.models[STUDENT], each.models[LATER]
            worse = difference(own[0].day_losses, own[-1].day_losses, setting.truth)
            return Recency(worse, recency_of(own, later, (setting.truth, setting.later)))
    return None


def as_csv(report: Report) -> str:
    """A line for each policy, model and cadence; an empty cell is undefined."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    bounds = ("difference", "low", "high")
    against = [f"{what}_{bound}" for what in ("over_slower", "over_fastest") for bound in bounds]
    writer.writerow([*_NAMES, *_MORE, *against, "is_knee", "seeds"])
    for line in report.lines:
        writer.writerow([*_cells(line), len(report.seeds)])
    for line in report.grid:
        if line.model != STUDENT:  # whose lines, of all seeds, stand above
            writer.writerow([*_cells(line), 1])
    for name, found in report.baselines.items():
        numbers = [found.loss, "", "", found.quality, found.accuracy, "", found.calibration]
        writer.writerow([name, "", "", "", *map(_cell, numbers)])
    return file.getvalue()


def _cells(line: Line) -> list[str]:
    values: list[Any] = [getattr(line, name) for name in (*_NAMES, *_MORE)]
    for found in (line.over_slower, line.over_fastest):
        values += ["", "", ""] if found is None else [found.mean, found.low, found.high]
    return [*map(_cell, values), "yes" if line.is_knee else ""]


def _cell(value: Any) -> str:
    """Numbers to nine digits: as many as repeat from run to run, and more than mean anything."""
    if isinstance(value, float):
        return f"{value:.9g}" if math.isfinite(value) else ""
    return str(value)


def _code() -> dict[str, str]:
    packages = (_ROOT / name for name in ("cloud_learner", "edge_runtime"))
    sources = (path for package in packages for path in package.rglob("*.py"))
    return {"version": metadata.version("headwater"), "sha256": _sha256(sources)}


def _machine() -> dict[str, Any]:
    libraries = {name: metadata.version(name) for name in ("torch", "numpy", "onnxruntime")}
    return {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        **libraries,
    }


def _sha256(paths: Iterable[Path]) -> str:
    """Of all files together, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()

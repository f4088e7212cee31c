"""The value of freshness as one command: what it is worth, on your data, to ship models more often.

Why: how often to train and ship is guessed at most places, and the answer differs with each data
set. It can be measured, with what it costs beside it.

The file is replayed by event time through the joiner and the learning cycle of production. What was
known by the end of the first `WARM_UP` of the time makes the first model; every later prediction is
answered by what each cadence would have had in service then. A control runs along, on the same
pairs of features and labels at shuffled times, where no recency can be worth anything: if it finds
any, the experiment is broken.

Invariants: the same file, family, code and options give the same CSV, byte for byte. Three files
are written at the end, each with one rename; whatever comes before leaves nothing.

Knows nothing about gates and devices. What the control is, and why: docs/experiments.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from cloud_learner.console.freshness_figure import freshness_figure
from cloud_learner.experiment.arms import Policy
from cloud_learner.experiment.asked import Asked, Index, read_asked
from cloud_learner.experiment.pool import run_all, workers_for
from cloud_learner.experiment.report import Options, Report, as_csv, report_of
from cloud_learner.experiment.scoring import Truth, later, truth_of
from cloud_learner.experiment.stream import Cut, streamed
from cloud_learner.experiment.trajectory import Job, Played, Setting, play, static_names
from cloud_learner.train.family import Family
from edge_runtime.errors import CapacityError, ConfigError
from edge_runtime.files import write_atomic

WARM_UP = 0.15
ROWS_MIN = 200
DAY_S = 86_400.0

Tell = Callable[[str], None]


def freshness(
    folder: Path, data: Path, options: Options, out: Path, *, tell: Tell, workers: int = 0
) -> Report:
    """Measure, and write `freshness.csv`, `freshness.json` and `freshness.svg` into `out`.

    `workers` 0 takes all processors. Raises: ConfigError, RequestError, CapacityError.
    """
    started_s = time.monotonic()
    if out.exists() and not out.is_dir():
        raise ConfigError("bad_out", f"--out {out} is a file; it is unchanged", "name a folder")
    family = Family.load(folder)
    asked = read_asked(family, data)
    setting = setting_of(family, asked, options)
    tell(
        f"{len(asked):,} predictions, {len(setting.warm):,} examples of the warm-up,"
        f" {len(setting.cuts):,} micro-batches, {len(setting.truth):,} predictions to score"
    )
    shuffled = asked.shuffled(family.config.learning.seed)
    settings = {False: setting, True: setting_of(family, shuffled, options)}
    jobs = _jobs(family, options)
    steps = sum(len(settings[job.control].cuts) + 1 for job in jobs)
    played = run_all(_play, settings, jobs, steps, workers or workers_for(len(jobs)))
    report = report_of(
        family, data, settings, options, played=played, wall_s=time.monotonic() - started_s
    )
    _write(report, out)
    return report


def setting_of(family: Family, asked: Asked, options: Options) -> Setting:
    """The stream of `asked` with all that its trajectories share. Raises: ConfigError."""
    window_s = family.config.label.window_s
    start_s = asked.start_s + WARM_UP * (asked.end_s - asked.start_s)
    stream = streamed(family, asked)
    cuts = stream.cuts(family.config, start_s)
    warm = stream.known_before(start_s)
    truth = truth_of(family.config.task, asked, start_s, window_s)
    _check(options, start_s, cuts, warm, truth)
    return Setting(
        family.folder,
        stream,
        cuts,
        warm,
        start_s,
        truth,
        later(truth),
        options.cadences,
        options.offsets,
    )


def _check(options: Options, start_s: float, cuts: list[Cut], warm: Index, truth: Truth) -> None:
    if len(warm) < ROWS_MIN or len(truth) < ROWS_MIN or not cuts:
        raise ConfigError(
            "too_few_rows",
            f"{len(warm)} examples of the warm-up, {len(cuts)} micro-batches after it and"
            f" {len(truth)} predictions to score; {ROWS_MIN}, one and {ROWS_MIN} are the least",
            "a longer file, a shorter label.window_s, or a smaller learning.batch_size",
        )
    if not np.ptp(truth.labels):
        raise ConfigError(
            "one_class",
            "all labels after the warm-up are alike: there is nothing to tell apart",
            "a longer file, or one in which the outcome differs",
        )
    span_s = float(truth.times_s[-1]) - start_s
    for cadence in options.cadences:
        if math.isfinite(cadence.every_s) and cadence.every_s >= span_s:
            raise ConfigError(
                "bad_cadence",
                f"a cadence of {cadence.name} does not fit the {span_s / DAY_S:.3g} days that are"
                " scored",
                f"leave {cadence.name} out of --cadence; never is there for the slowest",
            )


def _jobs(family: Family, options: Options) -> list[Job]:
    """The longest first, so that none is left alone at the end."""
    order = sorted(options.policies, key=lambda policy: policy.kind != "scratch")
    jobs = [
        Job(policy, seed, compares_teacher=seed == 0)
        for policy in order
        for seed in range(options.seeds)
    ]
    incremental = Policy("incremental", "incremental")
    has_windows = 0 < len(static_names(family)) < len(family.spec.features)
    if incremental in options.policies and has_windows:
        jobs.append(Job(incremental, 0, static=True))
    return [*jobs, Job(incremental, 0, control=True)]


def _play(settings: dict[bool, Setting], job: Job, tick: Callable[[], None]) -> Played:
    return play(settings[job.control], job, tick)


def _write(report: Report, out: Path) -> None:
    """Raises: CapacityError; a file that was not written is as it was."""
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "freshness.csv", as_csv(report).encode())
        write_atomic(out / "freshness.json", text + b"\n")
        write_atomic(out / "freshness.svg", freshness_figure(report).encode())
    except OSError as error:
        raise CapacityError("disk_failed", f"{out} was not written: {error}") from error

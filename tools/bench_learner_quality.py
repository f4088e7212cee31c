"""How right the learner is: prequential quality on real streams, beside what costs nothing.

Why: a number of a learner says something only beside the frozen model, the label before, and the
way of working that it replaces, on the same rows.

Invariants: every prediction is scored once, by what had been learned when it was made; quality is
that of the distilled student, in floating point (int8 has a row of its own).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bench_learner_streams import Setup, asked_of, first, learned, over_seeds, quality, setup_of
from bench_rows import Row

from cloud_learner.experiment.prequential import Course, stream_start_s
from cloud_learner.experiment.scoring import persistence, truth_of
from cloud_learner.stats.scores import auc
from cloud_learner.train.dataset import Matrix

FEBRUARY_S = 1_359_694_800.0  # 2013-02-01 at New York
STORM_DAYS = (8, 9)  # of February 2013, local
DAY_S = 86_400.0
CLASS_CHANCE = 1 / 6
HOTEL_WARM_SHARE = 0.15


def flights(data: Path, seeds: int, predictions: int | None) -> list[Row]:
    """The year with windows, and the storm within it."""
    asked = first(asked_of("flight_delay", data), predictions)
    found = over_seeds(setup_of("flight_delay", asked, FEBRUARY_S), seeds, _flights)
    return [
        Row("flights with windows, continual, the year: AUC", found["year"], "", 0.776, True),
        Row("flights with windows, frozen, the year: AUC", found["year frozen"], ""),
        *_storm_rows(found),
    ]


def _storm_rows(found: dict[str, float]) -> list[Row]:
    least = found["month"] - 0.02
    return [
        Row("flights, storm: AUC of 9 February", found["second"], "", least, True),
        Row("flights, storm: AUC of 8 February", found["first"], ""),
        Row("flights, storm: mean AUC of the days of February", found["month"], ""),
        Row("flights, storm: AUC of 9 February, frozen", found["second frozen"], ""),
        Row("flights, storm: mean AUC of the days of February, frozen", found["month frozen"], ""),
        Row("flights, storm: hours to recover", found["recovery"], "h"),
    ]


def _flights(setup: Setup, seed: int) -> dict[str, float]:
    course = learned(setup, seed)
    days = ((course.truth.times_s - FEBRUARY_S) // DAY_S).astype(int) + 1
    found: dict[str, float] = {}
    for suffix, part in (("", "student"), (" frozen", "frozen")):
        answers = course.answers[part][:, 0]
        daily = {
            day: auc(course.truth.labels[days == day], answers[days == day]) for day in range(1, 29)
        }
        found["year" + suffix] = auc(course.truth.labels, answers)
        found["month" + suffix] = float(np.nanmean(list(daily.values())))
        found["first" + suffix], found["second" + suffix] = (daily[day] for day in STORM_DAYS)
    found["recovery"] = _recovery_h(course)
    return found


def _recovery_h(course: Course) -> float:
    """Hours from the storm's first flight until a day's AUC is the month's mean less 2 points."""
    truth, answers = course.truth, course.answers["student"][:, 0]
    start_s = FEBRUARY_S + (STORM_DAYS[0] - 1) * DAY_S
    month = auc(*_between(truth.times_s, truth.labels, answers, FEBRUARY_S, 28 * DAY_S))
    for hour in range(6, 24 * 7):
        some = _between(truth.times_s, truth.labels, answers, start_s + (hour - 6) * 3600, 6 * 3600)
        if len(some[0]) >= 100 and auc(*some) >= month - 0.02:
            return float(hour)
    return float("nan")


def _between(
    times_s: np.ndarray, labels: Matrix, answers: Matrix, start_s: float, span_s: float
) -> tuple[Matrix, Matrix]:
    chosen = (times_s >= start_s) & (times_s < start_s + span_s)
    return labels[chosen], answers[chosen]


def hotel(data: Path, seeds: int, count: int | None) -> list[Row]:
    """Labels that are really late: the policies on the same bookings.

    The stream begins when a share of the bookings has been made: the first of them lie years apart.
    """
    asked = first(asked_of("hotel_cancellation", data), count)
    after_s = float(asked.times_s[int(HOTEL_WARM_SHARE * len(asked))])
    rows: list[Row] = []
    for policy in ("mature", "arrival"):
        setup = setup_of("hotel_cancellation", asked, after_s, label__policy=policy)
        found = over_seeds(setup, seeds, quality)
        decided = policy == "mature"
        rows += [
            Row(
                f"hotel bookings, `{policy}`: AUC",
                found["student.quality"],
                "",
                0.82 if decided else None,
                True,
            ),
            Row(
                f"hotel bookings, `{policy}`: NE",
                found["student.loss"],
                "",
                0.76 if decided else None,
            ),
            Row(
                f"hotel bookings, `{policy}`: calibration",
                found["student.calibration"],
                "",
            ),
        ]
        if decided:
            off = abs(found["student.calibration"] - 1.0)
            rows.append(Row("hotel bookings, `mature`: calibration away from 1", off, "", 0.1))
    return rows


def elec2(data: Path, seeds: int, count: int | None) -> list[Row]:
    """Without features from labels, and with them."""
    asked = first(asked_of("electricity", data), count)
    found = over_seeds(setup_of("electricity", asked), seeds, quality)
    lagged = first(asked_of("electricity_lags", data), count)
    with_lags = over_seeds(setup_of("electricity_lags", lagged), seeds, quality)
    persisting = _persisting(setup_of("electricity", asked))
    least = max(0.885, persisting)
    return [
        Row(
            "elec2, no label lags, micro-batches of 100: AUC",
            found["student.quality"],
            "",
            0.85,
            True,
        ),
        Row("elec2, no label lags: accuracy", found["student.accuracy"], ""),
        Row("elec2, persistence: accuracy", persisting, ""),
        Row(
            "elec2, immediate labels with label-lag windows: accuracy",
            with_lags["student.accuracy"],
            "",
            least,
            True,
        ),
        Row(
            "elec2, label-lag windows: kappa over persistence",
            (with_lags["student.accuracy"] - persisting) / (1 - persisting),
            "",
            0.0,
            True,
        ),
    ]


def _persisting(setup: Setup) -> float:
    family, asked = setup.family(0), setup.stream.asked
    window_s = family.config.label.window_s
    start_s = stream_start_s(asked)
    truth = truth_of(family.config.task, asked, start_s, window_s)
    return persistence(truth, asked, asked.labels[asked.times_s < start_s]).accuracy


def insects(data: Path, seeds: int, count: int | None) -> list[Row]:
    """Adaptation and retention, of one student."""
    asked = first(asked_of("insects", data), count)
    found = over_seeds(setup_of("insects", asked), seeds, _insects)
    return [
        Row("insects: prequential accuracy of the student", found["student"], "", 0.75, True),
        Row("insects: kept on the first concept by the student", found["kept"], "", 0.55, True),
        *(
            Row(f"insects: {name} of {part}", found[f"{name} {part}"], "")
            for part in ("fast", "stable")
            for name in ("accuracy", "kept")
        ),
        Row("insects: kept by chance", CLASS_CHANCE, ""),
    ]


def _insects(setup: Setup, seed: int) -> dict[str, float]:
    course = learned(setup, seed)
    asked, truth = setup.stream.asked, course.truth
    features, labels = asked.features[course.warm_held_out], asked.labels[course.warm_held_out]
    parts = {"student": course.cycle.student, **course.cycle.replicas.all}
    kept = {
        name: float(np.mean(each.answers(features).argmax(1) == labels))
        for name, each in parts.items()
    }
    found = {"student": truth.accuracy(course.answers["student"]), "kept": kept["student"]}
    for part in ("fast", "stable"):
        found[f"accuracy {part}"] = truth.accuracy(course.answers[part])
        found[f"kept {part}"] = kept[part]
    return found

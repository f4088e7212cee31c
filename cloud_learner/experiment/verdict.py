"""What a freshness experiment says: a line for each cadence, the knee, what more freshness costs.

Why: a table of scores is no answer; whoever decides how often to ship wants to know from where on
it is worth nothing, and what the last bit costs.

Differences are between losses on the same rows, over that of the best constant answer, with an
interval by the moving-block bootstrap over days. The knee is the slowest cadence that, like all
faster ones, cannot be told from the fastest, or is less than `EPSILON` worse.

A model that learns on gains twice: it has seen newer data, and more of them. Recency is the first
alone: how much further the fastest cadence is ahead of the slowest on the rows of its day than the
same two models are on rows of a later time, which neither has seen either. At shuffled times it is
0, whatever more data are worth.

Invariants: pure. Same trajectories, same lines. Seeds and phases are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec
import numpy as np

from cloud_learner.experiment.asked import Floats
from cloud_learner.experiment.cadence import Cadence
from cloud_learner.experiment.scoring import Measures, Truth, kappa
from cloud_learner.experiment.trajectory import AtCadence, Played
from cloud_learner.stats.blocks import Interval, interval

EPSILON = 0.001
"""A difference of a tenth of a percent of the loss of the best constant answer is none."""
BOOTSTRAP_SEED = 1
DAY_S = 86_400.0

Truths = tuple[Truth, Truth]


class Line(msgspec.Struct, frozen=True):
    """One cadence of one policy. Costs are those of one run: means over seeds and phases.

    `loss_min` and `loss_max` are the luckiest and the unluckiest of phases and seeds. `over_slower`
    and `over_fastest` are losses less those of that cadence: positive is worse.
    """

    policy: str
    model: str
    cadence: str
    every_s: float
    loss: float
    loss_min: float
    loss_max: float
    quality: float
    accuracy: float
    kappa: float
    calibration: float
    over_slower: Interval | None
    over_fastest: Interval | None
    is_knee: bool
    updates: float
    sample_passes: float
    bytes_shipped: float
    cpu_s: float


class Step(msgspec.Struct, frozen=True):
    """What going from one cadence to the next faster one brings and costs, a day.

    `gain_percent` is of the slower one's loss; costs are for each percent of it, None where there
    is no gain that can be told from none.
    """

    policy: str
    slower: str
    faster: str
    gain_percent: float
    is_sure: bool
    cpu_s_per_percent: float | None
    bytes_per_percent: float | None


def lines_of(
    played: Sequence[Played],
    model: str,
    cadences: Sequence[Cadence],
    truth: Truth,
    *,
    package_bytes: int,
    persisting: Measures,
) -> list[Line]:
    """The lines of one policy and model, of all its seeds, from the slowest to the fastest."""
    columns = [[each.models[model][at] for each in played] for at in range(len(cadences))]
    days = [np.mean([seed.day_losses for seed in column], axis=0) for column in columns]
    over_fastest = [difference(each, days[-1], truth) for each in days[:-1]]
    knee = knee_of(over_fastest)
    lines = []
    for at, (cadence, column) in enumerate(zip(cadences, columns, strict=True)):
        measures = [each for seed in column for each in seed.measures]
        mean, updates = _mean(measures), _mean_of(column, "updates")
        lines.append(
            Line(
                policy=played[0].job.policy.name,
                model=model,
                cadence=cadence.name,
                every_s=cadence.every_s,
                loss=mean.loss,
                loss_min=min(each.loss for each in measures),
                loss_max=max(each.loss for each in measures),
                quality=mean.quality,
                accuracy=mean.accuracy,
                kappa=kappa(mean, persisting),
                calibration=mean.calibration,
                over_slower=difference(days[at], days[at - 1], truth) if at else None,
                over_fastest=over_fastest[at] if at < len(cadences) - 1 else None,
                is_knee=at == knee,
                updates=updates,
                sample_passes=_mean_of(column, "sample_passes"),
                bytes_shipped=updates * package_bytes,
                cpu_s=_mean_of(column, "cpu_s"),
            )
        )
    return lines


def knee_of(over_fastest: Sequence[Interval]) -> int:
    """The place of the knee, given how much worse each is than the fastest, which comes last."""
    place = len(over_fastest)
    while place and is_none(over_fastest[place - 1]):
        place -= 1
    return place


def recency_of(own: Sequence[AtCadence], later: Sequence[AtCadence], truths: Truths) -> Interval:
    """What newer data alone are worth, slowest against fastest; days count alike."""
    ahead = (own[0].day_losses - own[-1].day_losses, later[0].day_losses - later[-1].day_losses)
    counts = [truth.counts for truth in truths]
    days = min(len(counts[0]), len(counts[1]))
    means = [
        sums[:days] / np.where(count[:days] > 0, count[:days], np.nan)
        for sums, count in zip(ahead, counts, strict=True)
    ]
    further = means[0] - means[1]
    further = further[np.isfinite(further)]
    return interval(further, np.ones(len(further)), seed=BOOTSTRAP_SEED)


def is_none(worse: Interval) -> bool:
    """Whether a difference may be none, or does not matter."""
    return not worse.low > 0 or worse.mean < EPSILON


def steps_of(lines: Sequence[Line], days: float) -> Iterator[Step]:
    """From each cadence to the next faster one; `days` is how long the scored stream is."""
    for slower, faster in pairwise(lines):
        change = faster.over_slower
        assert change is not None, "the slowest comes first"
        gain = -100 * change.mean / slower.loss
        is_sure = change.high < 0 and gain > 0

        def of(more: float, *, gain: float = gain, is_sure: bool = is_sure) -> float | None:
            return max(more, 0.0) / days / gain if is_sure else None

        yield Step(
            slower.policy,
            slower.cadence,
            faster.cadence,
            gain,
            is_sure,
            of(faster.cpu_s - slower.cpu_s),
            of(faster.bytes_shipped - slower.bytes_shipped),
        )


def sentence(step: Step) -> str:
    """The break-even of a step, in words."""
    where = f"{step.policy}: {step.faster} over {step.slower}"
    if step.cpu_s_per_percent is None or step.bytes_per_percent is None:
        return f"{where} brings nothing that can be told from nothing ({step.gain_percent:+.2f} %)"
    return (
        f"{where} brings {step.gain_percent:.2f} %; it pays if 1 % less loss is worth more than"
        f" {step.cpu_s_per_percent:.2g} s of a processor and"
        f" {size(step.bytes_per_percent)} to each device, a day"
    )


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def difference(ours: Floats, theirs: Floats, truth: Truth) -> Interval:
    """Of mean losses, from their sums a day."""
    return interval(ours - theirs, truth.counts, seed=BOOTSTRAP_SEED)


def _mean(measures: Sequence[Measures]) -> Measures:
    found = {
        name: math.fsum(getattr(each, name) for each in measures) / len(measures)
        for name in Measures.__struct_fields__
    }
    return Measures(**found)


def _mean_of(column: Sequence[AtCadence], name: str) -> float:
    return math.fsum(getattr(each, name) for each in column) / len(column)

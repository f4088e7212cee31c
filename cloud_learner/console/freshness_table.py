"""The end of a freshness experiment on a terminal: a table, and what it says, in sentences.

Invariants: pure; as wide as a terminal of 100 columns; an experiment whose control is not clean
gives no advice.

Knows nothing about how the numbers came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from cloud_learner.console.freshness_figure import short, take_away
from cloud_learner.experiment.report import Recency, Report
from cloud_learner.experiment.verdict import Line, size
from cloud_learner.stats.blocks import Interval


def table(report: Report) -> str:
    """The report as text."""
    return "\n".join([*_policies(report), *_models(report), *_words(report)])


def _policies(report: Report) -> Iterator[str]:
    yield _row("policy", "cadence", "loss", report.measure, "against fastest", "rows", "bytes")
    for line in report.lines:
        enough = line.is_knee and report.control_is_clean
        yield _line(line.policy, line) + ("  <- enough" if enough else "")
    for name, found in report.baselines.items():
        yield _row(name, "", _number(found.loss), _number(found.quality), "", "", "")


def _models(report: Report) -> Iterator[str]:
    """Models against data, at equal passes: a row for each model, a column for each cadence."""
    names = list(dict.fromkeys(line.model for line in report.grid))
    if len(names) < 2:
        return
    yield ""
    yield "models against data: loss of the first seed"
    by_model = {name: [line for line in report.grid if line.model == name] for name in names}
    yield _cells("", [line.cadence for line in by_model[names[0]]])
    for name, lines in by_model.items():
        yield _cells(name, [_number(line.loss) for line in lines])


def _words(report: Report) -> Iterator[str]:
    yield ""
    if report.control_is_clean:
        for name in dict.fromkeys(line.policy for line in report.lines):
            yield f"{name}: {take_away([line for line in report.lines if line.policy == name])}"
        yield from report.sentences
    if report.newer_data is not None:
        yield f"slowest against fastest: {_recency(report.newer_data)}"
    clean = "clean" if report.control_is_clean else "NOT CLEAN: do not trust this experiment"
    yield f"at shuffled times: {_recency(report.control)}; {clean}"
    if report.failed_batches:
        yield f"{report.failed_batches} micro-batches were not learned: their weights ran away"
    yield f"{report.experiments_per_hour:,.0f} experiments an hour, {report.wall_s:.0f} s in all"


def _recency(found: Recency) -> str:
    return f"{_interval(found.worse)} in all, {_interval(found.recency)} by newer data alone"


def _line(name: str, line: Line) -> str:
    against = "" if line.over_fastest is None else _interval(line.over_fastest)
    costs = short(line.sample_passes), size(line.bytes_shipped)
    return _row(name, line.cadence, _number(line.loss), _number(line.quality), against, *costs)


def _interval(found: Interval) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f} {found.high:+.4f}]"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _row(*cells: str) -> str:
    widths = (-13, -8, 7, 9, 26, 8, 9)
    pairs = zip(cells, widths, strict=True)
    return " ".join(f"{c:<{-w}}" if w < 0 else f"{c:>{w}}" for c, w in pairs).rstrip()


def _cells(name: str, cells: Sequence[str]) -> str:
    return f"{name:<18}" + "".join(f"{cell:>9}" for cell in cells)

"""The picture of a run: AUC over event time of four worlds, with the releases marked, as SVG.

Why: one look must say whether keeping a model fresh was worth it; a plotting library would weigh
more than the device runtime.

Invariants: the same data gives the same bytes; no line, mark or word is told from another by colour
alone (dashes, shapes and labels say it too); the picture carries its own background, so it reads
the same on light and on dark pages; a gap in the data is a gap in the line.

Knows nothing about how predictions were scored or why a release was promoted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cloud_learner.console.svg import STYLE, Look, curve, stroke, text
from cloud_learner.stats.scores import auc
from edge_runtime.errors import CapacityError
from edge_runtime.files import write_atomic

DAY_S = 86_400.0
# What the picture shows: a point a day, each over the week that ends there.
WINDOW_S, STEP_S = 7 * DAY_S, DAY_S

Outcome = Literal["promoted", "rolled back", "on trial"]


class Series(msgspec.Struct, frozen=True):
    """AUC of one world: at `ends_s[i]`, of the window that ends there; and over all predictions."""

    ends_s: Sequence[float]
    auc: Sequence[float]
    overall: float


class ReleaseMark(msgspec.Struct, frozen=True):
    """How a release ended, and the event time at which it did."""

    time_s: float
    outcome: Outcome


_LOOKS = {
    "windows_continual": Look("Windows + continual", "Headwater", "#0060a8", "none", 3.4),
    "windows_frozen": Look("Windows + frozen", "fresh features alone", "#a84300", "9 4", 2.0),
    "static_continual": Look("Static + continual", "learning on alone", "#007a58", "2 3", 2.2),
    "static_frozen": Look("Static + frozen", "how most companies run", "#5b6067", "11 3 2 3", 2.0),
}
_WIDTH, _HEIGHT = 960, 540
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 664.0, 106.0, 418.0
_LANES: dict[Outcome, float] = {"promoted": 468.0, "rolled back": 488.0, "on trial": 508.0}
_LABEL_GAP = 44.0
_SUBTITLE = (
    f"AUC of the last {WINDOW_S / DAY_S:.0f} days, all worlds on the same stream; each prediction"
    " scored once with what turned out to be true"
)


def rolling_auc(
    times_s: ArrayLike, labels: ArrayLike, scores: ArrayLike, window_s: float, step_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of windows every `step_s` and the AUC of what lies in (end - window_s, end].

    All windows are full, but where the stream is shorter than one: then it is the only one. Rows
    need no order. NaN where a window holds one class only. Empty without rows.
    """
    times = np.asarray(times_s, dtype=np.float64)
    order = np.argsort(times, kind="stable")
    times, y, p = times[order], np.asarray(labels)[order], np.asarray(scores)[order]
    if not len(times):
        return np.empty(0), np.empty(0)
    ends = np.arange(times[0] + window_s, np.nextafter(times[-1], np.inf), step_s)
    ends = ends if len(ends) else times[-1:]
    first = np.searchsorted(times, ends - window_s, side="right")
    last = np.searchsorted(times, ends, side="right")
    values = [auc(y[i:j], p[i:j]) for i, j in zip(first, last, strict=True)]
    return ends, np.array(values, dtype=np.float64)


def quality_figure(
    series: Mapping[str, Series], releases: Sequence[ReleaseMark], path: Path
) -> None:
    """Write the picture at `path`. `series` by world, named as in the report's `auc`.

    Raises: CapacityError, with `path` unchanged.
    """
    try:
        write_atomic(path, draw(series, releases).encode())
    except OSError as error:
        raise CapacityError("disk_failed", f"picture {path} was not written: {error}") from error


def draw(series: Mapping[str, Series], releases: Sequence[ReleaseMark]) -> str:
    """The SVG text of `quality_figure`."""
    assert series.keys() <= _LOOKS.keys(), f"unknown worlds {series.keys() - _LOOKS.keys()}"
    frame = _Frame(series, releases)
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"'
    parts = [
        f'{head} aria-labelledby="title desc">',
        f'<title id="title">{escape(take_away(series))}</title>',
        f'<desc id="desc">{escape(_description(series, releases))}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="#fdfdfc" stroke="#d5d9de"/>',
        text(24, 38, take_away(series), "title"),
        text(24, 61, _SUBTITLE, "sub"),
        *_axes(frame),
        *_release_lanes(frame, releases),
        *(_line(frame, world, series[world]) for world in reversed(_LOOKS) if world in series),
        *_legend(frame, series),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def take_away(series: Mapping[str, Series]) -> str:
    """The one sentence that the picture shows, whichever way the run went."""
    overall = {world: line.overall for world, line in series.items() if line.overall >= 0}
    live, frozen = overall.get("windows_continual"), overall.get("static_frozen")
    if live is None or frozen is None:
        return "AUC over event time"
    if live >= max(overall.values()):
        return f"Fresh features and continual learning lift AUC from {frozen:.3f} to {live:.3f}"
    return f"Fresh features and continual learning: AUC {live:.3f}, against {frozen:.3f} without"


class _Frame:
    """The scales: event time to x, AUC to y."""

    def __init__(self, series: Mapping[str, Series], releases: Sequence[ReleaseMark]) -> None:
        times = [time for line in series.values() for time in line.ends_s]
        times += [mark.time_s for mark in releases]
        values = [v for line in series.values() for v in line.auc if not math.isnan(v)] or [0.5]
        self.start_s, self.stop_s = min(times, default=0.0), max(times, default=DAY_S)
        if self.stop_s - self.start_s < DAY_S:
            self.stop_s = self.start_s + DAY_S
        self.step = 0.05 if max(values) - min(values) > 0.12 else 0.02
        self.low = math.floor(min(values) / self.step + 1e-9) * self.step
        self.high = max(math.ceil(max(values) / self.step - 1e-9) * self.step, self.low + self.step)

    def x(self, time_s: float) -> float:
        share = (time_s - self.start_s) / (self.stop_s - self.start_s)
        return round(_LEFT + share * (_RIGHT - _LEFT), 1)

    def y(self, value: float) -> float:
        return round(_BOTTOM - (value - self.low) / (self.high - self.low) * (_BOTTOM - _TOP), 1)

    def levels(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + i * self.step for i in range(count + 1)]

    def days(self) -> Iterator[tuple[float, str]]:
        """Times of the ticks with their names: months where the stream is long, else days."""
        span = (self.stop_s - self.start_s) / DAY_S
        every = next((days for days in (1, 2, 7) if span / days <= 10), 0)
        day = datetime.fromtimestamp(self.start_s, UTC).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        left = 0
        while day.timestamp() <= self.stop_s:
            if day.timestamp() >= self.start_s and (left % every == 0 if every else day.day == 1):
                yield day.timestamp(), f"{day:%b}" if not every else f"{day:%b} {day.day}"
            left, day = left + 1, day + timedelta(days=1)


def _axes(frame: _Frame) -> Iterator[str]:
    for level in frame.levels():
        y = frame.y(level)
        yield stroke("grid", _LEFT, y, _RIGHT, y)
        yield text(_LEFT - 8, y + 4, f"{level:.2f}", "tick end")
    for time_s, name in frame.days():
        x = frame.x(time_s)
        yield stroke("axis", x, _BOTTOM, x, _BOTTOM + 5)
        yield text(x, _BOTTOM + 19, name, "tick mid")
    yield stroke("axis", _LEFT, _BOTTOM, _RIGHT, _BOTTOM)
    yield text(_LEFT - 38, _TOP - 12, "AUC", "tick")
    years = sorted({datetime.fromtimestamp(t, UTC).year for t in (frame.start_s, frame.stop_s)})
    label = f"event time (UTC), {'-'.join(map(str, years))}"
    yield text(_RIGHT, _BOTTOM + 36, label, "tick end")


def _release_lanes(frame: _Frame, releases: Sequence[ReleaseMark]) -> Iterator[str]:
    yield text(_LEFT, _BOTTOM + 36, "Releases", "name")
    for outcome, y in _LANES.items():
        marks = [mark for mark in releases if mark.outcome == outcome]
        yield stroke("grid", _LEFT, y, _RIGHT, y)
        yield from (_shape(outcome, frame.x(mark.time_s), y) for mark in marks)
        yield _shape(outcome, _RIGHT + 28, y)
        yield text(_RIGHT + 50, y + 4, f"{len(marks)} {outcome}", "note")


def _shape(outcome: Outcome, x: float, y: float) -> str:
    if outcome == "promoted":
        return f'<path d="M{x} {y - 6}l5.5 10h-11z" fill="#0060a8"/>'
    if outcome == "rolled back":
        cross = f"M{x - 4.5} {y - 4.5}l9 9m0-9l-9 9"
        return f'<path d="{cross}" stroke="#a84300" stroke-width="2.4" fill="none"/>'
    return f'<circle cx="{x}" cy="{y}" r="4" fill="#fdfdfc" stroke="#5b6067" stroke-width="1.6"/>'


def _line(frame: _Frame, world: str, line: Series) -> str:
    steps, pen = [], "M"
    for time_s, value in zip(line.ends_s, line.auc, strict=True):
        if math.isnan(value):
            pen = "M"
            continue
        steps.append(f"{pen}{frame.x(time_s)} {frame.y(value)}")
        pen = "L"
    return curve("".join(steps), _LOOKS[world])


def _legend(frame: _Frame, series: Mapping[str, Series]) -> Iterator[str]:
    """A label at the right end of each line, moved apart where the ends lie close."""
    ends = sorted((_last(frame, line)[::-1], world) for world, line in series.items())
    heights = _apart([y for (y, _), _ in ends])
    for y, ((end_y, end_x), world) in zip(heights, ends, strict=True):
        look, overall = _LOOKS[world], series[world].overall
        yield f'<circle cx="{end_x}" cy="{end_y}" r="3.5" fill="{look.colour}"/>'
        yield f'<path class="lead" d="M{end_x} {end_y}L{_RIGHT + 14} {y}"/>'
        yield curve(f"M{_RIGHT + 14} {y}h28", look)
        yield text(_RIGHT + 50, y + 1, look.name, "name")
        yield text(_RIGHT + 50, y + 17, f"AUC {overall:.3f}: {look.note}", "note")


def _last(frame: _Frame, line: Series) -> tuple[float, float]:
    """Where a line ends on the plot; at its lower right corner when it has no point."""
    known = [(t, v) for t, v in zip(line.ends_s, line.auc, strict=True) if not math.isnan(v)]
    return (frame.x(known[-1][0]), frame.y(known[-1][1])) if known else (_RIGHT, _BOTTOM)


def _apart(heights: Sequence[float]) -> list[float]:
    """Sorted heights, moved as little as keeps labels apart and beside the plot."""
    halfway = [(a + b) / 2 for a, b in zip(_down(heights), _up(heights), strict=True)]
    return [round(height, 1) for height in _up(_down(halfway))]


def _down(heights: Sequence[float]) -> list[float]:
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _LABEL_GAP if placed else _TOP + 4))
    return placed


def _up(heights: Sequence[float]) -> list[float]:
    placed: list[float] = []
    for height in reversed(heights):
        placed.append(min(height, placed[-1] - _LABEL_GAP if placed else _BOTTOM - 18))
    return placed[::-1]


def _description(series: Mapping[str, Series], releases: Sequence[ReleaseMark]) -> str:
    worlds = "; ".join(
        f"{look.name} ({look.note}) {series[world].overall:.4f}"
        for world, look in _LOOKS.items()
        if world in series
    )
    counts = ", ".join(
        f"{sum(mark.outcome == outcome for mark in releases)} {outcome}" for outcome in _LANES
    )
    return f"Line chart over event time. AUC over all predictions: {worlds}. Releases: {counts}."

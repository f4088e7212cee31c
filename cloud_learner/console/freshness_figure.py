"""The picture of a freshness experiment: error against how often is shipped, with what it costs.

Why: whoever pays for training has to see in one look from where on fresher is no better.

Above, the error of each policy at each cadence, from the slowest to the fastest; a whisker is the
interval of the difference to the fastest, a band goes from the luckiest to the unluckiest sync. The
knee is ringed. Below, on an axis of its own, the rows that training went through; then how many
updates a device got, and their bytes.

Invariants: the same report gives the same bytes, but for a report of another run nothing in it
differs either: seconds are not drawn. No line is told from another by colour alone.

Knows nothing about how the numbers came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape

from cloud_learner.console.svg import STYLE, Look, curve, stroke, text
from cloud_learner.experiment.report import Report
from cloud_learner.experiment.verdict import Line, size

_WIDTH, _HEIGHT = 960, 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 78.0, 690.0, 112.0, 392.0
_BARS_TOP, _BARS_BOTTOM = 462.0, 532.0
_LANES = {"updates": 562.0, "bytes": 584.0}
_LABEL_GAP = 38.0
_KEY_X = 236.0
_LOOKS = (
    Look("", "", "#0060a8", "none", 3.0),
    Look("", "", "#a84300", "9 4", 2.4),
    Look("", "", "#007a58", "2 3", 2.4),
    Look("", "", "#5b6067", "11 3 2 3", 2.4),
)
_STEPS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # between lines, in percent
_UNITS = {"d": "day", "h": "hour", "m": "minute", "s": "second"}


def freshness_figure(report: Report) -> str:
    """The picture as SVG text."""
    frame = _Frame(report)
    size_ = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    title = take_away(frame.policies[0].lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size_} role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(_description(report))}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="#fdfdfc" stroke="#d5d9de"/>',
        text(24, 38, title, "title"),
        text(24, 61, _subtitle(report), "sub"),
        *_axes(frame),
        *(part for policy in reversed(frame.policies) for part in _errors(frame, policy)),
        *_names(frame),
        *_costs(frame),
        text(24, _HEIGHT - 20, _check(report), "note"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def take_away(lines: list[Line]) -> str:
    """The one sentence that the picture shows, whichever way the experiment went."""
    at = next(place for place, line in enumerate(lines) if line.is_knee)
    slowest, knee, fastest = lines[0], lines[at], lines[-1]
    if knee is slowest:
        return f"Fresher brings nothing here: {spoken(slowest)} is as good as {spoken(fastest)}"
    less = f"{100 * (1 - knee.loss / slowest.loss):.1f} % less error than {spoken(slowest)}"
    if knee is fastest:
        return f"The fresher, the better, up to {spoken(fastest)}: {less}"
    every = spoken(knee)
    return f"{every[0].upper()}{every[1:]} is enough: {less}; faster is no better"


def spoken(line: Line) -> str:
    """A cadence in words: `every 7 days`, `every hour`, `never`."""
    count, unit = line.cadence[:-1], _UNITS.get(line.cadence[-1:], "")
    if math.isinf(line.every_s):
        return line.cadence
    return f"every {unit}" if count == "1" else f"every {count} {unit}s"


class _Policy(NamedTuple):
    """The lines of one policy, and how they are drawn."""

    name: str
    lines: list[Line]
    look: Look
    place: int


class _Frame:
    """The scales: cadence to x, error and rows of training to y."""

    def __init__(self, report: Report) -> None:
        names = list(dict.fromkeys(line.policy for line in report.lines))
        self.policies = [
            _Policy(
                name,
                [line for line in report.lines if line.policy == name],
                _LOOKS[place % len(_LOOKS)],
                place,
            )
            for place, name in enumerate(names)
        ]
        self.count = len(self.policies[0].lines)
        ends = [end for line in report.lines for end in (*_whisker(line, report), *_band(line))]
        span = 100 * (max(ends) - min(ends)) or 1.0
        self.step = next((step for step in _STEPS if span / step < 7), 100.0)
        self.low = math.floor(100 * min(ends) / self.step) * self.step
        self.high = math.ceil(100 * max(ends) / self.step) * self.step
        self.passes_max = max(line.sample_passes for line in report.lines) or 1.0
        self.report = report

    def x(self, place: int) -> float:
        """The middle of a cadence's column."""
        return round(_LEFT + (place + 0.5) * (_RIGHT - _LEFT) / self.count, 1)

    def beside(self, place: int, policy: _Policy, width: float) -> float:
        """Where a policy stands in a cadence's column."""
        middle = (len(self.policies) - 1) / 2
        return round(self.x(place) + (policy.place - middle) * width, 1)

    def y(self, loss: float) -> float:
        """The height of an error."""
        share = (100 * loss - self.low) / (self.high - self.low)
        return round(_BOTTOM - share * (_BOTTOM - _TOP), 1)

    def levels(self) -> list[float]:
        """The errors at which there are lines, in percent."""
        return [
            self.low + number * self.step
            for number in range(round((self.high - self.low) / self.step) + 1)
        ]


def _whisker(line: Line, report: Report) -> tuple[float, float]:
    """Both ends of the interval of a line's difference to the fastest, as errors."""
    if line.over_fastest is None:
        return line.loss, line.loss
    fastest = [each for each in report.lines if each.policy == line.policy][-1]
    return fastest.loss + line.over_fastest.low, fastest.loss + line.over_fastest.high


def _band(line: Line) -> tuple[float, float]:
    return line.loss_min, line.loss_max


def _subtitle(report: Report) -> str:
    return (
        f"{report.family}: error over {report.days:.0f} days, {report.scored:,} predictions, each"
        " scored once; 100 % is to answer all of them alike"
    )


def _check(report: Report) -> str:
    found = report.control.recency
    numbers = f"{100 * found.mean:.2f} % ({100 * found.low:.2f} to {100 * found.high:.2f})"
    verdict = "none, as it must be" if report.control_is_clean else "the experiment is NOT sound"
    return (
        f"Check: on the same data at shuffled times, newer data are worth {numbers}: {verdict}."
        f" {_counted(len(report.seeds), 'seed')}, {_counted(report.offsets, 'offset')}."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _axes(frame: _Frame) -> Iterator[str]:
    digits = 1 if frame.step < 1 else 0
    for level in frame.levels():
        y = frame.y(level / 100)
        yield stroke("grid", _LEFT, y, _RIGHT, y)
        yield text(_LEFT - 8, y + 4, f"{level:.{digits}f} %", "tick end")
    yield text(24, _TOP - 20, "Error (lower is better)", "name")
    yield f'<circle cx="{_KEY_X}" cy="{_TOP - 24}" r="7" class="lead"/>'
    yield text(_KEY_X + 14, _TOP - 20, "slowest that is good enough", "note")
    yield f'<path class="lead" d="M{_KEY_X + 208} {_TOP - 32}v16m-4 0h8m-8 -16h8"/>'
    yield text(_KEY_X + 220, _TOP - 20, "95 % interval against the fastest", "note")
    yield f'<rect x="{_KEY_X + 440}" y="{_TOP - 32}" width="10" height="16" fill="#c9ced5"/>'
    yield text(_KEY_X + 456, _TOP - 20, "luckiest to unluckiest", "note")
    yield stroke("axis", _LEFT, _BOTTOM, _RIGHT, _BOTTOM)
    for place, line in enumerate(frame.policies[0].lines):
        yield text(frame.x(place), _BOTTOM + 21, spoken(line), "name mid")
    yield text(_RIGHT + 22, _BOTTOM + 21, "gets a new model", "note")


def _errors(frame: _Frame, policy: _Policy) -> Iterator[str]:
    """Band, whiskers, line and points of one policy; the knee with a ring."""
    points = [
        (frame.beside(place, policy, 12), frame.y(line.loss))
        for place, line in enumerate(policy.lines)
    ]
    steps = "L".join(f"{x} {y}" for x, y in points)
    colour = policy.look.colour
    for (x, y), line in zip(points, policy.lines, strict=True):
        top, bottom = frame.y(line.loss_max), frame.y(line.loss_min)
        height = round(max(bottom - top, 1.0), 1)
        yield (
            f'<rect x="{x - 5}" y="{top}" width="10" height="{height}" fill="{colour}"'
            ' fill-opacity="0.22"/>'
        )
        low, high = (frame.y(end) for end in _whisker(line, frame.report))
        if low != high:
            ends = f"M{x} {low}V{high}M{x - 4} {low}h8M{x - 4} {high}h8"
            yield f'<path d="{ends}" stroke="{colour}" stroke-width="1.3" fill="none"/>'
        yield f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>'
        if line.is_knee:
            yield (
                f'<circle cx="{x}" cy="{y}" r="10" fill="none" stroke="{colour}"'
                ' stroke-width="2.2"/>'
            )
    yield curve(f"M{steps}", policy.look)


def _names(frame: _Frame) -> Iterator[str]:
    """Each policy beside its last point, moved apart where they lie close."""
    ends = sorted((frame.y(policy.lines[-1].loss), policy) for policy in frame.policies)
    heights: list[float] = []
    for end, _ in ends:
        heights.append(max(end, heights[-1] + _LABEL_GAP if heights else _TOP + 8))
    beyond = max(heights[-1] - (_BOTTOM - 16), 0.0)
    for (end, policy), height in zip(ends, heights, strict=True):
        y = round(height - beyond, 1)
        x = frame.beside(frame.count - 1, policy, 12)
        knee = next(line for line in policy.lines if line.is_knee)
        yield f'<path class="lead" d="M{x + 6} {end}L{_RIGHT + 12} {y}"/>'
        yield curve(f"M{_RIGHT + 12} {y}h28", policy.look)
        yield text(_RIGHT + 48, y + 1, policy.name, "name")
        note = f"enough: {spoken(knee)}; {frame.report.measure} {knee.quality:.3f}"
        yield text(_RIGHT + 48, y + 16, note, "note")


def _costs(frame: _Frame) -> Iterator[str]:
    """Bars for the rows of training, then updates and bytes as numbers."""
    yield text(24, _BARS_TOP - 18, "What it costs", "name")
    yield stroke("axis", _LEFT, _BARS_BOTTOM, _RIGHT, _BARS_BOTTOM)
    width = min(30.0, 60.0 / len(frame.policies))
    for policy in frame.policies:
        for place, line in enumerate(policy.lines):
            height = line.sample_passes / frame.passes_max * (_BARS_BOTTOM - _BARS_TOP)
            x, y = frame.beside(place, policy, width + 14), round(_BARS_BOTTOM - height, 1)
            yield (
                f'<rect x="{round(x - width / 2, 1)}" y="{y}" width="{width}"'
                f' height="{round(height, 1)}" fill="{policy.look.colour}"/>'
            )
            yield text(x, y - 5, short(line.sample_passes), "tick mid")
    yield text(_RIGHT + 22, _BARS_BOTTOM - 16, "rows of training, every pass", "note")
    for place, line in enumerate(frame.policies[0].lines):
        yield text(frame.x(place), _LANES["updates"], f"{line.updates:.0f}", "tick mid")
        yield text(frame.x(place), _LANES["bytes"], size(line.bytes_shipped), "tick mid")
    yield text(_RIGHT + 22, _LANES["updates"], "updates in these days", "note")
    yield text(_RIGHT + 22, _LANES["bytes"], "sent to each device", "note")


def short(count: float) -> str:
    """A number for people: 0, 950, 1.2 k, 25 M."""
    for unit in ("", " k", " M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"


def _description(report: Report) -> str:
    found = "; ".join(
        f"{line.policy}, {spoken(line)}: {100 * line.loss:.2f} %"
        f"{', good enough' if line.is_knee else ''}"
        for line in report.lines
    )
    return f"Line chart of the error by how often a new model is shipped. {found}."

"""The rows of tools/bench-serving: what was found against what there is to reach.

Invariants: of times, and of throughput, the quietest round counts, on both sides of a ratio: what
else happens on a shared machine only adds to them, for seconds at a time. Of all else it is the
median. What was not measured, such as a peer that is not installed, is a row without a value, and
no row that missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

INFER = "in-process `infer`, hot, p50"
PREDICT = "in-process `predict` with 12 windowed features and the log append, hot, p50 / p99"
PACED = "the same, paced"
SOCKET = "Unix socket round trip of `infer`, hot, p50"
HTTP = "HTTP Open Inference JSON, hot, p50, raw client"
THROUGHPUT = (
    "throughput, Unix socket pipelined: `infer` / `predict` with 12 windows and the log append, "
    "server on one core"
)
SWAPS = "100 swaps under load"
RSS = "RSS of the daemon, one small model, all rooms loaded"
COLD = "cold start to ready"
CPU = "CPU at 100 paced events/s"
FLOOR = "the floor, raw `session.run`"
QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
SOCKET_TO_PEERS = {"mosec": 4, "mlserver": 9}
HTTP_TO_PEERS = {"mosec JSON": 2.5, "mlserver": 2.5, "mosec": None}
"""How many times as long each peer must take; `mosec` alone speaks MessagePack, as the socket does,
and is only told of beside JSON."""


class Row(NamedTuple):
    """One number; `least` says that it must not be lower than `reach`, instead of not higher."""

    what: str
    value: float | None
    unit: str
    reach: float | None = None
    least: bool = False

    @property
    def ok(self) -> bool | None:
        if self.reach is None or self.value is None:
            return None
        return self.value >= self.reach if self.least else self.value <= self.reach

    def plain(self) -> dict[str, Any]:
        """As every bench prints it."""
        value, reach = (None if each is None else round(each, 3) for each in self[1:4:2])
        return {"what": self.what, "value": value, "unit": self.unit, "reach": reach, "ok": self.ok}


class Found:
    """What each round found, by name: times in microseconds, and single numbers."""

    def __init__(self) -> None:
        self._rounds: dict[str, list[Sequence[float]]] = {}

    def add(self, name: str, values: Sequence[float]) -> None:
        self._rounds.setdefault(name, []).append(values)

    def value(self, name: str, quantile: float = 0.5) -> float | None:
        """The median over the rounds of a quantile; None when nothing was found."""
        return median(self._each(name, quantile)) if name in self._rounds else None

    def quietest(self, name: str, quantile: float = 0.5) -> float | None:
        """The lowest of a quantile of all rounds; None when nothing was found."""
        return min(self._each(name, quantile)) if name in self._rounds else None

    def most(self, name: str) -> float | None:
        """The highest of all rounds; None when nothing was found."""
        return max(self._each(name, 0.5)) if name in self._rounds else None

    def times(self, name: str, other: str) -> float | None:
        """How many times as long `name` takes as `other`; None when one was not found."""
        one, two = self.quietest(name), self.quietest(other)
        return one / two if one is not None and two else None

    def ratio(self, name: str, other: str, quantile: float = 0.5) -> float | None:
        """The median over the rounds of `name` to `other`; None when one was not found."""
        if name not in self._rounds or other not in self._rounds:
            return None
        pairs = zip(self._each(name, quantile), self._each(other, quantile), strict=True)
        return median(one / two if two else math.inf for one, two in pairs)

    def _each(self, name: str, quantile: float) -> list[float]:
        return [float(np.quantile(values, quantile)) for values in self._rounds[name]]


def rows(found: Found) -> list[Row]:
    """Every line of the table of promises, and what explains it."""
    return [*_in_process(found), *_asked(found), *_loaded(found), *_resident(found)]


def _in_process(found: Found) -> Iterator[Row]:
    floor = found.quietest("floor") or math.nan
    yield from _times(found, FLOOR, "floor", "hot")
    yield from _times(found, FLOOR, "floor paced", "paced")
    yield from _times(found, INFER, "infer", "", p50=floor + 4)
    yield Row(f"{INFER}: to the floor", found.times("infer", "floor"), "times")
    yield from _times(found, PREDICT, "predict", "", p50=floor + 15, p99=60)
    yield Row(f"{PREDICT}: to the floor", found.times("predict", "floor"), "times")
    yield from _times(found, PREDICT, "nothing", "a loop of 20 µs that does nothing,")
    ratio = found.times("predict paced", "floor paced")
    yield Row(f"{PACED}: p50 to the paced floor", ratio, "times", 2.5)
    yield from _times(found, PACED, "predict paced", "")


def _asked(found: Found) -> Iterator[Row]:
    yield from _times(found, SOCKET, "socket", "", p50=45)
    yield from _times(found, SOCKET, "socket apart", "on cores as they come,")
    yield from _times(found, SOCKET, "socket client", "by edge_runtime.api.client,")
    yield from _times(found, SOCKET, "socket predict", "`predict`,")
    yield from _times(found, SOCKET, "echo", "a bare uvloop echo,")
    yield Row(f"{SOCKET}: to the floor", found.times("socket", "floor"), "times")
    for peer, times in SOCKET_TO_PEERS.items():
        yield Row(
            f"{SOCKET}: {peer} to it", found.times(peer, "socket"), "times", times, least=True
        )
    yield from _times(found, HTTP, "http", "", p50=90)
    yield from _times(found, HTTP, "http binary", "binary,")
    yield Row(f"{HTTP}: binary to JSON", found.times("http binary", "http"), "times", 1.2)
    yield Row(f"{HTTP}: to the floor", found.times("http", "floor"), "times")
    for peer, times in HTTP_TO_PEERS.items():
        yield from _times(found, HTTP, peer, f"{peer},")
        ratio = found.times(peer, "http")
        yield Row(f"{HTTP}: {peer} to it", ratio, "times", times, least=True)


def _loaded(found: Found) -> Iterator[Row]:
    for name, reach in (("infer", 80_000), ("predict", 40_000)):
        value = found.most(f"{name} a second")
        yield Row(f"{THROUGHPUT}: {name}", value, "/s", reach, least=True)
    yield Row(f"{SWAPS}: failed", found.value("swaps failed"), "answers", 0)
    yield Row(f"{SWAPS}: mixed", found.value("swaps mixed"), "answers", 0)
    yield Row(f"{SWAPS}: asked", found.value("swaps asked"), "answers")
    yield Row(
        f"{SWAPS}: p99 to the steady p99", found.ratio("swapping", "steady", 0.99), "times", 1.5
    )
    yield from _times(found, SWAPS, "steady", "steady,")
    yield from _times(found, SWAPS, "swapping", "meanwhile,")
    yield Row(
        f"{SWAPS}: RSS over the start, after 30 swaps to warm up", found.value("swaps rss"), "MB", 3
    )


def _resident(found: Found) -> Iterator[Row]:
    yield Row(f"{RSS}: with a broker", found.value("rss"), "MB", 100)
    yield Row(f"{RSS}: without one, after the floods", found.value("rss local"), "MB")
    for peer in SOCKET_TO_PEERS:
        yield Row(f"{RSS}: {peer}", found.value(f"rss {peer}"), "MB")
    installed = f"{RSS}: `pip install headwater` (without pip itself) on disk"
    yield Row(installed, found.value("installed"), "MB", 210)
    yield Row(f"{COLD}: first answer", found.value("cold start"), "s", 0.8)
    yield Row(f"{CPU}: to a bare uvloop echo", found.ratio("cpu", "cpu echo"), "times", 5)
    yield Row(f"{CPU}: of a core", found.value("cpu"), "%")
    yield Row(f"{CPU}: of a core, with a broker", found.value("cpu broker"), "%")
    yield Row(f"{CPU}: of a core, the echo", found.value("cpu echo"), "%")


def _times(found: Found, title: str, name: str, detail: str, **reach: float) -> Iterator[Row]:
    for word, quantile in QUANTILES.items():
        what = f"{title}: {detail} {word}".replace(":  ", ": ")
        yield Row(what, found.quietest(name, quantile), "µs", reach.get(word))


def table(found: Sequence[Row]) -> str:
    """Rows of one line of the promises stand together below it."""
    lines, title = [f"{'':48} {'value':>10} {'unit':7} {'reach':>11}"], ""
    for row in found:
        above, _, detail = row.what.rpartition(": ")
        if above != title:
            lines += ["", above]
            title = above
        value = "-" if row.value is None else f"{row.value:,.2f}"
        reach = "" if row.reach is None else f"{'≥' if row.least else '≤'} {row.reach:,.6g}"
        said = {True: "  ok", False: "  missed", None: ""}[row.ok]
        lines.append(f"  {detail:46} {value:>10} {row.unit:7} {reach:>11}{said}".rstrip())
    return "\n".join(lines)

"""Counters of a distribution, and the text that Prometheus reads.

Why: every prediction of a run is counted, not a sample of them, in constant memory; and a library
for three kinds of metrics would cost a device more than they are worth.

Invariants: `record` allocates nothing that stays; a quantile is at most 5 % above the true value. A
page gives each name one kind and one block, and takes any text as the value of a label.

The page: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping

_GROWTH = 1.05
_FLOOR_US = 0.1
_BUCKETS = 512
_EDGES_US = [_FLOOR_US * _GROWTH ** (index + 1) for index in range(_BUCKETS - 1)]

# Prometheus is shown every fourteenth edge, each about twice the one before: 25 of them, from 1 µs
# to 13 s, each the exact edge of a bucket.
_SHOWN = range(3 * 14 + 5, _BUCKETS - 124, 14)


class Histogram:
    """Latencies in microseconds, from 0.1 µs to hours."""

    def __init__(self, counts: list[int] | None = None) -> None:
        self._counts = counts or [0] * _BUCKETS

    def record(self, value_us: float, count: int = 1) -> None:
        """Count a value, in microseconds, so many times."""
        self._counts[bisect_left(_EDGES_US, value_us)] += count

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`."""
        self._counts = [a + b for a, b in zip(self._counts, other.counts(), strict=True)]

    def quantile(self, q: float) -> float:
        """Upper edge of the bucket that holds quantile `q`, in microseconds; 0.0 when empty."""
        total = sum(self._counts)
        if not total:
            return 0.0
        rank, seen = q * total, 0
        for index, count in enumerate(self._counts):
            seen += count
            if count and seen >= rank:
                return _FLOOR_US * _GROWTH ** (index + 1)
        return _FLOOR_US * _GROWTH**_BUCKETS

    def summary(self) -> dict[str, float]:
        """Its quantiles p50, p99 and p999, in microseconds."""
        return {"p50": self.quantile(0.5), "p99": self.quantile(0.99), "p999": self.quantile(0.999)}

    def counts(self) -> list[int]:
        """The bucket counts, to be merged elsewhere."""
        return list(self._counts)

    @property
    def total(self) -> int:
        """How many values were recorded."""
        return sum(self._counts)

    def sum_us(self) -> float:
        """The sum of all values, in microseconds, at most 2.5 % off."""
        middles = ((_FLOOR_US * _GROWTH ** (i + 0.5), n) for i, n in enumerate(self._counts) if n)
        return math.fsum(middle * count for middle, count in middles)

    def shown(self) -> list[tuple[float, int]]:
        """(upper edge in microseconds, how many values lie below it), edges rising."""
        return [
            (_FLOOR_US * _GROWTH ** (index + 1), sum(self._counts[: index + 1])) for index in _SHOWN
        ]


class Page:
    """A page of metrics in the making; samples of one name may be given in any order."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[str]] = {}

    def counter(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """A count that only rises while the process lives; `name` without `_total`."""
        self._block(f"{name}_total", "counter").append(_sample(f"{name}_total", value, labels))

    def gauge(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """A number of now."""
        self._block(name, "gauge").append(_sample(name, value, labels))

    def histogram(self, name: str, values: Histogram) -> None:
        """A distribution, in seconds."""
        block = self._block(name, "histogram")
        for edge_us, count in values.shown():
            block.append(_sample(f"{name}_bucket", count, {"le": f"{edge_us / 1e6:.6g}"}))
        block.append(_sample(f"{name}_bucket", values.total, {"le": "+Inf"}))
        block.append(_sample(f"{name}_sum", values.sum_us() / 1e6, None))
        block.append(_sample(f"{name}_count", values.total, None))

    def text(self) -> str:
        """The page as Prometheus reads it."""
        return "".join(f"{line}\n" for block in self._blocks.values() for line in block)

    def _block(self, name: str, kind: str) -> list[str]:
        block = self._blocks.setdefault(name, [f"# TYPE {name} {kind}"])
        assert block[0].endswith(f" {kind}"), f"{name} has two kinds"
        return block


def metric_name(*words: str) -> str:
    """A name that Prometheus takes, made of `words`."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(words))


def _sample(name: str, value: float, labels: Mapping[str, str] | None) -> str:
    pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in (labels or {}).items())
    return f"{name}{{{pairs}}} {value:.17g}" if pairs else f"{name} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

"""Numbers of one lane that are lost: ranges that are apart, rise, and know why.

Why: what is lost has to be told with its reason for as long as a device is away, so it must stay
small however it came about.

Invariants: a number is lost once, for its first reason; neighbours of one reason are one gap.

Knows nothing about files, nor about who is told.
"""

from __future__ import annotations

import msgspec


class Gap(msgspec.Struct, array_like=True, frozen=True):
    """Numbers that are lost, both ends included, and why."""

    first: int
    last: int
    reason: str


def with_gap(gaps: list[Gap], new: Gap) -> tuple[list[Gap], int]:
    """`gaps` and what of `new` none of them covers, and how many numbers that is."""
    found, count, first = list(gaps), 0, new.first
    for gap in [*gaps, Gap(new.last + 1, new.last + 1, "")]:
        last = min(gap.first - 1, new.last)
        if first <= last:
            found.append(Gap(first, last, new.reason))
            count += last - first + 1
        first = max(first, gap.last + 1)
    merged: list[Gap] = []
    for gap in sorted(found, key=lambda gap: gap.first):
        before = merged[-1] if merged else None
        if before and (before.last + 1, before.reason) == (gap.first, gap.reason):
            merged[-1] = Gap(before.first, gap.last, gap.reason)
        else:
            merged.append(gap)
    return merged, count

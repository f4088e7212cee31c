"""Where windows are blind: which features may lack what happened in a gap, and for how long.

Why: a vector that was computed over a history with holes looks like any other; whoever learns from
it must know which of its values the device would have seen otherwise.

A window over seconds is whole again when its span lies behind the gap, one over the last entries
of a key when that key has as many newer ones, a decayed mean when what came before weighs nothing
any more. How far the device's event clock went in a gap is known only from what follows, of which
each event may be late: so a gap ends after SETTLED events, and what is missing may be as far ahead
of the newest of them as the family lets events be.

Invariants: a feature that is not named sees exactly what it would see without the gaps.

Knows nothing about logs, devices or values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from edge_runtime.features.feature import LABEL, Feature, Window
from edge_runtime.features.keyed import KEYS_MAX
from edge_runtime.features.spec import Spec
from edge_runtime.wire.messages import Fields, Value

HALF_LIVES = 128  # then a value of 2**62 adds nothing to a double near 1
SETTLED = 16
NOTHING: frozenset[str] = frozenset()

Concerns = Callable[[Feature], bool]


class Blind:
    """What the windows of `spec` do not know; `skew_s` is how far ahead an event may be."""

    def __init__(self, spec: Spec, skew_s: float) -> None:
        self._skew_s = skew_s
        self._windows = [each for each in spec.features if each.window is not None]
        self._awaited: set[str] = set()  # the features of gaps that have not ended
        self._left = 0  # events until they have
        self._until_s: dict[str, float] = {}  # of windows over seconds
        self._since: dict[str, _Since] = {}  # of the others
        self._clear_s = -math.inf
        self._newest_s = -math.inf

    def gap(self, concerns: Concerns = lambda _feature: True) -> None:
        """Something is missing here, which the windows of the features that it concerns lack."""
        self._awaited.update(each.name for each in self._windows if concerns(each))
        self._left = SETTLED

    def reach(self, time_s: float) -> None:
        """An event of this time comes, before it is seen: it may be the one with which gaps end."""
        self._newest_s = max(self._newest_s, time_s)
        if not self._awaited:
            return
        self._left -= 1
        if not self._left:
            names, self._awaited = self._awaited, set()
            self.miss(self._newest_s + self._skew_s, lambda feature: feature.name in names)

    def miss(self, time_s: float, concerns: Concerns) -> None:
        """Something is missing to those that it concerns, of no later time than this."""
        for feature in filter(concerns, self._windows):
            window = feature.window
            assert window is not None
            if window.span_s is None:
                self._since[feature.name] = _Since(window, time_s)
                continue
            until_s = max(time_s + window.span_s, self._until_s.get(feature.name, -math.inf))
            self._until_s[feature.name] = until_s
            self._clear_s = max(self._clear_s, until_s)

    def see(self, kind: str, time_s: float, fields: Fields) -> None:
        """What the windows see, once they have seen it."""
        for since in self._since.values():
            if since.window.over == kind:
                since.see(time_s, fields)

    def hidden(self, time_s: float, fields: Fields) -> frozenset[str]:
        """The features of an event whose windows may lack something."""
        if time_s > self._clear_s and not self._since and not self._awaited:
            return NOTHING
        late = time_s < self._newest_s
        timed = [name for name, until_s in self._until_s.items() if time_s <= until_s]
        since = [n for n, each in self._since.items() if late or not each.is_whole(fields)]
        return frozenset([*self._awaited, *timed, *since])


class _Since:
    """What a window without a span has seen of each key since a gap."""

    def __init__(self, window: Window, missing_s: float) -> None:
        self.window, self._missing_s = window, missing_s
        self._seen: dict[Value, int] = {}

    def see(self, time_s: float, fields: Fields) -> None:
        window = self.window
        key = _key(window, fields)
        faded_s = HALF_LIVES * window.half_life_s if window.half_life_s is not None else 0.0
        is_seen = window.over == LABEL or window.value is None or window.value in fields
        if key is None or not is_seen or time_s <= self._missing_s + faded_s:
            return
        if key in self._seen or len(self._seen) < KEYS_MAX:
            self._seen[key] = self._seen.get(key, 0) + 1

    def is_whole(self, fields: Fields) -> bool:
        key = _key(self.window, fields)
        return key is None or self._seen.get(key, 0) >= (self.window.span_events or 1)


def _key(window: Window, fields: Fields) -> Value | None:
    return "" if window.key is None else fields.get(window.key)

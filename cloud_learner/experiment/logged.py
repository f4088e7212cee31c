"""What was logged beside what is computed again: values that two specs share must be the same.

Why: if the engine gave another value today than it gave on the device, no value that it computes
for a new feature could be trusted; and what was logged need not be computed.

Invariants: a difference is explained when the feature's windows may lack something, and otherwise
counted by feature.

Knows nothing about how a vector was computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import msgspec
import numpy as np

from cloud_learner.experiment.blind import NOTHING
from cloud_learner.experiment.needs import Common, common
from edge_runtime.features.spec import Spec
from edge_runtime.wire.messages import PredictionRecord


class Known(msgspec.Struct, frozen=True):
    """What the home knows of earlier releases: their specs by hash, and which of them saw labels.

    Those are named by their release: a device that served one logged its labels for the windows.
    """

    specs: Mapping[str, Spec]
    saw_labels: frozenset[str]


class Found(msgspec.Struct):
    """What the replay of a device came to; `whole` vectors can be learned from.

    `partial` lack something from before the first envelope, `after_gap` something from a gap,
    `lacking` a field, by kind and field. `lost` are numbers that did not come, by reason. Of those
    `compared` with what was logged, `explained` differ after a gap, and `differing` counts by
    feature those that differ without one.
    """

    predictions: int = 0
    whole: int = 0
    partial: int = 0
    after_gap: int = 0
    lacking: dict[str, int] = {}
    lost: dict[str, int] = {}
    compared: int = 0
    explained: int = 0
    differing: dict[str, int] = {}
    unknown_spec: int = 0
    first_s: float = math.inf
    last_s: float = -math.inf


class Logged:
    """The logged values of a device; counts go to `found`."""

    def __init__(self, spec: Spec, known: Known, found: Found) -> None:
        self._spec, self._known, self._found = spec, known, found
        self._common: dict[str, Common | None] = {}
        self._differing: Counter[str] = Counter()

    def compare(
        self, record: PredictionRecord, packed: bytes, hidden: frozenset[str]
    ) -> tuple[frozenset[str], bytes]:
        """The features that were logged, and the vector `packed` with their logged values.

        Those in `hidden` may differ.
        """
        both, found = self._common_with(record.spec), self._found
        if both is None or len(record.features) != 4 * self._known.specs[record.spec].size:
            found.unknown_spec += 1
            return NOTHING, packed
        found.compared += 1
        logged = np.frombuffer(record.features, "<u4")[both.old]
        vector = np.frombuffer(packed, "<u4")
        differs = vector[both.new] != logged
        if not differs.any():
            return both.names, packed
        names = {both.features[at] for at in np.flatnonzero(differs)}
        found.explained += names <= hidden
        self._differing.update(names - hidden)
        found.differing = dict(self._differing)
        vector = vector.copy()
        vector[both.new] = logged
        return both.names, vector.tobytes()

    def _common_with(self, spec: str) -> Common | None:
        if spec not in self._common:
            old = self._known.specs.get(spec)
            self._common[spec] = None if old is None else common(old, self._spec)
        return self._common[spec]

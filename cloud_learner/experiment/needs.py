"""What a feature spec asks of events, and what two specs have in common.

Why: old events may lack a field that a new feature reads, and a value that an old spec has logged
already need not be computed again, only compared.

Invariants: two features are in common when nothing of their definition differs, the static table or
the tokenizer that they use included. Pure; knows nothing about devices or files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.features.feature import LABEL, Feature
from edge_runtime.features.spec import Spec
from edge_runtime.inference.package import Interface
from edge_runtime.wire.messages import Fields

Indices = npt.NDArray[np.intp]


class Common(msgspec.Struct, frozen=True):
    """The features that two specs share, their columns in either, and whose each column is."""

    names: frozenset[str]
    old: Indices
    new: Indices
    features: list[str]


def common(old: Spec, new: Spec) -> Common:
    """What the specs have in common."""
    known = {feature.name: (feature, columns) for feature, columns in _placed(old)}
    names, before, after, features = set(), list[int](), list[int](), list[str]()
    for feature, columns in _placed(new):
        other, others = known.get(feature.name, (None, range(0)))
        if other == feature and _used(old, feature) == _used(new, feature):
            names.add(feature.name)
            before += others
            after += columns
            features += [feature.name] * len(columns)
    return Common(frozenset(names), np.array(before, np.intp), np.array(after, np.intp), features)


def _placed(spec: Spec) -> list[tuple[Feature, range]]:
    """Each feature with the positions of its columns."""
    placed, at = [], 0
    for feature in spec.features:
        placed.append((feature, range(at, at + len(feature.columns))))
        at += len(feature.columns)
    return placed


def _used(spec: Spec, feature: Feature) -> object:
    """The table, or the tokenizer, that a feature uses."""
    if feature.tokens is not None:
        return spec.tokenizers[feature.tokens.tokenizer]
    return spec.tables[feature.lookup.table] if feature.lookup is not None else None


def _asked(feature: Feature) -> str | None:
    """The field of the predicted event that a feature without a window reads."""
    if feature.lookup is not None:
        return feature.lookup.key
    return feature.tokens.field if feature.tokens is not None else feature.field


class Needs:
    """Which field of which kind of event the features of a spec read."""

    def __init__(self, spec: Spec, interface: Interface) -> None:
        self._asked: dict[str, set[str]] = defaultdict(set)
        self._seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for feature in spec.features:
            window = feature.window
            if window is None:
                name = _asked(feature)
                if name is not None:
                    self._asked[name].add(feature.name)
                continue
            if window.key is not None:
                self._asked[window.key].add(feature.name)
            if window.over != LABEL:
                for name in filter(None, (window.key, window.value)):
                    self._seen[window.over][name].add(feature.name)
        self._kinds = interface.kinds

    def lacking(self, fields: Fields) -> Mapping[str, set[str]]:
        """By field, the features that a predicted event without it cannot say."""
        if self._asked.keys() <= fields.keys():
            return {}
        return {name: whose for name, whose in self._asked.items() if name not in fields}

    def unseen(self, kind: str, fields: Fields) -> Mapping[str, set[str]]:
        """By field, the features whose windows miss an event of this kind for want of it."""
        seen = self._seen.get(kind)
        return {} if seen is None else {n: who for n, who in seen.items() if n not in fields}

"""What replicas remember: a reservoir of everything that was learned, and the newest rows.

Why: a micro-batch alone makes a network forget; a uniform sample of everything seen is the cheapest
memory there is (Vitter 1985). With each row go the answers that were given when it was learned, for
a network that is held to them (DER++, Buzzega et al. 2020).

Invariants: same rows and same seed give the same memory; no size passes its bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cloud_learner.train.dataset import Matrix, Rows, concatenate


class Reservoir:
    """A uniform sample of all rows ever added, at most `bound` of them."""

    def __init__(self, bound: int, width: int, outputs: int, seed: int) -> None:
        self._kept: dict[str, npt.NDArray[Any]] = {
            "features": np.zeros((bound, width), np.float32),
            "labels": np.zeros(bound, np.float32),
            "groups": np.zeros(bound, np.int64),
            "answers": np.zeros((bound, outputs), np.float32),
        }
        self._bound = bound
        self._random = np.random.default_rng(seed)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, self._bound)

    def add(self, rows: Rows, answers: Matrix) -> None:
        """Give each new row, with the answers (rows, outputs) to it, the chance that is its due."""
        places = np.arange(self.seen, self.seen + len(rows))
        drawn = self._random.integers(0, places + 1)
        places = np.where(places < self._bound, places, drawn)
        chosen = places < self._bound
        new: dict[str, npt.NDArray[Any]] = {
            "features": rows.features,
            "labels": rows.labels,
            "groups": rows.groups,
        }
        for name, values in {**new, "answers": answers}.items():
            self._kept[name][places[chosen]] = values[chosen]
        self.seen += len(rows)

    def draw(self, count: int) -> tuple[Rows, Matrix]:
        """`count` rows, with replacement, and their answers; none while it is empty.

        Where rows compete, about as many in groups, as whole as they are here: a row by itself
        teaches no order.
        """
        index = self._random.integers(0, len(self), size=count if len(self) else 0)
        groups = self._kept["groups"][: len(self)]
        if groups.any():
            index = _whole(groups, index)
        kept = {name: values[index] for name, values in self._kept.items()}
        rows = Rows(kept["features"], kept["labels"], groups=kept["groups"])
        return rows, kept["answers"]

    def spread(self, count: int) -> Matrix:
        """Features of at most `count` rows, evenly spaced; looking changes no later draw."""
        places = np.linspace(0, len(self) - 1, min(count, len(self)))
        features: Matrix = self._kept["features"][places.astype(np.intp)]
        return features

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        kept = {name: values[: len(self)].copy() for name, values in self._kept.items()}
        return {**kept, "seen": self.seen, "random": self._random.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises: ValueError when it is of another bound or width."""
        size = len(state["labels"])
        if size != min(state["seen"], self._bound):
            raise ValueError(f"{size} rows kept of {state['seen']} are no reservoir of this bound")
        for name, values in self._kept.items():
            values[:size] = state[name]
        self.seen = state["seen"]
        self._random.bit_generator.state = state["random"]


def _whole(groups: npt.NDArray[np.int64], drawn: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """All places of the first groups among those `drawn` that hold as many rows as were drawn."""
    _names, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    first = np.sort(np.unique(number[drawn], return_index=True)[1])
    chosen = number[drawn[first]]
    fits = np.cumsum(sizes[chosen]) <= max(len(drawn), sizes[chosen[0]])
    return np.flatnonzero(np.isin(number, chosen[fits]))


class Newest:
    """The newest rows: whole micro-batches, as few as hold `bound` rows; none for a bound of 0."""

    def __init__(self, bound: int, width: int) -> None:
        self._bound, self._width = bound, width
        self._parts: list[Rows] = []

    def add(self, rows: Rows) -> None:
        """Take in a micro-batch, and let go of the oldest."""
        self._parts.append(rows)
        while self._parts and sum(map(len, self._parts[1:])) >= self._bound:
            del self._parts[0]

    def rows(self) -> Rows:
        """All of them, the oldest first."""
        return concatenate([Rows.none(self._width), *self._parts])

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def state(self) -> list[tuple[Any, ...]]:
        """All that is needed to go on from here."""
        return [(part.features, part.labels, part.weights, part.groups) for part in self._parts]

    def restore(self, state: list[tuple[Any, ...]]) -> None:
        """Go on from `state`."""
        self._parts = [Rows(*part) for part in state]

"""The ledger: the ids of all examples that were trained on, and which of a batch's are new.

Why: nothing may be learned twice, whatever is sent, joined or replayed again.

An example that comes early is learned by `fast` at once; when it comes again, mature, only those
that remember learn it, for `fast` knows it. The two forms are entered apart.

Invariants: of each form an id is entered once; what is held out is never entered; an example of
another feature spec is counted and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cloud_learner.store.examples import Example

Id = tuple[str, int, int]


class Entered(msgspec.Struct):
    """What a batch brings: examples to learn, in order, with who learns them, and held-out ones.

    `follow` and `remember`, bool of shape (examples,), say whether `fast` and whether those that
    remember learn it.
    """

    examples: list[Example]
    follow: npt.NDArray[np.bool_]
    remember: npt.NDArray[np.bool_]
    held_out: list[Example]


class Ledger:
    """Ids that were trained on, for examples of the feature spec with the hash `spec`."""

    def __init__(self, spec: str, is_held_out: Callable[[Example], bool]) -> None:
        self._spec, self._is_held_out = spec, is_held_out
        self._mature: set[Id] = set()
        self._early: set[Id] = set()
        self._held_out: set[Id] = set()
        self.learned_twice = 0
        self.other_spec = 0

    def __len__(self) -> int:
        """How many predictions were learned, in whatever form."""
        return len(self._mature | self._early) if self._early else len(self._mature)

    def enter(self, examples: Sequence[Example]) -> Entered:
        """Enter what is new."""
        fresh, follow, held_out = [], [], []
        for example in examples:
            form = self._early if example.early else self._mature
            if example.spec != self._spec:
                self.other_spec += 1
            elif example.id in form:
                self.learned_twice += 1
            elif self._is_held_out(example):
                if not example.early and example.id not in self._held_out:
                    self._held_out.add(example.id)
                    held_out.append(example)
            else:
                follow.append(example.early or example.id not in self._early)
                form.add(example.id)
                fresh.append(example)
        remember = [not example.early for example in fresh]
        return Entered(fresh, np.array(follow, bool), np.array(remember, bool), held_out)

    def leave(self, entered: Entered) -> None:
        """Nothing of it was learned after all; what was held out stays so."""
        for example in entered.examples:
            (self._early if example.early else self._mature).discard(example.id)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "mature": list(self._mature),
            "early": list(self._early),
            "held_out": list(self._held_out),
            "learned_twice": self.learned_twice,
            "other_spec": self.other_spec,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._mature, self._early = set(state["mature"]), set(state["early"])
        self._held_out = set(state["held_out"])
        self.learned_twice, self.other_spec = state["learned_twice"], state["other_spec"]

"""What sessions were answered and may still be told the truth about.

Why: a label comes later and names an answer by its number; to learn from it, a head needs what the
model made of the event then, which nobody wants to compute again, or to keep for ever.

Invariants: what is kept takes at most `bytes_max`; the oldest answer goes first.

Knows nothing about heads and models. Used by one thread at a time.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from edge_runtime.personal.prior import Prior

ANSWER_BYTES = 640
"""What an answer takes beside its arrays: Python's objects, measured and rounded up."""

Number = tuple[int, int]
"""The epoch and number of a prediction."""


class Answered(msgspec.Struct, frozen=True, gc=False):
    """An answer within the session `key`: the model's `base`, and the `embedding` behind it, by the
    release with this `prior`; `embedding` and the feature `row`, of the features `spec`, are
    float32, little-endian.
    """

    family: str
    key: str
    prior: Prior
    spec: str
    embedding: bytes
    base: float
    row: bytes


class Pending:
    """Answers by number, the oldest first."""

    def __init__(self, bytes_max: int) -> None:
        self._kept: OrderedDict[Number, Answered] = OrderedDict()
        self._bytes, self._bytes_max = 0, bytes_max

    def remember(self, number: Number, answer: Answered) -> None:
        """Keep an answer, and forget the oldest if need be."""
        self._kept[number] = answer
        self._bytes += ANSWER_BYTES + len(answer.embedding) + len(answer.row)
        while self._bytes > self._bytes_max:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])

    def find(self, number: Number) -> Answered | None:
        """The answer with that number, if it is still known."""
        return self._kept.get(number)

    def forget(self, number: Number) -> None:
        """An answer that has its label."""
        answer = self._kept.pop(number, None)
        if answer is not None:
            self._bytes -= _bytes(answer)

    def wipe(self, family: str | None, key: str | None = None) -> None:
        """Forget what one session, those of a family, or all were answered."""
        for number, answer in list(self._kept.items()):
            if family in (None, answer.family) and key in (None, answer.key):
                self.forget(number)

    def statistics(self) -> dict[str, int]:
        """What is kept, and its bytes."""
        return {"pending": len(self._kept), "pending_bytes": self._bytes}


def _bytes(answer: Answered) -> int:
    return ANSWER_BYTES + len(answer.embedding) + len(answer.row)

"""What sessions were answered and may still be told the truth about.

Why: a label comes later and names an answer by its number; to learn from it, a head needs what the
model made of the event then, which nobody wants to compute again, or to keep for ever.

Numbers are those of one epoch, and rise. Answers lie in blocks of consecutive numbers, and go by
blocks, so that remembering one costs no more than putting it into a dict.

Invariants: what is kept takes at most `bytes_max`, blocks that are half empty included; the oldest
answers go first. No clock is read where answers are remembered: what is too old is known by marks,
the last number at a time.

Knows nothing about heads and models. Used by one thread at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from sys import getsizeof

import msgspec

from edge_runtime.personal.prior import Prior

ANSWER_BYTES = 640
"""What an answer takes beside its arrays and key: Python's objects, measured and rounded up."""

_BLOCK_BITS = 7  # 128 numbers


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
    """Answers by number, the oldest first; `begun` is called when there is one where none was."""

    def __init__(self, bytes_max: int) -> None:
        self.begun: Callable[[], None] = lambda: None
        self._marks = deque[tuple[float, int]]()
        self._blocks: dict[int, dict[int, Answered]] = {}
        self._block, self._newest = -1, dict[int, Answered]()
        self._bytes, self._bytes_max = 0, bytes_max

    def remember(self, number: int, answer: Answered) -> None:
        """Keep an answer, and forget the oldest if need be."""
        if number >> _BLOCK_BITS != self._block:
            self._begin(number >> _BLOCK_BITS)
        self._newest[number] = answer
        data = len(answer.embedding) + len(answer.row)
        self._bytes += ANSWER_BYTES + getsizeof(answer.key) + data  # `_bytes`, without its call
        while self._bytes > self._bytes_max:
            self._drop(next(iter(self._blocks)))

    def _begin(self, block: int) -> None:
        before, self._block = self._block, block
        if before in self._blocks:
            self._bytes += getsizeof(self._newest)  # as large when its answers are gone
            if not self._newest:
                self._drop(before)
        if not self._blocks:
            self.begun()
        self._newest = self._blocks[block] = {}

    def _drop(self, block: int) -> None:
        gone = self._blocks.pop(block)
        self._bytes -= sum(map(_bytes, gone.values()))
        if block == self._block:
            self._block = -1
        else:
            self._bytes -= getsizeof(gone)

    def find(self, number: int) -> Answered | None:
        """The answer with that number, if it is still known."""
        return self._blocks.get(number >> _BLOCK_BITS, _NONE).get(number)

    def forget(self, number: int) -> None:
        """An answer that has its label."""
        block = number >> _BLOCK_BITS
        answers = self._blocks.get(block, _NONE)
        answer = answers.pop(number, None)
        if answer is not None:
            self._bytes -= _bytes(answer)
            if not answers and block != self._block:
                self._drop(block)

    def wipe(self, family: str | None, key: str | None = None) -> None:
        """Forget what one session, those of a family, or all were answered."""
        for block in list(self._blocks.values()):
            for number, answer in list(block.items()):
                if family in (None, answer.family) and key in (None, answer.key):
                    self.forget(number)

    def expire(self, now_s: float, ttl_s: float) -> None:
        """Forget what was answered `ttl_s` before `now_s`, as far as earlier calls have marked it;
        marks are an eighth of that apart, or as calls are.
        """
        while self._marks and self._marks[0][0] <= now_s - ttl_s:
            self._forget_until(self._marks.popleft()[1])
        if self._block in self._blocks and not self._newest:
            self._drop(self._block)
        last = next((next(reversed(each)) for each in reversed(self._blocks.values()) if each), -1)
        if last >= 0 and (not self._marks or now_s - self._marks[-1][0] >= ttl_s / 8):
            self._marks.append((now_s, last))

    def _forget_until(self, last: int) -> None:
        for block in [each for each in self._blocks if each <= last >> _BLOCK_BITS]:
            if block < last >> _BLOCK_BITS:
                self._drop(block)
            else:
                for number in [each for each in self._blocks[block] if each <= last]:
                    self.forget(number)

    def __len__(self) -> int:
        return sum(map(len, self._blocks.values()))

    def statistics(self) -> dict[str, int]:
        """What is kept, and its bytes."""
        return {"pending": len(self), "pending_bytes": self._bytes}


_NONE: dict[int, Answered] = {}


def _bytes(answer: Answered) -> int:
    return ANSWER_BYTES + getsizeof(answer.key) + len(answer.embedding) + len(answer.row)

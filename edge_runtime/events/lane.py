"""Where one class of the log stands on its way to the learner; state without any I/O.

Why: what to send next, and when to send it again, follows from three positions per epoch: read for
sending, stored by the broker, learned. The learner accepts no gap, so if it speaks and yet stands
still for long before what the broker stored, something before that is missing there and goes out
again; and so does what the broker lost while nobody spoke. A broker that is full is asked with one
envelope at a time, and by and by with more.

Invariants: only the learner's marks move `learned`, forward or, when it was put back, backward;
patience doubles with each rewind that did not help and is reset by progress. It has a bound only
for a learner that speaks: what goes again to one that is away for long is, all together, no more
than about twice what waits for it. A lane is held only while it has something to send. What was
refused as too much goes out again from the first envelope that was refused, behind it all that came
after.

Knows nothing about buses, files or what an envelope holds.
"""

from __future__ import annotations

import math
from collections import deque

from edge_runtime.events.log import Piece
from edge_runtime.events.packing import Packed
from edge_runtime.wire.messages import EventClass

WINDOW = 8
HOLD_S, HOLD_MAX_S = 0.05, 1.0  # there may be room again in a moment; else once a second
_PATIENCE_S, _PATIENCE_MAX_S = 5.0, 300.0


class Lane:
    """One class on its way: by epoch, what was read, acknowledged by the broker, and learned.

    `earlier` is where epochs before the running one end that the learner may not hold whole, oldest
    first. `ahead` is read and waits for its turn; `full_records` is how many records filled the
    last full envelope, a first guess until then. `turn` rises whenever what was read ahead is void.
    """

    def __init__(self, event_class: EventClass) -> None:
        self.event_class = event_class
        self.learned: dict[int, int] = {}
        self.read: dict[int, int] = {}
        self.stored: dict[int, int] = {}
        self.earlier: list[tuple[int, int]] = []
        self.ahead: deque[Packed] = deque()
        self.reading = False
        self.turn = 0
        self.under_way = 0
        self.window = WINDOW
        self.full_records = 192
        self.held = False
        self.hold_s = HOLD_S
        self.probed_s = 0.0
        self.progress_s = 0.0
        self.patience_s = _PATIENCE_S
        self._packing = 0
        self._refused: tuple[int, int] | None = None

    def start_over(self, now_s: float) -> None:
        """Go on from what the learner holds."""
        self.read, self.stored = dict(self.learned), {}
        self.under_way = 0
        self.progress_s = now_s
        self._refused = None
        self.release()
        self._void()

    def behind(self, epoch: int, durable_seq: int) -> tuple[int, int, int] | None:
        """(epoch, last read, last durable) of the first epoch that has more to read; the arguments
        are where the running one stands.
        """
        for owed, last_seq in (*self.earlier, (epoch, durable_seq)):
            after_seq = self.read.get(owed, 0)
            if after_seq < last_seq:
                return owed, after_seq, last_seq
        return None

    def release(self) -> None:
        """No longer held; what comes next is still one envelope, and more by and by."""
        self.held, self.probed_s = False, 0.0

    def is_empty(self) -> bool:
        """Whether nothing of it is read, or under way."""
        return not self.under_way and not self.to_send()

    def waits_for_probe(self) -> bool:
        """Whether it is held and can do nothing but wait for the time to try one envelope."""
        is_busy = self.under_way or self.reading or (self._packing and not self.ahead)
        return self.held and not is_busy

    def to_send(self) -> int:
        """How many envelopes are read and wait for their turn."""
        return self._packing + len(self.ahead)

    def took(self, epoch: int, pieces: list[Piece], last_seq: int) -> None:
        """What was read up to `last_seq` is to be packed; where nothing was, it is passed over."""
        self.reading = False
        self._packing += len(pieces)
        ends = [piece.base_seq + len(piece.records) - 1 for piece in pieces]
        self.read[epoch] = max(ends[-1] if ends else last_seq, self.read.get(epoch, 0))
        if ends and ends[0] < last_seq:
            self.full_records = max(1, len(pieces[0].records))

    def packed(self, envelopes: list[Packed]) -> None:
        """What was taken waits for its turn."""
        self._packing -= len(envelopes)
        self.ahead.extend(envelopes)

    def may_read(self, ahead_max: int) -> bool:
        """Whether more may be read, so that at most about `ahead_max` envelopes wait."""
        return not self.reading and self._refused is None and self.to_send() <= ahead_max

    def may_send(self) -> bool:
        """Whether one more envelope may be under way."""
        return bool(self.ahead) and self.under_way < self.window and self._refused is None

    def waits_for_learner(self) -> bool:
        """Whether the broker stored what the learner has not said to hold."""
        return any(seq > self.learned.get(epoch, 0) for epoch, seq in self.stored.items())

    def acknowledged(self, epoch: int, seq: int, now_s: float) -> None:
        """The broker stored all up to `seq`."""
        if not self.waits_for_learner():
            self.progress_s = now_s
        self.stored[epoch] = max(seq, self.stored.get(epoch, 0))
        self.release()
        self.window = min(WINDOW, 2 * self.window)
        self.hold_s = HOLD_S

    def refused(self, epoch: int, after_seq: int) -> None:
        """The broker has no room for what comes after `after_seq`."""
        self._refused = min(self._refused or (epoch, after_seq), (epoch, after_seq))
        self._void()

    def settle(self) -> bool:
        """Once nothing is under way, go back to the first that was refused, and hold; did it?"""
        if self._refused is None or self.under_way:
            return False
        (epoch, after_seq), self._refused = self._refused, None
        self.read = {e: seq for e, seq in self.read.items() if e < epoch}
        self.read[epoch] = after_seq
        for learned_epoch, seq in self.learned.items():
            self.read[learned_epoch] = max(seq, self.read.get(learned_epoch, 0))
        self.held, self.window = True, 1
        self.hold_s = min(HOLD_MAX_S, 2 * self.hold_s)
        self._void()
        return True

    def learn(self, marks: dict[int, int], now_s: float) -> bool:
        """Take in the learner's marks; False when what was sent has to be sent again."""
        before, self.learned = self.learned, self.learned | marks
        if any(seq < before.get(epoch, 0) for epoch, seq in marks.items()):
            return False  # it was put back to an older state
        if self.learned == before and self.waits_for_learner():
            return not self._is_out_of_patience(now_s, _PATIENCE_MAX_S)
        self.progress_s, self.patience_s = now_s, _PATIENCE_S
        for epoch, seq in marks.items():
            self.read[epoch] = max(seq, self.read.get(epoch, 0))
        return True

    def is_forgotten(self, now_s: float) -> bool:
        """Whether the learner has been silent for too long about what the broker stored, so that it
        has to be sent again.
        """
        return self.waits_for_learner() and self._is_out_of_patience(now_s, math.inf)

    def _void(self) -> None:
        self.ahead.clear()
        self._packing = 0
        self.reading = False
        self.turn += 1

    def _is_out_of_patience(self, now_s: float, longest_s: float) -> bool:
        patience_s = min(self.patience_s, longest_s)
        if now_s - self.progress_s < patience_s:
            return False
        self.patience_s = 2 * patience_s
        return True

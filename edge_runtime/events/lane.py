"""Where one class of the log stands on its way to the learner; state without any I/O.

Why: what to send next, and when to send it again, follows from three positions per epoch: sent,
stored by the broker, learned. The learner accepts no gap, so if it speaks and yet stands still for
long before what the broker stored, something before that is missing there and goes out again.

Invariants: only the learner's marks move `learned`, forward or, when it was put back, backward;
patience doubles with each rewind that did not help and is reset by progress.

Knows nothing about buses, files or envelopes.
"""

from __future__ import annotations

from edge_runtime.wire.messages import EventClass

_PATIENCE_S, _PATIENCE_MAX_S = 5.0, 300.0


class Lane:
    """One class on its way: by epoch, what was sent, acknowledged by the broker, and learned.

    `full_records` is how many records filled the last full envelope, a first guess until then.
    """

    def __init__(self, event_class: EventClass) -> None:
        self.event_class = event_class
        self.learned: dict[int, int] = {}
        self.sent: dict[int, int] = {}
        self.stored: dict[int, int] = {}
        self.under_way = 0
        self.full_records = 192
        self.progress_s = 0.0
        self.patience_s = _PATIENCE_S

    def start_over(self, now_s: float) -> None:
        """Go on from what the learner holds."""
        self.sent, self.stored = dict(self.learned), {}
        self.under_way = 0
        self.progress_s = now_s

    def waits_for_learner(self) -> bool:
        """Whether the broker stored what the learner has not said to hold."""
        return any(seq > self.learned.get(epoch, 0) for epoch, seq in self.stored.items())

    def acknowledged(self, epoch: int, seq: int, now_s: float) -> None:
        """The broker stored all up to `seq`."""
        if not self.waits_for_learner():
            self.progress_s = now_s
        self.stored[epoch] = max(seq, self.stored.get(epoch, 0))

    def learn(self, marks: dict[int, int], now_s: float) -> bool:
        """Take in the learner's marks; False when what was sent has to be sent again."""
        before, self.learned = self.learned, self.learned | marks
        if any(seq < before.get(epoch, 0) for epoch, seq in marks.items()):
            return False  # it was put back to an older state
        if self.learned == before and self.waits_for_learner():
            return not self._is_out_of_patience(now_s)
        self.progress_s, self.patience_s = now_s, _PATIENCE_S
        for epoch, seq in marks.items():
            self.sent[epoch] = max(seq, self.sent.get(epoch, 0))
        return True

    def _is_out_of_patience(self, now_s: float) -> bool:
        if now_s - self.progress_s < self.patience_s:
            return False
        self.patience_s = min(_PATIENCE_MAX_S, 2 * self.patience_s)
        return True

"""What a family says about its labels: how long they may take, and what is done before that.

Why: joining, settling and cutting batches must mean the same by a window and by a moment.

Invariants: the moment of a release follows from the example alone, so batches can be cut again
after a restart exactly as they were cut before. Pure.

Knows nothing about how labels are joined.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cloud_learner.stats.tasks import Task
from cloud_learner.store.examples import Example
from edge_runtime.wire.messages import Fields

_NEVER_S = float("-inf")
AHEAD_S_MAX = 10 * 366 * 86_400.0
"""A prediction whose window would begin later than this is treated as if its field were empty."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a family says about its labels; what was predicted before `learn_from_s` is not learned.

    `idle_s` is how long (wall time) a silent device holds the others; `awaited` names the devices
    that must be heard before time starts to pass. An event may take its device's time to
    `ahead_s_max` after its arrival, no further. `amend_s` is how long after its window (event
    time) a label may still amend an example.

    `window_field` names the field of a prediction that says how many seconds after it its window
    begins: when what it is about is over, and `label_window_s` runs.

    `policy` says when a labelled prediction is released: `mature` when its window is over,
    `arrival` when the joint clock has passed the time of its first label, `weighted` when it is
    mature and, where its first label came within `early_s`, once more before that, with a weight of
    at most `weight_max` (see `cloud_learner.ingest.shares`).
    """

    family: str
    label_window_s: float
    idle_s: float
    expiry: Literal["drop", "negative"] = "drop"
    amend_s: float = 0.0
    learn_from_s: float = _NEVER_S
    ahead_s_max: float = float("inf")
    awaited: tuple[str, ...] = ()
    window_field: str = ""
    policy: Literal["mature", "arrival", "weighted"] = "mature"
    early_s: float = 0.0
    weight_max: float = 10.0
    task: Task = Task()

    def released_s(self, example: Example) -> float:
        """The event time at which an example is due: when its label came, or its window was over.

        What has no label is an example, if at all, when its window is over; that is its label time.
        """
        if example.early or self.policy == "arrival":
            return example.label_time_s
        return self.begins_s(example.time_s, example.fields) + self.label_window_s

    def begins_s(self, time_s: float, fields: Fields) -> float:
        """When the label window of a prediction of that time begins."""
        ahead = fields.get(self.window_field, 0.0) if self.window_field else 0.0
        if isinstance(ahead, str) or not 0 < ahead < AHEAD_S_MAX:
            return time_s
        return time_s + ahead

    def may_amend(self, time_s: float, label_s: float) -> bool:
        """Whether a label of that time may amend the example of a prediction of that time."""
        return self.amend_s > 0 and label_s <= time_s + self.label_window_s + self.amend_s

    def is_early(self, time_s: float, label_s: float) -> bool:
        """Whether such a label brings out an early example: it is early, and before maturity."""
        soon = label_s - time_s <= self.early_s and label_s < time_s + self.label_window_s
        return self.policy == "weighted" and soon and time_s >= self.learn_from_s

"""The example: a prediction joined with its label, the unit that the learner trains on.

Why: ingest makes examples, and train, evaluate and rollout read them; they meet here because those
rooms never import each other.

Invariants: an example is released once, in the order of (`time_s`, device, epoch, seq);
`features` are the very values that the prediction used. Event times and ids decide all fields but
`arrived_s` and `matured_s`, which are wall times for measuring freshness and never order anything.

Knows nothing about where examples are stored or how they are learned.
"""

from __future__ import annotations

import msgspec

from edge_runtime.wire.messages import Scored, Value


class Example(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A prediction and what turned out to be true of it.

    `features` is float32, little-endian, in the order of the feature spec whose hash is `spec`;
    `scored` holds every arm that answered, the one that was served first. `arrived_s` is the wall
    time at which the label reached the learner, `matured_s` that at which the example was released.
    `early` says that it was released before all outcomes could be known, with the importance
    `weight` that makes up for it; the same prediction comes once more, mature, when they can be.
    """

    device: str
    epoch: int
    seq: int
    family: str
    time_s: float
    label_time_s: float
    features: bytes
    spec: str
    label: float
    propensity: float
    scored: list[Scored]
    arrived_s: float
    matured_s: float
    kind: str = ""
    fields: dict[str, Value] = {}
    final: bool = True
    revision: int = 0
    weight: float = 1.0
    early: bool = False

    @property
    def id(self) -> tuple[str, int, int]:
        """Device, epoch and sequence number of the prediction; unique for ever."""
        return self.device, self.epoch, self.seq


class Batch(msgspec.Struct, frozen=True, gc=False):
    """A micro-batch: `number` rises from 1 without holes, `examples` are in release order."""

    number: int
    examples: list[Example]

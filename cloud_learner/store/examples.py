"""The example: a prediction joined with its label, the unit that the learner trains on.

Why: ingest makes examples, and train, evaluate and rollout read them; they meet here because those
rooms never import each other.

Invariants: an example is released once in each form, early or mature, in the order of the event
time of its release and then of (`time_s`, device, epoch, seq); `features` are the very values that
the prediction used. Event times and ids decide all fields but `arrived_s` and `matured_s`, which
are wall times for measuring freshness and never order anything.

Knows nothing about where examples are stored or how they are learned.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from edge_runtime.wire.messages import Scored, Value

Form = tuple[str, int, int, bool]
"""The id of an example, and whether it is the early form of it."""


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

    @property
    def form(self) -> Form:
        """The id, and whether it is the early form: what is released at most once."""
        return self.device, self.epoch, self.seq, self.early


class Certificate(msgspec.Struct, frozen=True):
    """How much of a micro-batch any one device decided, and how much one could have.

    `largest_share` is that of the largest device; k hostile devices hold at most
    k * `bound_per_device` of the batch, whatever they send.
    """

    batch: int
    size: int
    devices: int
    largest_share: float
    cap: int
    bound_per_device: float


class Batch(msgspec.Struct, frozen=True, gc=False):
    """A micro-batch: `number` rises from 1 without holes, `examples` are in release order."""

    number: int
    examples: list[Example]

    def certificate(self, cap: int) -> Certificate:
        """What `cap` examples of one device at most mean for this batch; asserts that it holds."""
        of_device = Counter(example.device for example in self.examples)
        size, largest = len(self.examples), max(of_device.values(), default=0)
        assert largest <= cap, f"batch {self.number}: {largest} examples of one device, cap {cap}"
        bound = min(1.0, cap / max(size, 1))
        share = largest / max(size, 1)
        return Certificate(self.number, size, len(of_device), share, cap, bound)

"""The streams of the learner's broker, and their bounds.

Why: whoever starts a learner makes them first, so that a device finds where to publish.

Invariants: what devices publish is never dropped for being old: a full stream, or a device that
fills its own subject, is refused, and devices keep what they have. Of what is said about a state
only the last word is kept.

Implements proto/asyncapi.yaml (x-jetstream of its channels).
"""

from __future__ import annotations

from edge_runtime.bus.base import Bus
from edge_runtime.wire import subjects

EVENTS_BYTES = 4 << 30
EVENTS_PER_SUBJECT = 64  # envelopes of one device and class; beyond, that device waits
STATE_BYTES = 1 << 30  # some kilobytes of each device: nobody's watermark goes for another's
CANDIDATES_BYTES = 256 << 20  # packages on their way to a gate: the oldest go, and are sent again


GATE_DURABLE = "gate"


async def make_streams(bus: Bus) -> None:
    """Make them, or bring them to these bounds. Raises: TransportError."""
    await bus.ensure_stream(
        subjects.EVENTS_STREAM,
        [subjects.EVENTS_ALL],
        max_bytes=EVENTS_BYTES,
        per_subject=EVENTS_PER_SUBJECT,
        discard_new=True,
    )
    await bus.ensure_stream(
        subjects.STATE_STREAM,
        subjects.STATE_ALL,
        max_bytes=STATE_BYTES,
        per_subject=1,
        discard_new=False,
    )
    await bus.ensure_stream(
        subjects.CANDIDATES_STREAM,
        subjects.CANDIDATES_ALL,
        max_bytes=CANDIDATES_BYTES,
        per_subject=1,
        discard_new=False,
    )


async def keep_place(bus: Bus) -> None:
    """Have the events kept until the gate, too, has read them. Raises: TransportError."""
    async with bus.pull(subjects.EVENTS_STREAM, GATE_DURABLE, subjects.EVENTS_ALL):
        pass
